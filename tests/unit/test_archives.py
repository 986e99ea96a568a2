"""Which image an archive holds, and what an engine is given of it."""

import asyncio
import gzip
import io
import json
import os
import tarfile
from pathlib import Path

import pytest

from pd_deploy.errors import InvalidInput
from pd_deploy.registry import archives
from tests.archives import Image, tar

IMAGE = Image("one")
ATTESTATION = {
    "digest": "sha256:0",
    "annotations": {"vnd.docker.reference.type": "attestation-manifest"},
}
FORMS = {
    "saved": IMAGE.saved("omni:1"),
    "layout": IMAGE.laid_out(),
    "layout of a builder": IMAGE.laid_out(beside=[ATTESTATION], nested=True),
}


def read(content: bytes) -> dict[str, bytes]:
    """The members of a tar file, packed or not."""
    with tarfile.open(fileobj=io.BytesIO(content)) as opened:
        members = {member.name: opened.extractfile(member) for member in opened}
        return {name: member.read() for name, member in members.items() if member}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "image.tar"


@pytest.mark.parametrize("compress", [bytes, gzip.compress], ids=["plain", "gzip"])
@pytest.mark.parametrize("content", FORMS.values(), ids=list(FORMS))
def test_an_archive_tells_its_image_and_is_given_as_an_engine_wants_it(
    file: Path, content: bytes, compress: type[bytes]
) -> None:
    file.write_bytes(compress(content))
    archive = asyncio.run(archives.read(str(file)))
    assert (archive.id, archive.architecture) == (IMAGE.id, "arm64")
    assert archive.size == len(compress(content))
    given = read(b"".join(archive.parts()))
    assert archive.unpacked_size == sum(map(len, read(content).values()))
    (manifest,) = json.loads(given["manifest.json"])
    assert given[manifest["Config"]] == IMAGE.config
    (layer,) = (given[name] for name in manifest["Layers"])
    assert (gzip.decompress(layer) if layer[:2] == b"\x1f\x8b" else layer) == IMAGE.layer


def test_a_large_archive_is_never_whole_in_memory(file: Path) -> None:
    with file.open("wb") as large:
        large.write(tar({"layer": bytes(archives.SMALL_BYTES + 1)})[:512])
        large.truncate(3 << 30)
    parts = archives.Archive(file, "", "", 0, 0).parts()
    assert {len(next(parts)) for _ in range(4)} == {archives.PART_BYTES}


def test_a_file_that_was_replaced_is_read_again(file: Path) -> None:
    file.write_bytes(IMAGE.saved())
    assert asyncio.run(archives.read(str(file))).id == IMAGE.id
    other = Image("two")
    file.write_bytes(other.saved())
    os.utime(file, ns=(1, 1))
    assert asyncio.run(archives.read(str(file))).id == other.id


@pytest.mark.parametrize(
    ("content", "found"),
    [
        (None, "can't be read: No such file or directory"),
        (b"", "can't be read: empty file"),
        (b"FROM scratch\n", "can't be read: "),
        (gzip.compress(IMAGE.saved())[:-900], "can't be read: "),
        (b"\x28\xb5\x2f\xfd0123", "found one compressed by zstd; `zstd -d FILE` unpacks it"),
        (tar({"etc/passwd": b""}), "found neither manifest.json nor index.json in it"),
        (tar({"manifest.json": b"{"}), "found manifest.json missing or damaged in it"),
        (tar({"manifest.json": b"[{}, {}]"}), "found 2 images in it; save the one that is to run"),
        (IMAGE.laid_out(beside=[{"digest": "sha256:1"}]), "found 2 images in it"),
        (tar({"manifest.json": b'[{"Config": "a.json"}]'}), "found a.json missing or damaged"),
        (IMAGE.saved().replace(b"arm64", b"amd64"), ".json missing or damaged in it"),
        (tar({"index.json": b'{"manifests": [{}]}'}), "found blobs/ missing or damaged in it"),
    ],
)
def test_what_is_no_image_is_told_by_its_path(
    file: Path, content: bytes | None, found: str
) -> None:
    if content is not None:
        file.write_bytes(content)
    with pytest.raises(InvalidInput) as caught:
        asyncio.run(archives.read(str(file)))
    assert f"expected an image archive at {file}" in str(caught.value)
    assert found in str(caught.value)


def test_a_directory_is_no_archive(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="found a directory or a device"):
        asyncio.run(archives.read(str(tmp_path)))
