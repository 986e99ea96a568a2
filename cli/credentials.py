"""Saving secrets as Prefect blocks, without a secret on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from pydantic import SecretStr

from pd_deploy.errors import InvalidInput, Problem

app = typer.Typer(
    help="Save the credentials that a deployment file names, as Prefect blocks.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The block's name, as the deployment file gives it.")]


@app.command()
def ssh(
    name: Name,
    private_key: Annotated[
        Path | None, typer.Option(help="File with the private key; its content is saved.")
    ] = None,
    passphrase: Annotated[bool, typer.Option(help="Ask for the key's passphrase.")] = False,
    password: Annotated[bool, typer.Option(help="Ask for the user's password.")] = False,
    known_hosts: Annotated[
        Path | None,
        typer.Option(help="File with the hosts' keys, as ssh-keyscan prints them."),
    ] = None,
    jump_host: Annotated[str | None, typer.Option(help="Host to go through.")] = None,
    jump_user: Annotated[str | None, typer.Option(help="User on the jump host.")] = None,
    jump_port: Annotated[int, typer.Option(help="SSH port of the jump host.")] = 22,
    trust_on_first_use: Annotated[
        bool, typer.Option(help="Accept the key of a host that is not known yet.")
    ] = False,
) -> None:
    """Save SSH credentials; passphrase and password are asked for, never given as arguments.

    Where there is no terminal they are read from standard input, a line each.

    Example: pd-deploy credentials ssh pd-ssh --private-key ~/.ssh/id_ed25519
    --known-hosts ~/.ssh/known_hosts
    """
    # Prefect takes seconds to import.
    from pd_deploy.blocks.ssh import SshCredentials  # noqa: PLC0415
    from pd_deploy.cli.prefect_api import save  # noqa: PLC0415

    block = SshCredentials(
        private_key=_secret(_content("--private-key", private_key)),
        passphrase=_secret(_ask("Passphrase") if passphrase else None),
        password=_secret(_ask("Password") if password else None),
        known_hosts=_content("--known-hosts", known_hosts),
        trust_on_first_use=trust_on_first_use,
        jump_host=jump_host,
        jump_user=jump_user,
        jump_port=jump_port,
    )
    # A key that cannot be read is better found now than in a run at night.
    block.login(user="root", port=22).options(str(private_key))
    save(block, name)


@app.command()
def registry(
    name: Name,
    username: Annotated[str, typer.Option(help="User or robot account.")],
) -> None:
    """Save registry credentials; the password is asked for, or read from standard input.

    Example: pd-deploy credentials registry pd-registry --username robot
    """
    from pd_deploy.blocks.registry import RegistryCredentials  # noqa: PLC0415  as above
    from pd_deploy.cli.prefect_api import save  # noqa: PLC0415

    save(RegistryCredentials(username=username, password=SecretStr(_ask("Password"))), name)


def _ask(what: str) -> str:
    if sys.stdin.isatty():
        return str(typer.prompt(what, hide_input=True))
    return sys.stdin.readline().removesuffix("\n")


def _secret(text: str | None) -> SecretStr | None:
    return None if text is None else SecretStr(text)


def _content(option: str, path: Path | None) -> str | None:
    if path is None:
        return None
    try:
        return path.expanduser().read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput([Problem(option, f"{path} cannot be read: {error}")]) from error
