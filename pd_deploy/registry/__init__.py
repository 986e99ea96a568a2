"""Asking a registry which tags a repository has, and their digests (contract section 8.3).

    (repository,) = repositories_of(deployment)
    async with client.reach(repository, login=login, via=host) as registry:
        search = await client.search([registry], tags.policy_of(deployment))

Nothing is pulled. `archives` reads what images in local files are.
"""
