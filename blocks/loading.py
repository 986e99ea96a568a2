"""Reading the blocks that a deployment names."""

import json
from collections.abc import Callable
from typing import TypeVar

from prefect.blocks.core import Block

from pd_deploy.blocks.registry import RegistryCredentials
from pd_deploy.blocks.ssh import SshCredentials
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.login import Login

B = TypeVar("B", bound=Block)

_COMMANDS: dict[type[Block], str] = {
    SshCredentials: "pd-deploy credentials ssh",
    RegistryCredentials: "pd-deploy credentials registry",
}


async def of(
    deployment: Deployment,
) -> tuple[dict[str, Callable[[str, int], Login]], RegistryLogin | None]:
    """Load the blocks that a deployment names: those for SSH by name, and the registry's login.

    Raises:
        InvalidInput: blocks that do not exist, all at once.
    """
    keys = {"ssh.credentials": deployment.ssh.credentials}
    for name, entry in deployment.hosts.items():
        keys[f"hosts.{name}.ssh.credentials"] = entry.ssh.credentials if entry.ssh else None
    problems: list[Problem] = []
    logins: dict[str, Callable[[str, int], Login]] = {}
    registry_login = None
    for key, block in keys.items():
        if block and block not in logins:
            try:
                logins[block] = await ssh(block, key)
            except InvalidInput as error:
                problems += error.problems
    if block := deployment.registry.credentials:
        try:
            registry_login = (
                await _load(RegistryCredentials, block, "registry.credentials")
            ).login()
        except InvalidInput as error:
            problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return logins, registry_login


async def ssh(name: str, key: str) -> Callable[[str, int], Login]:
    """Load a block for SSH; return what makes a login of a user and a port.

    Args:
        key: where the block is named.

    Raises:
        InvalidInput: there is none.
    """
    block = await _load(SshCredentials, name, key)
    return lambda user, port: block.login(user=user, port=port)


async def _load(kind: type[B], name: str, key: str) -> B:
    try:
        block = await kind.aload(name)
    except json.JSONDecodeError:
        raise  # what answers is no Prefect server
    except ValueError as error:
        raise InvalidInput(
            [
                Problem(
                    key,
                    f"expected a block {kind.get_block_type_slug()}/{name}, found none; create it "
                    f"in the UI under Blocks, or with `{_COMMANDS[kind]} {name}`",
                )
            ]
        ) from error
    return block
