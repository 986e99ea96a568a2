"""Reading the blocks that a deployment names.

Prefect reads them where it is loaded, as in a run. Elsewhere the server is asked directly, which
spares a second; Prefect is loaded only to say what is wrong.
"""

import contextlib
import json
import sys
from collections.abc import Callable
from typing import TypeVar

from pydantic import ValidationError

from pd_deploy.blocks import server
from pd_deploy.blocks.fields import RegistryFields, SshFields
from pd_deploy.config.models import Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.login import Login

F = TypeVar("F", SshFields, RegistryFields)


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
            registry_login = (await _load(RegistryFields, block, "registry.credentials")).login()
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
    block = await _load(SshFields, name, key)
    return lambda user, port: block.login(user=user, port=port)


async def _load(kind: type[F], name: str, key: str) -> F:
    if "prefect" not in sys.modules:
        values = await server.block(kind.slug, name)
        with contextlib.suppress(ValidationError):
            if values is not None:
                return kind.model_validate(values)
    return await _by_prefect(kind, name, key)


async def _by_prefect(kind: type[F], name: str, key: str) -> F:
    from prefect.blocks.core import Block

    from pd_deploy.blocks.registry import RegistryCredentials
    from pd_deploy.blocks.ssh import SshCredentials

    blocks: list[type[Block]] = [SshCredentials, RegistryCredentials]
    try:
        block = await next(one for one in blocks if issubclass(one, kind)).aload(name)
    except json.JSONDecodeError:
        raise  # what answers is no Prefect server
    except ValueError as error:
        raise InvalidInput(
            [
                Problem(
                    key,
                    f"expected a block {kind.slug}/{name}, found none; create it in the UI under "
                    f"Blocks, or with `{kind.command} {name}`",
                )
            ]
        ) from error
    assert isinstance(block, kind)
    return block
