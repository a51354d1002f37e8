"""``/ingest``, ``/upload``, ``/move`` and ``/get_state``."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any, ClassVar

from pydantic import BaseModel, Field

import zerog
import zerog.server
from workers.ingest.asking import ServiceError
from workers.ingest.metadata import MAX_METADATA
from workers.ingest.services import Rules, policy_of
from workers.ingest.settings import Settings
from workers.ingest.steps import INGEST, JOB_TYPES, MOVE, UPLOADING, newest_of, state_of, state_view
from workers.ingest.volume import Exists, Part, Volume
from zerog.server import Answer, Problem, iso

logger = logging.getLogger(__name__)

#: Bytes that are gathered before they are written.
_GATHERED = 1024 * 1024
#: Bytes of JSON above which it is looked at in a process of its own: reading it would hold up all other requests.
_LARGE = 256 * 1024
#: Seconds that looking at it may take.
_CHECKED_WITHIN = 60.0

#: The disk, the quota, or what one file may have.
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

REUSED = (422, "idempotency_key_reused")
KEY = zerog.server.header("Idempotency-Key", "the same bundle of the same user once more is ingested once")


class _Upload(zerog.server.Endpoint):
    """Receives a body of any size into the volume, and makes a job of it when it is whole."""

    streamed: ClassVar = ("POST",)
    role: ClassVar = {"POST": "submit"}
    #: The type of the job, the media types that it accepts, the first of them to be named, and bytes at most.
    job_type: ClassVar[str] = INGEST
    accepted: ClassVar[tuple[str, ...]] = ("application/x-tar", "application/octet-stream")
    most: ClassVar[int | None] = None
    responses = {"POST": {200: ("the state of its job", None)}}
    headers: ClassVar = {"POST": (KEY, zerog.server.header("Content-Type", "the media type of what is sent"))}
    problems: ClassVar = {
        "POST": (
            (415, "unsupported_media_type"),
            (403, "forbidden"),
            REUSED,
            (507, "volume_full"),
            (503, "volume_unavailable"),
        ),
    }
    part: Part | None = None

    @classmethod
    def serving(cls, settings: Any) -> None:
        """Remove what uploads have left that a server before this one received; say what cannot work."""
        if cls is not IngestBundle:
            return  # once, and not for each of the three
        policy = policy_of(settings)
        if isinstance(policy, Rules):
            try:
                policy.read()
            except ServiceError as error:
                logger.error("every ingest fails if agents find the same: %s", error)
        volume = Volume(settings.volume)
        try:
            volume.prepare()
            volume.sweep()
        except OSError as error:
            logger.error("the volume cannot be used, and uploads are refused: %s: %s", volume.root, error.strerror)

    @property
    def volume(self) -> Volume:
        """Where uploads go."""
        settings: Settings = self.settings
        return Volume(settings.volume)

    async def find(self) -> None:
        """Refuse tokens for which jobs of this type do not exist."""
        self.check_may_run(self.job_type)

    async def begin(self) -> None:
        """Check what can be checked before a byte has come, and make a file for what comes."""
        kind = self.request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        if kind not in self.accepted:
            raise Problem(415, f"send the header Content-Type: {self.accepted[0]}", "unsupported_media_type")
        if self.request.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise Problem(415, "a body with a Content-Encoding is not accepted", "unsupported_media_type")
        self.idempotency_key()
        self.body_idle = self.settings.upload_idle
        self.gathered = bytearray()
        self.part = await self.written(self.volume.receive)

    async def receive(self, piece: bytes) -> None:
        """Take some bytes."""
        self.gathered += piece
        assert self.part is not None
        if self.most is not None and self.part.size + len(self.gathered) > self.most:
            raise Problem(413, f"it may have {self.most:,} bytes", "body_too_large")
        if len(self.gathered) >= _GATHERED:
            data, self.gathered = bytes(self.gathered), bytearray()
            await self.written(self.part.write, data)

    async def written(self, call: Any, *arguments: Any) -> Any:
        """Do something with the volume in a thread; a full one is 507, another fault 503."""
        try:
            return await self.off_loop(call, *arguments, pool=self.services.applications)
        except OSError as error:
            if error.errno in _FULL:
                raise Problem(507, "the volume is full", "volume_full") from error
            raise Problem(503, f"the volume cannot be written: {error.strerror}", "volume_unavailable") from error

    async def abandon(self) -> None:
        """Leave nothing of it."""
        part, self.part = self.part, None
        if part is not None:
            await self.off_loop(part.discard)

    async def post(self) -> Answer:
        """Make a job of what has come."""
        part, self.part = self.part, None
        assert part is not None
        try:
            return await self.written(self._submit, part)  # type: ignore[no-any-return]
        finally:
            await self.off_loop(part.discard)

    def _submit(self, part: Part) -> Answer:
        if self.gathered:
            part.write(bytes(self.gathered))
        self.check(part)
        sha256, uuid = part.sync(), self.keyed_uuid(self.job_type)
        parameters = {"bundle": uuid, "user": self.user(), "sha256": sha256, "size": part.size}
        known = self.manager.get_many([uuid]).get(uuid)
        if known is None:
            zerog.failpoint("ingest.before_spool")
            try:
                self.volume.keep(part, uuid, sha256)
            except Exists as error:
                raise Problem(422, "this Idempotency-Key was used for another bundle", REUSED[1]) from error
            zerog.failpoint("ingest.after_spool")
        record = self.run(self.job_type, parameters, uuid=uuid)
        if known is not None:
            view = state_of(newest_of(record, self.manager), self.documents, self.manager, iso)
            return Answer(view, 200, {"Idempotency-Replayed": "true"})
        created = iso(record.created_at)
        return Answer(state_view(record, UPLOADING, "0.0", "", created, created, "OK"))

    def check(self, part: Part) -> None:
        """Refuse what can be seen to be wrong at once."""

    def user(self) -> str:
        """Return who sends it: whom the header names, if who asks may say that, else whose token it is."""
        settings: Settings = self.settings
        named = self.request.headers.get(settings.user_header, "").strip()
        token = self.request.principal
        if named and (token is None or "proxy" in token.roles or "admin" in token.roles):
            return named[:200]
        return token.name if token is not None else settings.default_user


class IngestBundle(_Upload):
    """Bundles."""

    name = "ingest"
    url = "/ingest"

    async def post(self) -> Answer:
        """Receive a bundle, a tar file with data and metadata, and ingest it."""
        return await super().post()


class UploadBundle(IngestBundle):
    """Bundles, under another name."""

    name = "upload"
    url = "/upload"


class MoveFiles(_Upload):
    """Files that are there already."""

    name = "move"
    url = "/move"
    job_type = MOVE
    accepted = ("application/json",)
    most = MAX_METADATA
    problems: ClassVar = {
        "POST": (*_Upload.problems["POST"], (400, "invalid_json"), (400, "empty_body"), (413, "body_too_large")),
    }

    async def begin(self) -> None:
        """Refuse it where nothing may be moved."""
        if not self.settings.sources:
            raise Problem(403, "nothing may be moved: the setting sources of ingest names no folder", "forbidden")
        await super().begin()

    async def post(self) -> Answer:
        """Receive metadata, and move the files that they list into the archive."""
        return await super().post()

    def check(self, part: Part) -> None:
        """Refuse what is not JSON; whether it is metadata is the job's to find out."""
        if not part.size:
            raise Problem(400, "the body is empty", "empty_body")
        why = _said_elsewhere(part.path) if part.size > _LARGE else not_json(part.path)
        if why:
            raise Problem(400, f"the body is not JSON: {why.strip()[:500]}", "invalid_json")


