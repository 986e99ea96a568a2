"""Prefect as docs/production.md sets it up, on one machine: two API servers behind nginx with TLS,
background services for each, PostgreSQL and Redis, from the files in deploy/.

All of it runs in a temporary directory, as processes of this command's own.
"""

import json
import os
import re
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

from cryptography.fernet import Fernet

from demo.processes import Processes
from demo.programs import Programs
from pd_deploy.cli.local_http import free_ports, is_healthy

FILES = Path(__file__).resolve().parents[1] / "deploy"
BIN = Path(sys.executable).parent
MACHINES = ("1", "2")
READY_S = 300  # a busy machine needs minutes for Prefect's imports
# PostgreSQL refuses to run as root.
_UNPRIVILEGED = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]


class Production:
    """The control plane. Its processes are named postgres, redis, nginx, server-1, services-1,
    server-2, services-2, and as the caller names its workers."""

    def __init__(self, processes: Processes, directory: Path, ports: Mapping[str, int]) -> None:
        self.processes = processes
        self.directory = directory
        self.ports = ports
        self.programs = Programs()
        self.programs.unpack()
        self._secrets: dict[str, str] = json.loads((directory / "secrets.json").read_text())

    @classmethod
    def create(cls, processes: Processes, port: int | None = None) -> "Production":
        """Make its directory, passwords and certificate.

        Args:
            port: where nginx is to listen; any free one by default.
        """
        directory = Path(tempfile.mkdtemp(prefix="pd-deploy-production-"))
        directory.chmod(0o711)
        names = ("nginx", "postgres", "redis", *(f"server-{number}" for number in MACHINES))
        ports = dict(zip(names, free_ports(len(names)), strict=True))
        if port:
            ports["nginx"] = port
        keys = ("postgres", "redis", "api")
        made = {key: secrets.token_urlsafe(18) for key in keys}
        made["encryption"] = Fernet.generate_key().decode()
        _write(directory / "secrets.json", json.dumps(made))
        _write(directory / "ports.json", json.dumps(ports))
        production = cls(processes, directory, ports)
        _write(directory / "login", f"{production._auth}\n")
        production._make_certificate()
        return production

    @classmethod
    def load(cls, processes: Processes, directory: Path) -> "Production":
        """Take up what `create` made."""
        return cls(processes, directory, json.loads((directory / "ports.json").read_text()))

    @property
    def url(self) -> str:
        """Where people and workers reach it."""
        return f"https://127.0.0.1:{self.ports['nginx']}"

    @property
    def server_env(self) -> dict[str, str]:
        """Settings of servers and services: deploy/server.env and server.secrets.env, filled in."""
        local = "127.0.0.1"
        redis = f":{self._secrets['redis']}@{local}:{self.ports['redis']}"
        secret = settings(FILES / "server.secrets.env")
        here = {
            name: value.replace(":PASSWORD@redis.example.org:6379", redis)
            for name, value in secret.items()
        }
        return _clean() | {
            **settings(FILES / "server.env"),
            "PREFECT_HOME": str(self.directory / "prefect"),
            "PREFECT_SERVER_API_HOST": local,
            "PREFECT_SERVER_DATABASE_HOST": local,
            "PREFECT_SERVER_DATABASE_PORT": str(self.ports["postgres"]),
            **here,
            "PREFECT_SERVER_DATABASE_PASSWORD": self._secrets["postgres"],
            "PREFECT_SERVER_API_AUTH_STRING": self._auth,
            "PREFECT_SERVER_ENCRYPTION_KEY": self._secrets["encryption"],
        }

    def client_env(self, name: str) -> dict[str, str]:
        """Fill in deploy/worker.env and worker.secrets.env, for a worker or a person.

        Args:
            name: whose; each has a Prefect directory of its own.
        """
        return _clean() | {
            **settings(FILES / "worker.env"),
            "PREFECT_HOME": str(self.directory / f"prefect-{name}"),
            "PREFECT_API_URL": f"{self.url}/api",
            "PREFECT_API_SSL_CERT_FILE": str(self.directory / "tls.pem"),
            **settings(FILES / "worker.secrets.env"),
            "PREFECT_API_AUTH_STRING": self._auth,
        }

    def start(self) -> None:
        """Start all of it, and wait until it answers."""
        self._create_database()
        self.start_postgres()
        self.start_redis()
        self._sql("create database prefect", "postgres")
        prefect = f"{BIN}/prefect"
        _run([prefect, "server", "database", "upgrade", "-y"], self.server_env)
        for number in MACHINES:
            self.start_server(number)
            self.start_services(number)
        self.start_nginx()
        for number in MACHINES:
            self.until(f"server-{number}", lambda n=number: self._server_answers(n))  # type: ignore[misc]
        self.until("nginx", self.answers)

    def start_postgres(self) -> None:
        """Start PostgreSQL, and wait until it takes connections."""
        data = self.directory / "postgres"
        argv = [self.programs["postgres"], "-D", str(data), "-p", str(self.ports["postgres"])]
        self._start("postgres", [*_UNPRIVILEGED, *argv], self.programs.env)
        ready = [self.programs["pg_isready"], "-q", "-h", "127.0.0.1"]
        port = ["-p", str(self.ports["postgres"])]
        self.until("postgres", lambda: _succeeds([*ready, *port], self.programs.env))

    def start_redis(self) -> None:
        """Start Redis, and wait until it takes connections."""
        lines = [
            (FILES / "redis.conf").read_text(),
            f"bind 127.0.0.1\nport {self.ports['redis']}\nrequirepass {self._secrets['redis']}",
            f"dir {self._owned('redis')}\n",
        ]
        path = self.directory / "redis.conf"
        _write(path, "\n".join(lines))
        shutil.chown(path, "nobody", "nogroup")
        argv = [*_UNPRIVILEGED, self.programs["redis-server"], str(path)]
        self._start("redis", argv, self.programs.env)
        self.until("redis", lambda: _listens(self.ports["redis"]))

    def start_server(self, number: str) -> None:
        """Start an API server; `until` can wait until it answers."""
        env = self.server_env | {"PREFECT_SERVER_API_PORT": str(self.ports[f"server-{number}"])}
        argv = [f"{BIN}/prefect", "server", "start", "--no-services"]
        self._start(f"server-{number}", argv, env)

    def start_services(self, number: str) -> None:
        """Start a machine's background services."""
        argv = [f"{BIN}/prefect", "server", "services", "start"]
        self._start(f"services-{number}", argv, self.server_env)

    def start_worker(self, name: str, pool: str, python: str = sys.executable) -> None:
        """Start a worker in an empty directory, as on a machine of its own.

        Args:
            python: of the environment in which pd-deploy is installed there.
        """
        env = self.client_env(name)
        home = Path(env["PREFECT_HOME"])
        home.mkdir(exist_ok=True)
        argv = [python, "-m", "prefect", "worker", "start", "--pool", pool, "--name", name]
        self.processes.start(name, argv, env, cwd=home)

    def start_nginx(self) -> None:
        """Start nginx with deploy/nginx.conf."""
        site = (FILES / "nginx.conf").read_text()
        for number in MACHINES:
            here = f"127.0.0.1:{self.ports[f'server-{number}']}"
            site = site.replace(f"control-{number}.example.org:4200", here)
        site = site.replace("listen 443 ", f"listen 127.0.0.1:{self.ports['nginx']} ")
        site = site.replace("/etc/pd-deploy/", f"{self.directory}/")
        work = self._owned("nginx")
        temporary = "".join(
            f"{kind}_temp_path {work}/{kind};\n"
            for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        )
        path = self.directory / "nginx.conf"
        path.write_text(
            f"daemon off;\npid {work}/nginx.pid;\nerror_log stderr;\nevents {{}}\n"
            f"http {{\naccess_log {work}/access.log;\n{temporary}\n{site}}}\n"
        )
        argv = [*_UNPRIVILEGED, self.programs["nginx"], "-p", str(work), "-c", str(path)]
        self._start("nginx", argv, self.programs.env)

    def worker_of(self, run: str) -> str | None:
        """Name the worker on whose machine a run has a process."""
        homes = {
            Path(environment["PREFECT_HOME"]).name.removeprefix("prefect-")
            for environment in environments()
            if environment.get("PREFECT__FLOW_RUN_ID") == run
        }
        return next(iter(homes), None)

    def has_begun(self, run: str) -> bool:
        """Tell whether a run has come to its first step."""
        return run in self.query("select distinct flow_run_id from task_run").split()

    def answers(self) -> bool:
        """Tell whether a server answers through nginx."""
        return is_healthy(f"{self.url}/api", authority=self.directory / "tls.pem")

    def back_up(self, to: Path) -> None:
        """Copy the database, as deploy/prefect-backup.service does."""
        unit = (FILES / "prefect-backup.service").read_text()
        (script,) = re.findall(r"ExecStart=/bin/sh -ec '\\\n(.*)'\n", unit, re.DOTALL)
        script = script.replace("\\\n", "").replace("%%", "%")
        script = script.replace("/var/lib/prefect-backups", str(to))
        env = self.server_env | self.programs.env
        path = f"{Path(self.programs['pg_dump']).parent}:{env['PATH']}"
        _run(["/bin/sh", "-ec", script], env | {"PATH": path})

    def restore(self, dump: Path) -> None:
        """Put a copy in the database's place, as docs/production.md says."""
        self._sql("drop database prefect", "postgres")
        self._sql("create database prefect", "postgres")
        argv = [self.programs["pg_restore"], "--exit-on-error", "--dbname", "prefect", str(dump)]
        _run(argv, self._postgres_env)

    def query(self, statement: str) -> str:
        """Ask the database; one line for each row."""
        return self._sql(statement, "prefect")

    def until(self, name: str, condition: Callable[[], bool]) -> None:
        """Wait for a condition while a process is alive."""
        self.processes.until(name, condition, READY_S)

    def remove(self) -> None:
        """End all processes, and delete the directory."""
        self.processes.stop_all()
        shutil.rmtree(self.directory, ignore_errors=True)

    @property
    def _auth(self) -> str:
        return f"prefect:{self._secrets['api']}"

    @property
    def _postgres_env(self) -> dict[str, str]:
        return self.programs.env | {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(self.ports["postgres"]),
            "PGUSER": "prefect",
            "PGPASSWORD": self._secrets["postgres"],
        }

    def _server_answers(self, number: str) -> bool:
        return is_healthy(f"http://127.0.0.1:{self.ports[f'server-{number}']}/api", "/ready")

    def _start(self, name: str, argv: Sequence[str], env: Mapping[str, str]) -> None:
        self.processes.start(name, argv, env, cwd=self.directory)

    def _create_database(self) -> None:
        data = self._owned("postgres")
        password = self.directory / "postgres.password"
        _write(password, self._secrets["postgres"])
        shutil.chown(password, "nobody", "nogroup")
        argv = [self.programs["initdb"], "-D", str(data), "-U", "prefect", "--auth=scram-sha-256"]
        options = ["--pwfile", str(password), "--no-sync", "--encoding=UTF8", "--locale=C.UTF-8"]
        _run([*_UNPRIVILEGED, *argv, *options], self.programs.env)
        password.unlink()
        with (data / "postgresql.conf").open("a") as file:
            file.write("listen_addresses = '127.0.0.1'\nunix_socket_directories = ''\njit = off\n")

    def _sql(self, statement: str, database: str) -> str:
        argv = [self.programs["psql"], "-X", "-q", "-A", "-t", "-d", database, "-c", statement]
        return _run(argv, self._postgres_env).strip()

    def _owned(self, name: str) -> Path:
        directory = self.directory / name
        directory.mkdir(mode=0o700, exist_ok=True)
        shutil.chown(directory, "nobody", "nogroup")
        return directory

    def _make_certificate(self) -> None:
        key, certificate = self.directory / "tls.key", self.directory / "tls.pem"
        argv = [self.programs["openssl"], "req", "-x509", "-newkey", "ec", "-noenc", "-days", "30"]
        curve = ["-pkeyopt", "ec_paramgen_curve:P-256", "-subj", "/CN=pd-deploy demo"]
        names = ["-addext", "subjectAltName=IP:127.0.0.1"]
        files = ["-keyout", str(key), "-out", str(certificate)]
        _run([*argv, *curve, *names, *files], self.programs.env)
        shutil.chown(key, "nobody", "nogroup")


def environments() -> Iterator[dict[str, str]]:
    """Read the environment of each process that is still there, with its id as `pid`."""
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            content = path.read_text(errors="replace")
        except OSError:
            continue
        pairs = (entry.partition("=") for entry in content.split("\0"))
        yield {name: value for name, _, value in pairs} | {"pid": path.parent.name}


def settings(path: Path) -> dict[str, str]:
    """Read an environment file of systemd's."""
    lines = path.read_text().splitlines()
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {name: value for name, _, value in pairs}


def _clean() -> dict[str, str]:
    """Return this process's environment without Prefect's settings."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PREFECT_")}
    return inherited | {"PATH": f"{BIN}:{os.environ['PATH']}"}


def _write(path: Path, content: str) -> None:
    path.touch(mode=0o600)
    path.write_text(content)


def _run(argv: Sequence[str], env: Mapping[str, str]) -> str:
    done = subprocess.run(argv, env=dict(env), cwd="/", capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"`{argv[0]}` failed: {done.stdout}{done.stderr}")
    return done.stdout


def _succeeds(argv: Sequence[str], env: Mapping[str, str]) -> bool:
    return subprocess.run(argv, env=dict(env), check=False).returncode == 0


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
