"""What runs a load generator in a container: bounded in time, and gone with whoever waits for it.

Its source is sent to whatever Python the image has, so it needs no more than the standard library
of 3.9. What it is told comes as its one argument; its standard input is open for as long as
somebody waits for the answer.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

MARK = "pd-deploy: the load generator "
PLACE = "{directory}"
"""In an argument: the directory that is removed at the end."""
READ = ("duration", "ttfts", "output_lens", "errors")
MOST_SAID = 2000  # characters of what the generator printed last
# Where the generator finds its package, asked of its own Python; it imports nothing of it.
LOOK = """
import importlib.util, importlib.metadata, json, sys
spec = importlib.util.find_spec(sys.argv[1])
try:
    version = importlib.metadata.version(sys.argv[1])
except importlib.metadata.PackageNotFoundError:
    version = ""
print(json.dumps([spec.origin if spec else None, version]))
"""
LOOK_S = 60
# Requests to a loopback address must not go through a proxy that an image or its host has set, nor
# may a tokenizer be looked for anywhere but in the model's directory. Unbuffered, what it printed
# last is what it said last, also where that are errors.
UNSET = ("http_proxy", "https_proxy", "all_proxy")
SET = {
    "HF_HUB_OFFLINE": "1",
    "PYTHONUNBUFFERED": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
}


def run(told: dict[str, Any]) -> dict[str, Any]:
    """Run a generator; return what it found, or what came in place of that.

    Args:
        told: `command`; `package`, and the `sources` in it of which one has its options. Without
            more, it is only looked for. To run it: its `arguments`; `if_known`, alternatives of
            options: the first whose names its source has is passed on; `seconds`; `result`, the
            file that it writes.
    """
    path = shutil.which(told["command"][0])
    if path is None:
        return {"missing": f"there is no program {told['command'][0]}"}
    origin, version = package(interpreter(Path(path)), told["package"])
    source = options_in(Path(origin).parent, told["sources"]) if origin else ""
    if not source:
        sources = " or ".join(told["sources"])
        lacks = f"{version} has no {sources}" if origin else "is not installed"
        return {"missing": f"package {told['package']} {lacks}"}
    if "arguments" not in told:
        return {"version": version}
    known = [
        option
        for alternatives in told["if_known"]
        for option in next((a for a in alternatives if all_known(a, source)), [])
    ]
    with tempfile.TemporaryDirectory(prefix="pd-deploy-load-") as directory:
        words = [*told["command"], *told["arguments"], *known]
        argv = [word.replace(PLACE, directory) for word in words]
        ended = attended([path, *argv[1:]], Path(directory), told["seconds"])
        result = Path(directory, told["result"])
        found = slimmed(json.loads(result.read_text())) if result.is_file() else None
    return {"version": version, "result": found, **ended}


def interpreter(program: Path) -> str:
    """Return the Python that runs a program; this one where it is not written in Python."""
    if re.match(r"python", program.name):
        return str(program)
    with program.open("rb") as file:
        first = file.readline().decode(errors="replace")
    words = first[2:].split() if first.startswith("#!") else []
    word = next((word for word in words if re.match(r"python", Path(word).name)), "")
    return (shutil.which(word) if word else None) or sys.executable


def package(python: str, name: str) -> tuple[str | None, str]:
    """Ask a Python for the place of a package, and for its version."""
    argv = [python, "-c", LOOK, name]
    said = subprocess.run(argv, capture_output=True, text=True, timeout=LOOK_S, check=False)
    try:
        origin, version = json.loads(said.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        return None, ""
    return origin, version


def options_in(package: Path, sources: list[str]) -> str:
    """Read the first of some sources that a package has; "" where it has none."""
    paths = (package / source for source in sources)
    return next((path.read_text(errors="replace") for path in paths if path.is_file()), "")


def all_known(options: list[str], source: str) -> bool:
    """Tell whether a source has all options of some words."""
    return all(f'"{word}"' in source for word in options if word.startswith("--"))


def attended(argv: list[str], directory: Path, seconds: float) -> dict[str, Any]:
    """Run a command until it ends, its time is over, or nobody waits for it any more."""
    output = directory / "output"
    with output.open("wb") as file:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            env={k: v for k, v in os.environ.items() if k.lower() not in UNSET} | SET,
            cwd=directory,
            start_new_session=True,
        )
    threading.Thread(target=end_with_input, args=(process,), daemon=True).start()
    late = False
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        late = True
    finally:
        end(process)
    said = output.read_text(errors="replace").replace("\r", "\n").rstrip()[-MOST_SAID:]
    return {"late": late, "code": process.wait(), "said": said}


def end_with_input(process: subprocess.Popen[bytes]) -> None:
    """End a process when this one's standard input ends."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def slimmed(result: dict[str, Any]) -> dict[str, Any]:
    """Keep of a result what is read: SGLang's has all that servers say of themselves, and each
    token's own time is long."""
    kept = {key: result[key] for key in READ if key in result}
    return {**kept, "itls": [[sum(times)] if times else [] for times in result.get("itls") or []]}


if __name__ == "__main__":
    print(MARK + json.dumps(run(json.loads(sys.argv[1]))))
