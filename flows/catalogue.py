"""The types of pd-deploy's blocks, for the catalogue of blocks in Prefect's UI."""

from pd_deploy.blocks.registry import RegistryCredentials
from pd_deploy.blocks.ssh import SshCredentials


async def block_types() -> None:
    """Register them, so that the UI offers to make them; a step of `build` in prefect.yaml."""
    for kind in (SshCredentials, RegistryCredentials):
        await kind.aregister_type_and_schema()
