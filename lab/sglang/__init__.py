"""SGLang for the lab: a strict stand-in for its server, and its own router.

The stand-in takes the options that the real parser takes, by a table made from it, and hands KV
over as SGLang does: bootstrap server, rooms, what both sides must have alike. It needs no device
and no package beyond Python's own. The router is in vLLM's directory, which hosts see.
"""

import json
from pathlib import Path

from pd_deploy.lab import Lab, contracts, images, vllm

IMAGE, IMAGE_TAG = "sglang", "v0.5.23"
STANDIN = Path(__file__).with_name("standin")
ROUTER = vllm.HOME / "sglang-router"
_LOAD = contracts.STANDIN / "image/usr/local/Ascend/latest/standin/load.py"
_PACKAGES = "usr/local/lib/python3.11/dist-packages"


def sources() -> dict[str, bytes]:
    """Return what is installed of the stand-in, and what of the original is read of who asks an
    image: its version, and the source that adds the options."""
    files = {
        str(path.relative_to(STANDIN)): path.read_bytes()
        for path in sorted(STANDIN.rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    files[f"{IMAGE}/benchmark/load.py"] = _LOAD.read_bytes()
    version = IMAGE_TAG.removeprefix("v")
    described = f"Metadata-Version: 2.1\nName: {IMAGE}\nVersion: {version}\n"
    files[f"{IMAGE}-{version}.dist-info/METADATA"] = described.encode()
    files[f"{IMAGE}/srt/server_args.py"] = _server_args().encode()
    return files


def prepare_router(say: vllm.Say) -> None:
    """Install the router unless it is there."""
    lock = Path(__file__).with_name("router.lock")
    vllm.prepare_program(ROUTER, lock, "SGLang's router", say)


def push(lab: Lab, say: vllm.Say = lambda _: None) -> str:
    """Install the router unless it is there, and push the stand-in; return its name.

    It lies over the packages of vLLM's image, which a lab may have made already.
    """
    prepare_router(say)
    files = {f"{_PACKAGES}/{path}": content for path, content in sources().items()}
    tree = images.tar_files(files)
    return lab.push_packages(IMAGE, IMAGE_TAG, vllm.IMAGE_PACKAGES, tree=tree, say=say)


def _server_args() -> str:
    table = json.loads((STANDIN / "sglang/options.json").read_text())
    calls = [
        "        parser.add_argument(\n"
        + "".join(f"            {json.dumps(name)},\n" for name in row["names"])
        + "        )\n"
        for row in table
    ]
    return "class ServerArgs:\n    @staticmethod\n    def add_cli_args(parser):\n" + "".join(calls)
