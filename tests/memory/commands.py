"""The commands that pd-deploy runs on hosts, answered from a machine's state.

A command that is not in the table is an error: so nothing passes for done that was not.
"""

import contextlib
import functools
import hashlib
import io
import json
import posixpath
import re
import shlex
import tarfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from pd_deploy.engines.omniinfer import npu_smi, ranktable
from pd_deploy.hosts import batch, facts, files, lease, reach
from pd_deploy.hosts import machine as machines
from pd_deploy.hosts.host import CommandResult
from pd_deploy.steps import host_records, own_code, tidy
from tests.memory.disk import BLOCK
from tests.memory.machine import Machine
from tests.memory.programs import Proxy

DEVICES = 16
LINK = 0o120777
INTERFACE = "enp23s0f3"
NOT_INSTALLED = ("lscpu", "docker", "sysctl")
Answer = Callable[[Machine, Sequence[str], str], str | CommandResult]


@dataclass(frozen=True)
class Command:
    """A command by how it begins; `answer` is given the arguments that follow, and the input."""

    name: str
    begins: tuple[str, ...]
    answer: Answer
    changes: bool = False


# What `Host.outputs` has between its commands.
BETWEEN = re.compile(r" \|\| exit\n(echo [0-9a-f]{32})(?:\n|$)")


@dataclass(frozen=True)
class Asked:
    """A command with its arguments, and what is printed after it."""

    command: Command
    argv: Sequence[str]
    end: str = ""

    @property
    def name(self) -> str:
        """Of the command, for a moment; a lease's has its verb."""
        return f"lease {self.argv[5]}" if self.command.name == "lease" else self.command.name

    @property
    def changes(self) -> bool:
        """Whether it may change the host."""
        return self.command.changes and self.name != "lease look"


def run(asked: Sequence[Asked], machine: Machine, data: bytes) -> CommandResult:
    """What commands print, one after the other as long as they succeed."""
    machine.cluster.settle()
    printed = ""
    for each in asked:
        done = _one(each, machine, data)
        printed += done.stdout
        if done.exit_status != 0:
            return replace(done, stdout=printed)
        printed += each.end
    return CommandResult(0, printed, "")


def _one(asked: Asked, machine: Machine, data: bytes) -> CommandResult:
    arguments = asked.argv[len(asked.command.begins) :]
    try:
        text = data.decode(errors="surrogateescape")
        answer = asked.command.answer(machine, arguments, text)
    except TimeoutError:
        raise
    except OSError as error:
        return CommandResult(1, "", f"{asked.argv[0]}: {error.strerror}\n")
    return CommandResult(0, answer, "") if isinstance(answer, str) else answer


def asked(argv: Sequence[str]) -> list[Asked]:
    """The command of the table, or those that run in one session.

    Raises:
        NotImplementedError: one is not in the table.
    """
    if list(argv[:2]) != ["sh", "-c"] or not BETWEEN.search(argv[2]):
        return [Asked(_recognised(argv), argv)]
    *parts, _ = BETWEEN.split(argv[2])
    several = [(_words(line), end) for line, end in zip(parts[::2], parts[1::2], strict=True)]
    return [Asked(_recognised(argv), argv, f"{end.split()[1]}\n") for argv, end in several]


@functools.cache  # runs send the same lines again and again
def _words(line: str) -> Sequence[str]:
    return tuple(shlex.split(line))


def _recognised(argv: Sequence[str]) -> Command:
    for command in TABLE:
        if tuple(argv[: len(command.begins)]) == command.begins:
            return command
    raise NotImplementedError(f"hosts in memory know no command {list(argv)}")


def _records(machine: Machine, arguments: Sequence[str], _: str) -> str:
    (root,) = arguments
    disk, parts = machine.disk, list[str]()
    names = disk.names(root)
    # Like the shell's `*/`.
    shown = [name for name in names if not name.startswith(".")]
    directories = [n for n in shown if disk.entries[f"{root}/{n}"].is_directory]
    for name in ["record.json", *(f"{d}/release.json" for d in directories)]:
        if disk.get(f"{root}/{name}"):
            parts += [name, disk.read(f"{root}/{name}")]
    for name in [*(f"{d}/plan.json" for d in directories), ".reserve"]:
        if disk.get(f"{root}/{name}"):
            parts += [name, ""]
    for name in host_records.LEASES:
        if disk.get(f"{root}/{name}"):
            parts += [name, disk.read(f"{root}/{name}").partition("\n")[0]]
    for name in directories:
        parts += [f"{name}/", ""]
    return "".join(f"{part}\0" for part in parts)