def not_json(path: Path) -> str:
    """Return why a file holds no JSON; nothing if it does."""
    try:
        json.loads(path.read_bytes().decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return str(error)
    return ""


def _said_elsewhere(path: Path) -> str:
    """Do as ``not_json`` does, in a process of its own."""
    command = [sys.executable, "-I", "-c", _CHECK, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_CHECKED_WITHIN)
    except (OSError, subprocess.SubprocessError) as error:
        raise Problem(503, "the body could not be looked at; send it again", "volume_unavailable") from error
    return done.stdout


#: The same for a process of its own.
_CHECK = """
import json, sys
try:
    json.loads(open(sys.argv[1], "rb").read().decode("utf-8"))
except (ValueError, RecursionError) as error:
    print(error)
"""


class Wanted(BaseModel):
    """Whose state is wanted."""

    job_id: int = Field(ge=1, le=2**53 - 1, description="number of the job, as it was answered")


class GetState(zerog.server.Endpoint):
    """Where an ingest stands."""

    name = "get state"
    url = "/get_state"
    parameters = Wanted
    problems: ClassVar = {"GET": ((404, "unknown_job"),)}

    def get(self, wanted: Wanted) -> dict[str, Any]:
        """Show the task that it is at, or where it failed and why; of one that was tried again, its successor's."""
        try:
            record = self.manager.by_number(wanted.job_id)
        except zerog.UnknownJob as error:
            raise Problem(404, f"there is no ingest {wanted.job_id}", "unknown_job") from error
        if record.job_type not in JOB_TYPES or not self.sees(record.job_type):
            raise Problem(404, f"there is no ingest {wanted.job_id}", "unknown_job")
        return state_of(newest_of(record, self.manager), self.documents, self.manager, iso)
