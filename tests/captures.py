"""Files of `pd-deploy capture`, to be replayed: by parsers, and by hosts in memory."""

import json
import shlex
from dataclasses import dataclass
from pathlib import Path

from pd_deploy.hosts.batch import Printed

DIRECTORY = Path(__file__).parent / "data/captures"


@dataclass(frozen=True)
class Capture:
    """What a host printed, by command."""

    name: str
    printed: dict[str, Printed]

    @property
    def devices(self) -> list[int]:
        """Those that were asked."""
        return sorted(
            int(words[2])
            for words in map(shlex.split, self.printed)
            if words[0] == "hccn_tool" and words[3] == "-link"
        )

    @property
    def address(self) -> str:
        """The host's first one that is not its own loopback's."""
        interfaces = json.loads(self.texts["ip -j -4 addr"])
        found = [a["local"] for i in interfaces for a in i.get("addr_info", ()) if "local" in a]
        return next(address for address in found if not address.startswith("127."))

    @property
    def texts(self) -> dict[str, str]:
        """What was printed, for `Machine.captured`."""
        return {command: printed.text for command, printed in self.printed.items()}


def load(path: Path) -> Capture:
    """Load a file."""
    document = json.loads(path.read_text())
    assert document["format"] == 1
    return Capture(
        path.stem,
        {
            shlex.join(command["argv"]): Printed(command["output"], command["exit"])
            for command in document["commands"]
        },
    )


def kept() -> list[Capture]:
    """Those in this repository. To add one, copy it there, named after its machine: `a2-…` or
    `a3-…`."""
    return [load(path) for path in sorted(DIRECTORY.glob("*.json"))]
