"""Asking a registry which tags a repository has, and their digests (contract section 8.3).

    async with client.reach(repository_of(deployment), login=login, via=host) as registry:
        build = await client.newest(registry, tags.policy_of(deployment))

Nothing is pulled. `archives` reads what images in local files are.
"""
