"""How the hosts' Docker engines log in to the image registry."""

from prefect.blocks.core import Block

from pd_deploy.blocks.fields import RegistryFields


class RegistryCredentials(RegistryFields, Block):
    """Credentials for the image registry. They are sent with each pull, never stored on a host.

    Example:
        ```python
        RegistryCredentials(username="robot", password="…").save("pd-registry")
        ```
    """

    _block_type_name = "pd-deploy registry credentials"
    _block_type_slug = RegistryFields.slug
    _description = "How the hosts' Docker engines log in to the image registry."
