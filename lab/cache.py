"""What all labs share: the hosts' root file system and the image's base, made once."""

import fcntl
import gzip
import hashlib
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict

from pd_deploy.lab.errors import LabError
from pd_deploy.lab.images import Layer
from pd_deploy.lab.system import clean_environment, remove_tree

CACHE = Path("/var/cache/pd-deploy-lab")
SUITE = "bookworm"
# mmdebstrap's processes ignore SIGTERM and make mounts. In namespaces of their own they all end,
# and their mounts go, when the process that started them ends or kills the first of them.
CONFINED = (
    *("setpriv", "--pdeathsig", "KILL"),
    *("unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc"),
)
NGINX = Path("usr/sbin/nginx")  # in the image's base
HOST_PACKAGES = (
    "ca-certificates",
    "curl",
    "docker-registry",
    "docker.io",
    "iproute2",
    "iputils-ping",
    "openssh-server",
    "procps",
    "python3",
    "tcsh",
    "tini",
    "tzdata",
)
# Nobody reads these on a simulated host, and unpacking them takes time at every image pull.
SLIM = tuple(
    f"--dpkgopt=path-exclude=/usr/share/{unread}/*" for unread in ("doc", "info", "locale", "man")
)
# A locked password (!) would also refuse keys, because sshd runs without PAM; `*` does not.
# Host keys are removed because each host gets its own.
HOST_SETUP = """
chroot "$1" useradd --create-home --shell /bin/bash --uid 1000 -p '*' --groups docker deployer
chroot "$1" useradd --create-home --shell /bin/bash --uid 1001 -p '*' nodocker
rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/resolv.conf
touch "$1"/etc/resolv.conf
"""


class Base(BaseModel):
    """The lowest layer of an image."""

    model_config = ConfigDict(frozen=True)

    layer: Layer
    blob: Path


class Cached(BaseModel):
    """The cache's contents for one version of the package lists."""

    model_config = ConfigDict(frozen=True)

    root: Path
    base: Layer
    base_blob: Path
    nginx: Path  # the base's nginx program, for the image variant without it


def prepare(image_packages: Sequence[str], say: Callable[[str], None]) -> Cached:
    """Make the parts that are missing in the cache, both at the same time.

    Raises:
        LabError: a part could not be made; the message names its log.
    """
    with locked("making"):
        return _prepare(image_packages, say)


def prepare_base(packages: Sequence[str], say: Callable[[str], None]) -> Base:
    """Make an image's base of some Debian packages unless there is one.

    Raises:
        LabError: it could not be made; the message names its log.
    """
    base = CACHE / f"base-{key(SUITE, *SLIM, *packages)}"
    with locked("making"):
        if not base.exists():
            say(f"making an image's base ({len(packages)} packages)")
            with _work_directory() as work:
                _finish([_Bootstrap(work / "base.tar", "essential", packages)])
                _compress(work / "base.tar", work / "base").rename(base)
    return Base(layer=_layer(base), blob=base / "layer.tar.gz")


def _prepare(image_packages: Sequence[str], say: Callable[[str], None]) -> Cached:
    root = CACHE / f"root-{key(SUITE, *SLIM, *HOST_PACKAGES, HOST_SETUP)}"
    base = CACHE / f"base-{key(SUITE, *SLIM, str(NGINX), *image_packages)}"
    missing = [part for part in (root, base) if not part.exists()]
    if missing:
        with _work_directory() as work:
            setup = work / "setup.sh"
            setup.write_text(f"set -e\n{HOST_SETUP}")
            bootstraps = []
            if root in missing:
                say(f"making the hosts' root file system ({len(HOST_PACKAGES)} packages)")
                hook = f'--customize-hook=sh {setup} "$1"'
                bootstraps.append(_Bootstrap(work / "root", "minbase", HOST_PACKAGES, hook))
            if base in missing:
                say(f"making the image's base ({len(image_packages)} packages)")
                bootstraps.append(_Bootstrap(work / "base.tar", "essential", image_packages))
            _finish(bootstraps)
            if root in missing:
                (work / "root").rename(root)
            if base in missing:
                say("compressing the image's base")
                _with_nginx(work / "base.tar", _compress(work / "base.tar", work / "base"))
                (work / "base").rename(base)
    blob, nginx = base / "layer.tar.gz", base / NGINX.name
    return Cached(root=root, base=_layer(base), base_blob=blob, nginx=nginx)


def _layer(base: Path) -> Layer:
    return Layer.model_validate_json((base / "layer.json").read_bytes())


@contextmanager
def locked(name: str) -> Iterator[None]:
    """Let only one process at a time hold the lock of that name: of a lab, or of the cache."""
    CACHE.mkdir(mode=0o700, parents=True, exist_ok=True)
    with (CACHE / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def purge() -> bool:
    """Delete the cache; return False if there was none."""
    return remove_tree(CACHE)


class _Bootstrap:
    """One running mmdebstrap."""

    def __init__(self, target: Path, variant: str, packages: Sequence[str], *options: str) -> None:
        self.target = target
        self.log = CACHE / f"{target.name}.log"
        command = ["mmdebstrap", f"--variant={variant}", f"--include={','.join(packages)}"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*CONFINED, *command, *SLIM, *options, SUITE, str(target)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=clean_environment(),
            )

    def finish(self) -> None:
        if self.process.wait():
            end = "\n".join(self.log.read_text().splitlines()[-5:])
            raise LabError(f"mmdebstrap failed for {self.target.name}, see {self.log}:\n{end}")


def _finish(bootstraps: Sequence[_Bootstrap]) -> None:
    try:
        for bootstrap in bootstraps:
            bootstrap.finish()
    except BaseException:
        for bootstrap in bootstraps:
            bootstrap.process.kill()
            bootstrap.process.wait()
        raise


@contextmanager
def _work_directory() -> Iterator[Path]:
    for remains in CACHE.glob("work-*"):
        remove_tree(remains)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=CACHE))
    # The apt user inside the new root has to enter it.
    work.chmod(0o711)
    try:
        yield work
    finally:
        remove_tree(work)


def _compress(tar: Path, directory: Path) -> Path:
    """Turn a tar into a layer: compressed, with the digests that a registry asks for."""
    directory.mkdir()
    blob = directory / "layer.tar.gz"
    diff_id = hashlib.sha256()
    with (
        tar.open("rb") as source,
        blob.open("wb") as raw,
        gzip.GzipFile(fileobj=raw, mode="wb", compresslevel=1, mtime=0, filename="") as out,
    ):
        while chunk := source.read(1 << 20):
            diff_id.update(chunk)
            out.write(chunk)
    with blob.open("rb") as compressed:
        digest = hashlib.file_digest(compressed, "sha256").hexdigest()
    layer = Layer(
        digest=f"sha256:{digest}",
        diff_id=f"sha256:{diff_id.hexdigest()}",
        size=blob.stat().st_size,
    )
    (directory / "layer.json").write_text(layer.model_dump_json())
    return directory


def _with_nginx(tar: Path, directory: Path) -> None:
    """Put the base's nginx program beside its layer."""
    with tarfile.open(tar) as members:
        nginx = members.extractfile(f"./{NGINX}")
        assert nginx is not None, f"{NGINX} is no file in the image's base"
        (directory / NGINX.name).write_bytes(nginx.read())


def key(*parts: str) -> str:
    """Return a short name for what is made from these texts."""
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:12]
