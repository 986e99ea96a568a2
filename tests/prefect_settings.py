"""Where the tests' own Prefect server is. Imported before Prefect, which reads this only once."""

import os
import socket
import tempfile
from pathlib import Path

HOME = Path(tempfile.mkdtemp(prefix="pd-deploy-tests-"))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


PORT = _free_port()
API = f"http://127.0.0.1:{PORT}/api"

os.environ |= {
    "PREFECT_HOME": str(HOME),
    "PREFECT_API_URL": API,
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
    "DO_NOT_TRACK": "1",
}
