"""What an instance runs. An engine is a module, or an object, that follows `base.Engine`."""

from pd_deploy.engines.base import Engine
from pd_deploy.engines.omniinfer import engine as omniinfer
from pd_deploy.engines.sglang import Sglang
from pd_deploy.engines.vllm import Vllm

_ENGINES: dict[str, Engine] = {"omniinfer": omniinfer, "sglang": Sglang(), "vllm": Vllm()}


def get(name: str) -> Engine:
    """Return the engine that the deployment file names."""
    return _ENGINES[name]
