"""The lab itself: two hosts like real ones, that come and go without a trace."""

import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import asyncssh
import httpx
import pytest
from typer.testing import CliRunner

from pd_deploy.lab import Lab, LabError, LabHost, cache
from pd_deploy.lab.cli import app
from pd_deploy.lab.lifecycle import CGROUPS, STATE, take_down
from pd_deploy.lab.system import wait_until
from tests.conftest import NAME, SUBNET, lab_up

OTHER = f"{NAME}-o"
OTHER_SUBNET = str(ipaddress.ip_network(SUBNET).network_address + 256 * 128) + "/24"
OUTSIDE = f"{NAME}-out"
OTHER_A = OTHER_SUBNET.replace(".0/24", ".11")


async def on(lab: Lab, host: str, command: str, **login: object) -> asyncssh.SSHCompletedProcess:
    login = {"username": "root", "client_keys": [str(lab.ssh_key)], **login}
    async with asyncssh.connect(
        lab.hosts[host].address, known_hosts=str(lab.known_hosts), **login
    ) as connection:
        return await connection.run(command)


def container(lab: Lab, host: LabHost, *command: str) -> str:
    argv = ["docker", "run", "--rm", "--net", "host", "--init", lab.image, *command]
    return host.run(argv).stdout


@pytest.fixture
def other_lab(lab: Lab) -> Iterator[Lab]:
    """A second lab, for tests that break it."""
    with lab_up(OTHER, OTHER_SUBNET) as other:
        yield other


@pytest.fixture
def outside() -> Iterator[str]:
    """An address that the machine answers for and that is not of the lab."""
    address = "203.0.113.1"
    subprocess.run(["ip", "link", "add", OUTSIDE, "type", "bridge"], check=True)
    try:
        subprocess.run(["ip", "address", "add", address, "dev", OUTSIDE], check=True)
        yield address
    finally:
        subprocess.run(["ip", "link", "delete", OUTSIDE], check=True)


def traces(name: str) -> list[str]:
    """Whatever of a lab the machine still has."""
    processes = [
        f"process {process.name}"
        for process in Path("/proc").glob("[0-9]*")
        if mentions(process, str(STATE / name))
    ]
    links = json.loads(subprocess.check_output(["ip", "-json", "link", "show"]))
    interfaces = [f"interface {link['ifname']}" for link in links if name in link["ifname"]]
    groups = [str(group) for group in CGROUPS.glob(f"**/pd-deploy-lab-{name}")]
    directories = [str(STATE / name)] if (STATE / name).exists() else []
    return [*processes, *interfaces, *groups, *directories]


def mentions(process: Path, directory: str) -> bool:
    """Whether a process lives in a mount namespace that has mounts from a lab's directory."""
    try:
        return f"{directory}/" in (process / "mountinfo").read_text()
    except OSError:
        return False


def firewall() -> str:
    """The machine's packet filter as far as its tools are installed, and its forwarding."""
    forwarding = Path("/proc/sys/net/ipv4/ip_forward").read_text()
    try:
        return forwarding + subprocess.check_output(["iptables-save"], text=True)
    except FileNotFoundError:
        return forwarding


@pytest.mark.parametrize("user", ["root", "deployer", "nodocker"])
@pytest.mark.parametrize("host", ["a", "b"])
async def test_every_user_logs_in_with_the_labs_key(lab: Lab, host: str, user: str) -> None:
    result = await on(lab, host, "whoami; hostname", username=user)
    assert result.stdout == f"{user}\n{lab.name}-{host}\n"


async def test_the_password_lets_deployer_in_and_another_one_does_not(lab: Lab) -> None:
    password = lab.password_file.read_text()
    result = await on(lab, "a", "whoami", username="deployer", client_keys=[], password=password)
    assert result.stdout == "deployer\n"
    with pytest.raises(asyncssh.PermissionDenied):
        await on(lab, "a", "true", username="deployer", client_keys=[], password="wrong")


