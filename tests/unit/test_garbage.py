"""How seldom commands look for garbage."""

import subprocess
import sys

from pd_deploy.flows import garbage

# What is registered first is called last.
SHOWN_AT_THE_END = """
import atexit, gc, sys
atexit.register(lambda: print(gc.get_threshold()[0], gc.get_freeze_count() > len(gc.get_objects())))
sys.argv = ["pd-deploy", "--version"]
from pd_deploy.cli.main import main
main()
"""


def test_a_command_looks_for_garbage_seldom_and_not_when_it_ends() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SHOWN_AT_THE_END], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{garbage.OBJECTS_BETWEEN_COLLECTIONS} True"
