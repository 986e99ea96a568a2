"""Starting, loading and stopping a lab."""

import itertools
import os
import re
import secrets
import string
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from ipaddress import IPv4Network
from pathlib import Path
from typing import TypeVar

import httpx
from pydantic import BaseModel, ConfigDict, ValidationError

from pd_deploy.lab import cache, contracts, images, network, seed, vllm
from pd_deploy.lab.box import Box, kill_recorded, recorded_init
from pd_deploy.lab.errors import LabError
from pd_deploy.lab.host import LabHost
from pd_deploy.lab.system import install_missing_packages, remove_tree, require_root, wait_until

STATE = Path("/var/lib/pd-deploy-lab")
STANDIN = Path(__file__).with_name("standin")
DEFAULT_NAME = "pdlab"
DEFAULT_SUBNET = "10.77.0.0/24"
DEFAULT_HOSTS = 2
FIRST_HOST = 11  # number of its address in the subnet; the others follow
LAST_HOST = 253
SWITCH = 1
MACHINE = -2  # the machine's own interface: the last usable address
AT_ONCE = 8  # hosts that start or stop at the same time
REGISTRY_PORT = 5000
REPOSITORY = "omni-ci/daily_omniinfer"
TAG = "20250722_26"
# A wheel holds no links, so they are made here.
IMAGE_LINKS = {
    "usr/local/bin/python": "/usr/bin/python3",
    "usr/local/nginx/modules/pd_handover.lua": "/usr/libexec/standin/pd_handover.lua",
    "usr/local/nginx/nginx": "/usr/sbin/nginx",
}
# Upstream's images of this age have no nginx; this variant of the stand-in has none either.
TAG_WITHOUT_NGINX = f"{TAG}-nonginx"
KEPT_NGINX = "usr/libexec/standin/nginx"  # what its build script installs
CGROUPS = Path("/sys/fs/cgroup")

Say = Callable[[str], None]
T = TypeVar("T")


class Lab(BaseModel):
    """A running lab, as recorded in its directory."""

    model_config = ConfigDict(frozen=True)

    name: str
    subnet: IPv4Network
    switch: Box
    hosts: dict[str, LabHost]
    images: dict[str, str]  # full image name → digest, as pushed by `up`

    @classmethod
    def load(cls, name: str = DEFAULT_NAME) -> "Lab":
        """Find a lab that is up.

        Raises:
            LabError: there is no lab of this name, or its record is damaged.
        """
        require_root()
        record = _directory(name) / "lab.json"
        try:
            return cls.model_validate_json(record.read_bytes())
        except FileNotFoundError:
            raise LabError(f"there is no lab {name}: start it with `pd-deploy lab up`") from None
        except ValidationError as error:
            raise LabError(
                f"{record} is damaged ({error}): run `pd-deploy lab down`, then `pd-deploy lab up`"
            ) from None

    @classmethod
    def up(
        cls,
        name: str = DEFAULT_NAME,
        subnet: str = DEFAULT_SUBNET,
        *,
        hosts: int | None = None,
        share: Iterable[Path] | None = None,
        say: Say = lambda _: None,
    ) -> "Lab":
        """Start a lab, or load a running one; remove what is left of a broken one first.

        In a running lab, cut cables are plugged in again and changed stand-in images are pushed.

        Args:
            subnet: hosts get .11, .12, … of it, the registry .1, the machine the last address.
            hosts: how many; by default as many as a running lab has, and two in a new one.
            share: paths of the machine that the hosts see, read-only, at the same paths; by
                default this checkout and the running Python.
            say: is called with a line about each step.

        Raises:
            LabError: not root, name or subnet taken, a running lab has another subnet or number of
                hosts, or a step failed; nothing is left behind.
        """
        require_root()
        _check_name(name)
        network_address = network.parse_subnet(subnet)
        numbers = _numbers(DEFAULT_HOSTS if hosts is None else hosts, network_address)
        install_missing_packages(say)
        with cache.locked(name):
            running = _running(name)
            if running is not None:
                return _reuse(running, network_address, hosts, say)
            for removed in _remove(name):
                say(f"removed what was left of a broken lab: {removed}")
            network.check_free(name, network_address)
            shared = tuple(default_shares() if share is None else share)
            vllm.HOME.mkdir(mode=0o755, parents=True, exist_ok=True)
            try:
                return _start(name, network_address, numbers, shared, say)
            except BaseException:
                _remove(name)
                raise

    @property
    def registry(self) -> str:
        """The registry, as image names have it: HOST:PORT."""
        return _registry(self.subnet)

    @property
    def machine_address(self) -> str:
        """The address at which the hosts reach this machine."""
        return str(self.subnet[MACHINE])

    @property
    def directory(self) -> Path:
        """The lab's state, readable by root only."""
        return _directory(self.name)

    @property
    def ssh_key(self) -> Path:
        """Private key that root, deployer and nodocker accept on all hosts."""
        return self.directory / "id_ed25519"

    @property
    def known_hosts(self) -> Path:
        """The hosts' public keys."""
        return self.directory / "known_hosts"

    @property
    def password_file(self) -> Path:
        """The file with the password of the user deployer."""
        return self.directory / "deployer.password"

    @property
    def image(self) -> str:
        """Full name of the stand-in image."""
        return f"{self.registry}/{REPOSITORY}:{TAG}"

    def push_variant(
        self, tag: str, files: Mapping[str, str | bytes | None], source_tag: str = TAG
    ) -> str:
        """Push the stand-in image with some files changed, under another tag.

        Args:
            files: path in the image → new content, or None to remove it.

        Returns:
            The new image's digest.
        """
        repository = images.Repository(self.registry, REPOSITORY)
        return images.push_variant(repository, source_tag, tag, images.tar_files(files))

    def push_build(
        self,
        tag: str,
        contract: str = contracts.OLDEST,
        faults: Mapping[str, object] | None = None,
    ) -> str:
        """Push a build of the stand-in under a tag of its own; return its digest.

        Args:
            contract: what its engines and its proxy expect; see `contracts.CONTRACTS`.
            faults: of its engines, by the names that the stand-in's README lists.

        Raises:
            LabError: there is no such contract, or no image can have such a tag.
        """
        if not re.fullmatch(r"\w[\w.-]{0,127}", tag, re.ASCII):
            raise LabError(
                f"expected a tag, up to 128 letters, digits, `_`, `.` and `-`, found {tag!r}"
            )
        return self.push_variant(tag, contracts.build(contract, tag, faults or {}))

    def push_packages(
        self,
        repository: str,
        tag: str,
        packages: Sequence[str],
        *,
        tree: bytes | None = None,
        say: Say = lambda _: None,
    ) -> str:
        """Push an image of Debian packages, and of a tar of files; return its full name."""
        base = cache.prepare_base(packages, say)
        target = images.Repository(self.registry, repository)
        images.push_image(target, tag, base.layer, base.blob, tree or images.tar_files({}))
        return f"{self.registry}/{repository}:{tag}"

    def healthy(self) -> bool:
        """Tell whether every box is on, and SSH, engines and registry answer."""
        boxes_on = self.switch.on and all(host.on for host in self.hosts.values())
        return (
            boxes_on
            and _registry_answers(self.registry)
            and all(host.ssh_answers() and host.engine_answers() for host in self.hosts.values())
        )

    def down(self, say: Say = lambda _: None) -> list[str]:
        """Take the lab down, except the cache; return what was removed."""
        return take_down(self.name, say)


