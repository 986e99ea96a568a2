"""Running the stand-in's proxy scripts as on a machine of their own, with Debian's nginx and its
module of Lua, unpacked but not installed."""

import os
import subprocess
from pathlib import Path

import pytest

from demo.programs import Programs
from pd_deploy.lab.standin.processes import STANDIN

GLOBAL_PROXY = STANDIN / "image/workspace/omniinfer/tools/scripts/global_proxy.sh"
OMNI_PROXY = STANDIN / "later/omni_proxy.sh"
HANDOVER = STANDIN / "image/usr/libexec/standin/pd_handover.lua"
NGINX = Programs(
    (
        "nginx",
        "libnginx-mod-http-lua",
        "libnginx-mod-http-ndk",
        "lua-resty-core",
        "lua-resty-lrucache",
    )
)

needs_nginx = pytest.mark.usefixtures("nginx")


def fill_root(root: Path) -> None:
    """Put the image's proxy files below a root directory, with links to nginx."""
    prefix = root / "usr/local/nginx"
    (prefix / "modules").mkdir(parents=True)
    (root / "usr/sbin").mkdir()
    (prefix / "nginx").symlink_to(NGINX.root / "usr/sbin/nginx")
    (root / "usr/sbin/nginx").symlink_to(NGINX.root / "usr/sbin/nginx")
    (prefix / "modules/pd_handover.lua").symlink_to(HANDOVER)
    for shared in ("usr/lib/nginx", "usr/share/lua"):
        (root / shared).parent.mkdir(parents=True, exist_ok=True)
        (root / shared).symlink_to(NGINX.root / shared)


def set_age(root: Path, built: str, contract: str = "v0") -> None:
    """Give the image below this root a date and a contract."""
    image = root / "usr/local/Ascend/latest/standin"
    image.mkdir(parents=True, exist_ok=True)
    (image / "built").write_text(f"{built}\n")
    (image / "contract").write_text(f"{contract}\n")


def run_proxy(script: Path, root: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a proxy's script below a root directory."""
    environment = {**os.environ, **NGINX.env, "STANDIN_ROOT": str(root), **env}
    return subprocess.run(
        ["bash", str(script), *args], env=environment, capture_output=True, text=True, check=False
    )


def conf_of(root: Path) -> str:
    """Read the configuration that a script has written."""
    return (root / "usr/local/nginx/conf/nginx.conf").read_text()
