"""From the deployment file to connected hosts: the secrets' way from blocks to logins."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TypeVar

from prefect.blocks.core import Block

from blocks.registry import RegistryCredentials
from blocks.ssh import SshCredentials
from pd_deploy.deployment import Deployment, Ssh
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts import Host, Hosts, Login, RegistryLogin
from pd_deploy.rollout import Site

B = TypeVar("B", bound=Block)

_COMMANDS: dict[type[Block], str] = {
    SshCredentials: "pd-deploy credentials ssh",
    RegistryCredentials: "pd-deploy credentials registry",
}


@asynccontextmanager
async def open_site(deployment: Deployment) -> AsyncIterator[Site]:
    """The deployment's hosts, with the credentials of its blocks; closed at the end.

    Nothing is connected before the first step asks.

    Raises:
        InvalidInput: a block does not exist; all of them at once.
    """
    blocks = await _load_blocks(deployment)
    hosts = [
        Host(
            name,
            entry.address,
            _login(entry.ssh or deployment.ssh, blocks),
            connect_timeout=deployment.gates.connect,
        )
        for name, entry in deployment.hosts.items()
    ]
    async with Hosts(hosts) as opened:
        yield Site(deployment, opened, await _registry_login(deployment))


async def _load_blocks(deployment: Deployment) -> dict[str, SshCredentials]:
    keys = {"ssh.credentials": deployment.ssh.credentials}
    for name, entry in deployment.hosts.items():
        keys[f"hosts.{name}.ssh.credentials"] = entry.ssh.credentials if entry.ssh else None
    problems: list[Problem] = []
    blocks: dict[str, SshCredentials] = {}
    for key, block in keys.items():
        if block and block not in blocks:
            try:
                blocks[block] = await _load(SshCredentials, block, key)
            except InvalidInput as error:
                problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return blocks


def _login(ssh: Ssh, blocks: dict[str, SshCredentials]) -> Login:
    if ssh.credentials:
        return blocks[ssh.credentials].login(user=ssh.user or "root", port=ssh.port)
    return Login(user=ssh.user, port=ssh.port)


async def _registry_login(deployment: Deployment) -> RegistryLogin | None:
    name = deployment.registry.credentials
    if name is None:
        return None
    return (await _load(RegistryCredentials, name, "registry.credentials")).login()


async def _load(kind: type[B], name: str, key: str) -> B:
    try:
        block = await kind.aload(name)
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
