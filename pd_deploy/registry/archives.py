"""Image archives: files that `docker save` wrote, or tar files of an OCI layout.

An archive is read from front to back without unpacking it; only its small members are kept in
memory.
"""

import gzip
import hashlib
import io
import json
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

from pd_deploy.errors import InvalidInput, Problem, headline
from pd_deploy.hosts.threads import in_thread

MANIFEST = "manifest.json"
PART_BYTES = 1 << 20  # of a file that is streamed
SMALL_BYTES = 1 << 20  # manifests and configurations of images have some 10 kB
SMALL_MEMBERS = 10_000  # an image has at most 127 layers, with a few small members each
_GZIP = b"\x1f\x8b"
# By which others begin; Docker's engine takes some of them, depending on its version.
_COMPRESSED = {
    b"\x28\xb5\x2f\xfd": ("zstd", "zstd -d"),
    b"\xfd7zXZ": ("xz", "xz -d"),
    b"BZh": ("bzip2", "bzip2 -d"),
}
# What builders add beside an image's own manifest: signatures, and where it comes from.
_ATTESTATION = "vnd.docker.reference.type"


@dataclass(frozen=True)
class Archive:
    """An image in a file.

    Attributes:
        id: the image's id in a Docker engine: the digest of its configuration.
        architecture: what its programs are for, in OCI's names; "" where it does not say.
        size: of the file, in bytes.
        unpacked_size: of all members together; layers may be compressed in them once more.
        prefix: what an engine has to be given before the file.
    """

    path: Path
    id: str
    architecture: str
    size: int
    unpacked_size: int
    prefix: bytes = b""

    def parts(self) -> Iterator[bytes]:
        """Yield what a Docker engine loads, in parts; only one is in memory at a time."""
        if self.prefix:
            yield self.prefix
        with self.path.open("rb") as file:
            while part := file.read(PART_BYTES):
                yield part


async def read(path: str) -> Archive:
    """Read which image an archive holds.

    A compressed one is decompressed for that, to its end. What was read of a file is kept until the
    file changes.

    Raises:
        InvalidInput: there is no such file, it is no image archive, or holds several images.
    """
    return await in_thread(lambda: _read(Path(path)), f"read {path}")


def _read(path: Path) -> Archive:
    try:
        stat = path.stat()
        if not path.is_file():
            raise _invalid(path, "found a directory or a device")
        with _reading:
            return _read_once(path, stat.st_size, (stat.st_mtime_ns, stat.st_ino))
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        reason = error.strerror if isinstance(error, OSError) else None
        found = f"found that it can't be read: {reason or headline(error)}"
        raise _invalid(path, found) from error


_reading = Lock()  # several hosts need the same archive at the same time


@lru_cache(maxsize=8)
def _read_once(path: Path, size: int, _version: tuple[int, int]) -> Archive:
    with path.open("rb") as file:
        begin = file.read(8)
    for magic, (name, command) in _COMPRESSED.items():
        if begin.startswith(magic):
            raise _invalid(path, f"found one compressed by {name}; `{command} FILE` unpacks it")
    compressed = begin.startswith(_GZIP)
    with tarfile.open(path, "r|gz" if compressed else "r:") as tar:
        small, unpacked = _members(tar)
    config_name, prefix = _image_of(path, small)
    config = small.get(config_name, b"")
    digest = hashlib.sha256(config).hexdigest()
    if digest not in config_name:
        raise _invalid(path, f"found {config_name or 'no configuration'} missing or damaged in it")
    return Archive(
        path,
        f"sha256:{digest}",
        str(_json(path, config_name, config).get("architecture") or ""),
        size,
        unpacked,
        gzip.compress(prefix, mtime=0) if prefix and compressed else prefix,
    )


def _members(tar: tarfile.TarFile) -> tuple[dict[str, bytes], int]:
    """Return the content of a tar's small members by name, and the bytes of all."""
    small: dict[str, bytes] = {}
    total = 0
    for member in tar:
        total += member.size
        if member.isfile() and member.size <= SMALL_BYTES and len(small) < SMALL_MEMBERS:
            content = tar.extractfile(member)
            assert content
            small[member.name.removeprefix("./")] = content.read()
    return small, total


def _image_of(path: Path, small: Mapping[str, bytes]) -> tuple[str, bytes]:
    """Return the name of the image's configuration, and what an engine is given before the file.

    Engines want `docker save`'s manifest, which an OCI layout has not.
    """
    if MANIFEST in small:
        (image,) = _only(path, _json(path, MANIFEST, small[MANIFEST], list))
        return str(image.get("Config", "")), b""
    if "index.json" not in small:
        raise _invalid(path, "found neither manifest.json nor index.json in it")
    manifest, name = _json(path, "index.json", small["index.json"]), "index.json"
    # An index may name another one.
    while "manifests" in manifest:
        (image,) = _only(path, [m for m in manifest["manifests"] if not _is_attestation(m)])
        name = _blob(image)
        manifest = _json(path, name, small.get(name, b""))
    config, layers = _blob(manifest.get("config", {})), manifest.get("layers", [])
    docker = [{"Config": config, "RepoTags": None, "Layers": [_blob(layer) for layer in layers]}]
    return config, _member(MANIFEST, json.dumps(docker).encode())


def _only(path: Path, images: list[Any]) -> list[Any]:
    if len(images) != 1:
        raise _invalid(path, f"found {len(images)} images in it; save the one that is to run")
    return images


def _is_attestation(descriptor: Mapping[str, Any]) -> bool:
    return _ATTESTATION in (descriptor.get("annotations") or {})


def _blob(descriptor: Mapping[str, Any]) -> str:
    """Name the member of an OCI layout that a descriptor is for."""
    return f"blobs/{str(descriptor.get('digest', '')).replace(':', '/')}"


def _member(name: str, content: bytes) -> bytes:
    """Make the beginning of a tar file: one member."""
    header = tarfile.TarInfo(name)
    header.size = len(content)
    header.mode = 0o644
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        tar.addfile(header, io.BytesIO(content))
        end = tar.offset
    return written.getvalue()[:end]


def _json(path: Path, name: str, content: bytes, kind: type[Any] = dict) -> Any:
    try:
        document = json.loads(content)
    except (ValueError, RecursionError):
        document = None
    if not isinstance(document, kind):
        raise _invalid(path, f"found {name} missing or damaged in it")
    return document


def _invalid(path: Path, found: str) -> InvalidInput:
    message = f"expected an image archive at {path}, as `docker save` writes it; {found}"
    return InvalidInput([Problem("image", message)])
