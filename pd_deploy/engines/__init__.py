"""What an instance runs. An engine is a module that follows `base.Engine`."""

from pd_deploy.engines import sglang, vllm
from pd_deploy.engines.base import Engine
from pd_deploy.engines.omniinfer import engine as omniinfer

_ENGINES: dict[str, Engine] = {"omniinfer": omniinfer, "sglang": sglang, "vllm": vllm}


def get(name: str) -> Engine:
    """Return the engine that the deployment file names."""
    return _ENGINES[name]
