"""`pd-deploy init`: a directory of the user's own to deploy from."""

from collections.abc import Iterator
from pathlib import Path
from string import Template

import yaml

from pd_deploy.config.load import load_deployment
from pd_deploy.errors import InvalidInput, Problem

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATES = Path(__file__).parent / "scaffold"
# What a lab needs that real hosts have, and where it keeps its keys.
_LAB_PREPARED = {
    "omniinfer": "Start the lab, two simulated hosts on this machine, as root: `pd-deploy lab up`.",
    "vllm": "Start the lab, two simulated hosts on this machine, and install vLLM for it, as root: "
    "`pd-deploy lab up`, then `pd-deploy lab vllm`.",
}
_LAB = Path("/var/lib/pd-deploy-lab/pdlab")


def examples() -> list[str]:
    """Names of the deployment files that come with pd-deploy."""
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def scaffold(directory: Path, example: str) -> list[Path]:
    """Write an example's deployment file, and what Prefect and its reader need beside it.

    Returns:
        The files written, the deployment file first.

    Raises:
        InvalidInput: there is no such example, a file exists already, or the directory can't be
            written. In the first two cases nothing was written.
    """
    if example not in examples():
        expected = f"expected one of {', '.join(examples())}, found {example}"
        raise InvalidInput([Problem("--example", expected)])
    files = {directory / name: content for name, content in _contents(example).items()}
    taken = [path for path in files if path.exists() or path.is_symlink()]
    if taken:
        expected = "exists already and is left as it is; choose another directory, or move it away"
        raise InvalidInput([Problem(str(path), expected) for path in taken])
    for path, content in files.items():
        try:
            directory.mkdir(parents=True, exist_ok=True)
            with path.open("x") as file:
                file.write(content)
        except OSError as error:
            raise InvalidInput(
                [Problem(str(path), f"cannot be written: {error.strerror}")]
            ) from error
    return list(files)


def _contents(example: str) -> dict[str, str]:
    texts = {path.name: path.read_text() for path in _with_extended(EXAMPLES / f"{example}.yaml")}
    values = _values(example)
    for template in sorted(TEMPLATES.iterdir(), reverse=True):
        texts[template.name] = Template(template.read_text()).substitute(values)
    return texts


def _with_extended(path: Path) -> Iterator[Path]:
    """A deployment file and those that it extends."""
    yield path
    if parent := yaml.safe_load(path.read_text()).get("extends"):
        yield from _with_extended(path.parent / parent)


def _values(example: str) -> dict[str, str]:
    deployment = load_deployment(EXAMPLES / f"{example}.yaml")
    is_lab = example.startswith("lab-")
    return {
        "name": example,
        "engine": deployment.engine,
        "block": deployment.ssh.credentials or "pd-ssh",
        "prepare": _LAB_PREPARED[deployment.engine]
        if is_lab
        else f"Put the addresses of your hosts into `{example}.yaml`, and change what differs: "
        "image, model, paths.",
        "key": f"{_LAB}/id_ed25519" if is_lab else "~/.ssh/id_ed25519",
        "known_hosts": f"{_LAB}/known_hosts" if is_lab else "~/.ssh/known_hosts",
    }
