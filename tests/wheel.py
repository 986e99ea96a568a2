"""The project as others install it: a wheel, built without a network from what git has."""

import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def tracked() -> dict[str, bool]:
    """The files that git has or will have, each with whether it is executable. Links among them."""
    listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
    paths = [ROOT / name for name in sorted(set(done.stdout.split("\0"))) if name]
    return {
        str(path.relative_to(ROOT)): bool(path.lstat().st_mode & 0o100)
        for path in paths
        if path.is_symlink() or path.is_file()
    }


def copy_sources(to: Path) -> None:
    """Copy what git has; a build beside it would leave files that a later one takes for sources."""
    for name in tracked():
        (to / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, to / name, follow_symlinks=False)


def build(sources: Path, to: Path) -> Path:
    """Build the wheel of a directory or a source archive."""
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--wheel-dir"]
    _run([sys.executable, "-m", "pip", "wheel", *options, str(to), str(sources)], sources.parent)
    (wheel,) = to.glob("*.whl")
    return wheel


def build_archive(sources: Path, to: Path) -> Path:
    """Build the source archive of a directory."""
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(to)!r})"
    _run([sys.executable, "-c", code], sources)
    (archive,) = to.glob("*.tar.gz")
    return archive


def install(wheel: Path, to: Path) -> Path:
    """Install a wheel into a new environment that has this one's packages; returns its `bin`.

    This checkout is not among them: a .pth file adds a directory, but not the .pth files in it.
    """
    _run([sys.executable, "-m", "venv", "--without-pip", str(to)], to.parent)
    (packages,) = to.glob("lib/python3.*/site-packages")
    here = next(path for path in sys.path if path.endswith("site-packages"))
    (packages / "others.pth").write_text(f"{here}\n")
    options = ["--no-deps", "--no-index", "--quiet", "--ignore-installed"]
    pip = [sys.executable, "-m", "pip", "--python", str(to / "bin/python")]
    _run([*pip, "install", *options, str(wheel)], to.parent)
    return to / "bin"


def _run(argv: list[str], cwd: Path) -> None:
    done = subprocess.run(argv, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{argv}:\n{done.stdout}{done.stderr}"