def _drafts(machine: Machine, arguments: Sequence[str], _: str) -> str:
    found = [p for p, _ in machine.disk.files(arguments[0]) if is_draft(p)]
    for path in found:
        machine.disk.may_change(path)
        machine.disk.remove(path)
    return "".join(f"{path}\n" for path in found)


def is_draft(path: str) -> bool:
    """Whether a file was being written."""
    name = posixpath.basename(path)
    return name.startswith(".") and name.endswith(".tmp")


def _tree(machine: Machine, arguments: Sequence[str], _: str) -> str:
    root, logs = arguments
    disk, lines = machine.disk, list[str]()
    for directory, depth in ((root, 3), (logs, 2)):
        paths = [directory] if disk.get(directory) else []
        for path in [*paths, *disk.below(directory)]:
            entry, level = disk.entries[path], path.removeprefix(directory).count("/")
            if "/.code/" in path and level > 2:
                continue
            if level > depth or (directory == logs and not entry.is_directory):
                continue
            kind = 0o040000 if entry.is_directory else 0o100000
            lines.append(f"{kind | entry.mode:x} {path}")
            if entry.content is not None and level == depth:
                lines.append(f"{hashlib.sha256(entry.content).hexdigest()}  {path}")
    return "".join(f"{line}\n" for line in lines)


def _objects(machine: Machine, arguments: Sequence[str], names: str) -> str:
    """What `own_code.LOOK` does."""
    found = {name: machine.disk.get(f"{arguments[0]}/objects/{name}") for name in names.split()}
    return "".join(
        f"{hashlib.sha256(entry.content or b'').hexdigest()}  {name}\n"
        for name, entry in found.items()
        if entry
    )


def _receive(machine: Machine, arguments: Sequence[str], data: str) -> str:
    """What `own_code.RECEIVE` does."""
    for member, content in _members(data):
        path = f"{arguments[0]}/objects/{member.name}"
        machine.disk.make_room(path, len(content))
        machine.disk.put(path, content, member.mode)
    return ""


def _lay_out(machine: Machine, arguments: Sequence[str], data: str) -> str:
    """What `own_code.LAY_OUT` does."""
    root, digest = arguments
    machine.disk.add_directory(f"{root}/{digest}")
    for member, _ in _members(data):
        path = f"{root}/{digest}/{member.name.removeprefix('new').lstrip('/')}"
        if member.issym():
            machine.disk.put(path, member.linkname.encode(), LINK)
        elif member.islnk():
            machine.disk.entries[path] = machine.disk.entries[f"{root}/{member.linkname}"]
            machine.disk.add_directory(posixpath.dirname(path))
    return ""


def _members(data: str) -> list[tuple[tarfile.TarInfo, bytes]]:
    content = io.BytesIO(data.encode(errors="surrogateescape"))
    with tarfile.open(fileobj=content, errors="surrogateescape") as tar:
        files = [(member, tar.extractfile(member) if member.isreg() else None) for member in tar]
        return [(member, file.read() if file else b"") for member, file in files]


def _prune_code(machine: Machine, arguments: Sequence[str], _: str) -> str:
    """What `own_code.PRUNE` does."""
    root, *kept = arguments
    disk = machine.disk
    gone = [name for name in disk.names(root) if name not in (*kept, "objects")]
    for name in gone:
        disk.may_change(root)
        disk.remove(f"{root}/{name}")
    objects = f"{root}/objects/"
    used = {id(entry) for path, entry in disk.entries.items() if not path.startswith(objects)}
    for path in disk.below(f"{root}/objects"):
        if id(disk.entries[path]) not in used:
            disk.remove(path)
    return "".join(f"{name}\n" for name in gone)


def _missing(machine: Machine, arguments: Sequence[str], _: str) -> str:
    return "".join(f"{path}\0" for path in arguments if machine.disk.get(path) is None)


