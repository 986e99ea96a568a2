"""Image archives for tests: small, and such as a Docker engine loads."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Mapping, Sequence


def tar(members: Mapping[str, bytes]) -> bytes:
    """Make a tar file."""
    written = io.BytesIO()
    with tarfile.open(fileobj=written, mode="w") as archive:
        for name, content in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(content)
            archive.addfile(header, io.BytesIO(content))
    return written.getvalue()


def digest(content: bytes) -> str:
    """Return `sha256:…` of some bytes."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


class Image:
    """An image with one file in one layer.

    Attributes:
        id: what a Docker engine calls it.
    """

    def __init__(self, content: str, architecture: str = "arm64") -> None:
        self.layer = tar({"what": content.encode()})
        config = {
            "architecture": architecture,
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [digest(self.layer)]},
        }
        self.config = json.dumps(config).encode()
        self.id = digest(self.config)

    def saved(self, *tags: str) -> bytes:
        """Write it as `docker save` does."""
        config = f"{self.id.removeprefix('sha256:')}.json"
        image = {"Config": config, "RepoTags": list(tags) or None, "Layers": ["1/layer.tar"]}
        manifest = json.dumps([image]).encode()
        return tar({config: self.config, "1/layer.tar": self.layer, "manifest.json": manifest})

    def laid_out(
        self, *, beside: Sequence[Mapping[str, object]] = (), nested: bool = False
    ) -> bytes:
        """Write it as an OCI layout.

        Args:
            beside: further entries of its index.
            nested: whether the index names another one.
        """
        layer = gzip.compress(self.layer)
        layers = [{"digest": digest(layer), "size": len(layer)}]
        manifest = {"schemaVersion": 2, "config": {"digest": self.id}, "layers": layers}
        blobs = [self.config, layer, json.dumps(manifest).encode()]
        index = {"manifests": [{"digest": digest(blobs[-1])}, *beside]}
        if nested:
            blobs.append(json.dumps(index).encode())
            index = {"manifests": [{"digest": digest(blobs[-1])}]}
        named = {f"blobs/{digest(blob).replace(':', '/')}": blob for blob in blobs}
        layout = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'}
        return tar({**named, **layout, "index.json": json.dumps(index).encode()})
