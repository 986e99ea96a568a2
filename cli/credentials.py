"""`pd-deploy credentials`: save secrets as Prefect blocks, with no secret on the command line."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from pd_deploy.config import text_files
from pd_deploy.errors import InvalidInput, Problem

app = typer.Typer(
    help="Save credentials as Prefect blocks.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Name = Annotated[str, typer.Argument(help="The name that the deployment file gives the block.")]


@app.command()
def ssh(
    name: Name,
    private_key: Annotated[
        Path | None, typer.Option(help="The private key's file; its content is saved.")
    ] = None,
    passphrase: Annotated[bool, typer.Option(help="Ask for the key's passphrase.")] = False,
    password: Annotated[bool, typer.Option(help="Ask for the user's password.")] = False,
    known_hosts: Annotated[
        Path | None,
        typer.Option(help="A known_hosts file with the hosts' keys, as ssh-keyscan prints them."),
    ] = None,
    jump_host: Annotated[str | None, typer.Option(help="Connect through this host.")] = None,
    jump_user: Annotated[str | None, typer.Option(help="User on the jump host.")] = None,
    jump_port: Annotated[int, typer.Option(help="SSH port of the jump host.")] = 22,
    trust_on_first_use: Annotated[
        bool, typer.Option(help="Accept and remember the key of an unknown host.")
    ] = False,
) -> None:
    """Save SSH credentials.

    You are prompted for the passphrase or password. Without a terminal they are read from standard
    input, one line each. They are never given as arguments.

    Example: pd-deploy credentials ssh pd-ssh --private-key ~/.ssh/id_ed25519
    --known-hosts ~/.ssh/known_hosts
    """
    from pydantic import SecretStr

    from pd_deploy.blocks.ssh import SshCredentials
    from pd_deploy.cli.prefect_api import save

    def secret(text: str | None) -> SecretStr | None:
        return None if text is None else SecretStr(text)

    block = SshCredentials(
        private_key=secret(_content("--private-key", private_key)),
        passphrase=secret(_ask("Passphrase") if passphrase else None),
        password=secret(_ask("Password") if password else None),
        known_hosts=_content("--known-hosts", known_hosts),
        trust_on_first_use=trust_on_first_use,
        jump_host=jump_host,
        jump_user=jump_user,
        jump_port=jump_port,
    )
    files = {"private_key": private_key, "known_hosts": known_hosts}
    unusable = block.unusable()
    if unusable:
        raise InvalidInput(
            [
                Problem(f"--{k.replace('_', '-')}", f"{files[k]}: {why}")
                for k, why in unusable.items()
            ]
        )
    save(block, name)


@app.command()
def registry(
    name: Name,
    username: Annotated[str, typer.Option(help="User or robot account.")],
) -> None:
    """Save registry credentials.

    You are prompted for the password. Without a terminal it is read from standard input.

    Example: pd-deploy credentials registry pd-registry --username robot
    """
    from pydantic import SecretStr

    from pd_deploy.blocks.registry import RegistryCredentials
    from pd_deploy.cli.prefect_api import save

    save(RegistryCredentials(username=username, password=SecretStr(_ask("Password"))), name)


def _ask(secret: str) -> str:
    if sys.stdin.isatty():
        return str(typer.prompt(secret, hide_input=True))
    return sys.stdin.readline().removesuffix("\n")


def _content(option: str, path: Path | None) -> str | None:
    return None if path is None else text_files.read(path.expanduser(), option)
