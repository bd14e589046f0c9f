"""The arms of a split: a daemon each, on a socket that it is handed, and what its log has said so far.

A daemon gets its sockets as a service manager would hand them over (sd_listen_fds(3)), so it is the same
`triptych serve` as anywhere. All that is known of its sessions is its log, read as it grows: from where the
last look ended, one line after the other, and only the numbers are kept.
"""

import contextlib
import fcntl
import json
import os
import signal
import socket
import sys
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec
import numpy as np

from comparisons.effects import SESSION_METRICS, TIMERS, Sample
from services.config import _fault_table
from services.systemd import FIRST

# a sample of CPU time each second: coarser than the 10 ms steps of that clock by enough
STATS = "1s"
# the longest there is (services/config.py): a split never cuts a session
DRAIN = "596h"
# a daemon behind a split is none of the service manager's that may have started us
NOT_INHERITED = ("NOTIFY_SOCKET", "WATCHDOG_PID", "WATCHDOG_USEC")


class Arm(msgspec.Struct, frozen=True, kw_only=True):
    """One process of the split. `name` is the engine's, or "control"; `weight` its shares of the sessions."""

    name: str
    engine: str
    weight: int
    faults: tuple[str, ...]


class Line(msgspec.Struct, frozen=True):
    """The fields read here, of every event that has them; see services/vocabulary.py for their meaning."""

    event: str
    connect_us: int | None = None
    first_byte_us: int | None = None
    duration_us: int = 0
    max_gap_us: int = 0
    bytes_c2s: int = 0
    bytes_s2c: int = 0
    state: str = ""
    termination: str | None = None
    sessions: int = 0
    open_sessions: int = 0
    closed: int = 0
    cpu_us: int | None = None


DECODER = msgspec.json.Decoder(Line)


class Daemon:
    """A child of ours that runs `triptych serve`."""

    def __init__(self, arm: Arm, config: Path, sockets: Sequence[socket.socket], stderr: Path) -> None:
        self._arm = arm
        self._stderr = stderr
        self._status: int | None = None
        root = str(Path(__file__).parents[2])
        environment = {name: value for name, value in os.environ.items() if name not in NOT_INHERITED}
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, environment.get("PYTHONPATH")]))
        environment["LISTEN_FDS"] = str(len(sockets))
        environment["LISTEN_FDNAMES"] = ":".join(["split"] * len(sockets))
        arguments = [sys.executable, "-P", "-m", "services.cli", "serve"]
        arguments += ["--config", str(config), "--instance", arm.name]
        with contextlib.ExitStack() as stack:
            # out of the way of the numbers that they get in the child
            above = FIRST + len(sockets)
            copies = [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, above) for each in sockets]
            for copy in copies:
                stack.callback(os.close, copy)
            # the protocol wants to know the child's own pid, which the child alone knows before it is another
            # program; a session of its own, so that Ctrl-C reaches only us
            self.pid = os.posix_spawnp(
                "sh",
                ["sh", "-c", 'LISTEN_PID=$$ exec "$@"', "sh", *arguments],
                environment,
                file_actions=[
                    (os.POSIX_SPAWN_OPEN, 0, os.devnull, os.O_RDONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                    (os.POSIX_SPAWN_OPEN, 2, str(stderr), os.O_WRONLY | os.O_CREAT, 0o600),
                    *((os.POSIX_SPAWN_DUP2, copy, FIRST + at) for at, copy in enumerate(copies)),
                ],
                setsid=True,
                setsigmask=(),
            )

    def send(self, number: signal.Signals) -> None:
        if self.runs():
            os.kill(self.pid, number)

    def runs(self) -> bool:
        if self._status is None:
            ended, status = os.waitpid(self.pid, os.WNOHANG)
            if ended:
                self._status = os.waitstatus_to_exitcode(status)
        return self._status is None

    def how_it_ended(self) -> str:
        status = self._status or 0
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        said = [line for line in self._stderr.read_text(errors="replace").splitlines() if line.strip()]
        return f"the daemon of {self._arm.name} ended with {how}: {said[-1] if said else 'nothing on stderr'}"

    def kill(self) -> None:
        if self.runs():
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)


