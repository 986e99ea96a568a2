"""Reading the text files that people name: never a device, nor more than such a file can have."""

from pathlib import Path

from pd_deploy.errors import InvalidInput, Problem

# A deployment file has some 10 kB; this stops a wrong path, such as a disk image.
MAX_BYTES = 1 << 20


def read(path: Path, named_by: str = "", named_in: str | None = None) -> str:
    """Read a text file.

    Args:
        named_by: the option, or key, that names the file, if one does; messages begin with it.
        named_in: the file that has that key.

    Raises:
        InvalidInput: it can't be read, is not a regular file, has more than `MAX_BYTES`, or is not
            UTF-8.
    """

    def invalid(message: str) -> InvalidInput:
        if named_by:
            return InvalidInput([Problem(named_by, f"{path}: {message}")], source=named_in)
        return InvalidInput([Problem("", message)], source=str(path))

    try:
        content = _bytes(path)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise invalid(f"cannot be read: {reason}") from error
    if content is None:
        raise invalid("expected a file, found a directory or a device")
    if len(content) > MAX_BYTES:
        raise invalid(f"expected a file of at most {MAX_BYTES} bytes, found a larger one")
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise invalid(f"expected UTF-8 text, found other bytes at offset {error.start}") from error


def _bytes(path: Path) -> bytes | None:
    """Read a regular file, of a large one no more than shows that; return None for others.

    Nothing else is opened: a FIFO would let the reader wait for a writer.
    """
    if not path.is_file():
        path.stat()  # says why, if nothing is there
        return None
    with path.open("rb") as file:
        return file.read(MAX_BYTES + 1)
