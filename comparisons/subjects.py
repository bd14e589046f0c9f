"""What is compared: a subject is a thing that is started, has an address, and is ended.

An engine is a daemon process of its own, fresh each time, whose log is read when it has
stopped. `Direct` is no process at all: the clients talk to the upstream, which is the floor.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Protocol

from comparisons import daemon_log
from comparisons.results import Facts

START_LIMIT = 10.0  # seconds until service_ready
STOP_LIMIT = 10.0  # seconds from SIGTERM to the end, once no session is open
LOOK = 0.005  # seconds between two looks into a log that is being written


class SubjectFailed(Exception):  # noqa: N818  it is not the program's error
    """The subject did not start, died, or did not stop; one line says how."""


class Running(Protocol):
    """A started subject. `pid` is the process to measure, if there is one."""

    pid: int | None

    def address(self) -> str:
        """Waits until it accepts, and says where. SubjectFailed if that does not come."""

    def finish(self) -> Facts | None:
        """Ends it in order and returns what its log says. SubjectFailed if it ended otherwise."""

    def died(self) -> str | None:
        """How it ended by itself, or None while it runs."""

    def kill(self) -> None:
        """Ends it at once, whatever its state."""


class Subject(Protocol):
    name: str

    def start(self, service: str, upstream: str | None, directory: Path, core: int | None) -> Running:
        """Starts it as `service`; its files go to `directory`, an empty folder of its own."""


class Direct:
    """No proxy: the floor of every proxied workload."""

    name = "direct"

    def start(self, service: str, upstream: str | None, directory: Path, core: int | None) -> Running:  # noqa: ARG002  the contract of every subject
        if upstream is None:
            raise ValueError("direct is the way to an upstream; an echo has none")
        return DirectRunning(upstream)


class DirectRunning:
    pid: int | None = None

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream

    def address(self) -> str:
        return self._upstream

    def finish(self) -> None:
        return None

    def died(self) -> None:
        return None

    def kill(self) -> None:
        pass


class Engine:
    """One of the three daemons, as anybody would start it."""

    def __init__(self, name: str) -> None:
        self.name = name

    def start(self, service: str, upstream: str | None, directory: Path, core: int | None) -> Running:
        command = [
            sys.executable,
            "-m",
            "services.cli",
            service,
            "--engine",
            self.name,
            "--listen",
            "127.0.0.1:0",
        ]
        if upstream is not None:
            command += ["--upstream", upstream]
        return DaemonRunning(command, directory, core)


class DaemonRunning:
    def __init__(self, command: list[str], directory: Path, core: int | None) -> None:
        self._log = directory / "log.jsonl"
        self._stderr = directory / "stderr"
        self._core = core
        with self._stderr.open("wb") as stderr:
            # a session of its own: Ctrl-C reaches only us, and we end what we started
            self._process = subprocess.Popen(
                [*command, "--log", str(self._log)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,
            )
        self.pid: int | None = self._process.pid

    def address(self) -> str:
        until = time.monotonic() + START_LIMIT
        while (address := self._bound()) is None:
            if self._process.poll() is not None:
                raise SubjectFailed(f"the daemon did not come up: {self._how_it_ended()}")
            if time.monotonic() > until:
                raise SubjectFailed(f"the daemon did not come up within {START_LIMIT:g} s")
            time.sleep(LOOK)
        if self._core is not None:
            # only now: several daemons start at once, on all cores. Threads to come inherit it.
            for task in Path(f"/proc/{self.pid}/task").iterdir():
                with contextlib.suppress(ProcessLookupError):  # a thread that ended meanwhile
                    os.sched_setaffinity(int(task.name), {self._core})
        return address

    def finish(self) -> Facts:
        if self._process.poll() is not None:
            raise SubjectFailed(f"the daemon died: {self._how_it_ended()}")
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(STOP_LIMIT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise SubjectFailed(f"the daemon did not stop within {STOP_LIMIT:g} s of SIGTERM") from None
        if self._process.returncode:
            raise SubjectFailed(f"the daemon stopped badly: {self._how_it_ended()}")
        try:
            return daemon_log.facts(self._log)
        except daemon_log.LogError as error:
            raise SubjectFailed(str(error)) from error

    def died(self) -> str | None:
        try:
            self._process.wait(0.1)  # its sockets are closed a moment before it can be waited for
        except subprocess.TimeoutExpired:
            return None
        return f"the daemon died: {self._how_it_ended()}"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def _bound(self) -> str | None:
        try:
            return daemon_log.bound_address(self._log)
        except daemon_log.LogError as error:
            raise SubjectFailed(str(error)) from error

    def _how_it_ended(self) -> str:
        status = self._process.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        said = self._stderr.read_text(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "nothing on stderr")
        return f"{how}, {last}"
