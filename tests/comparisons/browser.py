"""A Chromium to look at pages with: without a window, a network or a memory, driven over a pair of pipes.

It speaks the DevTools protocol, one JSON message after the other, each ended by a NUL byte. What goes wrong
in the page (an exception, an error on the console, a request for anything but the page) is in `faults`.
"""

import fcntl
import json
import os
import select
import subprocess
import time
from pathlib import Path
from typing import Any, Self

PATIENCE = 30.0
FLAGS = (
    "--headless",
    # it runs as root, and opens nothing but our own pages
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
)


class Page:
    """One page, open and loaded: `Page(path, profile)` in a with statement; `profile` is an empty folder."""

    def __init__(self, path: Path, profile: Path, *, width: int = 1280, dark: bool = False) -> None:
        self.faults: list[str] = []
        self._number = 0
        self._rest = b""
        self._session: str | None = None
        self._events: list[str] = []
        said, heard = os.pipe(), os.pipe()
        # it reads from 3 and writes to 4; ours are above both, so that neither is overwritten
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (said[0], heard[1])]
        self._process = subprocess.Popen(
            [
                *("bash", "-c", 'exec 3<&"$1" 4>&"$2"; shift 2; exec chromium "$@"', "bash", *map(str, ends)),
                *(*FLAGS, f"--user-data-dir={profile}", "about:blank"),
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            pass_fds=ends,
        )
        for end in (said[0], heard[1], *ends):
            os.close(end)
        self._to, self._from = said[1], heard[0]
        [target] = [each for each in self.ask("Target.getTargets")["targetInfos"] if each["type"] == "page"]
        self._session = self.ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)[
            "sessionId"
        ]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.ask(f"{domain}.enable")
        self.resize(width)
        self.prefer(dark=dark)
        self._address = path.as_uri()
        self.ask("Page.navigate", url=self._address)
        while "Page.loadEventFired" not in self._events:
            self._hear()
        self.settle()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(PATIENCE)
        os.close(self._to)
        os.close(self._from)

    def resize(self, width: int, height: int = 1000) -> None:
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=False,
        )

    def prefer(self, *, dark: bool) -> None:
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", features=[scheme])

    def evaluate(self, expression: str) -> Any:
        """The value of a JavaScript expression, awaited if it is a promise."""
        found = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    def settle(self) -> None:
        """Until what was begun is drawn."""
        self.evaluate(
            "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done())))"
        )

    def wait_for(self, expression: str) -> Any:
        deadline = time.monotonic() + PATIENCE
        while not (found := self.evaluate(expression)):
            assert time.monotonic() < deadline, f"never {expression}"
            self.settle()
        return found

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.ask(
            "Input.dispatchMouseEvent", type=f"mouse{kind}", x=x, y=y, button="left", clickCount=1, **more
        )

    def drag(self, x: float, y: float, to_x: float) -> None:
        self.mouse("Moved", x, y)
        self.mouse("Pressed", x, y, buttons=1)
        for step in range(1, 6):
            self.mouse("Moved", x + (to_x - x) * step / 5, y, buttons=1)
        self.mouse("Released", to_x, y)
        self.settle()

    def click(self, x: float, y: float) -> None:
        self.mouse("Moved", x, y)
        self.settle()
        self.mouse("Pressed", x, y, buttons=1)
        self.mouse("Released", x, y)
        self.settle()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        number = self._number
        message: dict[str, Any] = {"id": number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._hear()
            if answer.get("id") == number:
                assert "error" not in answer, answer
                result: dict[str, Any] = answer["result"]
                return result

    def _hear(self) -> dict[str, Any]:
        while b"\0" not in self._rest:
            assert select.select([self._from], (), (), PATIENCE)[0], "Chromium is silent"
            data = os.read(self._from, 1 << 16)
            assert data, "Chromium ended"
            self._rest += data
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        match message.get("method"):
            case "Runtime.exceptionThrown" | "Log.entryAdded":
                self.faults.append(str(message["params"]))
            case "Network.requestWillBeSent":
                address = message["params"]["request"]["url"]
                if address != self._address:
                    self.faults.append(f"asked for {address[:200]}")
            case str(event):
                self._events.append(event)
        return message
