"""A service's files as a team keeps them: in git, registered with Prefect, for a site's workers."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path

import yaml

EXAMPLE = "lab-qwq-3p1d"
DEPLOY_LAB = ("--no-prompt", "deploy", "--all", "--prefect-file", "demo/prefect.yaml")
"""What follows `prefect`, in the checkout's directory: register the lab's services."""
GIT = {
    f"GIT_{who}_{what}": value
    for who in ("AUTHOR", "COMMITTER")
    for what, value in (("NAME", "pd-deploy demo"), ("EMAIL", "demo@example.org"))
}
"""Environment of git, which asks for a name."""


def create(
    run: Callable[..., object],
    directory: Path,
    pool: str,
    credentials: tuple[str, Path, Path],
    overrides: Mapping[str, Mapping[str, object]],
) -> None:
    """Make the files and register them; the repository is made beside the directory.

    Args:
        run: runs a command in the directory.
        pool: the site's work pool.
        credentials: the block's name, the key's file and known_hosts.
        overrides: values in sections of the deployment file that differ from the example's.
    """
    repository = directory.with_suffix(".git")
    block, key, known_hosts = credentials
    run("git", "init", "-q", "--bare", "--initial-branch=main", str(repository))
    run("git", "clone", "-q", str(repository), ".")
    run("pd-deploy", "init", ".", "--example", EXAMPLE)
    change(directory, overrides)
    path = directory / "prefect.yaml"
    path.write_text(for_workers_elsewhere(path.read_text(), f"file://{repository}", pool))
    run("git", "add", ".")
    run("git", "commit", "-q", "-m", "The service")
    run("git", "push", "-q", "origin", "HEAD:main")
    run("prefect", "work-pool", "create", pool, "--type", "process")
    run("pd-deploy", "credentials", "ssh", block, "--private-key", str(key),
        "--known-hosts", str(known_hosts))  # fmt: skip
    run("prefect", "--no-prompt", "deploy", "--all")


def change(directory: Path, overrides: Mapping[str, Mapping[str, object]]) -> None:
    """Change values in sections of the deployment file."""
    path = directory / f"{EXAMPLE}.yaml"
    document = yaml.safe_load(path.read_text())
    changed = {name: {**document.get(name, {}), **values} for name, values in overrides.items()}
    path.write_text(yaml.safe_dump(document | changed))


def for_workers_elsewhere(prefect_yaml: str, repository: str, pool: str) -> str:
    """Edit prefect.yaml as its comment says, so that each run fetches its files.

    Raises:
        ValueError: it has no such comment.
    """
    comment = re.search(r"(?m)^# pull:\n(?:#  .*\n)+", prefect_yaml)
    if not comment:
        raise ValueError("expected the lines of `pull` as a comment in prefect.yaml, found none")
    pull = re.sub(r"(?m)^# ", "", comment[0])
    pull = re.sub(r"(?m)(repository:) .*", rf"\1 {repository}", pull)
    return prefect_yaml.replace(comment[0], pull).replace("name: pd-pool", f"name: {pool}")
