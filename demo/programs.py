"""PostgreSQL, Redis and nginx as Debian has them, unpacked but not installed: an installed package
would start a service of the machine."""

import hashlib
import os
import shutil
import tempfile
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
    """Where the programs are, and what they need to find their libraries."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def __getitem__(self, name: str) -> str:
        return next(
            str(path)
            for directory in _DIRECTORIES
            if (path := self._root / directory / name).exists()
        )

    @property
    def env(self) -> dict[str, str]:
        """Environment for them: libraries that the machine lacks were unpacked beside them."""
        libraries = f"usr/lib/{os.uname().machine}-linux-gnu"
        return {
            "PATH": os.environ["PATH"],
            "LC_ALL": "C.UTF-8",
            "LD_LIBRARY_PATH": str(self._root / libraries),
        }


def unpacked() -> Programs:
    """Download and unpack the packages, with those that they need and the machine lacks; once.

    Raises:
        LabError: the machine has no apt-get, or it failed.
    """
    root = CACHE / hashlib.sha256(" ".join(PACKAGES).encode()).hexdigest()[:12]
    with locked("programs"):
        if not root.exists():
            CACHE.mkdir(mode=0o755, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=CACHE) as name:
                _unpack(Path(name))
                (Path(name) / "root").rename(root)
    return Programs(root)


def _unpack(work: Path) -> None:
    work.chmod(0o755)  # for apt's user
    archives = work / "archives"
    (archives / "partial").mkdir(parents=True)
    apt = ["apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120"]
    run([*apt, "update"])
    download = ["--reinstall", "--download-only", "--no-install-recommends"]
    run([*apt, "-y", "-o", f"Dir::Cache::archives={archives}", *download, "install", *PACKAGES])
    for package in sorted(archives.glob("*.deb")):
        run(["dpkg-deb", "-x", str(package), str(work / "root")])
    # Compiles queries, which no demo needs; it is larger than all the rest.
    shutil.rmtree(work / "root/usr/lib/llvm-14", ignore_errors=True)
