"""How pd-deploy logs in to the hosts."""

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from pd_deploy.errors import AuthenticationFailed, HostKeyMismatch
from pd_deploy.hosts.login import HostKeys, Jump, Login


class SshCredentials(Block):
    """SSH credentials for the hosts of a deployment.

    Give a private key or a password. Without either, pd-deploy uses the SSH agent and
    ~/.ssh/config of the user that runs the worker.

    Example:
        ```python
        SshCredentials(
            private_key=Path("id_ed25519").read_text(),
            known_hosts=Path("known_hosts").read_text(),
        ).save("pd-ssh")
        ```
    """

    _block_type_name = "pd-deploy SSH credentials"
    _block_type_slug = "pd-deploy-ssh"
    _description = "How pd-deploy logs in to the hosts of a deployment."

    private_key: SecretStr | None = Field(
        default=None, description="The private key itself (PEM or OpenSSH format), not its path."
    )
    passphrase: SecretStr | None = Field(
        default=None, description="Passphrase of the private key, if it has one."
    )
    password: SecretStr | None = Field(
        default=None, description="The user's password, if there is no key."
    )
    known_hosts: str | None = Field(
        default=None,
        description="Lines of a known_hosts file, as ssh-keyscan prints them. By default, "
        "~/.ssh/known_hosts of the user that runs the worker is used.",
    )
    trust_on_first_use: bool = Field(
        default=False,
        description="Accept and remember the key of an unknown host. "
        "A changed key is still refused.",
    )
    jump_host: str | None = Field(default=None, description="Host to connect through, if any.")
    jump_user: str | None = Field(default=None, description="User on the jump host.")
    jump_port: int = Field(default=22, description="SSH port of the jump host.")

    def login(self, *, user: str, port: int) -> Login:
        """Return the credentials as a user's login."""
        jump = Jump(self.jump_host, self.jump_user, self.jump_port) if self.jump_host else None
        return Login(
            user=user,
            port=port,
            private_key=_reveal(self.private_key),
            passphrase=_reveal(self.passphrase),
            password=_reveal(self.password),
            known_hosts=self.known_hosts,
            trust_on_first_use=self.trust_on_first_use,
            jump=jump,
        )

    def unusable(self) -> dict[str, str]:
        """Say of the key and the known hosts why they can't be used, by field, if they can't."""
        login, reasons = self.login(user="root", port=22), {}
        for field, check in (
            ("private_key", login.options),
            ("known_hosts", lambda where: HostKeys(where, login).option()),
        ):
            try:
                check("")
            except (AuthenticationFailed, HostKeyMismatch) as error:
                reasons[field] = f"{error.message}; {error.hint}"
        return reasons


def _reveal(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
