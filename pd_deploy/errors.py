"""Everything that can go wrong, as one tree.

    PdDeployError
     ├─ InvalidInput              what the user wrote is wrong; lists every problem at once
     ├─ HostError                 a host refuses, and will again until somebody changes something
     │   ├─ AuthenticationFailed      user, key or password not accepted
     │   ├─ HostKeyMismatch           the host's key is unknown or has changed
     │   ├─ NoShell                   the user's login shell runs no commands
     │   ├─ NoSftp                    the SSH server offers no SFTP
     │   ├─ DockerAccessDenied        the SSH user may not talk to the Docker engine
     │   ├─ DockerMissing             no Docker engine is installed where one is expected
     │   ├─ ImageNotFound             the image or tag does not exist
     │   ├─ WrongArchitecture         the image's programs are for other machines
     │   ├─ RegistryDenied            the registry wants other credentials
     │   ├─ RegistryMisconfigured     the engine does not trust the registry (TLS)
     │   ├─ DiskFull                  no space left on the host
     │   ├─ DiskReadOnly              a file system that is written to is mounted read-only
     │   ├─ PortTaken                 somebody else listens on a port we need
     │   ├─ FileMissing               a path (file, directory, device) does not exist
     │   ├─ FileDenied                a path may not be read, written or removed
     │   ├─ NotOurs                   the path or container is not this deployment's to touch
     │   ├─ NameTaken                 another container has the name
     │   ├─ ContainerMissing          the container does not exist (any more)
     │   ├─ FactsError                what a host says about itself can't be read or can't be right
     │   │   └─ FactsUnknown              it is needed, and the host was not asked
     │   ├─ DockerRefused             the Docker engine rejects a request for another reason
     │   ├─ DockerRestarted           Docker or its host started again, which ended its containers
     │   ├─ InUse                     devices or ports are in use by somebody else
     │   └─ CommandFailed             a command ran and exited with another status than 0
     ├─ LeaseHeld                 another run works on the deployment
     ├─ OnHold                    somebody keeps all runs from working on the deployment
     ├─ LeaseLost                 another run took this run's lease, or its file was deleted
     ├─ SeveralFaults             steps that ran together failed for more than one reason
     ├─ ServiceError              the hosts do as told, but the service does not come up
     │   ├─ InstanceDied              a server or the proxy ended; carries the last lines of its log
     │   ├─ NotReady                  a wait timed out
     │   ├─ OutOfOrder                a stage is run before the one that it depends on
     │   ├─ Abandoned                 given up because something else failed
     │   ├─ SmokeTestFailed           the service answers, but not as it should
     │   ├─ BenchmarkFailed           the service answers, but not as fast as it has to
     │   ├─ HostAway                  a host was not back in time for the way back
     │   ├─ UnknownImage              nobody knows what an image like this expects
     │   ├─ CodeRefused               other source code would run than the file's
     │   ├─ NoSuchGeneration          a generation that is not kept
     │   ├─ Unrecorded                containers run of which no host has a record any more
     │   ├─ NothingServes             what served was stopped, and there is nothing to go back to
     │   │   └─ RollbackFailed            a generation failed, and the previous one does not return
     │   └─ RolledBack                a generation failed, and the previous one serves again
     └─ TransientError            worth a retry
         ├─ HostUnreachable           no SSH connection could be made
         ├─ ConnectionDropped         the connection was lost while a call was under way
         ├─ TimedOut                  an answer did not come in time
         ├─ SessionRefused            the SSH server allows no further session
         ├─ DockerDown                the Docker engine does not answer
         └─ RegistryUnavailable       the registry can't be reached or is overloaded

Messages never carry a secret: no key, password, token or command input.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

E = TypeVar("E", bound=BaseException)


class PdDeployError(Exception):
    """Base of all errors: where it happened, what was expected and found, what to do next.

    Args:
        message: what was expected and what was found.
        host: the host, as `name (address)`.
        instance: the instance, e.g. `p1`.
        hint: the likely next step.
    """

    def __init__(
        self,
        message: str,
        *,
        host: str | None = None,
        instance: str | None = None,
        hint: str | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.host = host
        self.instance = instance
        self.hint = hint
        self.step: str | None = None
        """The step that failed, e.g. `ready p1`."""
        self.logged = False
        """Whether it has been logged already."""
        self.nothing_serves = False
        """Whether it ended a run after which nothing serves."""

    def __str__(self) -> str:
        where = ", ".join(
            f"{kind} {name}"
            for kind, name in (("host", self.host), ("instance", self.instance))
            if name
        )
        text = f"{where}: {self.message}" if where else self.message
        if not self.hint:
            return text
        separator = "\n" if "\n" in text else " "
        return f"{text}{separator}→ {self.hint}"

    @property
    def headline(self) -> str:
        """Where and why, in one line: without hint, and without the logs below it."""
        where = ", ".join(
            filter(
                None,
                (self.host and f"host {self.host}", self.instance and f"instance {self.instance}"),
            )
        )
        first = self.message.partition("\n")[0]
        return f"{where}: {first}" if where else first

    @property
    def unanswered(self) -> str:
        """Say in a line why its host can't be looked at: it gives no answer, or another one than is
        expected."""
        return self.headline

    def __reduce__(self) -> tuple[Any, ...]:
        # Exception's own __reduce__ calls the class with `args`, which lack keyword arguments.
        return _rebuild, (type(self), self.args, self.__dict__.copy())


@dataclass(frozen=True)
class Problem:
    """One thing wrong with the input: `key` is its path, `message` says expected and found, and
    `place` is the line where it stands, if a file has it."""

    key: str
    message: str
    place: str = ""

    def __str__(self) -> str:
        return ": ".join(filter(None, (self.place, self.key, self.message)))


class InvalidInput(PdDeployError):
    """What the user wrote is wrong; carries every problem, not only the first."""

    def __init__(
        self, problems: Sequence[Problem], *, source: str | None = None, hint: str | None = None
    ) -> None:
        self.problems = list(problems)
        self.source = source
        count = f"{len(self.problems)} problem{'' if len(self.problems) == 1 else 's'}"
        head = f"{source}: {count}" if source else count
        super().__init__("\n  ".join([head, *map(str, self.problems)]), hint=hint)


class HostError(PdDeployError):
    """A host refuses, and will refuse again until somebody changes something."""


class AuthenticationFailed(HostError):
    """The SSH server accepts none of the credentials offered."""


class HostKeyMismatch(HostError):
    """The host's key is unknown or differs from the known one."""


