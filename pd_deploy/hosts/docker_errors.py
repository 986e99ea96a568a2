"""What the Docker engine's refusals mean (pure)."""

import re

from docker import errors as sdk

from pd_deploy.errors import (
    ContainerMissing,
    DiskFull,
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

_DENIED = ("access denied", "unauthorized", "authentication required", "no basic auth", "denied:")
_MISSING_IMAGE = ("manifest unknown", "no such image", "manifest for", "name unknown", "not found")
_UNTRUSTED = ("x509", "server gave http response to https", "certificate")
_UNAVAILABLE = (
    "connection refused",
    "timeout",
    "timed out",
    "no such host",
    "no route to host",
    "network is unreachable",
    "connection reset",
    "deadline exceeded",
    "toomanyrequests",
    "too many requests",
    "unavailable",
    "server misbehaving",
    "bad gateway",
    "internal server error",
    "eof",
)
_BIND = re.compile(r"bind source path does not exist: (\S+)")
_DEVICE = re.compile(r'(?:custom device "|error gathering device information.*? ")([^"]+)"')
_GONE = re.compile(r"no such container|removal of container .* is already in progress", re.I)
_NAME = re.compile(r'container name "/?([^"]+)" is already in use by container "?(\w{12})')


def container_error(exc: sdk.APIError, what: str, where: str) -> PdDeployError:
    """The error for a refused call about a container; `what` says what was tried."""
    text = explanation(exc)
    if found := _BIND.search(text):
        return _missing_path(found[1], f"{what}: the mount's source", where)
    if (found := _DEVICE.search(text)) and "no such file" in text:
        return _missing_path(found[1], f"{what}: the device", where)
    if found := _NAME.search(text):
        return NameTaken(
            f"{what}: the name {found[1]} belongs to container {found[2]} already",
            host=where,
            hint=f"look at it with `docker inspect {found[2]}` and remove it if it is left over",
        )
    if "no such image" in text.lower():
        return ImageNotFound(f"{what}: {text}", host=where, hint="pull the image first")
    if _GONE.search(text):
        return ContainerMissing(f"{what}: there is no such container (any more)", host=where)
    return _other(text, exc.status_code, what, where)


def pull_error(text: str, ref: str, where: str) -> PdDeployError:
    """The error for a pull of `ref` that failed with the engine's message `text`."""
    low = text.lower()
    if "no space left" in low:
        return DiskFull(f"no space left to pull {ref}", host=where, hint="docker image prune")
    if any(sign in low for sign in _DENIED):
        return RegistryDenied(
            f"the registry refuses {ref} ({_short(text)})",
            host=where,
            hint="check the repository's name and the registry credentials",
        )
    if any(sign in low for sign in _UNTRUSTED):
        return RegistryMisconfigured(
            f"the engine does not trust the registry of {ref} ({_short(text)})",
            host=where,
            hint="give the engine its CA in /etc/docker/certs.d, or list it in "
            "insecure-registries of /etc/docker/daemon.json",
        )
    if any(sign in low for sign in _UNAVAILABLE):
        return RegistryUnavailable(
            f"the registry of {ref} does not answer ({_short(text)})",
            host=where,
            hint="check that the host reaches the registry",
        )
    if any(sign in low for sign in _MISSING_IMAGE):
        return ImageNotFound(
            f"{ref} is not in its registry ({_short(text)})", host=where, hint="check name and tag"
        )
    return DockerRefused(f"pulling {ref} failed: {_short(text)}", host=where)


def explanation(exc: sdk.APIError) -> str:
    """The engine's own words."""
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
        return DiskFull(f"{what}: no space left", host=where, hint="docker system df shows by what")
    if status == 503:
        return DockerDown(f"{what}: {_short(text)}", host=where, hint="systemctl status docker")
    return DockerRefused(f"{what}: the Docker engine says {_short(text)!r}", host=where)


def _short(text: str) -> str:
    return " ".join(text.split())[:400]
