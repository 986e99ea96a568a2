"""Asking a registry which tags a repository has and what they stand for (contract section 8.3).

    async with registry.reach(registry.place_of(deployment), login=login, via=host) as found:
        build = await registry.newest(found, tags.policy_of(deployment))

Nothing is pulled.
"""

from pd_deploy.registry.client import Found, Registry, newest, reach
from pd_deploy.registry.place import Place, place_of
from pd_deploy.registry.ways import Connect, straight, through, trust

__all__ = [
    "Connect",
    "Found",
    "Place",
    "Registry",
    "newest",
    "place_of",
    "reach",
    "straight",
    "through",
    "trust",
]