def prepare(say: Say = lambda _: None) -> cache.Cached:
    """Return what all labs share; make it first if it is missing.

    Raises:
        LabError: not root, or a part could not be made.
    """
    require_root()
    install_missing_packages(say)
    lines = [line.strip() for line in (STANDIN / "packages.txt").read_text().splitlines()]
    return cache.prepare([line for line in lines if line and not line.startswith("#")], say)


def take_down(name: str, say: Say = lambda _: None) -> list[str]:
    """Take a lab down, or remove what is left of a broken one; return what was removed.

    Raises:
        LabError: not root, or something could not be removed.
    """
    require_root()
    _check_name(name)
    with cache.locked(name):
        removed = _remove(name)
    for item in removed:
        say(f"removed {item}")
    return removed


def purge_cache() -> bool:
    """Delete the cache; return False if there was none.

    Raises:
        LabError: there is still a lab, and its hosts' file systems need the cache.
    """
    require_root()
    if STATE.exists():
        labs = ", ".join(sorted(path.name for path in STATE.iterdir()))
        raise LabError(f"labs still use the cache ({labs}): run `pd-deploy lab down --name` first")
    return vllm.purge() | cache.purge()


def default_shares() -> list[Path]:
    """List the paths that hosts share by default: this checkout or installed package and the
    running Python, so that hosts can run them, and what `lab.vllm` installs."""
    code = Path(__file__).resolve().parents[1]  # resolved: in a checkout, a link leads here
    # Hosts have their own /usr, so they use their own system's Python.
    candidates = [code, Path(sys.prefix), Path(sys.base_prefix), vllm.HOME]
    candidates = [path for path in candidates if not path.is_relative_to("/usr")]
    return [
        path
        for path in dict.fromkeys(candidates)
        if not any(path != other and path.is_relative_to(other) for other in candidates)
    ]