class Account:
    """What an arm's log says so far."""

    def __init__(self, log: Path) -> None:
        self._log = log
        self._offset = 0
        self.ready = self.draining = self.stopped = False
        self.values = {metric.name: array("q") for metric in SESSION_METRICS}
        # 1 for each session that ended by a reset, 0 for the others
        self.resets = array("b")
        self.open = self.cut = 0
        self.bytes_c2s = self.bytes_s2c = 0
        # sessions that the daemon closed and whose line is not there; known when it has stopped
        self.missing = 0
        self._spent: tuple[int, int] | None = None
        self._cpu = array("q")

    @property
    def sessions(self) -> int:
        return len(self.resets)

    def read_on(self) -> None:
        """Takes in the whole lines that are new. ValueError for one that is none of a log."""
        with contextlib.suppress(FileNotFoundError), self._log.open("rb") as log:
            log.seek(self._offset)
            text = log.read()
            whole = text[: text.rfind(b"\n") + 1]
            self._offset += len(whole)
            for line in DECODER.decode_lines(whole):
                self._take(line)

    def sample(self) -> Sample:
        return Sample(
            values={name: np.array(values, np.int64) for name, values in self.values.items()},
            resets=np.array(self.resets, np.int64),
            cpu=np.array(self._cpu, np.int64).reshape(-1, 2),
        )

    def _take(self, line: Line) -> None:
        match line.event:
            case "service_ready":
                self.ready = True
            case "service_draining":
                self.draining = True
                self.open = line.open_sessions
            case "session_closed":
                self._close(line)
            case "engine_stats" | "service_stopped":
                self.open = line.open_sessions
                self._spend(line)
                if line.event == "service_stopped":
                    self.stopped = True
                    self.missing = line.closed - self.sessions - self.cut

    def _close(self, line: Line) -> None:
        # it counts itself
        self.open = line.sessions - 1
        self.bytes_c2s += line.bytes_c2s
        self.bytes_s2c += line.bytes_s2c
        if line.termination is not None and line.termination[0] == "K":
            # we ended it, so it says nothing of the engine
            self.cut += 1
            return
        self.resets.append(line.state.startswith("RST"))
        for metric in TIMERS:
            value = getattr(line, metric.name)
            if value is not None:
                self.values[metric.name].append(value)
        moved = line.bytes_c2s + line.bytes_s2c
        if moved:
            self.values["throughput"].append(moved * 1_000_000 // max(line.duration_us, 1))

    def _spend(self, line: Line) -> None:
        """CPU time and sessions from one `engine_stats` to the next: what starting cost is not in it."""
        if line.cpu_us is None:
            return
        now = (line.cpu_us, line.closed)
        if self._spent is not None:
            self._cpu.extend(at - before for at, before in zip(now, self._spent, strict=True))
        self._spent = now


def configuration(arm: Arm, service: str, upstreams: Sequence[str], log: Path) -> str:
    """What `triptych serve` is told, as TOML."""
    lines = [
        f"engine = {json.dumps(arm.engine)}",
        f"log = {_table({'path': str(log), 'stats': STATS})}",
        f"timeouts.drain = {json.dumps(DRAIN)}",
        "[[listener]]",
        'name = "split"',
        'address = "systemd:split"',
        f"service = {json.dumps(service)}",
        f"faults = [{', '.join(_table(_fault_table(spec)) for spec in arm.faults)}]",
    ]
    if upstreams:
        addresses = ", ".join(_table({"address": each}) for each in upstreams)
        lines += ['pool = "upstream"', "[pool.upstream]", f"upstreams = [{addresses}]"]
    return "\n".join(lines) + "\n"


def _table(values: Mapping[str, object]) -> str:
    # what JSON writes for text, numbers and booleans, TOML reads as the same
    return "{ " + ", ".join(f"{key} = {json.dumps(value)}" for key, value in values.items()) + " }"
