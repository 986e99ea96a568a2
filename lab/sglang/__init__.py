"""SGLang for the lab: a strict stand-in for its server, and its own router.

The stand-in takes the options that the real parser takes, by a table made from it, and hands KV
over as SGLang does: bootstrap server, rooms, what both sides must have alike. It needs no device
and no package beyond Python's own. The router is in vLLM's directory, which hosts see.
"""

import json
from pathlib import Path

from pd_deploy.lab import Lab, images, vllm

IMAGE, IMAGE_TAG = "sglang", "v0.5.23"
STANDIN = Path(__file__).with_name("standin")
ROUTER = vllm.HOME / "sglang-router"
_PACKAGES = "usr/local/lib/python3.11/dist-packages"


def server_args() -> str:
    """Write the source that adds the options, as the original has it: who asks the image reads it
    there."""
    table = json.loads((STANDIN / "sglang/options.json").read_text())
    calls = [
        "        parser.add_argument(\n"
        + "".join(f"            {json.dumps(name)},\n" for name in row["names"])
        + "        )\n"
        for row in table
    ]
    return "class ServerArgs:\n    @staticmethod\n    def add_cli_args(parser):\n" + "".join(calls)


def prepare_router(say: vllm.Say) -> None:
    """Install the router unless it is there."""
    lock = Path(__file__).with_name("router.lock")
    vllm.prepare_program(ROUTER, lock, "SGLang's router", say)


def push(lab: Lab, say: vllm.Say = lambda _: None) -> str:
    """Install the router unless it is there, and push the stand-in; return its name.

    It lies over the packages of vLLM's image, which a lab may have made already.
    """
    prepare_router(say)
    files = {
        f"{_PACKAGES}/{path.relative_to(STANDIN)}": path.read_bytes()
        for path in sorted(STANDIN.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{_PACKAGES}/sglang/srt/server_args.py"] = server_args().encode()
    tree = images.tar_files(files)
    return lab.push_packages(IMAGE, IMAGE_TAG, vllm.IMAGE_PACKAGES, tree=tree, say=say)
