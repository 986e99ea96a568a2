"""Debian's Chromium without a window, led by its own debugging protocol: what a user clicks."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from websockets.sync.client import ClientConnection, connect

from pd_deploy.lab import system

PROGRAM = "chromium-headless-shell"
CLICKS = 3
SWITCH = """(() => {
  const shown = [...document.querySelectorAll('[role=switch]')].filter(one => one.offsetParent);
  if (!shown.length) return null;
  shown[0].scrollIntoView({block: 'center'});
  const box = shown[0].getBoundingClientRect();
  return {on: shown[0].ariaChecked === 'true', x: box.x + box.width / 2, y: box.y + box.height / 2};
})()"""


class Page:
    """A page that a browser shows."""

    def __init__(self, connection: ClientConnection) -> None:
        self._connection = connection
        self._calls = 0

    def open(self, url: str) -> None:
        """Go to an address."""
        self._call("Page.navigate", url=url)

    def turn(self, *, on: bool) -> None:
        """Click the page's first switch, once it is there, and wait until it shows the change."""
        self._until_switch(on=not on)
        for _ in range(CLICKS):  # a page that is still being laid out moves it away from a click
            place = self._switch()
            for event in ("mousePressed", "mouseReleased"):
                where = {"x": place["x"], "y": place["y"], "button": "left", "clickCount": 1}
                self._call("Input.dispatchMouseEvent", type=event, **where)
            if self._shows(on=on, within=20):
                return
        raise AssertionError(f"expected a switch that is {on=} after {CLICKS} clicks")

    def _until_switch(self, *, on: bool) -> None:
        assert self._shows(on=on, within=60), f"expected a switch that is {on=}"

    def _shows(self, *, on: bool, within: float) -> bool:
        deadline = time.monotonic() + within
        while (self._switch() or {}).get("on") is not on:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
        return True

    def _switch(self) -> Any:
        answer = self._call("Runtime.evaluate", expression=SWITCH, returnByValue=True)
        return answer["result"].get("value")

    def _call(self, method: str, **parameters: object) -> Any:
        self._calls += 1
        call = {"id": self._calls, "method": method, "params": parameters}
        self._connection.send(json.dumps(call))
        while (answer := json.loads(self._connection.recv(timeout=60))).get("id") != self._calls:
            pass
        assert "error" not in answer, f"{method}: {answer['error']}"
        return answer["result"]


@contextmanager
def page(directory: Path) -> Iterator[Page]:
    """An empty page in a browser of its own, which ends with it.

    Args:
        directory: for all that the browser writes.
    """
    system.install_missing_packages(print, {PROGRAM: PROGRAM})
    options = ["--no-sandbox", "--remote-debugging-port=0", f"--user-data-dir={directory}"]
    browser = subprocess.Popen(
        [PROGRAM, *options, "about:blank"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert browser.stderr
        said = next(line for line in browser.stderr if "DevTools listening on" in line)
        address = said.split()[-1].split("/")[2]
        pages = httpx.get(f"http://{address}/json", trust_env=False).json()
        (target,) = (one for one in pages if one["type"] == "page")
        with connect(target["webSocketDebuggerUrl"], max_size=None, proxy=None) as connection:
            yield Page(connection)
    finally:
        # It leaves processes of its own behind, which hold its standard error.
        os.killpg(browser.pid, signal.SIGKILL)
        browser.communicate()
