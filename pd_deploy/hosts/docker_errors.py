"""What the Docker engine's refusals mean (pure)."""

import re
from typing import NamedTuple

from docker import errors as sdk

from pd_deploy.errors import (
    ContainerMissing,
    DiskFull,
    DiskReadOnly,
    DockerDown,
    DockerRefused,
    FileMissing,
    ImageNotFound,
    NameTaken,
    PdDeployError,
    RegistryDenied,
    RegistryMisconfigured,
    RegistryUnavailable,
)


class _Meaning(NamedTuple):
    """The meaning of a failed pull whose text matches `signs`; `{ref}` in `says` is the image."""

    signs: str
    error: type[PdDeployError]
    says: str
    hint: str


# The first match counts. The texts are those of Docker Engine 20.10 and 27.
_PULL = (
    _Meaning("no space left", DiskFull, "no space left to pull {ref}", "docker image prune"),
    _Meaning(
        "access denied|unauthorized|authentication required|no basic auth|denied:|http 40[13]",
        RegistryDenied,
        "the registry denies access to {ref}",
        "check the repository's name and the registry credentials",
    ),
    _Meaning(
        "server gave http response to https|does not look like a tls handshake",
        RegistryMisconfigured,
        "the registry of {ref} speaks plain HTTP, but Docker expects TLS",
        "check its port, or list it in insecure-registries of /etc/docker/daemon.json",
    ),
    _Meaning(
        "x509|certificate",
        RegistryMisconfigured,
        "Docker does not trust the certificate of the registry of {ref}",
        "install its CA in /etc/docker/certs.d, or list it in insecure-registries of "
        "/etc/docker/daemon.json",
    ),
    _Meaning(
        "toomanyrequests|too many requests|http 429",
        RegistryUnavailable,
        "the registry of {ref} is rate-limiting requests",
        "wait, then run again; a registry may allow more requests with credentials",
    ),
    _Meaning(
        "connection refused",
        RegistryUnavailable,
        "the registry of {ref} refuses connections",
        "check the registry's address and port, and that the registry is running",
    ),
    _Meaning(
        "no such host|server misbehaving|name resolution",
        RegistryUnavailable,
        "the host can't resolve the name of the registry of {ref}",
        "check the name, and the host's DNS",
    ),
    _Meaning(
        "http status: 5[0-9][0-9]|http 5[0-9][0-9]|unavailable|bad gateway|internal server error",
        RegistryUnavailable,
        "the registry of {ref} answers with a server error",
        "wait, then run again",
    ),
    _Meaning(
        "unknown blob",
        ImageNotFound,
        "the registry lacks a layer of {ref}",
        "push the image again",
    ),
    _Meaning(
        "byte range request|verification failed|eof|connection reset|broken pipe",
        RegistryUnavailable,
        "the download of {ref} was interrupted or damaged",
        "run again; if it happens again, look for a proxy between the host and the registry",
    ),
    _Meaning(
        "timeout|timed out|deadline exceeded|no route to host|network is unreachable",
        RegistryUnavailable,
        "the registry of {ref} does not answer",
        "check that the host can reach the registry",
    ),
    _Meaning(
        "invalid character|error unmarshalling|error parsing http",
        RegistryMisconfigured,
        "expected a registry for {ref}, but the server that answers is not a registry",
        "check its address and port; in some networks, a sign-in page answers for every server",
    ),
    _Meaning(
        "manifest unknown|no such image|manifest for|name unknown|not found",
        ImageNotFound,
        "{ref} is not in the registry",
        "check the image's name and tag",
    ),
)
# When a container is created, or started after the path was removed.
_BIND = re.compile(
    r'(?:bind source path does not exist: |error mounting "(?=[^"]+" to rootfs.*no such file))'
    r'([^\s"]+)'
)
_DEVICE = re.compile(r'(?:custom device "|error gathering device information.*? ")([^"]+)"')
_GONE = re.compile(r"no such container|removal of container .* is already in progress", re.I)
_NAME = re.compile(r'container name "/?([^"]+)" is already in use by container "?(\w{12})')


def container_error(exc: sdk.APIError, what: str, where: str) -> PdDeployError:
    """Make the error for a refused call about a container; `what` says what was tried."""
    text = explanation(exc)
    if mount := _BIND.search(text):
        return _missing_path(mount[1], f"{what}: the mount's source", where)
    if (device := _DEVICE.search(text)) and "no such file" in text:
        return _missing_path(device[1], f"{what}: the device", where)
    if name := _NAME.search(text):
        return NameTaken(
            f"{what}: the name {name[1]} already belongs to container {name[2]}",
            host=where,
            hint=f"look at it with `docker inspect {name[2]}`, and remove it if it is not needed",
        )
    if "no such image" in text.lower():
        return ImageNotFound(f"{what}: {text}", host=where, hint="pull the image first")
    if _GONE.search(text):
        return ContainerMissing(f"{what}: no such container (it may have been removed)", host=where)
    return _other(text, exc.status_code, what, where)


def pull_error(text: str, ref: str, where: str) -> PdDeployError:
    """Make the error for a pull of `ref` that failed with the engine's message `text`."""
    for meaning in _PULL:
        if re.search(meaning.signs, text, re.I):
            message = f"{meaning.says.format(ref=ref)} ({_short(text)})"
            return meaning.error(message, host=where, hint=meaning.hint)
    return DockerRefused(f"pulling {ref} failed: {_short(text)}", host=where)


def load_error(text: str, what: str, where: str) -> PdDeployError:
    """Make the error for an archive that the engine does not load, with its message `text`."""
    return _other(text, None, what, where)


def explanation(exc: sdk.APIError) -> str:
    """Return the engine's own words."""
    return str(exc.explanation or exc)


def _missing_path(path: str, what: str, where: str) -> FileMissing:
    return FileMissing(
        f"{what} {path} does not exist on the host",
        path=path,
        host=where,
        hint="create it, or correct the path in the deployment file",
    )


def _other(text: str, status: int | None, what: str, where: str) -> PdDeployError:
    if "no space left" in text.lower():
        return DiskFull(
            f"{what}: Docker's disk is full ({_short(text)})",
            host=where,
            hint="`docker system df` shows what uses it",
        )
    if "read-only file system" in text.lower():
        return DiskReadOnly(
            f"{what}: Docker's disk is mounted read-only ({_short(text)})",
            host=where,
            hint="`dmesg` says why (disk errors, for example)",
        )
    if status == 503:
        return DockerDown(
            f"{what}: {_short(text)}", host=where, hint="look at `systemctl status docker`"
        )
    return DockerRefused(f"{what}: the Docker engine says {_short(text)!r}", host=where)


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
