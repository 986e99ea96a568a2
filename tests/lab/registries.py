"""Real registries of the tests' own (Debian's docker-registry), and odd servers beside them."""

import base64
import gzip
import hashlib
import json
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import bcrypt
import httpx
import yaml
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import padding, rsa
from cryptography.x509.oid import NameOID

from pd_deploy.cli.local_http import free_port
from pd_deploy.hosts.container_values import RegistryLogin
from pd_deploy.lab import images
from pd_deploy.lab.system import wait_until

LOGIN = RegistryLogin("robot", "open-sesame")
SERVICE = "test-service"
ISSUER = "test-issuer"


@dataclass(frozen=True)
class Request:
    """A request as a server got it; names of headers are in small letters."""

    method: str
    path: str
    headers: Mapping[str, str]

    @property
    def query(self) -> dict[str, list[str]]:
        return parse_qs(urlsplit(self.path).query)


@dataclass(frozen=True)
class Reply:
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    @classmethod
    def json(cls, document: object) -> "Reply":
        return cls(200, {"Content-Type": "application/json"}, json.dumps(document).encode())


@dataclass(frozen=True)
class Server:
    """A small HTTP server; `requests` are those it got."""

    address: str
    requests: list[Request]


@contextmanager
def serving(answer: Callable[[Request], Reply]) -> Iterator[Server]:
    """Serves HTTP on a free port of 127.0.0.1."""
    requests: list[Request] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            headers = {name.lower(): value for name, value in self.headers.items()}
            requests.append(Request(self.command, self.path, headers))
            reply = answer(requests[-1])
            self.send_response(reply.status)
            for name, value in {"Content-Length": str(len(reply.body)), **reply.headers}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(reply.body)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield Server(f"127.0.0.1:{server.server_port}", requests)
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def in_front_of(registry: str, request: Request) -> Reply:
    """What a registry answers to a request."""
    kept = {
        name: value
        for name, value in request.headers.items()
        if name in ("accept", "authorization")
    }
    got = httpx.request(
        request.method, f"http://{registry}{request.path}", headers=kept, trust_env=False
    )
    names = ("content-type", "docker-content-digest", "www-authenticate")
    return Reply(
        got.status_code,
        {name: got.headers[name] for name in names if name in got.headers},
        got.content,
    )


def in_pages(registry: str, size: int, link: str) -> Callable[[Request], Reply]:
    """A registry that gives its tags in pages, as newer versions do.

    Args:
        registry: the registry that has the tags.
        size: tags on a page.
        link: form of the link to the next page; `{path}` is its path and query.
    """

    def answer(request: Request) -> Reply:
        reply = in_front_of(registry, request)
        path = urlsplit(request.path).path
        if reply.status != 200 or not path.endswith("/tags/list"):
            return reply
        last = request.query.get("last", [""])[0]
        rest = sorted(tag for tag in json.loads(reply.body)["tags"] if tag > last)
        page = Reply.json({"tags": rest[:size]})
        if len(rest) <= size:
            return page
        target = link.format(path=f"{path}?last={rest[size - 1]}&n={size}")
        return Reply(200, {**page.headers, "Link": f'<{target}>; rel="next"'}, page.body)

    return answer


