"""omni-infer's own package, found and loaded as vLLM does it: wherever Python imports it from.

So code that is mounted over the image's, or installed in its place, is what runs; and code of
another age registers other connectors than the engine is asked for.
"""

import importlib
import importlib.util
import sys
import traceback
import types
from pathlib import Path
from typing import Any

from standin import age
from standin.rules import Refusal

ROOT = Path(__file__).resolve().parents[5]
_FACTORY = "vllm.distributed.kv_transfer.kv_connector.factory"


class KVConnectorFactory:
    """vLLM's list of connectors, as far as plug-ins add to it."""

    registered: dict[str, tuple[str, str]] = {}

    @classmethod
    def register_connector(cls, name: str, module: str, class_name: str) -> None:
        """Add a connector; its module is imported when it is used."""
        cls.registered[name] = (module, class_name)


def load(connector: str) -> str:
    """Load the package and return its revision, which answers tell; the engine is of its age.

    Raises:
        Refusal: there is none, or it does not register this connector.
    """
    name = "omni" if age.contract() == "v0" else "omni_npu"
    if ROOT != Path("/") and importlib.util.find_spec(name) is None:
        return ""  # a process without an image of its own: Python has nothing installed there
    _offer_factory()
    try:
        package: Any = importlib.import_module(name)
    except Exception as error:
        raise Refusal("plugin", f"{name} can't be imported: {error!r}") from None
    age.follow(package.__file__)
    try:
        package.register()
    except Exception:
        # As vLLM does it: what the plug-in should have brought is missed later.
        print(f"ERROR Failed to load plugin {name}", flush=True)
        traceback.print_exc()
    if connector not in KVConnectorFactory.registered:
        known = ", ".join(KVConnectorFactory.registered) or "none"
        detail = f"Unsupported connector type: {connector}, {package.__file__} registers {known}"
        raise Refusal("plugin", detail)
    revision = getattr(package, "REVISION", "")
    print(f"INFO {name} {revision} from {package.__file__}", flush=True)
    return revision


def _offer_factory() -> None:
    """Offer the one module of vLLM that plug-ins import."""
    parts = _FACTORY.split(".")
    for depth in range(len(parts)):
        name = ".".join(parts[: depth + 1])
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules[_FACTORY].KVConnectorFactory = KVConnectorFactory
