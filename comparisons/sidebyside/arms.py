"""The arms of a split: a daemon each (daemons.py), and what its log has said so far.

The log is read as it grows: from where the last look ended, one line after the other, and only the numbers
are kept.
"""

import contextlib
from array import array
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np

from comparisons.effects import SESSION_METRICS, TIMERS, Sample
from comparisons.sidebyside import daemons
from services.config import fault_table

# a sample of CPU time each second: coarser than the 10 ms steps of that clock by enough
STATS = "1s"
# the longest there is (services/config.py): a split never cuts a session
DRAIN = "596h"


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
    """What the daemon of this arm is told."""
    return daemons.configuration(
        arm.engine,
        service,
        upstreams,
        log={"path": str(log), "stats": STATS},
        listener={"faults": [fault_table(spec) for spec in arm.faults]},
        timeouts={"drain": DRAIN},
    )