async def test_only_members_of_the_group_docker_use_the_engine(lab: Lab) -> None:
    allowed = await on(lab, "b", "docker ps", username="deployer")
    refused = await on(lab, "b", "docker ps", username="nodocker")
    assert (allowed.exit_status, refused.exit_status) == (0, 1)
    assert "permission denied" in str(refused.stderr)


async def test_sftp_works(lab: Lab, tmp_path: Path) -> None:
    host = lab.hosts["a"]
    async with (
        asyncssh.connect(
            host.address,
            username="root",
            client_keys=[str(lab.ssh_key)],
            known_hosts=str(lab.known_hosts),
        ) as connection,
        connection.start_sftp_client() as sftp,
    ):
        await sftp.get("/etc/hccn.conf", tmp_path)
    assert (tmp_path / "hccn.conf").read_text() == host.run(["cat", "/etc/hccn.conf"]).stdout


def test_secrets_are_readable_by_root_only(lab: Lab) -> None:
    assert lab.directory.stat().st_mode & 0o777 == 0o700
    for secret in (lab.ssh_key, lab.password_file, lab.directory / "lab.json"):
        assert secret.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("name", ["a", "b"])
def test_containers_run_in_their_hosts_network(lab: Lab, name: str) -> None:
    host = lab.hosts[name]
    assert container(lab, host, "hostname", "-I").split() == [host.address]


