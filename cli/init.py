"""`pd-deploy init`: make a directory for a user to deploy from."""

from collections.abc import Iterator
from pathlib import Path
from string import Template

from pd_deploy.errors import InvalidInput, Problem

EXAMPLES = Path(__file__).parents[1] / "examples"
TEMPLATES = Path(__file__).parent / "scaffold"
# How to prepare a lab for an example, and where the lab keeps its keys.
_LAB_PREPARED = {
    "omniinfer": "Start the lab, two simulated hosts on this machine, as root: `pd-deploy lab up`.",
    "sglang": "Start the lab, two simulated hosts on this machine, and put SGLang's stand-in and "
    "router there, as root: `pd-deploy lab up`, then `pd-deploy lab sglang`.",
    "vllm": "Start the lab, two simulated hosts on this machine, and install vLLM for it, as root: "
    "`pd-deploy lab up`, then `pd-deploy lab vllm`.",
}
_LAB = Path("/var/lib/pd-deploy-lab/pdlab")


def examples() -> list[str]:
    """List the names of the deployment files that come with pd-deploy."""
    return sorted(path.stem for path in EXAMPLES.glob("*.yaml"))


def scaffold(directory: Path, example: str) -> list[Path]:
    """Write an example's deployment file, a prefect.yaml and a README.

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
        message = "exists already and was not changed; choose another directory, or move it away"
        raise InvalidInput([Problem(str(path), message) for path in taken])
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
    """Yield a deployment file and those that it extends."""
    import yaml

    yield path
    if parent := yaml.safe_load(path.read_text()).get("extends"):
        yield from _with_extended(path.parent / parent)


def _values(example: str) -> dict[str, str]:
    from pd_deploy.config.load import load_deployment

    deployment = load_deployment(EXAMPLES / f"{example}.yaml")
    is_lab = example.startswith("lab-")
    return {
        "name": example,
        "engine": deployment.engine,
        "block": deployment.ssh.credentials or "pd-ssh",
        "prepare": _LAB_PREPARED[deployment.engine]
        if is_lab
        else f"Edit `{example}.yaml`: enter your hosts' addresses, and adapt the image, the model "
        "and the paths.",
        "key": f"{_LAB}/id_ed25519" if is_lab else "~/.ssh/id_ed25519",
        "known_hosts": f"{_LAB}/known_hosts" if is_lab else "~/.ssh/known_hosts",
    }
