"""Asking a registry which tags a repository has and what they stand for (contract section 8.3).

    async with registry.reach(registry.repository_of(deployment), login=login, via=host) as found:
        build = await registry.newest(found, tags.policy_of(deployment))

Nothing is pulled.
"""
