"""How pd-deploy logs in to the hosts."""

from prefect.blocks.core import Block

from pd_deploy.blocks.fields import SshFields


class SshCredentials(SshFields, Block):
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
    _block_type_slug = SshFields.slug
    _description = "How pd-deploy logs in to the hosts of a deployment."
