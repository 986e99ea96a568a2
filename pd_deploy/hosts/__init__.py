"""How a host is reached: SSH, files, the Docker engine through SSH, and facts."""

from pd_deploy.hosts.containers import (
    DEPLOYMENT_LABEL,
    ContainerSpec,
    ContainerState,
    DeviceRequest,
    EngineInfo,
    Image,
    Mount,
    PullProgress,
    RegistryLogin,
    create_kwargs,
)
from pd_deploy.hosts.engine import Engine
from pd_deploy.hosts.facts import Facts
from pd_deploy.hosts.files import File
from pd_deploy.hosts.host import Completed, Host, Hosts
from pd_deploy.hosts.login import Jump, Login

__all__ = [
    "DEPLOYMENT_LABEL",
    "Completed",
    "ContainerSpec",
    "ContainerState",
    "DeviceRequest",
    "Engine",
    "EngineInfo",
    "Facts",
    "File",
    "Host",
    "Hosts",
    "Image",
    "Jump",
    "Login",
    "Mount",
    "PullProgress",
    "RegistryLogin",
    "create_kwargs",
]
