"""A real browser for tests: headless Chromium, driven over the W3C's WebDriver protocol with the standard library.

Needs `chromium` and `chromedriver` (Debian: chromium, chromium-driver); tests skip where they are not installed.
Selenium speaks the same protocol through a dozen more packages; a test here needs eight of its commands.
"""

import base64
import contextlib
import http.client
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

_FLAGS = (
    *("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking"),
    *("disable-component-update", "disable-sync", "disable-dev-shm-usage", "hide-scrollbars"),
)
_ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # what the protocol calls a reference to an element


class Browser:
    """A window of a fresh profile."""

    def __init__(self, port: int, profile: str) -> None:
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        chrome = {"args": [*(f"--{flag}" for flag in _FLAGS), f"--user-data-dir={profile}"]}
        # ChromeDriver would look for Google's browser; what the page writes to its console is kept.
        chrome["binary"] = shutil.which("chromium")  # type: ignore[assignment]
        wanted = {"browserName": "chrome", "goog:chromeOptions": chrome, "goog:loggingPrefs": {"browser": "ALL"}}
        session = self._call("POST", "/session", capabilities={"alwaysMatch": wanted})
        self._session = f"/session/{session['sessionId']}"

    def open(self, address: str) -> None:
        """Load a page; returns when it is there."""
        self._post("/url", url=address)

    def run(self, script: str, *arguments: Any) -> Any:
        """What a function body returns in the page; `arguments` are its own."""
        return self._post("/execute/sync", script=script, args=arguments)

    def text(self, selector: str) -> str:
        """What a reader sees of an element."""
        return self.run("return document.querySelector(arguments[0]).innerText", selector)

    def count(self, selector: str) -> int:
        return self.run("return document.querySelectorAll(arguments[0]).length", selector)

    def click(self, selector: str) -> None:
        self._post(f"/element/{self._find(selector)}/click")

    def type(self, selector: str, text: str) -> None:
        """Replace what a field holds."""
        element = self._find(selector)
        self._post(f"/element/{element}/clear")
        self._post(f"/element/{element}/value", text=text)

    def hover(self, selector: str, x: float = 0.5, y: float = 0.5) -> None:
        """Move the pointer over an element: to its middle, or to a share of its width and height."""
        self.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        left, top, width, height = self.run(
            "const b = document.querySelector(arguments[0]).getBoundingClientRect();"
            " return [b.left, b.top, b.width, b.height]",
            selector,
        )
        move = {"type": "pointerMove", "duration": 0, "x": round(left + x * width), "y": round(top + y * height)}
        self._post("/actions", actions=[{"type": "pointer", "id": "mouse", "actions": [move]}])

    def wait(self, condition: Callable[[], Any], seconds: float = 30) -> Any:
        """The condition's value once it is true."""
        deadline = time.monotonic() + seconds
        while not (value := condition()):
            assert time.monotonic() < deadline, "the page did not come to it"
            time.sleep(0.05)
        return value

    def resize(self, width: int, height: int = 900) -> None:
        """Set the size of the page's viewport in CSS pixels."""
        self._devtools(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def prefer(self, scheme: str) -> None:
        """`light` or `dark`."""
        self._devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def screenshot(self, file: Path) -> None:
        """The whole page, as PNG."""
        shot = self._devtools("Page.captureScreenshot", captureBeyondViewport=True)
        file.write_bytes(base64.b64decode(shot["data"]))

    def complaints(self) -> list[str]:
        """Errors in the page's console since the last call."""
        entries = self._post("/se/log", type="browser")
        return [entry["message"] for entry in entries if entry["level"] == "SEVERE"]

    def close(self) -> None:
        self._call("DELETE", self._session)

    def _devtools(self, command: str, **parameters: Any) -> Any:
        return self._post("/goog/cdp/execute", cmd=command, params=parameters)

    def _find(self, selector: str) -> str:
        return self._post("/element", using="css selector", value=selector)[_ELEMENT]

    def _post(self, path: str, **body: Any) -> Any:
        return self._call("POST", self._session + path, **body)

    def _call(self, method: str, path: str, **body: Any) -> Any:
        self._connection.request(method, path, json.dumps(body), {"content-type": "application/json"})
        response = self._connection.getresponse()
        value = json.loads(response.read())["value"]
        assert response.status == 200, value
        return value


def why_no_browser() -> str:
    """What is missing; empty where nothing is."""
    missing = [program for program in ("chromium", "chromedriver") if shutil.which(program) is None]
    return f"no {' and '.join(missing)} (Debian: apt-get install chromium chromium-driver)" if missing else ""


@contextlib.contextmanager
def browser_window() -> Iterator[Browser]:
    """A browser that ends with the block; skips the test where none is installed."""
    if why := why_no_browser():
        pytest.skip(why)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile, _driver() as port:
        browser = Browser(port, profile)
        try:
            yield browser
        finally:
            browser.close()


@contextlib.contextmanager
def _driver() -> Iterator[int]:
    """The port of a running chromedriver. It chooses a free one, which another program may take before it does."""
    for _ in range(3):
        with subprocess.Popen(["chromedriver", "--port=0"], stdout=subprocess.PIPE, text=True) as driver:
            try:
                assert driver.stdout is not None
                started = (re.search(r"successfully on port (\d+)", line) for line in driver.stdout)
                if match := next(filter(None, started), None):
                    yield int(match[1])
                    return
            finally:
                driver.terminate()
    raise RuntimeError("chromedriver does not start")
