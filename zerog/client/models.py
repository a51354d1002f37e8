"""Models: what the server answers, with attributes, and references that are fetched when they are touched."""

from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, cast

from zerog.client.api import TERMINAL, Api

Self = TypeVar("Self", bound="Model")

_JOB = re.compile(r"/jobs/([0-9a-f-]{36})")


class Model:
    """One resource.  ``view`` is its JSON as far as it is known; ``href`` where it is.

    An attribute that the view does not have is looked for at ``href``, once.  A member that refers to other resources
    is a model, or a tuple of models; one that has several pages can be iterated over.
    """

    def __init__(self, api: Api, view: Mapping[str, Any]) -> None:
        self._api = api
        self._view = dict(view)
        self._whole = False

    @property
    def view(self) -> dict[str, Any]:
        """The JSON as it was read last."""
        return self._view

    def refresh(self: Self) -> Self:
        """Read the resource again; returns itself."""
        self._view = {**self._view, **self._api.json(self._view["href"])}
        self._whole = True
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        member = _camel(name)
        if member not in self._view and not self._whole and "href" in self._view:
            self.refresh()
        if member not in self._view:
            raise AttributeError(f"{type(self).__name__} has no {name!r}; it has {', '.join(dir(self))}")
        return wrapped(self._api, self._view[member])

    def __dir__(self) -> list[str]:
        own = [name for name in super().__dir__() if not name.startswith("_")]
        return sorted({*own, *(_snake(name) for name in self._view)})

    def __getitem__(self, member: str) -> Any:
        """Return a member of the view as it stands in the JSON."""
        return self._view[member]

    def __iter__(self) -> Iterator[Any]:
        """Yield the items of a collection, over all its pages."""
        view: Mapping[str, Any] | None = self._view
        if "items" not in self._view or "next" not in self._view:
            view = self.refresh().view
        while view is not None:
            for item in view["items"]:
                yield wrapped(self._api, item)
            view = self._api.json(view["next"]) if view.get("next") else None

    def __len__(self) -> int:
        """Return how many items a collection has, as the server has counted them."""
        count = self._view.get("count")
        return int(count) if count is not None else sum(1 for _ in self)

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Model) and self._view.get("href") == other._view.get("href") is not None

    def __hash__(self) -> int:
        return hash(self._view.get("href"))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._view.get('href')!r})"


class Job(Model):
    """A job."""

    @property
    def uuid(self) -> str:
        """Its UUID, which a reference has in it already."""
        known = self._view.get("uuid")
        match = _JOB.match(str(self._view.get("href", "")))
        return str(known) if known is not None else match.group(1) if match is not None else ""

    @property
    def finished(self) -> bool:
        """Whether it had ended when it was read last."""
        return cast(str, self.state) in TERMINAL

    @property
    def succeeded(self) -> bool:
        """Whether it had succeeded when it was read last."""
        return cast(str, self.state) == "succeeded"

    def follow(self) -> Iterator[dict[str, Any]]:
        """Yield the progress view now and at each change, until the job has ended."""
        for view in self._api.follow(self.uuid):
            self._view = {**self._view, **view}
            yield view

    def wait(self, timeout: float | None = None, progress: Callable[[Job], object] | None = None) -> Job:
        """Wait until the job has ended, however that was, and return it; ``TimeoutError`` after ``timeout`` seconds.

        ``progress`` is called with the job now and at each change.
        """
        end = None if timeout is None else time.monotonic() + timeout
        tag: str | None = None
        while True:
            left = None if end is None else end - time.monotonic()
            if left is not None and left <= 0 and tag is not None:
                raise TimeoutError(f"job {self.uuid} was {self.state} after {timeout:g} s")
            view, tag = self._api.progress_after(self.uuid, tag, left)
            if view is not None:
                self._view = {**self._view, **view}
                if progress is not None:
                    progress(self)
            if self.finished:
                return self.refresh()

    def data(self) -> Any:
        """Return the data, all in memory: the value if it is JSON, else bytes; None if the job has none.

        ``JobFailed`` or ``JobCancelled`` if there are none for that reason, ``NotFinished`` before the end.
        """
        content, media_type = self._api.data_and_type(self.uuid)
        if media_type is None:
            return None
        return json.loads(content) if media_type.partition(";")[0] == "application/json" else content

    def download(self, path: str | os.PathLike[str]) -> Path:
        """Write the data into a file, which is there only when they are whole; returns its path."""
        target = Path(path)
        part = target.with_name(f"{target.name}.part")
        try:
            with part.open("wb") as file:
                self._api.download(self.uuid, file)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)
        return target

    def cancel(self) -> Job:
        """Cancel the job; returns itself."""
        self._view = {**self._view, **self._api.cancel(self.uuid)}
        return self

    def retry(self, parameters: Mapping[str, Any] | None = None) -> Job:
        """Try it again, if it failed or was cancelled: returns the new job."""
        return Job(self._api, self._api.retry(self.uuid, parameters))

    def explain(self) -> Model:
        """Return why it is not done."""
        return Model(self._api, self._api.explain(self.uuid))

    def info(self) -> Model:
        """Return its progress and the newest events, warnings and errors."""
        return Model(self._api, self._api.info(self.uuid))

    def events(self, level: str | None = None) -> Iterator[Model]:
        """Yield all that it said, oldest first."""
        return (Model(self._api, one) for one in self._api.events(self.uuid, level))

    @property
    def children(self) -> Model:
        """The jobs that wait for this one, as a collection."""
        return cast(Model, self.relationships.children)


def wrapped(api: Api, value: Any) -> Any:
    """Return a member of a view: references as models, lists as tuples, everything else as it is."""
    if isinstance(value, dict) and isinstance(value.get("href"), str):
        kind = Job if _JOB.fullmatch(value["href"]) else Model
        return kind(api, value)
    if isinstance(value, list):
        return tuple(wrapped(api, one) for one in value)
    return value


def _camel(name: str) -> str:
    head, *rest = name.split("_")
    return head + "".join(part.title() for part in rest)


def _snake(name: str) -> str:
    return re.sub(r"[A-Z]", lambda match: f"_{match.group().lower()}", name)