def _free(machine: Machine, arguments: Sequence[str], _: str) -> str:
    free = machine.disk.free(arguments[0]) // 1024
    head = "Filesystem 1024-blocks Used Available Capacity Mounted on"
    return f"{head}\n/dev/sda1 {1 << 40} 0 {free} 1% /\n"


def _ages(machine: Machine, *_: object) -> str:
    up, now = machine.clock.seconds(), machine.clock.date().timestamp()
    return f"{up} {machine.docker_since * 100:.0f} 100 {now}\n"


def _tail(machine: Machine, arguments: Sequence[str], _: str) -> str:
    lines, size, *paths = arguments
    shown = ""
    for path in paths:
        entry, names = machine.disk.get(path), machine.disk.names(path)
        files = [f"{path}/{n}" for n in names] if entry and entry.is_directory else [path]
        for file in files:
            if (found := machine.disk.get(file)) and found.content is not None:
                last = b"".join(found.content.splitlines(True)[-int(lines) :])[-int(size) :]
                shown += f"{file}\0{last.decode()}\0"
    return shown


def _containers(machine: Machine, arguments: Sequence[str], _: str) -> str:
    homes = machine.processes()
    return "".join(f"{pid} {homes[int(pid)]}\n" for pid in arguments if int(pid) in homes)


def _rmdir(machine: Machine, arguments: Sequence[str], _: str) -> str | CommandResult:
    (path,) = arguments
    found = machine.disk.get(path)
    if found is None or not found.is_directory or machine.disk.below(path):
        return CommandResult(1, "", f"rmdir: failed to remove '{path}'\n")
    machine.disk.may_change(path)
    machine.disk.remove(path)
    return ""


def _find(machine: Machine, arguments: Sequence[str], _: str) -> str:
    disk = machine.disk
    files = (p for p, _ in disk.files(arguments[0]) if disk.entries[p].mode != LINK)
    return "".join(f"{path}\0" for path in files)


def _sizes(machine: Machine, arguments: Sequence[str], _: str) -> str:
    return "".join(
        f"{len(content)}\0{path}\0" for path, content in machine.disk.files(arguments[0])
    )


def _addresses(machine: Machine, *_: object) -> str:
    links = [("lo", "127.0.0.1"), (INTERFACE, machine.address)]
    return json.dumps(
        [{"ifname": n, "mtu": machine.mtu, "addr_info": [{"local": a}]} for n, a in links]
    )


def _route(machine: Machine, *_: object) -> str:
    if not machine.route_address:
        return ""
    return json.dumps([{"dst": "8.8.8.8", "dev": INTERFACE, "prefsrc": machine.route_address}])


def _listeners(machine: Machine, *_: object) -> str:
    return "".join(
        f'LISTEN 0 128 {address}:{port} 0.0.0.0:* users:(("{name}",pid={pid},fd=3))\n'
        for address, port, name, pid in machine.listeners()
    )


def _taken(machine: Machine, *_: object) -> str:
    lingering = filter(machine.lingers, machine.lingering)
    over = (f"TIME-WAIT 0 0 {machine.address}:{port} 10.9.9.9:40000\n" for port in lingering)
    return _listeners(machine) + "".join(over)


def _connections(machine: Machine, arguments: Sequence[str], _: str) -> str:
    port = int(arguments[0].removeprefix("sport = :"))
    return "".join(
        f'0 0 {machine.address}:{port} 10.9.9.9:40000 users:(("nginx",pid={one.pid},fd=9))\n'
        for one in machine.running()
        if isinstance(one.program, Proxy) and one.program.port == port
        for _ in range(one.program.clients())
    )


def _npus(machine: Machine, *_: object) -> str:
    version = machine.driver
    rows = [f"| npu-smi {version:<25}Version: {version:<53}|", "| Chip  Phy-ID | Bus-Id | HBM |"]
    for device in range(DEVICES):
        npu, chip = divmod(device, 2)
        rows.append(f"| {npu} Ascend910 | {machine.health.get(device, 'OK')} | 185.1 36 0 / 0 |")
        rows.append(f"| {chip} {device} | 0000:{0x9D + device:02X}:00.0 | 0 0 / 0 3395 / 65536 |")
    for device, (user, pid) in machine.device_users().items():
        rows.append(f"| {device // 2} {device % 2} | {pid} | {user} | 54815 |")
    return "\n".join(rows)


