"""Where the tests' own Prefect server is. Imported before Prefect, which reads this only once."""

import os
import tempfile
from pathlib import Path

from pd_deploy.cli import one_server
from pd_deploy.cli.local_http import free_port

PROCESS = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
"""Which of the processes of `pytest -n` this is; 0 without."""


def _home() -> Path:
    """Make a directory for this process, inside that of the process that started it, if one did."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        home = Path(os.environ["PD_TEST_HOME"], str(PROCESS))
        home.mkdir()
        return home
    home = Path(tempfile.mkdtemp(prefix="pd-deploy-tests-"))
    os.environ["PD_TEST_HOME"] = str(home)
    return home


HOME = _home()
PORT = free_port()
API = f"http://127.0.0.1:{PORT}/api"

os.environ |= {
    "PREFECT_HOME": str(HOME),
    "PREFECT_API_URL": API,
    "PREFECT_WORKER_QUERY_SECONDS": "1",
    "PREFECT_SERVER_SERVICES_SCHEDULER_LOOP_SECONDS": "2",
    # Two labs start processes beside it: SQLite's lock may be held for longer than its 10 s.
    "PREFECT_SERVER_DATABASE_TIMEOUT": "120",
    **one_server.SETTINGS,
}
