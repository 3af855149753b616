"""A headless Chromium, driven over its debugging pipe (Chrome DevTools Protocol) by the standard library alone.

Chromium reads commands from descriptor 3 and answers on 4, each a JSON text that ends with a zero byte
(``--remote-debugging-pipe``). It has a profile of its own and ends with the block.
"""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import signal
import subprocess
import time
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
DEADLINE_S = 60.0


class Page:
    """A page in the browser."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        """Open an empty one."""
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._last_id = 0
        self.problems: list[str] = []
        """What the page's script threw, and what the browser refused it."""
        self._session = ""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self._call(f"{domain}.enable")

    def _call(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._last_id += 1
        message: dict[str, Any] = {"id": self._last_id, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last_id:
                assert "error" not in answer, (method, answer)
                result: dict[str, Any] = answer["result"]
                return result
            if answer.get("method") == "Runtime.exceptionThrown":
                self.problems.append(json.dumps(answer["params"])[:600])
            if answer.get("method") == "Log.entryAdded" and answer["params"]["entry"]["level"] == "error":
                self.problems.append(answer["params"]["entry"]["text"])

    def _receive(self) -> dict[str, Any]:
        deadline = time.monotonic() + DEADLINE_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0.0, deadline - time.monotonic()))
            data = os.read(self._from, 1 << 20) if ready else b""
            if not data:
                raise TimeoutError("the browser has gone, or says nothing")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        return message

    def show(self, url: str, width: int, height: int, *, scheme: str = "light", scale: float = 1.0) -> None:
        """Go to an address, in a window of this size, with a preference for light or dark."""
        self.look_like(width, height, scheme=scheme, scale=scale)
        self._call("Page.navigate", url=url)

    def look_like(self, width: int, height: int, *, scheme: str, scale: float = 1.0) -> None:
        """Change the window and the preference."""
        self._call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )
        self._call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])

    def evaluate(self, script: str) -> Any:
        """Return the value of an expression in the page; a promise is waited for."""
        result = self._call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """Return the first true value of an expression."""
        deadline = time.monotonic() + DEADLINE_S
        while not (value := self.evaluate(script)):
            if time.monotonic() > deadline:
                raise TimeoutError(f"never came: {script}; {self.problems}")
            time.sleep(0.05)
        return value

    def screenshot(self, path: Path, *, is_whole: bool = True) -> None:
        """Write what is to be seen as a PNG, beyond the window too."""
        data = self._call("Page.captureScreenshot", captureBeyondViewport=is_whole)["data"]
        path.write_bytes(base64.b64decode(data))


@contextmanager
def browsing(directory: Path) -> Iterator[Page]:
    """Run a Chromium whose profile is in ``directory``."""
    assert CHROMIUM is not None
    read_commands, to_browser = os.pipe()
    from_browser, write_answers = os.pipe()
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--hide-scrollbars",
        "--remote-debugging-pipe",
        f"--user-data-dir={directory}",
    ]

    def put_in_place() -> None:
        # Both numbers may be in use by the other pipe: first away, then there.
        high = os.dup(read_commands), os.dup(write_answers)
        os.dup2(high[0], 3)
        os.dup2(high[1], 4)

    process = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        preexec_fn=put_in_place,
        close_fds=False,
        start_new_session=True,
    )
    os.close(read_commands)
    os.close(write_answers)
    try:
        yield Page(to_browser, from_browser)
    finally:
        os.close(to_browser)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(DEADLINE_S)
        os.close(from_browser)
