"""Running the stand-in's proxy scripts as on a machine of their own, with this machine's nginx."""

import os
import subprocess
from pathlib import Path

import pytest

from pd_deploy.lab.standin.processes import STANDIN

GLOBAL_PROXY = STANDIN / "image/workspace/omniinfer/tools/scripts/global_proxy.sh"
OMNI_PROXY = STANDIN / "later/omni_proxy.sh"
HANDOVER = STANDIN / "image/usr/libexec/standin/pd_handover.lua"
NGINX = Path("/usr/sbin/nginx")
LUA = Path("/usr/lib/nginx/modules/ngx_http_lua_module.so")

needs_nginx = pytest.mark.skipif(
    not (NGINX.exists() and LUA.exists()), reason="nginx with its Lua module is not installed"
)


def fill_root(root: Path) -> None:
    """Put the image's proxy files below a root directory, with links to the machine's nginx."""
    prefix = root / "usr/local/nginx"
    (prefix / "modules").mkdir(parents=True)
    (root / "usr/sbin").mkdir()
    (prefix / "nginx").symlink_to(NGINX)
    (root / "usr/sbin/nginx").symlink_to(NGINX)
    (prefix / "modules/pd_handover.lua").symlink_to(HANDOVER)
    for shared in ("usr/lib/nginx", "usr/share/lua"):
        (root / shared).parent.mkdir(parents=True, exist_ok=True)
        (root / shared).symlink_to(f"/{shared}")


def set_age(root: Path, built: str, contract: str = "v0") -> None:
    """Give the image below this root a date and a contract."""
    image = root / "usr/local/Ascend/latest/standin"
    image.mkdir(parents=True, exist_ok=True)
    (image / "built").write_text(f"{built}\n")
    (image / "contract").write_text(f"{contract}\n")


def run_proxy(script: Path, root: Path, *args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a proxy's script below a root directory."""
    environment = {**os.environ, "STANDIN_ROOT": str(root), **env}
    return subprocess.run(
        ["bash", str(script), *args], env=environment, capture_output=True, text=True, check=False
    )


def conf_of(root: Path) -> str:
    """Read the configuration that a script has written."""
    return (root / "usr/local/nginx/conf/nginx.conf").read_text()