def _start(
    name: str,
    subnet: IPv4Network,
    numbers: Mapping[str, int],
    shared: tuple[Path, ...],
    say: Say,
) -> Lab:
    began = time.monotonic()

    def step(progress: str) -> None:
        say(f"{time.monotonic() - began:6.1f} s  {progress}")

    cached = prepare(step)
    directory = _directory(name)
    directory.mkdir(mode=0o700, parents=True)
    switch, hosts = _plan(name, subnet, numbers, cached.root, shared)
    _write_seeds(name, subnet, hosts)
    lab = Lab(name=name, subnet=subnet, switch=switch, hosts=hosts, images={})
    _boot(lab)
    step("switch and hosts booted")
    side_by_side(partial(_start_daemons, password_file=lab.password_file), hosts.values())
    step("SSH servers up")
    lab = lab.model_copy(update={"images": _push_images(lab, cached)})
    step("registry up, stand-in images pushed")
    side_by_side(LabHost.wait_for_engine, hosts.values())
    step("Docker engines up")
    # The record is written last: a lab without one has only half started.
    record = directory / "lab.json"
    _write_secret(record, lab.model_dump_json(indent=1))
    return lab


def host_names(count: int) -> list[str]:
    """Name the hosts of a lab: a to z, then aa, ab, and so on, as a spreadsheet its columns."""
    letters = string.ascii_lowercase
    words = (
        "".join(word)
        for length in itertools.count(1)
        for word in itertools.product(letters, repeat=length)
    )
    return list(itertools.islice(words, count))


def _numbers(count: int, subnet: IPv4Network) -> dict[str, int]:
    """Choose the numbers of so many hosts' addresses in the subnet, by name.

    Raises:
        LabError: there is no room for them.
    """
    room = min(LAST_HOST, subnet.num_addresses + MACHINE - 1) - FIRST_HOST + 1
    if not 1 <= count <= room:
        raise LabError(f"expected 1 to {room} hosts, which {subnet} has room for, found {count}")
    return {name: FIRST_HOST + index for index, name in enumerate(host_names(count))}


def _plan(
    name: str,
    subnet: IPv4Network,
    numbers: Mapping[str, int],
    root: Path,
    shared: tuple[Path, ...],
) -> tuple[Box, dict[str, LabHost]]:
    directory = _directory(name)
    gateway = str(subnet[SWITCH])

    def box(kind: str, number: int) -> Box:
        is_host = number != SWITCH
        return Box(
            name=f"{name}-{kind}",
            directory=directory / kind,
            address=f"{subnet[number]}/{subnet.prefixlen}",
            gateway=gateway if is_host else "",
            layers=(directory / kind / "seed", root),
            shared=shared if is_host else (),
            devices=seed.NPU_DEVICES if is_host else (),
        )

    switch = box("switch", SWITCH)
    hosts = {
        host: LabHost(name=host, address=str(subnet[number]), box=box(host, number), switch=switch)
        for host, number in numbers.items()
    }
    return switch, hosts


def _write_seeds(name: str, subnet: IPv4Network, hosts: Mapping[str, LabHost]) -> None:
    directory = _directory(name)
    client_key = _new_key(f"{name} client")
    _write_secret(directory / "id_ed25519", client_key.private)
    _write_secret(directory / "deployer.password", secrets.token_urlsafe(16))
    known_hosts = []
    names = {host.box.name: host.address for host in hosts.values()}
    for host in hosts.values():
        host_key = _new_key(host.box.name)
        known_hosts.append(f"{host.address} {host_key.public}")
        seed.seed_host(
            directory / host.name / "seed",
            standin=STANDIN / "host",
            address=host.address,
            names=names,
            registry=_registry(subnet),
            cgroup=f"/{_cgroup(name)}/{host.name}",
            client_key=client_key.public,
            host_key=host_key,
        )
    _write_secret(directory / "known_hosts", "".join(known_hosts))
    seed.seed_switch(directory / "switch" / "seed", registry=_registry(subnet))


def _boot(lab: Lab) -> None:
    network.make_room_for_neighbours(len(lab.hosts))
    lab.switch.start().go_on()
    machine = f"{lab.machine_address}/{lab.subnet.prefixlen}"
    network.plug_in_machine(lab.name, machine, lab.switch)
    config = "/etc/docker/registry/config.yml"
    lab.switch.start_daemon(["docker-registry", "serve", config], "/var/log/registry.log")
    side_by_side(LabHost.boot, lab.hosts.values())


def _start_daemons(host: LabHost, password_file: Path) -> None:
    host.start_engine(wait=False)
    host.start_sshd()
    host.run(["chpasswd"], input=f"deployer:{password_file.read_text()}")


def side_by_side(work: Callable[[T], object], items: Iterable[T]) -> None:
    """Do something with all items, some at a time; raise the first error when all have ended."""
    with ThreadPoolExecutor(AT_ONCE) as threads:
        results = [threads.submit(work, item) for item in items]
    for result in results:
        result.result()


