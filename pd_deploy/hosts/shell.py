"""Commands as any login shell takes them, and where their own output begins. Pure.

sshd hands a command to the user's login shell, which may be csh, and whose start-up files may print
something or exit before the command runs.
"""

import base64
import re
import shlex
from collections.abc import Sequence

MARK = b"pd-deploy-begins\n"
"""What both output streams have before the command's own output."""

_WORD = MARK.decode().strip()
# A newline ends csh's quotes and "!" is its history; fish takes backslashes within quotes.
_MISREAD = re.compile(r"[\n\r!\\]")


def line(argv: Sequence[str]) -> str:
    """Return a command line that csh, fish and POSIX shells take alike: it prints `MARK` to both
    output streams, then runs the command."""
    script = f"echo {_WORD}; echo {_WORD} >&2; exec {shlex.join(argv)}"
    # In place of the login shell, so that what its files leave for its end is not printed: `trap`.
    plain = shlex.join(["exec", "sh", "-c", script])
    if not _MISREAD.search(plain):
        return plain
    encoded = base64.b64encode(script.encode()).decode()
    return f"""exec sh -c 'eval "$(echo {encoded} | base64 -d)"'"""
