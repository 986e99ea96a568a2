"""PostgreSQL, Redis, nginx and others as Debian has them, unpacked but not installed: an installed
package would start a service of the machine."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from pd_deploy.lab.cache import locked
from pd_deploy.lab.system import run

PACKAGES = (
    "nginx",
    "openssl",
    "postgresql-15",
    "postgresql-client-15",
    "redis-server",
    "redis-tools",
)
CACHE = Path("/var/cache/pd-deploy-demo")
_DIRECTORIES = ("usr/sbin", "usr/bin", "usr/lib/postgresql/15/bin")


class Programs:
    """Where the programs are, and what they need to find their libraries.

    Attributes:
        root: a directory that has the packages' files once they are unpacked.
    """

    def __init__(self, packages: Sequence[str] = PACKAGES) -> None:
        self._packages = packages
        self.root = CACHE / hashlib.sha256(" ".join(packages).encode()).hexdigest()[:12]

    def __getitem__(self, name: str) -> str:
        return next(
            str(path)
            for directory in _DIRECTORIES
            if (path := self.root / directory / name).exists()
        )

    @property
    def env(self) -> dict[str, str]:
        """Environment for them: libraries that the machine lacks were unpacked beside them."""
        machine = f"{os.uname().machine}-linux-gnu"
        libraries = (str(self.root / top / machine) for top in ("usr/lib", "lib"))
        return {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "LD_LIBRARY_PATH": ":".join(libraries),
        }

    def unpack(self) -> None:
        """Download and unpack the packages, with those that they need and the machine lacks; once.

        Raises:
            LabError: the machine has no apt-get, or it failed.
        """
        with locked("programs"):
            if not self.root.exists():
                CACHE.mkdir(mode=0o755, exist_ok=True)
                with tempfile.TemporaryDirectory(dir=CACHE) as name:
                    _unpack(Path(name), self._packages)
                    (Path(name) / "root").rename(self.root)


def _unpack(work: Path, packages: Sequence[str]) -> None:
    work.chmod(0o755)  # for apt's user
    archives = work / "archives"
    (archives / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    run([*apt, "update"])
    download = ["--reinstall", "--download-only", "--no-install-recommends"]
    run([*apt, "-y", "-o", f"Dir::Cache::archives={archives}", *download, "install", *packages])
    for package in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", str(package), str(work / "root")])
    # Compiles queries, which no demo needs; it is larger than all the rest.
    shutil.rmtree(work / "root/usr/lib/llvm-14", ignore_errors=True)
