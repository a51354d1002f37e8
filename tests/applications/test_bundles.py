"""The reader of bundles and of metadata, by itself: whatever a stranger sends, a reason or files that are all right."""

from __future__ import annotations

import io
import json
import os
import random
import re
import tarfile

import pytest

from tests import bundles
from workers.ingest import metadata, tar
from workers.ingest.metadata import BadMetadata
from workers.ingest.tar import BadBundle


def walked(data: bytes) -> dict[str, bytes]:
    """Return what the reader finds."""
    found = tar.walk(io.BytesIO(data), len(data))
    return {name: data[one.offset : one.offset + one.size] for name, one in found.items()}


@pytest.mark.requirement("I1", "I2", "I3", "I4")
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("padding", [0, 512, 10240])
def test_what_others_write_is_read(format: int, padding: int) -> None:
    files = {**bundles.FILES, f"{'d' * 90}/{'e' * 90}": b"long", "é/ü": "é".encode()}
    if format == tarfile.USTAR_FORMAT:
        del files["é/ü"]
    data = bundles.bundle(files, format=format).rstrip(b"\0")
    data += bytes(-len(data) % 512) + bytes(1024 + padding)
    found = walked(data)
    assert found.pop("metadata.txt") == bundles.metadata_of(files)
    assert found == {f"data/{path}": content for path, content in files.items()}


@pytest.mark.requirement("I1", "I4")
def test_folders_leading_dots_and_times_of_fractions_are_fine() -> None:
    members = [
        bundles.member("./", type=tarfile.DIRTYPE),
        bundles.member("./data/", type=tarfile.DIRTYPE, mode=0o2755),
        bundles.member("./data/a", b"a", mtime=1.25),
        bundles.member("././metadata.txt", b"[]"),
    ]
    assert walked(bundles.tar(members, tarfile.PAX_FORMAT)) == {"data/a": b"a", "metadata.txt": b"[]"}


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("what", sorted(bundles.BAD_TARS))
def test_bad_tars_are_refused_with_the_reason(what: str) -> None:
    data, word = bundles.BAD_TARS[what]
    with pytest.raises(BadBundle) as refused:
        walked(data)
    assert word in str(refused.value)
    assert str(refused.value).isprintable()


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("what", sorted(bundles.BAD_METADATA))
def test_bad_metadata_are_refused_with_the_reason(what: str) -> None:
    data, word = bundles.BAD_METADATA[what]
    with pytest.raises(BadMetadata, match=word):
        metadata.read(data)


@pytest.mark.requirement("I3")
def test_good_metadata_are_read_and_unknown_tables_passed_on() -> None:
    found = metadata.read(bundles.metadata_of(bundles.FILES))
    assert set(found.files) == set(bundles.FILES) and found.project == "project-1"
    assert found.entries[4] == {"destinationTable": "Unknown.table", "value": {"passed": "on"}}
    prefixed = [*bundles.HEAD, bundles.entry("a", b"", hashsum="SHA1:" + "DA39A3EE5E6B4B0D3255BFEF95601890AFD80709")]
    assert metadata.read(json.dumps(prefixed).encode()).files["a"].hashsum == "da39a3ee5e6b4b0d3255bfef95601890afd80709"


@pytest.mark.requirement("I11")
@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_bundle_cut_short_at_every_block_is_refused(format: int) -> None:
    data = bundles.bundle(bundles.FILES, format=format)
    whole = len(data.rstrip(b"\0"))
    whole += -whole % 512 + 1024
    for size in range(0, whole, 512):
        with pytest.raises(BadBundle):
            walked(data[:size])
    assert walked(data[:whole]) == walked(data)


@pytest.mark.requirement("I11")
def test_ten_thousand_mutated_headers_give_a_reason_or_what_another_reader_finds() -> None:
    """What is accepted is what Python's own reader finds: nobody can see other files in it."""
    chance, reasons = random.Random(20261201), []
    for _ in range(10_000 if os.environ.get("TESTS_FULL") else 2_000):
        data = mutated(chance)
        try:
            found = walked(data)
        except BadBundle as error:
            reasons.append(str(error))
            continue
        with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
            theirs = {re.sub(r"^(\./)+", "", one.name): archive.extractfile(one) for one in archive if one.isreg()}
        assert found == {name: file.read() for name, file in theirs.items() if file is not None}
    assert len(reasons) > 100
    assert all(reason.isprintable() and len(reason) < 1000 for reason in reasons)


def mutated(chance: random.Random) -> bytes:
    """Return a bundle with some bytes of a header changed, whose checksum is right again most of the time."""
    format = chance.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    files = {chance.choice(["a", "d/b", f"{'e' * 90}/{'f' * 90}"]): b"x" * chance.choice([0, 1, 512, 700]), "c": b"c"}
    data = bytearray(bundles.bundle(files, format=format))
    starts = [start for start in range(0, len(data), 512) if data[start + 257 : start + 262] == b"ustar"]
    start = chance.choice(starts)
    header = data[start : start + 512]
    for _ in range(chance.randint(1, 4)):
        field, size = chance.choice(
            [(0, 100), (100, 8), (124, 12), (136, 12), (156, 1), (157, 100), (257, 8), (345, 155)]
        )
        place = field + chance.randrange(size)
        header[place] = chance.choice(
            [0, 0x20, 0x2F, 0x2E, 0x30 + chance.randrange(10), 0x80, 0xFF, chance.randrange(256)]
        )
    if chance.random() < 0.9:
        bundles.sign(header)
    data[start : start + 512] = header
    return bytes(data)
