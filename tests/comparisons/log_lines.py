"""Log lines as a daemon writes them, and what stands between them, for the tests of `triptych logs`."""

import random
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec

from comparisons.logs.summary import AMOUNTS, TIMERS
from services.vocabulary import Event, SessionClosed

ENGINES = ("blocking", "nonblocking", "twisted")
ENDINGS = (("SF", "--"), ("RSTO", "CD"), ("RSTR", "SC"), ("RSTR", "cD"), ("S0", "--"))
NEVER_NULL = ("duration_us", "max_gap_us", "paused_us", "loop_lag_us")
NOT_OURS = {
    "the first half of a line": b'{"timestamp":"2026-11-22T10:00:00.000000Z","level":"in',
    "a line torn behind a colon": b'{"timestamp":',
    "a line torn in a list": b'{"timestamp":"2026-11-22T10:00:00.000000Z","addresses":[',
    "text": b"Nov 22 10:00:00 host other[7]: hello",
    "the JSON of another program": b'{"timestamp":"2026-11-22T10:00:00Z","level":"info","msg":"hello"}',
    "JSON that is no object": b'["session_closed"]',
    "two objects on a line": b'{"event":"session_closed"}{"event":"session_closed"}',
    "bytes that are no UTF-8": b'\xff\xfe{"event":"session_closed"}',
    "NUL bytes, as a crash leaves them": b"\0" * 4096,
}


class Process:
    """Writes lines as the log layer of one process does, a millisecond apart."""

    def __init__(self, engine: str, pid: int = 7, millisecond: int = 0) -> None:
        self.engine, self.pid, self.seq, self.millisecond = engine, pid, 0, millisecond

    def line(self, event: Event, /, **changed: Any) -> bytes:
        moment = datetime(2026, 11, 22, 10, tzinfo=UTC) + timedelta(milliseconds=self.millisecond)
        envelope = {
            "timestamp": f"{moment:%Y-%m-%dT%H:%M:%S.%fZ}",
            "level": event.LEVEL,
            "event": event.NAME,
            "schema": 1,
            "engine": self.engine,
            "instance": "-",
            "pid": self.pid,
            "worker": 0,
            "seq": self.seq,
        }
        self.seq += 1
        self.millisecond += 1
        return msgspec.json.encode({**envelope, **msgspec.structs.asdict(event), **changed})


def closed(number: int = 0, **changed: Any) -> SessionClosed:
    fields: dict[str, Any] = dict.fromkeys(SessionClosed.__struct_fields__)
    counts = ("reads", "writes", "partial_writes", "would_block", "pauses", "peak_buffer", "spliced_bytes")
    fields |= dict.fromkeys((*counts, "sessions", "bytes_c2s", "bytes_s2c"), 0)
    fields |= dict.fromkeys(NEVER_NULL, 0)
    fields |= {"session": f"{number:026}", "service": "proxy", "listener": "front", "transport": "tcp"}
    fields |= {"state": "SF", "history": "ShDdFf", "termination": "--", "closed_by": "client"}
    return SessionClosed(**{**fields, **changed})


def drawn(number: int, dice: random.Random) -> SessionClosed:
    """A session whose timers are spread over six powers of ten, a third of the nullable ones null."""
    nullable = [timer for timer in TIMERS if timer not in NEVER_NULL]
    state, termination = dice.choice(ENDINGS)
    values: dict[str, Any] = {timer: int(10 ** dice.uniform(0, 6)) for timer in TIMERS}
    values |= {timer: None for timer in nullable if dice.random() < 1 / 3}
    values |= {amount: dice.randrange(100_000) for amount in AMOUNTS[:2]}
    if dice.random() < 1 / 4:
        values |= {"transport": "udp"} | {amount: dice.randrange(100) for amount in AMOUNTS[2:]}
    return closed(number, state=state, termination=termination, **values)


def written(path: Path, lines: Sequence[bytes], end: bytes = b"\n") -> str:
    path.write_bytes(b"\n".join(lines) + end)
    return str(path)
