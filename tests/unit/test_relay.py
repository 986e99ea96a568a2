"""What a router's start script does with `proxy.hold`, and that it is as it was without."""

from pathlib import Path

from pd_deploy.engines.vllm import Vllm
from tests.unit import example

GPU = example.ROOT / "deployments/sglang-gpu-2p1d.yaml"
VLLM = example.ROOT / "deployments/vllm-gpu-3p1d.yaml"
HOST = "10.0.5.1"


def script(file: Path, **proxy: object) -> str:
    """The proxy's start script."""
    made = example.plan_of(file, {"proxy": {"c0": proxy}} if proxy else {})
    return made.instance("c0").start_script.content


def test_without_hold_the_router_has_the_port_itself() -> None:
    """And existing services go on as they are: a new fingerprint would restart them."""
    for file, host in ((GPU, HOST), (VLLM, "10.0.3.1")):
        plain = script(file)
        assert plain == script(file, drain=50)
        assert "--host 0.0.0.0 --port 7000" in plain
        assert "relay" not in plain
        relayed = script(file, hold=50)
        assert relayed == script(file, hold=10)
        assert '--host 127.77.0.1 --port "$inner"' in relayed
        assert f"until_ready {host}" in relayed
        proxy = example.place().proxies[0]
        assert not Vllm().shares_port(proxy, plain)
        assert Vllm().shares_port(proxy, relayed)