def test_containers_of_one_host_are_unknown_to_the_other(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    a.run(["docker", "run", "-d", "--name", "lonely", "--net", "host", lab.image, "sleep", "99"])
    try:
        assert (a.containers(), b.containers()) == (1, 0)
    finally:
        a.run(["docker", "rm", "-f", "lonely"])


def test_each_npu_host_has_its_devices_and_their_addresses(lab: Lab) -> None:
    for number, host in ((11, lab.hosts["a"]), (12, lab.hosts["b"])):
        devices = host.run(["sh", "-c", "ls -d /dev/davinci[0-9]*"]).stdout.split()
        assert len(devices) == 16
        conf = host.run(["cat", "/etc/hccn.conf"]).stdout.splitlines()
        assert f"address_15=192.168.{number}.115" in conf
        assert "netmask_15=255.255.255.0" in conf


def test_a_device_can_be_given_to_a_container(lab: Lab) -> None:
    argv = ["docker", "run", "--rm", "--net", "host", "--device", "/dev/davinci3"]
    listed = lab.hosts["a"].run([*argv, lab.image, "sh", "-c", "ls /dev/davinci*"]).stdout
    assert listed.split() == ["/dev/davinci3"]


def test_hosts_see_their_own_files_only(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    a.run(["sh", "-c", "echo a >/data/mark; echo a >/tmp/mark"])
    for path in ("/data/mark", "/tmp/mark"):
        assert b.run(["test", "-e", path], check=False).returncode == 1
        assert not Path(path).exists()


def test_hosts_reach_each_other(lab: Lab) -> None:
    a, b = lab.hosts["a"], lab.hosts["b"]
    a.run(["ping", "-c1", "-W2", b.address])
    b.run(["ping", "-c1", "-W2", a.address])
    a.run(["ping", "-c1", "-W2", lab.machine_address])


def test_traffic_does_not_leave_the_lab(lab: Lab, outside: str) -> None:
    a = lab.hosts["a"]
    ping = ["ping", "-c1", "-W1", outside]
    assert a.run(ping, check=False).returncode == 1
    # Only a route that the lab does not set leads out.
    a.run(["ip", "route", "add", outside, "via", lab.machine_address])
    try:
        a.run(ping)
    finally:
        a.run(["ip", "route", "delete", outside])


def test_a_variant_differs_in_its_files_only(lab: Lab) -> None:
    digest = lab.push_variant(
        "variant", {"/opt/say": "#!/bin/sh\necho variant\n", "/usr/bin/python3": None}
    )
    image = f"{lab.image.rpartition(':')[0]}@{digest}"
    run = ["docker", "run", "--rm", "--net", "host", image]
    assert lab.hosts["a"].run([*run, "/opt/say"]).stdout == "variant\n"
    assert lab.hosts["a"].run([*run, "python3"], check=False).returncode == 127
    assert lab.push_variant("again", {"/opt/say": "x"}) == lab.push_variant(
        "and-again", {"/opt/say": "x"}
    )


def test_a_build_of_another_contract_has_its_files_alone(lab: Lab) -> None:
    lab.push_build("roles", "roles", {"unhealthy": True})
    seen = (
        "cd /workspace/omniinfer && ls tools && python -c "
        "'from importlib.metadata import version; print(version(\"omni-infer\"))'"
        " && cat /etc/standin.json"
    )
    image = f"{lab.image.rpartition(':')[0]}:roles"
    done = lab.hosts["a"].run(["docker", "run", "--rm", "--net", "host", image, "sh", "-c", seen])
    assert done.stdout.split() == ["deploy", "1.2.1.post1", '{"unhealthy":', "true}"]


def test_one_variant_has_no_nginx_but_can_build_it(lab: Lab) -> None:
    host = lab.hosts["b"]
    argv = ["docker", "run", "--rm", "--net", "host"]
    nginx = ["sh", "-c", "nginx -v 2>&1 && /usr/local/nginx/nginx -v 2>&1"]
    assert host.run([*argv, lab.image, *nginx]).stdout.count("nginx/1.") == 2
    without = f"{lab.image}-nonginx"
    assert host.run([*argv, without, *nginx], check=False).returncode == 127
    proxy = "/workspace/omniinfer/omni/accelerators/sched/global_proxy"
    build = f"cd {proxy} && mkdir nginx-1.24.0 && bash build.sh && /usr/local/nginx/nginx -v 2>&1"
    assert "nginx/1." in host.run([*argv, without, "sh", "-c", build]).stdout


def test_a_host_runs_this_checkout_with_this_python(lab: Lab) -> None:
    script = "import prefect, lab, socket; print(lab.__file__, socket.gethostname())"
    root = Path(__file__).parents[2]
    env = {"PYTHONPATH": str(root)}
    output = lab.hosts["a"].run([sys.executable, "-c", script], env=env).stdout
    assert output.split() == [str(root / "lab" / "__init__.py"), f"{lab.name}-a"]
    written = lab.hosts["a"].run(["touch", str(root / "mark")], check=False)
    assert "Read-only file system" in written.stderr


def test_a_cut_host_lives_on_unreached(lab: Lab) -> None:
    host = lab.hosts["b"]
    host.cut()
    try:
        assert not host.ssh_answers()
        assert host.engine_answers()
    finally:
        host.mend()
    wait_until("b to be back", host.ssh_answers, timeout=5)


def test_engine_and_sshd_stop_and_start(lab: Lab) -> None:
    host = lab.hosts["b"]
    host.stop_engine()
    assert not host.engine_answers()
    host.start_engine()
    host.stop_sshd()
    assert not host.ssh_answers()
    host.start_sshd()
    assert lab.healthy()


def test_ending_a_started_command_ends_it_in_the_host(lab: Lab) -> None:
    host = lab.hosts["a"]
    command = host.popen(["sleep", "4711"])
    find = ["pgrep", "-f", "^sleep 4711"]
    wait_until("it to run", lambda: host.run(find, check=False).returncode == 0, timeout=5)
    command.kill()
    command.communicate()
    wait_until("it to end", lambda: host.run(find, check=False).returncode == 1, timeout=5)


def test_a_power_failure_ends_everything_and_the_disk_stays(lab: Lab) -> None:
    host = lab.hosts["b"]
    host.run(["docker", "run", "-d", "--name", "victim", "--net", "host", lab.image, "sleep", "99"])
    host.run(["sh", "-c", "echo kept >/data/kept"])
    host.power_off()
    assert not any(mentions(p, str(host.box.directory)) for p in Path("/proc").glob("[0-9]*"))
    assert not host.ssh_answers()
    with pytest.raises(LabError, match="off"):
        host.run(["true"])
    host.power_on()
    assert host.run(["cat", "/data/kept"]).stdout == "kept\n"
    state = host.run(["docker", "inspect", "-f", "{{.State.Running}}", "victim"]).stdout
    assert state == "false\n"
    host.run(["docker", "rm", "victim"])


def test_a_host_is_rebooted_by_command_also_one_that_is_off(lab: Lab) -> None:
    host = lab.hosts["b"]
    before = host.init_pid
    for _ in range(2):
        done = CliRunner().invoke(app, ["reboot", "b", "--name", lab.name])
        assert (done.exit_code, done.output) == (0, "b is up again; what ran on it has ended\n")
        assert host.init_pid != before
        assert lab.healthy()
        host.power_off()
    host.power_on()


def test_up_leaves_a_running_lab_as_it_is(lab: Lab) -> None:
    pids = [host.init_pid for host in lab.hosts.values()]
    again = Lab.up(lab.name, str(lab.subnet))
    assert [host.init_pid for host in again.hosts.values()] == pids


def test_up_mends_a_cut_host(lab: Lab) -> None:
    pid = lab.hosts["b"].init_pid
    lab.hosts["b"].cut()
    assert Lab.up(lab.name, str(lab.subnet)).healthy()
    assert lab.hosts["b"].init_pid == pid


def test_up_replaces_a_lab_whose_host_died(other_lab: Lab) -> None:
    os.kill(other_lab.hosts["a"].init_pid, signal.SIGKILL)
    again = Lab.up(OTHER, OTHER_SUBNET)
    assert again.healthy()
    assert container(again, again.hosts["a"], "hostname", "-I").split() == [OTHER_A]


def test_up_after_a_killed_up(lab: Lab) -> None:
    script = f"from lab import Lab; Lab.up({OTHER!r}, {OTHER_SUBNET!r}, say=print)"
    root = Path(__file__).parents[2]
    first = subprocess.Popen([sys.executable, "-c", script], cwd=root, stdout=subprocess.DEVNULL)
    try:
        booted = STATE / OTHER / "b" / "init.json"
        wait_until("host b to boot", booted.exists, timeout=20)
        first.kill()
        first.wait()
        assert not (STATE / OTHER / "lab.json").exists()
        assert Lab.up(OTHER, OTHER_SUBNET).healthy()
    finally:
        first.kill()
        take_down(OTHER)
    assert traces(OTHER) == []


def test_an_interrupted_up_leaves_nothing(lab: Lab) -> None:
    def interrupt(step: str) -> None:
        if "SSH" in step:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Lab.up(OTHER, OTHER_SUBNET, say=interrupt)
    assert traces(OTHER) == []


def test_down_leaves_nothing(lab: Lab) -> None:
    before = firewall()
    other = Lab.up(OTHER, OTHER_SUBNET, hosts=3)
    run = ["docker", "run", "-d", "--net", "host", "--init", other.image, "sleep", "99"]
    other.hosts["c"].run(run)
    assert traces(OTHER) != []
    removed = other.down()
    assert removed[:4] == [f"{OTHER}-{box}" for box in ("a", "b", "c", "switch")]
    assert traces(OTHER) == []
    assert firewall() == before
    assert lab.healthy()
    assert cache.CACHE.exists()
    assert take_down(OTHER) == []


def test_a_taken_subnet_is_refused(lab: Lab) -> None:
    with pytest.raises(LabError, match=f"overlaps .* on interface {lab.name}: .*--subnet"):
        Lab.up(OTHER, str(lab.subnet))
    assert traces(OTHER) == []


def test_a_taken_interface_name_is_refused(lab: Lab) -> None:
    subprocess.run(["ip", "link", "add", OTHER, "type", "bridge"], check=True)
    try:
        with pytest.raises(LabError, match=f"{OTHER} already exists and is not this lab's"):
            Lab.up(OTHER, OTHER_SUBNET)
        # What is not the lab's also survives its removal.
        take_down(OTHER)
        assert traces(OTHER) == [f"interface {OTHER}"]
    finally:
        subprocess.run(["ip", "link", "delete", OTHER], check=True)


def test_without_root_it_says_so() -> None:
    script = "import os; from lab import Lab; os.setuid(65534); Lab.up()"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=root, capture_output=True, text=True, check=False
    )
    assert "needs root" in done.stderr


@pytest.mark.parametrize("name", ["", "Lab", "../x", "a-name-too-long-for-a-link"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(LabError, match="lab name"):
        Lab.up(name, OTHER_SUBNET)


@pytest.mark.parametrize("subnet", ["10.78.128.0", "10.78.128.1/24", "10.78.128.0/30", "fd00::/64"])
def test_a_bad_subnet_is_refused(subnet: str) -> None:
    with pytest.raises(LabError, match="subnet"):
        Lab.up(OTHER, subnet)


@pytest.mark.parametrize("hosts", [0, 244])
def test_a_number_of_hosts_that_the_subnet_has_no_room_for_is_refused(hosts: int) -> None:
    with pytest.raises(LabError, match=f"expected 1 to 243 hosts, .* found {hosts}"):
        Lab.up(OTHER, OTHER_SUBNET, hosts=hosts)


def test_a_lab_that_is_up_with_another_number_of_hosts_is_left_alone(lab: Lab) -> None:
    with pytest.raises(LabError, match="up with 2 hosts, not with 3: run `pd-deploy lab down`"):
        Lab.up(lab.name, str(lab.subnet), hosts=3)
    assert lab.healthy()


def test_status_tells_what_is_up(lab: Lab) -> None:
    lab.hosts["b"].stop_sshd()
    try:
        result = CliRunner().invoke(app, ["status", "--name", lab.name, "--json"])
    finally:
        lab.hosts["b"].start_sshd()
    rows = json.loads(result.output)
    assert [(row["host"], row["ssh"], row["engine"]) for row in rows] == [
        ("a", True, True),
        ("b", False, True),
    ]


def test_exec_runs_in_the_host_and_returns_its_exit_code(lab: Lab) -> None:
    command = [
        sys.executable,
        "-c",
        "from pd_deploy.lab.cli import app; app()",
        "exec",
        "--name",
        lab.name,
    ]
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [*command, "a", "--", "sh", "-c", "hostname; exit 3"],
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (3, f"{lab.name}-a\n")


def test_a_command_for_an_unknown_lab_or_host_says_what_to_do(lab: Lab) -> None:
    no_lab = CliRunner().invoke(app, ["status", "--name", "nowhere"])
    assert (no_lab.exit_code, "`pd-deploy lab up`" in no_lab.output) == (1, True)
    no_host = CliRunner().invoke(app, ["cut", "c", "--name", lab.name])
    assert (no_host.exit_code, "expected a host of" in no_host.output) == (1, True)


def test_the_cache_of_a_running_lab_is_not_purged(lab: Lab) -> None:
    result = CliRunner().invoke(app, ["down", "--purge", "--name", OTHER])
    assert (result.exit_code, lab.name in result.output) == (1, True)
    assert cache.CACHE.exists()


def test_the_registry_is_the_labs_own(lab: Lab) -> None:
    tags = httpx.get(f"http://{lab.registry}/v2/omni-ci/daily_omniinfer/tags/list").json()["tags"]
    assert {"20250722_26", "20250722_26-nonginx"} <= set(tags)