class NoShell(HostError):
    """The user's login shell ends without running the command that it is given."""


class NoSftp(HostError):
    """The SSH server offers no SFTP, and the host has no SFTP server that could be run."""


class DockerAccessDenied(HostError):
    """The SSH user may not talk to the Docker engine."""


class DockerMissing(HostError):
    """There is no Docker engine where one is expected."""


class ImageNotFound(HostError):
    """The image, tag or digest exists neither on the host nor in the registry."""


class WrongArchitecture(HostError):
    """The image's programs are for machines of another architecture than the host's."""


class RegistryDenied(HostError):
    """The registry refuses the credentials, or wants some."""


class RegistryMisconfigured(HostError):
    """The registry's TLS is not trusted, or what answers is no registry."""


class DiskFull(HostError):
    """A file system of the host is full."""


class DiskReadOnly(HostError):
    """A file system of the host that has to be written to is mounted read-only."""


class PortTaken(HostError):
    """Somebody else listens on a port that is needed."""


class InUse(HostError):
    """Devices or ports that are needed are in use by somebody else, or by another deployment."""


class DockerRestarted(HostError):
    """Docker or its host started again, which ended what ran there."""


class FileMissing(HostError):
    """A file, directory or device of the host does not exist; `path` names it."""

    def __init__(self, message: str, *, path: str = "", **where: str | None) -> None:
        super().__init__(message, **where)
        self.path = path


class FileDenied(HostError):
    """A path of the host may not be read, written or removed by the SSH user."""


class NotOurs(HostError):
    """A path or container that this deployment did not make; it stays untouched."""


class NameTaken(HostError):
    """Another container already has the name."""


class ContainerMissing(HostError):
    """The container does not exist (any more)."""


class FactsError(HostError):
    """What a host says about itself can't be read or can't be right."""


class FactsUnknown(FactsError):
    """What a host says about itself is needed for a plan, and the host does not answer."""


class DockerRefused(HostError):
    """The Docker engine rejects a request; the message is the engine's own."""


class CommandFailed(HostError):
    """A command exited with another status than 0; `argv`, `exit_status` and `stderr` say more."""

    def __init__(
        self,
        message: str,
        *,
        argv: Sequence[str] = (),
        exit_status: int = -1,
        stderr: str = "",
        **where: str | None,
    ) -> None:
        super().__init__(message, **where)
        self.argv = list(argv)
        self.exit_status = exit_status
        self.stderr = stderr


