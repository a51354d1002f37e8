"""The example jobs: ``inventory`` is real work, the others each show one way in which a job can go."""

from __future__ import annotations

import csv
import hashlib
import io
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

import zerog

_BLOCK = 1024 * 1024


class Inventory(zerog.Job):
    """Walk a directory and hash every file; the data is the manifest, as JSON or as CSV."""

    job_type = "inventory"
    example = {"path": "/usr/share/doc"}

    path: str = Field(min_length=1, description="directory to walk")
    algorithm: Literal["sha256", "sha1", "md5", "blake2b"] = "sha256"
    format: Literal["json", "csv"] = "json"

    def run(self, context: zerog.Context) -> dict[str, Any] | None:
        """Hash file by file, with progress by bytes."""
        root = Path(self.path)
        if not root.is_dir():
            raise zerog.Fail(f"{self.path} is no directory", code=422)
        files = sorted(_files(root))
        total = sum(size for _, size in files)
        done = 0
        rows = []
        for path, size in files:
            if context.cancelled:
                return None
            rows.append(self._row(context, root, path, size))
            done += size
            context.progress(done / total if total else 1.0, f"{len(rows)} of {len(files)} files")
        if self.format == "csv":
            self._write_csv(context, rows)
            return None
        return {"path": self.path, "algorithm": self.algorithm, "files": len(rows), "bytes": done, "manifest": rows}

    def _row(self, context: zerog.Context, root: Path, path: Path, size: int) -> dict[str, Any]:
        digest = hashlib.new(self.algorithm)
        try:
            with path.open("rb") as file:
                while block := file.read(_BLOCK):
                    digest.update(block)
        except OSError as error:
            context.warning(f"{path}: {error.strerror}")
            return {"name": _name(path, root), "size": size, "hash": None}
        return {"name": _name(path, root), "size": size, "hash": digest.hexdigest()}

    def _write_csv(self, context: zerog.Context, rows: list[dict[str, Any]]) -> None:
        with context.output("text/csv") as output, io.TextIOWrapper(output, "utf-8", newline="") as text:  # type: ignore[type-var]
            writer = csv.DictWriter(text, ["name", "size", "hash"])
            writer.writeheader()
            writer.writerows(rows)


def _files(root: Path) -> Iterator[tuple[Path, int]]:
    for folder, _, names in os.walk(root):
        for name in names:
            path = Path(folder, name)
            if path.is_file() and not path.is_symlink():
                yield path, path.stat().st_size


def _name(path: Path, root: Path) -> str:
    return str(path.relative_to(root)).encode("utf-8", "backslashreplace").decode()


class Sleep(zerog.Job):
    """Sleep for some seconds, reporting how far it is."""

    job_type = "sleep"

    seconds: float = Field(1.0, ge=0, le=86400)

    def run(self, context: zerog.Context) -> dict[str, float]:
        """Sleep in small steps, so that a cancel is heard."""
        start = time.monotonic()
        while (slept := time.monotonic() - start) < self.seconds:
            if context.cancelled:
                break
            context.progress(slept / self.seconds, f"slept {slept:.1f} of {self.seconds:g} s")
            time.sleep(min(0.1, self.seconds - slept))
        return {"slept": round(time.monotonic() - start, 3)}


class Noop(zerog.Job):
    """Do nothing: the shortest way through."""

    job_type = "noop"

    def run(self, context: zerog.Context) -> None:
        """Return at once."""


class Broken(zerog.Job):
    """Raise an exception each time, or until attempt ``until``."""

    job_type = "broken"
    backoff = 0.2

    message: str = "this job always fails"
    until: int | None = Field(None, ge=1, description="attempt that succeeds")

    def run(self, context: zerog.Context) -> str:
        """Fail."""
        if self.until is not None and context.attempt >= self.until:
            return f"succeeded in attempt {context.attempt}"
        raise RuntimeError(self.message)


class Patient(zerog.Job):
    """Wait for something outside by going back into the queue: it asks again ``rounds`` times."""

    job_type = "patient"

    rounds: int = Field(3, ge=1, le=1000)
    delay: float = Field(1.0, ge=0, le=3600)

    def run(self, context: zerog.Context) -> dict[str, int] | zerog.Requeue:
        """Requeue itself with what it has seen so far as its state."""
        seen = (context.state or 0) + 1
        context.progress(seen / self.rounds, f"asked {seen} of {self.rounds} times")
        if seen < self.rounds:
            return zerog.Requeue(delay=self.delay, state=seen)
        return {"asked": seen}


class Primes(zerog.Job):
    """Count the primes below a limit, reporting through ``track``."""

    job_type = "primes"

    below: int = Field(20_000, ge=2, le=10_000_000)

    def run(self, context: zerog.Context) -> dict[str, int]:
        """Sieve block by block."""
        sieve = bytearray([1]) * self.below
        sieve[:2] = b"\0\0"[: len(sieve)]
        for number in context.track(range(2, int(self.below**0.5) + 1), message="sieving"):
            if sieve[number]:
                sieve[number * number :: number] = bytes(len(range(number * number, self.below, number)))
        return {"primes": sum(sieve)}


class Bulk(zerog.Job):
    """Write an output of any size, 1 GiB unless told otherwise."""

    job_type = "bulk"
    example = {"size": 1048576}

    size: int = Field(1024**3, ge=0, le=1024**4, description="bytes")

    def run(self, context: zerog.Context) -> None:
        """Write block by block; every block carries its own number, so that a reader can check it."""
        with context.output("application/octet-stream") as output:
            while output.size < self.size and not context.cancelled:
                block = output.size.to_bytes(8, "big") * (_BLOCK // 8)
                output.write(block[: self.size - output.size])
                context.progress(output.size / self.size if self.size else 1.0)
