"""Ways to die that look like the engine's."""

import os
import sys
import threading
import traceback


def crash(exit_code: int) -> None:
    """End the process now, with a traceback as its last log lines."""
    sys.stdout.flush()
    try:
        raise RuntimeError("NPU out of memory. Tried to allocate 2.00 GiB (stand-in fault)")
    except RuntimeError:
        traceback.print_exc()
    sys.stderr.flush()
    os._exit(exit_code)


def crash_after(seconds: float, exit_code: int) -> None:
    """Arm a crash that many seconds from now."""
    timer = threading.Timer(seconds, crash, args=(exit_code,))
    timer.daemon = True
    timer.start()