def _push_images(lab: Lab, cached: cache.Cached) -> dict[str, str]:
    wait_until(
        f"the registry on {lab.registry}",
        lambda: _registry_answers(lab.registry),
        timeout=20,
        explain=lambda: lab.switch.run(["tail", "-n3", "/var/log/registry.log"]).stdout,
    )
    repository = images.Repository(lab.registry, REPOSITORY)
    metadata = contracts.layer(contracts.OLDEST)
    tree = images.tar_directory(STANDIN / "image", IMAGE_LINKS, metadata)
    digest = images.push_image(repository, TAG, cached.base, cached.base_blob, tree)
    no_nginx = images.tar_files(
        {str(cache.NGINX): None, "usr/local/nginx": None, KEPT_NGINX: cached.nginx.read_bytes()}
    )
    without = images.push_variant(repository, TAG, TAG_WITHOUT_NGINX, no_nginx)
    name = f"{lab.registry}/{REPOSITORY}"
    return {f"{name}:{TAG}": digest, f"{name}:{TAG_WITHOUT_NGINX}": without}


def _running(name: str) -> Lab | None:
    """Load the lab of this name, plug in its cables, and return it if it works."""
    try:
        lab = Lab.load(name)
        for host in lab.hosts.values():
            host.mend()
        wait_until(f"lab {name} to answer", lab.healthy, timeout=3)
    except LabError:
        return None
    return lab


def _reuse(lab: Lab, subnet: IPv4Network, hosts: int | None, say: Say) -> Lab:
    """Keep a running lab; push the stand-in images again if their files have changed."""
    differences = []
    if lab.subnet != subnet:
        differences.append(f"on {lab.subnet}, not on {subnet}")
    if hosts not in (None, len(lab.hosts)):
        differences.append(f"with {len(lab.hosts)} hosts, not with {hosts}")
    if differences:
        raise LabError(
            f"lab {lab.name} is up {' and '.join(differences)}: "
            "run `pd-deploy lab down` first, or choose another --name"
        )
    say(f"lab {lab.name} is already up")
    pushed = _push_images(lab, prepare(say))
    if pushed == lab.images:
        return lab
    say("the stand-in images have changed; pushed them again")
    lab = lab.model_copy(update={"images": pushed})
    _write_secret(lab.directory / "lab.json", lab.model_dump_json(indent=1))
    return lab


def _remove(name: str) -> list[str]:
    """Remove all that exists of a lab, complete or not."""
    directory = _directory(name)
    boxes = sorted(path.parent for path in directory.glob("*/init.json"))
    removed = [f"{name}-{box.name}" for box in boxes if recorded_init(box)]
    side_by_side(kill_recorded, boxes)
    if boxes and network.unplug_machine(name):
        removed.append(f"network interface {name}")
    if _remove_cgroups(name):
        removed.append(f"control groups {_cgroup(name)}")
    if remove_tree(directory):
        removed.append(str(directory))
    if STATE.exists() and not any(STATE.iterdir()):
        STATE.rmdir()
    return removed


def _remove_cgroups(name: str) -> bool:
    """Remove a lab's control groups, which outlive an engine that is killed."""
    tops = [*CGROUPS.glob(_cgroup(name)), *CGROUPS.glob(f"*/{_cgroup(name)}")]
    for top in tops:
        wait_until(f"control group {top} to be empty", partial(_rmdirs, top), timeout=10)
    return bool(tops)


def _rmdirs(top: Path) -> bool:
    # Bottom up: a control group's directory can only be removed when it has no children.
    for directory, _, _ in os.walk(top, topdown=False):
        try:
            Path(directory).rmdir()
        except OSError:
            return False
    return True


def _registry_answers(registry: str) -> bool:
    try:
        return httpx.get(f"http://{registry}/v2/", timeout=2, trust_env=False).is_success
    except httpx.HTTPError:
        return False


def _registry(subnet: IPv4Network) -> str:
    return f"{subnet[SWITCH]}:{REGISTRY_PORT}"


def _new_key(comment: str) -> seed.KeyPair:
    # Slow to import, and only a new lab needs it.
    import asyncssh  # noqa: PLC0415

    key = asyncssh.generate_private_key("ssh-ed25519", comment)
    return seed.KeyPair(
        private=key.export_private_key().decode(), public=key.export_public_key().decode()
    )


def _write_secret(path: Path, text: str) -> None:
    path.touch(mode=0o600)
    path.write_text(text)


def _directory(name: str) -> Path:
    return STATE / name


def _cgroup(name: str) -> str:
    return f"pd-deploy-lab-{name}"


def _check_name(name: str) -> None:
    # It also names a network interface, for which the kernel allows 15 characters.
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,14}", name):
        raise LabError(
            "expected a lab name of up to 15 lowercase letters, digits and '-', starting with a "
            f"letter; found {name!r}"
        )
