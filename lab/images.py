"""Stand-in images, assembled layer by layer and pushed to the lab's registry over HTTP.

No Docker engine is needed, and the same files always give the same digest.
"""

import gzip
import hashlib
import io
import json
import platform
import tarfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import httpx
from pydantic import BaseModel, ConfigDict

from pd_deploy.lab.errors import LabError
from pd_deploy.lab.system import mode_of

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG = "application/vnd.docker.container.image.v1+json"
LAYER = "application/vnd.docker.image.rootfs.diff.tar.gzip"
ARCHITECTURES = {"x86_64": "amd64", "aarch64": "arm64"}
ENVIRONMENT = ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]


class Layer(BaseModel):
    """A compressed layer as image manifests name it."""

    model_config = ConfigDict(frozen=True)

    digest: str  # of the compressed tar
    diff_id: str  # of the tar itself
    size: int  # bytes, compressed


class Repository:
    """One repository of the lab's registry."""

    def __init__(self, registry: str, name: str) -> None:
        self._http = httpx.Client(base_url=f"http://{registry}/v2/{name}/", timeout=60)

    def push_blob(self, digest: str, content: bytes | Path) -> None:
        """Store a blob unless the registry already has it."""
        if self._http.head(f"blobs/{digest}").status_code == 200:
            return
        location = self._checked(self._http.post("blobs/uploads/")).headers["location"]
        body = content if isinstance(content, bytes) else content.read_bytes()
        self._checked(
            self._http.put(httpx.URL(location).copy_merge_params({"digest": digest}), content=body)
        )

    def push_manifest(self, tag: str, manifest: Mapping[str, Any]) -> str:
        """Store a manifest under a tag; return its digest."""
        put = self._http.put(
            f"manifests/{tag}", content=_json(manifest), headers={"Content-Type": MANIFEST}
        )
        return str(self._checked(put).headers["docker-content-digest"])

    def manifest(self, tag: str) -> dict[str, Any]:
        """Fetch the manifest of a tag.

        Raises:
            LabError: there is no such tag.
        """
        response = self._http.get(f"manifests/{tag}", headers={"Accept": MANIFEST})
        return dict(self._checked(response).json())

    def config(self, manifest: Mapping[str, Any]) -> dict[str, Any]:
        """Fetch the image configuration that a manifest names."""
        return dict(self._checked(self._http.get(f"blobs/{manifest['config']['digest']}")).json())

    def _checked(self, response: httpx.Response) -> httpx.Response:
        if response.is_error:
            request = response.request
            raise LabError(
                f"the lab's registry refused {request.method} {request.url}: "
                f"{response.status_code} {response.text.strip()}"
            )
        return response


def push_image(repository: Repository, tag: str, base: Layer, base_blob: Path, tree: bytes) -> str:
    """Push an image of a base layer and a tar of further files; return its digest."""
    repository.push_blob(base.digest, base_blob)
    config = {
        "architecture": ARCHITECTURES.get(platform.machine(), platform.machine()),
        "os": "linux",
        "config": {"Env": ENVIRONMENT, "Cmd": ["/bin/bash"]},
        "rootfs": {"type": "layers", "diff_ids": [base.diff_id]},
        "history": [{"created_by": "base packages"}],
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "layers": [{"mediaType": LAYER, "size": base.size, "digest": base.digest}],
    }
    return _push_with_layer(repository, tag, manifest, config, tree)


def push_variant(repository: Repository, source_tag: str, tag: str, tree: bytes) -> str:
    """Push a tagged image with one more layer under another tag; return its digest."""
    manifest = repository.manifest(source_tag)
    return _push_with_layer(repository, tag, manifest, repository.config(manifest), tree)


def tar_directory(
    directory: Path,
    links: Mapping[str, str],
    others: Mapping[str, str | bytes | None],
) -> bytes:
    """Make a tar of a directory's files, and of links and other files by their path in the image.

    Args:
        links: path in the image → target.
        others: path in the image → content; what the directory has there is left out.
    """
    # Without directories, so that those of the layers below keep their modes (/tmp, /root).
    files = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    files = [path for path in files if "__pycache__" not in path.parts]
    files = [path for path in files if str(path.relative_to(directory)) not in others]
    contents = [_entry(path.relative_to(directory), path.read_bytes()) for path in files]
    contents += _contents(others)
    for path, target in sorted(links.items()):
        link = tarfile.TarInfo(path)
        link.type, link.linkname = tarfile.SYMTYPE, target
        contents.append((link, b""))
    return _tar(contents)


def tar_files(files: Mapping[str, str | bytes | None]) -> bytes:
    """Make a tar of files by their path in the image; None removes a path of a layer below."""
    return _tar(_contents(files))


def _contents(
    files: Mapping[str, str | bytes | None],
) -> list[tuple[tarfile.TarInfo, bytes]]:
    contents = []
    for path, content in sorted(files.items()):
        relative = Path(path.lstrip("/"))
        if content is None:
            contents.append((tarfile.TarInfo(str(relative.with_name(f".wh.{relative.name}"))), b""))
            continue
        data = content.encode() if isinstance(content, str) else content
        contents.append(_entry(relative, data))
    return contents


def _push_with_layer(
    repository: Repository,
    tag: str,
    manifest: Mapping[str, Any],
    config: Mapping[str, Any],
    tree: bytes,
) -> str:
    blob = gzip.compress(tree, mtime=0)
    layer = Layer(digest=_digest(blob), diff_id=_digest(tree), size=len(blob))
    repository.push_blob(layer.digest, blob)
    diff_ids = [*config["rootfs"]["diff_ids"], layer.diff_id]
    new_config = _json(
        {
            **config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
            "history": [*config["history"], {"created_by": "files"}],
        }
    )
    repository.push_blob(_digest(new_config), new_config)
    new_layer = {"mediaType": LAYER, "size": layer.size, "digest": layer.digest}
    new_manifest = {
        **manifest,
        "config": {
            "mediaType": CONFIG,
            "size": len(new_config),
            "digest": _digest(new_config),
        },
        "layers": [*manifest["layers"], new_layer],
    }
    return repository.push_manifest(tag, new_manifest)


def _entry(path: Path, content: bytes) -> tuple[tarfile.TarInfo, bytes]:
    entry = tarfile.TarInfo(str(path))
    entry.mode = mode_of(content)
    return entry, content


def _tar(contents: Iterable[tuple[tarfile.TarInfo, bytes]]) -> bytes:
    # Owner root and time zero in every entry: the digest depends on the files alone.
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as tar:
        for entry, data in contents:
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    return buffer.getvalue()


def _digest(content: bytes) -> str:
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def _json(document: Mapping[str, Any]) -> bytes:
    return json.dumps(document, sort_keys=True).encode()
