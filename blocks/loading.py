"""Reading the blocks that a deployment names.

Prefect reads them where it is loaded, as in a run. Elsewhere the server is asked directly, which
spares a second; Prefect is loaded only to say what is wrong.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from pydantic import SecretStr, ValidationError

from pd_deploy.blocks import server
from pd_deploy.blocks.fields import RegistryFields, SecretFields, SshFields
from pd_deploy.config.models import ApiKey, Deployment
from pd_deploy.errors import InvalidInput, Problem
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.login import Login

F = TypeVar("F", SshFields, RegistryFields, SecretFields)


@dataclass(frozen=True)
class Credentials:
    """What a deployment's blocks, and the environment, hold for it.

    Attributes:
        logins: by block, what makes a login of a user and a port.
        api_key: what the service wants of its clients, if anything.
    """

    logins: dict[str, Callable[[str, int], Login]] = field(default_factory=dict)
    registry_login: RegistryLogin | None = None
    api_key: SecretStr | None = None


async def of(deployment: Deployment, *, with_key: bool) -> Credentials:
    """Load the blocks that a deployment names, and with `with_key` its API key.

    Raises:
        InvalidInput: blocks and variables that do not exist, all at once.
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
    api_key = None
    try:
        api_key = await _api_key(deployment.api_key) if with_key else None
    except InvalidInput as error:
        problems += error.problems
    if problems:
        raise InvalidInput(problems)
    return Credentials(logins, registry_login, api_key)


async def _api_key(given: ApiKey | None) -> SecretStr | None:
    if given is None:
        return None
    if given.credentials:
        return (await _load(SecretFields, given.credentials, "api_key.credentials")).value
    if key := os.environ.get(given.environment or ""):
        return SecretStr(key)
    raise InvalidInput(
        [
            Problem(
                "api_key.environment",
                f"expected the variable {given.environment} in pd-deploy's environment (that of "
                "the worker, for its runs), found none",
            )
        ]
    )


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
    from prefect.blocks.system import Secret

    from pd_deploy.blocks.registry import RegistryCredentials
    from pd_deploy.blocks.ssh import SshCredentials

    try:
        if issubclass(kind, SecretFields):
            secret: Any = await Secret.aload(name)
            return kind.model_validate({"value": str(secret.get())})
        blocks: list[type[Block]] = [SshCredentials, RegistryCredentials]
        block = await next(one for one in blocks if issubclass(one, kind)).aload(name)
    except ValueError as error:
        if isinstance(error, json.JSONDecodeError) or "proxy URL" in str(error):
            raise  # what answers is no Prefect server, or there is no way to it
        by_command = f", or with `{kind.command} {name}`" if kind.command else ""
        message = (
            f"expected a block {kind.slug}/{name}, found none; create it in the UI under Blocks"
        )
        raise InvalidInput([Problem(key, f"{message}{by_command}")]) from error
    assert isinstance(block, kind)
    return block
