"""Hints name the file that a command was given."""

from pathlib import Path

import pytest

from pd_deploy.cli import locks, main
from pd_deploy.errors import OnHold
from tests.unit import example


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "my file.yaml"
    path.write_text(example.FILE.read_text().replace(", credentials: pd-ssh", ""))
    return path


def test_a_hint_is_ready_to_be_typed(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    async def held(*_: object) -> str:
        raise OnHold(
            "expected to be let, found FILE held",
            hint="`pd-deploy lock release FILE` or `cat FILE`, `pd-deploy logs FILE 2-a`",
        )

    monkeypatch.setattr(locks, "status", held)
    monkeypatch.setattr("sys.argv", ["pd-deploy", "lock", "status", str(file)])
    with pytest.raises(SystemExit) as end:
        main.main()
    assert end.value.code == main.FAILED
    told = capsys.readouterr().err
    assert told == (
        "pd-deploy: expected to be let, found FILE held → "
        f"`pd-deploy lock release '{file}'` or `cat FILE`, `pd-deploy logs '{file}' 2-a`\n"
    )
