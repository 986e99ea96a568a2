"""What others install: whole, and with no general name."""

import email
import re
from pathlib import Path
from zipfile import ZipFile

import pytest

from pd_deploy.lab.system import mode_of
from tests import wheel as building

ROOT = building.ROOT
# Folders at the top of the checkout, by their place in the package.
FOLDERS = {
    "pd_deploy": "pd_deploy",
    **{room: f"pd_deploy/{room}" for room in ("blocks", "cli", "flows", "lab", "tasks")},
    "deployments": "pd_deploy/examples",
}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what git has."""
    copy = tmp_path_factory.mktemp("sources") / "pd-deploy"
    building.copy_sources(copy)
    return copy


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this checkout."""
    return building.build(sources, tmp_path_factory.mktemp("wheel"))


def names(wheel: Path) -> list[str]:
    """A wheel's files."""
    with ZipFile(wheel) as archive:
        return sorted(archive.namelist())


def of_the_package() -> dict[str, Path]:
    """The checkout's files by their place in the package."""
    found = {}
    for name in building.tracked():
        folder, _, rest = name.partition("/")
        to_a_room = folder == "pd_deploy" and (ROOT / name).is_symlink()
        if folder in FOLDERS and not to_a_room:
            found[f"{FOLDERS[folder]}/{rest}"] = ROOT / name
    return found


def test_every_file_of_the_package_is_in_the_wheel_and_no_other(wheel: Path) -> None:
    wanted = of_the_package()
    assert [name for name in names(wheel) if _is_ours(name)] == sorted(wanted)
    with ZipFile(wheel) as archive:
        assert [n for n, file in wanted.items() if archive.read(n) != file.read_bytes()] == []


def test_the_wheel_puts_no_general_name_into_site_packages(wheel: Path) -> None:
    tops = {name.partition("/")[0] for name in names(wheel) if not _is_ours(name)}
    assert len(tops) == 1
    assert tops.pop().endswith(".dist-info")


def test_the_source_archive_gives_the_same_wheel(
    sources: Path, wheel: Path, tmp_path: Path
) -> None:
    archive = building.build_archive(sources, tmp_path)
    assert names(building.build(archive, tmp_path / "wheel")) == names(wheel)


def test_an_index_has_all_it_shows(wheel: Path) -> None:
    with ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith("/METADATA"))
        told = email.message_from_bytes(archive.read(name))
        assert archive.read(name.replace("METADATA", "licenses/LICENSE"))
    assert told["License-Expression"] == "Apache-2.0"
    assert told["Description-Content-Type"] == "text/markdown"
    page = str(told.get_payload())
    assert page.startswith("# pd-deploy\n")
    links = re.findall(r"\]\(([^)]*)\)", page)
    assert links
    assert [link for link in links if not link.startswith("https://")] == []


def test_the_lab_finds_out_which_files_are_executable() -> None:
    """A wheel does not keep every mode, and no links."""
    trees = ("lab/standin/host/", "lab/standin/image/")
    files = {name: x for name, x in building.tracked().items() if name.startswith(trees)}
    assert set(files.values()) == {True, False}
    assert [name for name in files if (ROOT / name).is_symlink()] == []
    made = {name: mode_of((ROOT / name).read_bytes()) == 0o755 for name in files}
    assert made == files


def _is_ours(name: str) -> bool:
    return name.startswith("pd_deploy/")
