"""What servers had counted at the last look, in a file of the user's cache directory.

So one `pd-deploy status` after another tells what was served between them, without a process that
stays. `--watch` compares with its own last look instead, so that neither disturbs the other.
"""

import contextlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from pd_deploy.steps.verify.looking import InstanceLook

PRIVATE = 0o600


@dataclass(frozen=True)
class Counted:
    """What an instance had counted, as far as it said so; `run` is which run of which container,
    empty if its host did not answer."""

    run: str
    requests: float | None
    kv_tokens: float | None


@dataclass(frozen=True)
class LastLook:
    """A look, by instance."""

    when: datetime
    counted: Mapping[str, Counted]


@dataclass(frozen=True)
class Since:
    """What an instance has served since the last look; None if that is not known."""

    requests: int | None = None
    kv_tokens: int | None = None


def of(instances: Iterable[InstanceLook], when: datetime) -> LastLook:
    """Keep of a look what the next one needs."""
    return LastLook(
        when,
        {
            i.name: Counted(i.run, i.requests, i.kv_tokens)
            for i in instances
            if i.run or not i.container
        },
    )


def since(last: LastLook | None, instance: InstanceLook) -> Since:
    """Tell what an instance has served since the last look: from zero, if it started after it, and
    nothing if it did not say then what it had served."""
    if last is None:
        return Since()
    before = last.counted.get(instance.name)
    if before is None or before.run not in ("", instance.run):
        before = Counted(instance.run, 0, 0)
    return Since(
        _grown(instance.requests, before.requests), _grown(instance.kv_tokens, before.kv_tokens)
    )


def _grown(now: float | None, before: float | None) -> int | None:
    return None if now is None or before is None or now < before else int(now - before)


def path_of(deployment: str, file: Path) -> Path:
    """Return where the last look at a file's deployment is kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = str(file.resolve()).replace("%", "%25").replace("/", "%2F")
    return cache / "pd-deploy" / "looks" / f"{deployment}{name[-150:]}.json"


def read(path: Path) -> LastLook | None:
    """Read the last look; return None if there is none that can be read."""
    try:
        return TypeAdapter(LastLook).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None


def write(path: Path, look: LastLook) -> None:
    """Keep a look for the next; a cache that can't be written only means that there is none."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(json.dumps(asdict(look), default=str))
        draft.chmod(PRIVATE)
        draft.replace(path)
