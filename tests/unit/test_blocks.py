"""The blocks that a deployment names."""

import pytest
from prefect.blocks.core import Block

from pd_deploy.blocks import opening
from pd_deploy.errors import InvalidInput
from tests.unit import example


async def test_unknown_blocks_of_both_kinds_are_told_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def missing(cls: type[Block], name: str) -> None:
        raise ValueError(name)

    monkeypatch.setattr(Block, "aload", classmethod(missing))
    deployment = example.service(
        {
            "registry": {"credentials": "one"},
            "ssh": {"credentials": "two"},
            "hosts": {"a": {"address": "10.0.0.1", "ssh": {"credentials": "three"}}},
        }
    )
    with pytest.raises(InvalidInput) as caught:
        async with opening.open_session(deployment):
            pass
    assert {problem.key for problem in caught.value.problems} == {
        "ssh.credentials",
        "hosts.a.ssh.credentials",
        "registry.credentials",
    }
    for command in ("credentials registry one", "credentials ssh two", "credentials ssh three"):
        assert f"pd-deploy {command}" in str(caught.value)
