"""What follows from a deployment: its pods with their ranks, ports and servers. Pure."""

from collections.abc import Iterable
from itertools import accumulate

from pd_deploy import engines
from pd_deploy.config.models import Deployment, InstanceEntry
from pd_deploy.config.topology import Instance, Pod, Proxy, ServingRole, Topology
from pd_deploy.engines.image_facts import ImageFacts
from pd_deploy.errors import InvalidInput
from pd_deploy.planning import rules


def build(deployment: Deployment, images: Iterable[ImageFacts] = ()) -> Topology:
    """Derive the topology of a deployment that is to be planned, and check its rules.

    Args:
        images: what its image says of itself, for each architecture.

    Raises:
        InvalidInput: names used twice, and rules that are broken without being allowed to.
    """
    topology = derive(deployment)
    problems = rules.broken(deployment, topology, images)
    if problems:
        source = f"deployment {deployment.name}"
        raise InvalidInput(problems, source=source, hint=rules.hint(problems))
    return topology


def derive(deployment: Deployment) -> Topology:
    """Derive the topology of a deployment, whatever rules it breaks: a saved one has to come back
    even if a later version of pd-deploy has further rules."""
    prefill = tuple(
        _pod(deployment, "prefill", name, entry, rank)
        for rank, (name, entry) in enumerate(deployment.prefill.items())
    )
    decode = tuple(
        _pod(deployment, "decode", name, entry, rank)
        for rank, (name, entry) in enumerate(deployment.decode.items())
    )
    router = deployment.router
    metrics = router.router_metrics_port if router else None
    proxies = tuple(
        Proxy(name, entry.host, deployment.hosts[entry.host].address, entry, metrics)
        for name, entry in deployment.proxy.items()
    )
    return Topology(prefill, decode, proxies)


def _pod(
    deployment: Deployment, role: ServingRole, name: str, entry: InstanceEntry, rank: int
) -> Pod:
    kv_rank = rank if role == "prefill" else len(deployment.prefill) + rank
    hosts = _canonical(deployment, role, entry)
    settings = deployment.settings_of(role, entry)
    counts = [len(entry.devices_on(host)) for host in hosts]
    engine, ports = engines.get(deployment.engine), deployment.ports
    tp = settings.tensor_parallel or engine.tensor_parallel(role, counts)
    has_ray = deployment.supports.multi_host_prefill != "native"
    brought_up = engine.members(deployment, role, counts, tp)
    # All members of a pod share the master's port; a decode's API ports count over its hosts.
    base = rank if role == "prefill" else ports.decode_offset + rank
    offsets = [base + (index if role == "decode" else 0) for index in range(len(hosts))]
    zmq_step = ports.zmq_step or engine.zmq_step(deployment)
    zmq = [
        entry.ports.on("zmq", host, ports.zmq + offset * zmq_step)
        for host, offset in zip(hosts, offsets, strict=True)
    ]
    api = [
        entry.ports.on("api", host, ports.api + offset)
        for host, offset in zip(hosts, offsets, strict=True)
    ]
    api_ports = [
        tuple(first + i for i in range(member.servers))
        for first, member in zip(api, brought_up, strict=True)
    ]
    addresses = tuple(deployment.hosts[host].address for host in hosts)
    # Of each member: the copies of the model on those before it. The last number counts them all.
    ranks = list(accumulate((member.ranks for member in brought_up), initial=0))
    members = tuple(
        Instance(
            name=name if len(hosts) == 1 else f"{name}-{index}",
            pod=name,
            role=role,
            host=host,
            address=addresses[index],
            devices=entry.devices_on(host),
            kv_rank=kv_rank,
            node_rank=index,
            pod_addresses=addresses,
            master_port=entry.ports.master or ports.master + base,
            api_port=api[index],
            api_ports=api_ports[index],
            zmq_port=zmq[index],
            kv_ports=tuple(zmq[index] + i for i in range(brought_up[index].kv_ports)),
            ray_port=ports.ray + rank if has_ray else None,
            tensor_parallel=tp,
            ranks=brought_up[index].ranks,
            server_offset=ranks[index],
            data_parallel=max(1, ranks[-1]),
            settings=settings,
            further_ports=tuple(
                engine.further_ports(
                    deployment, role, entry.devices_on(host), api_ports[index], settings
                ).items()
            ),
        )
        for index, host in enumerate(hosts)
    )
    return Pod(name, role, kv_rank, members)


def _canonical(deployment: Deployment, role: ServingRole, entry: InstanceEntry) -> tuple[str, ...]:
    """Order a pod's hosts, the master first. Ray ranks a prefill's others by address as text."""
    master, *others = entry.on
    if role == "prefill":
        others.sort(key=lambda host: deployment.hosts[host].address)
    return (master, *others)
