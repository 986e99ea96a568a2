"""How the hosts' Docker engines log in to the image registry."""

from prefect.blocks.core import Block
from pydantic import Field, SecretStr

from pd_deploy.hosts.container_values import RegistryLogin


class RegistryCredentials(Block):
    """Credentials for the image registry. They are sent with each pull, never stored on a host.

    Example:
        ```python
        RegistryCredentials(username="robot", password="…").save("pd-registry")
        ```
    """

    _block_type_name = "pd-deploy registry credentials"
    _block_type_slug = "pd-deploy-registry"
    _description = "How the hosts' Docker engines log in to the image registry."

    username: str = Field(description="User or robot account.")
    password: SecretStr = Field(description="Password or access token.")

    def login(self) -> RegistryLogin:
        """Return the credentials in the form that the Docker engine takes."""
        return RegistryLogin(self.username, self.password.get_secret_value())