class LeaseHeld(PdDeployError):
    """Another run works on the deployment; the message names it."""


class OnHold(PdDeployError):
    """Somebody keeps all runs from working on the deployment; the message says who, and why."""


class LeaseLost(PdDeployError):
    """Another run took this run's lease, or its file was deleted; this run changes nothing more.

    `is_overtaken` tells which.
    """

    def __init__(self, message: str, *, is_overtaken: bool = True, **where: str | None) -> None:
        super().__init__(message, **where)
        self.is_overtaken = is_overtaken


class SeveralFaults(PdDeployError):
    """Steps that ran together failed for more than one reason; `faults` has them all."""

    def __init__(self, faults: Sequence[Exception]) -> None:
        self.faults = list(faults)
        count = f"{len(self.faults)} steps failed:"
        super().__init__("\n- ".join([count, *map(str, self.faults)]))

    @property
    def headline(self) -> str:
        """All causes in one line."""
        return "; ".join(headline(fault) for fault in self.faults)


class ServiceError(PdDeployError):
    """The hosts do as told, but the service does not come up."""


class InstanceDied(ServiceError):
    """A server or the proxy ended by itself; the message ends with the last lines of its log."""


class NotReady(ServiceError):
    """A wait timed out; the message says what was waited for."""


class OutOfOrder(ServiceError):
    """A stage is run before the one that it depends on."""


class Abandoned(ServiceError):
    """Given up because something else failed; the cause is reported there."""


class SmokeTestFailed(ServiceError):
    """The service answers, but not as it should."""


class BenchmarkFailed(ServiceError):
    """The service answers, but not as fast as it has to, or not all of a load.

    `of_the_generation` tells whether the generation before did better by the same load.
    """

    def __init__(
        self, message: str, *, of_the_generation: bool = False, **where: str | None
    ) -> None:
        super().__init__(message, **where)
        self.of_the_generation = of_the_generation


class HostAway(ServiceError):
    """A host was away for longer than the way back waits for it."""


class UnknownImage(ServiceError):
    """Nobody knows what an image like this expects, or it does not say what it is."""


class CodeRefused(ServiceError):
    """Other source code would run than the file's, or it can't be imported."""


class NoSuchGeneration(ServiceError):
    """The generation is not kept, or not one that ever served."""


class Unrecorded(ServiceError):
    """Containers of the deployment run, and no host knows any more what was deployed."""


class NothingServes(ServiceError):
    """What clients could reach was stopped, and there is no generation to go back to."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.nothing_serves = True


class RolledBack(ServiceError):
    """A generation failed, and the previous one serves again; the message says both."""


class RollbackFailed(NothingServes):
    """A generation failed, and the previous one does not come back."""


class TransientError(PdDeployError):
    """A fault that may be gone on the next try."""

    @property
    def unanswered(self) -> str:
        """Say in a line that its host gave no answer, and why."""
        return f"no answer from {self.headline}"


class HostUnreachable(TransientError):
    """No SSH connection to the host could be made."""


class ConnectionDropped(TransientError):
    """The connection was lost while a call was under way; whether it took effect is unknown."""


class TimedOut(TransientError):
    """An answer did not come in time; whether the call took effect is unknown."""


class SessionRefused(TransientError):
    """The SSH server allows no further session on the connection."""


class DockerDown(TransientError):
    """The host's Docker engine does not answer."""


class RegistryUnavailable(TransientError):
    """The registry can't be reached, or answers that it is overloaded."""


def faults_of(error: E) -> Sequence[E | Exception]:
    """List the faults that an error reports: those of several steps, or itself."""
    if isinstance(error, SeveralFaults):
        return [cause for fault in error.faults for cause in faults_of(fault)]
    return [error]


def headline(error: BaseException) -> str:
    """Tell an error's cause in one line."""
    if isinstance(error, PdDeployError):
        return error.headline
    return str(error).partition("\n")[0] or type(error).__name__


def is_transient(exc: BaseException) -> bool:
    """Tell whether a retry may help: the rule for every retry in the project."""
    return isinstance(exc, TransientError)


def _rebuild(
    kind: type[PdDeployError], args: tuple[Any, ...], state: dict[str, Any]
) -> PdDeployError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error
