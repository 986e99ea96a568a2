"""Programs that run in a container, by whatever Python its image has. Pure."""

# As the start scripts do it: ~/.bashrc says which Python that is.
_BASHRC = "source ~/.bashrc >/dev/null 2>&1\n"
_PYTHON = 'exec "$(command -v python || command -v python3)" "$@"'


def in_python(source: str, *arguments: str, setup: str = "") -> list[str]:
    """Return the command that runs a program's source in the Python of an image, after the lines of
    `setup`."""
    return ["bash", "-c", f"{_BASHRC}{setup}{_PYTHON}", "bash", "-c", source, *arguments]