def _health(machine: Machine, arguments: Sequence[str], _: str) -> str:
    return f"{_npus(machine)}\n" + "".join(
        f"network port of device {device}\n"
        f"link status: {'DOWN' if int(device) in machine.ports_down else 'UP'}\n"
        for device in arguments
    )


def _batch(machine: Machine, arguments: Sequence[str], _: str) -> str:
    """What `batch.BATCH` does: each command's own answer, and how it ends."""
    _, _, last, *lanes = arguments
    printed = ""
    for line in (line for lane in (*lanes, last) for line in lane.splitlines()):
        if line in machine.captured:
            done = CommandResult(0, machine.captured[line], "")
        elif _words(line)[0] in NOT_INSTALLED:
            done = CommandResult(127, "", "sh: not found\n")
        else:
            argv = _words(line)
            done = _one(Asked(_recognised(argv), argv), machine, b"")
        printed += f"\x1e{line}\n{done.stdout}{done.stderr}\n\x1e={done.exit_status}\n"
    return printed


def _hccn(machine: Machine, arguments: Sequence[str], _: str) -> str:
    """hccn_tool, in the formats of the lab's."""
    device, item = int(arguments[1]), arguments[2].removeprefix("-")
    if (device, item) in machine.hccn:
        return machine.hccn[device, item]
    octet = f"{machine.address.rpartition('.')[2]}.{100 + device}"
    if item in ("ping", "hccs_ping"):
        return "3 packets transmitted, 3 received, 0.00% packet loss\n"
    return {
        "link": f"link status: {'DOWN' if device in machine.ports_down else 'UP'}\n",
        "net_health": "net health status: Success\n",
        "ip": f"ipaddr:192.168.{octet}\nnetmask:255.255.0.0\n",
        "gateway": f"default gateway:192.168.0.1, Iface:eth{device}\n",
        "vnic": f"vnic link status: UP\nvnic ipaddr: 172.31.{octet}\n",
        "lldp": f"\tIfname: 400GE1/1/{device}\n",
        "netdetect": "netdetect address: 192.168.0.1\n",
        "tls": f"dev_id:{device}, tls switch[0](0:disable, 1:enable), tls preconfigured[1]\n",
    }[item]


def _date(machine: Machine, *_: object) -> str:
    return f"{machine.clock.date().timestamp() + machine.clock_ahead:.9f}\n"


def _cat(machine: Machine, paths: Sequence[str], given: str) -> str | CommandResult:
    octet = machine.address.rpartition(".")[2]
    usual = {
        "/proc/meminfo": "MemTotal: 1056460452 kB\nMemAvailable: 902134432 kB\n"
        "HugePages_Total: 0\nHugepagesize: 2048 kB\n",
        "/usr/local/Ascend/driver/version.info": f"Version={machine.driver}\n",
        "/usr/local/Ascend/firmware/version.info": "Version=7.5.0.5.220\n",
        "/etc/hccn.conf": "".join(
            f"address_{device}=192.168.{octet}.{100 + device}\n" for device in range(DEVICES)
        ),
    } | machine.files
    if any(path not in usual for path in paths):
        return CommandResult(1, "", f"cat: {paths[0]}: No such file or directory\n")
    return "".join(usual[path] for path in paths) or given


def _shared_memory(machine: Machine, *_: object) -> str:
    head = "Filesystem 1024-blocks Used Available Capacity Mounted on"
    return f"{head}\ntmpfs 528230224 {machine.files.get('/dev/shm', '0')} 1 1% /dev/shm\n"


def _model_files(machine: Machine, arguments: Sequence[str], _: str) -> str:
    directory = arguments[0].rstrip("/")
    files = [
        (path, content)
        for path, content in machine.disk.files(directory)
        if "/." not in path.removeprefix(directory)
    ]
    if "-printf" in arguments:
        return "".join(f"{len(c)} {p.removeprefix(directory)[1:]}\n" for p, c in files)
    return "".join(f"{hashlib.sha256(c).hexdigest()}  {p}\n" for p, c in files)


