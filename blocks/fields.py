"""What the blocks hold, and logins made of it; blocks themselves need Prefect."""

from typing import ClassVar

from pydantic import BaseModel, Field, SecretStr

from pd_deploy.errors import AuthenticationFailed, HostKeyMismatch
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.hosts.login import HostKeys, Jump, Login


class SshFields(BaseModel):
    """How to log in to the hosts of a deployment."""

    slug: ClassVar = "pd-deploy-ssh"
    command: ClassVar = "pd-deploy credentials ssh"

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


class RegistryFields(BaseModel):
    """How to log in to the image registry."""

    slug: ClassVar = "pd-deploy-registry"
    command: ClassVar = "pd-deploy credentials registry"

    username: str = Field(description="User or robot account.")
    password: SecretStr = Field(description="Password or access token.")

    def login(self) -> RegistryLogin:
        """Return the credentials in the form that the Docker engine takes."""
        return RegistryLogin(self.username, self.password.get_secret_value())


class SecretFields(BaseModel):
    """Prefect's own block for one secret, such as an API key."""

    slug: ClassVar = "secret"
    command: ClassVar = ""  # `prefect block create secret` opens its form in the UI

    value: SecretStr


def _reveal(secret: SecretStr | None) -> str | None:
    return secret.get_secret_value() if secret else None