class Authority:
    """Certificates of the tests' own: a CA, and what it signs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._key = rsa.generate_private_key(65537, 2048)
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "tests' CA")])
        self._certificate = self._signed(self._name, self._key, x509.BasicConstraints(True, 0))
        self.pem = self._certificate.public_bytes(serialization.Encoding.PEM).decode()
        self.file = directory / "ca.pem"
        self.file.write_text(self.pem)

    def server(self, name: str) -> dict[str, str]:
        """A server's certificate for a name or address, as the registry's configuration has it."""
        key = rsa.generate_private_key(65537, 2048)
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        is_address = name[0].isdigit()
        alternative = x509.IPAddress(ip_address(name)) if is_address else x509.DNSName(name)
        certificate = self._signed(subject, key, x509.SubjectAlternativeName([alternative]))
        files = {part: self._directory / f"{name}.{part}" for part in ("certificate", "key")}
        pem = serialization.Encoding.PEM
        files["certificate"].write_bytes(certificate.public_bytes(pem))
        files["key"].write_bytes(
            key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        return {part: str(file) for part, file in files.items()}

    def token(self, access: list[dict[str, Any]]) -> str:
        """A token for the registry: a JWT with the certificate that verifies it."""
        now = int(time.time())
        certificate = self._certificate.public_bytes(serialization.Encoding.DER)
        head = {"typ": "JWT", "alg": "RS256", "x5c": [base64.b64encode(certificate).decode()]}
        claims = {
            "iss": ISSUER,
            "sub": "",
            "aud": SERVICE,
            "exp": now + 300,
            "nbf": now - 60,
            "iat": now,
            "jti": str(time.monotonic_ns()),
            "access": access,
        }
        signed = b".".join(_base64url(json.dumps(part).encode()) for part in (head, claims))
        signature = self._key.sign(signed, padding.PKCS1v15(), hashes.SHA256())
        return b".".join((signed, _base64url(signature))).decode()

    def _signed(
        self, subject: x509.Name, key: rsa.RSAPrivateKey, extension: x509.ExtensionType
    ) -> x509.Certificate:
        now = datetime.now(UTC)
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
            .sign(self._key, hashes.SHA256())
        )


class Tokens:
    """A token server: robot may pull all, everybody else what is below `public/`.

    Args:
        authority: signs the tokens.
        answer: what it makes of a token: the JSON document of its answer.
    """

    def __init__(self, authority: Authority, answer: Callable[[str], dict[str, Any]]) -> None:
        self._authority = authority
        self._answer = answer

    def __call__(self, request: Request) -> Reply:
        given = request.headers.get("authorization")
        if given not in (None, basic(LOGIN)):
            return Reply(401)
        query = request.query
        assert query["service"] == [SERVICE]
        kind, name, action = query["scope"][0].split(":")
        allowed = given is not None or name.startswith("public/")
        access = [{"type": kind, "name": name, "actions": [action]}] if allowed else []
        return Reply.json(self._answer(self._authority.token(access)))


@dataclass(frozen=True)
class Registries:
    """Starts registries on one common storage, so that what one is given all have.

    Args:
        program: Debian's docker-registry.
        directory: for configurations, logs and the storage.
        processes: those started.
    """

    program: Path
    directory: Path
    processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def start(self, **more: Any) -> str:
        """Starts a registry on a free port of 127.0.0.1 and waits until it answers.

        Args:
            more: top-level keys of its configuration, `tls` for that of its server.

        Returns:
            Its HOST:PORT.
        """
        address = f"127.0.0.1:{free_port()}"
        config = self.directory / f"{address}.yml"
        config.write_text(configuration(address, str(self.directory / "storage"), **more))
        log = config.with_suffix(".log")
        with log.open("wb") as output:
            command = ["setpriv", "--pdeathsig", "KILL", str(self.program), "serve", str(config)]
            process = subprocess.Popen(command, stdout=output, stderr=output)
        self.processes.append(process)
        wait_until(f"registry {address}", lambda: listens(address), 20, log.read_text)
        return address

    def stop(self) -> None:
        """Ends all that were started."""
        for process in self.processes:
            process.kill()
            process.wait()


def configuration(address: str, storage: str, **more: Any) -> str:
    """A registry's configuration file."""
    http = {"addr": address, "secret": "of the tests"} | (
        {"tls": more.pop("tls")} if "tls" in more else {}
    )
    return yaml.safe_dump(
        {
            "version": 0.1,
            "log": {"level": "warn"},
            "storage": {"filesystem": {"rootdirectory": storage}},
            "http": http,
            **more,
        }
    )


def htpasswd(file: Path) -> dict[str, Any]:
    """A registry's `auth` for LOGIN by htpasswd."""
    hashed = bcrypt.hashpw(LOGIN.password.encode(), bcrypt.gensalt(4)).decode()
    file.write_text(f"{LOGIN.username}:{hashed}\n")
    return {"htpasswd": {"realm": "tests", "path": str(file)}}


def token_auth(realm: str, authority: Authority) -> dict[str, Any]:
    """A registry's `auth` by tokens from a token server."""
    return {
        "token": {
            "realm": realm,
            "service": SERVICE,
            "issuer": ISSUER,
            "rootcertbundle": str(authority.file),
        }
    }


def push(registry: str, repository: str, tag: str, content: str = "") -> str:
    """Pushes a small image; the same content gives the same digest, which is returned."""
    tree = images.tar_files({"/etc/base": "base"})
    blob = gzip.compress(tree, mtime=0)
    base = images.Layer(digest=sha256(blob), diff_id=sha256(tree), size=len(blob))
    to = images.Repository(registry, repository)
    to.push_blob(base.digest, blob)
    # The base is there already, so no file of it is needed.
    top = images.tar_files({"/etc/build": content or tag})
    return images.push_image(to, tag, base, Path("/nonexistent"), top)


def push_index(registry: str, repository: str, tag: str, manifest_tag: str) -> str:
    """Pushes an index with one image of the repository in it; returns its digest."""
    kind = "application/vnd.docker.distribution.manifest.list.v2+json"
    url = f"http://{registry}/v2/{repository}/manifests"
    manifest = httpx.get(f"{url}/{manifest_tag}", headers={"Accept": images.MANIFEST})
    entry = {
        "mediaType": images.MANIFEST,
        "digest": manifest.headers["docker-content-digest"],
        "size": len(manifest.content),
        "platform": {"architecture": "arm64", "os": "linux"},
    }
    body = json.dumps({"schemaVersion": 2, "mediaType": kind, "manifests": [entry]}).encode()
    httpx.put(f"{url}/{tag}", content=body, headers={"Content-Type": kind}).raise_for_status()
    return sha256(body)


def basic(login: RegistryLogin) -> str:
    """The Authorization header of a login."""
    return "Basic " + base64.b64encode(f"{login.username}:{login.password}".encode()).decode()


def sha256(content: bytes) -> str:
    """A digest as registries write it."""
    return f"sha256:{hashlib.sha256(content).hexdigest()}"


def listens(address: str) -> bool:
    """Whether somebody listens on HOST:PORT."""
    host, _, port = address.partition(":")
    with socket.socket() as probe:
        return probe.connect_ex((host, int(port))) == 0


def _base64url(content: bytes) -> bytes:
    return base64.urlsafe_b64encode(content).rstrip(b"=")