def _reach(machine: Machine, arguments: Sequence[str], _: str) -> str:
    """What `reach.REACH` does, as if all hosts ran it at the same time."""
    asked, cluster = json.loads(arguments[0]), machine.cluster
    own = {port for _, port, *_ in machine.listeners()}
    calls = {}
    for address, port in asked["call"]:
        other = cluster.machines[address]
        shut = machine.address in other.closed_to or other.unplugged
        calls[f"{address}:{port}"] = "ETIMEDOUT" if shut else ""
    listened = [port for port, _ in asked["listen"] if port not in own]
    return json.dumps({"listened": listened, "calls": calls})


def _digest(machine: Machine, paths: Sequence[str], _: str) -> str:
    contents = {path: (machine.disk.get(path), path) for path in paths}
    return "".join(
        f"{hashlib.sha256(entry.content or b'').hexdigest()}  {path}\n"
        for entry, path in contents.values()
        if entry
    )


def _links(machine: Machine, arguments: Sequence[str], _: str) -> str:
    found = [("link", *each) for each in machine.links.items()]
    found += [("closed", path, "") for path in machine.closed]
    found += [("path", path, path) for path in arguments[1:]]
    return "".join(f"{part}\0" for row in found for part in row)


def _device_addresses(machine: Machine, arguments: Sequence[str], _: str) -> str:
    octet = machine.address.rpartition(".")[2]
    return "".join(
        f"device {device}\nipaddr:192.168.{octet}.{100 + int(device)}\nnetmask:255.255.255.0\n"
        for device in arguments
    )


def _lease(machine: Machine, arguments: Sequence[str], content: str) -> str:
    """What `lease.SCRIPT` does."""
    root, verb, token, lasts, gone, _, floor = arguments
    path, disk = f"{root}/lease", machine.disk
    if verb == "take":
        disk.add_directory(root)
    elif disk.get(root) is None:
        return "gone\n" if verb == "renew" else ""
    if verb == "look":
        number, holder, owner, renewed = lease_lines(machine, root)
        age = _age(machine, renewed) // 100
        return f"held {age}\n{number}\n{holder}\n{owner}\n" if holder else ""
    lock = f"{root}/.lease.lock"
    if disk.get(lock) is None:
        disk.put(lock, b"", 0o600)
    number, holder, owner, renewed = lease_lines(machine, root)
    shown = f"{number}\n{holder}\n{owner}\n"
    held = holder and _age(machine, renewed) < int(lasts)

    def put(new_holder: str, number: str, owner: str) -> None:
        now = f"{int(100 * machine.clock.seconds())}"
        text = f"{number}\n{new_holder}\n{owner}\nstart {now}\n".encode()
        disk.make_room(path, BLOCK)
        disk.put(path, text.ljust(BLOCK, b"\0"), 0o600, machine.clock.seconds())

    answer = ""
    if verb == "take" and held and holder not in (token, gone):
        answer = f"held {_age(machine, renewed) // 100}\n{shown}"
    elif verb == "take":
        kept = disk.read(lock).partition("\n")[0]
        number = str(max(int(known or 0) for known in (number, kept, floor)) + 1)
        put(token, number, content.strip())
        with contextlib.suppress(OSError):
            disk.make_room(lock, BLOCK)
            disk.put(lock, f"{number}\n".encode().ljust(BLOCK, b"\0"), 0o600)
        dead = owner if holder not in ("", token) else ""
        answer = f"taken {number} {dead}\n{_others(machine, root)}"
    elif verb == "renew" and holder == token:
        put(token, number, owner)
        answer = "kept\n"
    elif verb == "renew":
        answer = f"lost\n{shown}" if disk.read(path) else "gone\n"
    elif holder == token:
        put("", number, "")
    return answer


def lease_lines(machine: Machine, root: str) -> list[str]:
    """Number, token, owner, and when it was renewed."""
    text = machine.disk.read(f"{root}/lease").rstrip("\0")
    return [*text.split("\n"), "", "", "", ""][:4]


def _age(machine: Machine, renewed: str) -> int:
    """In 1/100 s."""
    now, (start, _, since) = int(100 * machine.clock.seconds()), renewed.partition(" ")
    return now - int(since) if start == "start" else now


