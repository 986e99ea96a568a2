"""Hosts in memory: what pd-deploy sees of a machine, its Docker engine and a service on it.

`MemoryHost` is a `Host` whose SSH connection leads to a `Machine` in this process. Everything
above the connection is the real thing: `Files`, `Facts` and `DockerClient`, with their errors and
retries. `tests/host_contract.py` holds it to the real one: what both do is tested on both.

    clock      time that only passes when all wait, and the event loop that goes with it
    calls      what a run does to its hosts, one moment after the other; where faults come in
    disk       files and directories
    machine    one machine: disk, images, containers; a cluster of them, and the registry
    answers    what images say of themselves
    programs   what runs in a container: an engine's server, the proxy, a small shell
    client     the Docker engine's API
    registry   the registry's API
    sftp       the SFTP server
    commands   the commands that pd-deploy runs; any other is an error
    host       the host
    world      the documented 3P1D on two of them, and flows that run there without Prefect's server
"""