def _others(machine: Machine, root: str) -> str:
    """Leases of other deployments that are held."""
    parent, found = posixpath.dirname(root), ""
    for name in machine.disk.names(parent):
        if f"{parent}/{name}" == root:
            continue
        _, holder, owner, renewed = lease_lines(machine, f"{parent}/{name}")
        if holder:
            found += f"{_age(machine, renewed) // 100} {owner}\n"
    return found


def _sleep(*_: object) -> CommandResult:
    raise TimeoutError


def _missing_command(_: Machine, arguments: Sequence[str], __: str) -> CommandResult:
    said = "timeout: failed to run command 'no-such-command': No such file or directory\n"
    return CommandResult(127, "", said)


def _try_to_write(machine: Machine, arguments: Sequence[str], _: str) -> str:
    path, size = arguments
    machine.disk.make_room(f"{posixpath.dirname(path)}/.try.1.tmp", int(size))
    return ""


def _script(name: str, script: str, answer: Answer, word: str = "sh", **more: bool) -> Command:
    return Command(name, ("sh", "-c", script, word), answer, **more)


TABLE = (
    _script("records", host_records.READ, _records),
    _script("tree", facts.TREE, _tree),
    _script("drafts", tidy.DRAFTS, _drafts, changes=True),
    _script("objects", own_code.LOOK, _objects),
    _script("receive", own_code.RECEIVE, _receive, changes=True),
    _script("lay out", own_code.LAY_OUT, _lay_out, changes=True),
    _script("prune code", own_code.PRUNE, _prune_code, changes=True),
    _script("missing paths", facts.MISSING, _missing),
    _script("disk", facts.FREE, _free),
    _script("containers of", facts.CONTAINERS, _containers),
    _script("docker age", facts.AGES, _ages),
    _script("tail", facts.TAIL, _tail),
    _script("sizes", facts.SIZES, _sizes),
    _script("try to write", files.TRY, _try_to_write),
    _script("lease", lease.SCRIPT, _lease, changes=True),
    _script(
        "device addresses",
        ranktable.read_addresses_command([])[2],
        _device_addresses,
        "hccn_tool",
    ),
    Command("addresses", tuple(facts.ADDRESSES), _addresses),
    Command("listeners", ("ss", "-Hltnp"), _listeners),
    Command("route", tuple(facts.ROUTE), _route),
    _script("ports taken", facts.TAKEN, _taken),
    Command("port range", ("sh", "-c", facts.EPHEMERAL), lambda *_: "32768\t60999\n\n"),
    Command("connections", tuple(facts.CONNECTIONS), _connections),
    Command("npu-smi", tuple(npu_smi.COMMAND), _npus),
    Command("npu-smi -v", ("npu-smi", "-v"), lambda m, *_: f"npu-smi version: {m.driver}\n"),
    _script("links", facts.LINKS, _links),
    _script("device health", npu_smi.HEALTH, _health, "npu-smi"),
    _script("batch", batch.BATCH, _batch),
    _script("reach", reach.REACH, _reach),
    Command("hccn_tool", ("hccn_tool",), _hccn),
    Command("date", tuple(machines.DATE), _date),
    Command("date", tuple(machines.DATE_LAST), _date),
    Command("shared memory", tuple(machines.SHARED_MEMORY), _shared_memory),
    Command("model files", ("find", "-L"), _model_files),
    Command("sha256sum", ("sha256sum",), _digest),
    Command("name", ("uname", "-n"), lambda machine, *_: f"{machine.name}\n"),
    Command("uname", ("uname", "-srmo"), lambda *_: "Linux 5.10.0 aarch64 GNU/Linux\n"),
    Command("routes", ("ip", "-4", "route"), lambda *_: "default via 10.0.0.254\n"),
    Command("links", ("ip", "-s", "link"), lambda *_: "1: lo: <LOOPBACK,UP> mtu 65536\n"),
    Command("uname", ("uname", "-m"), lambda *_: "aarch64\n"),
    Command("find", ("find",), _find),
    Command("true", ("true",), lambda *_: ""),
    Command("rmdir", tidy.RMDIR, _rmdir, changes=True),
    # What the contract of hosts asks for.
    Command("cat", ("cat",), _cat),
    Command("false", ("false",), lambda *_: CommandResult(1, "", "")),
    Command("missing", ("no-such-command",), _missing_command),
    Command("sleep", ("sleep",), _sleep),
)
