"""A daemon's own log, read after it stopped: added up for the report, and checked against the load.

The check is what makes a number worth reading: a daemon that lost a session or a byte, or
says so, has a broken cell instead of a figure.
"""

from collections import Counter
from pathlib import Path
from statistics import median

import msgspec

from comparisons.results import Facts


class LogError(Exception):
    """The log does not tell what it must; the text is one line."""


class Line(msgspec.Struct, frozen=True):
    """The fields read here, of every event that has them; see services/vocabulary.py for their meaning."""

    event: str
    addresses: list[str] = []
    closed: int = 0
    lines_dropped: int = 0
    bytes_c2s: int = 0
    bytes_s2c: int = 0
    reads: int = 0
    writes: int = 0
    partial_writes: int = 0
    would_block: int = 0
    pauses: int = 0
    paused_us: int = 0
    peak_buffer: int = 0
    spliced_bytes: int = 0
    loop_lag_us: int = 0
    sessions: int = 0
    termination: str | None = None
    accept_wait_us: int | None = None
    connect_us: int | None = None
    first_byte_us: int | None = None
    duration_us: int | None = None


DECODER = msgspec.json.Decoder(Line)


def read(path: Path) -> list[Line]:
    """The whole lines of a log; LogError if one is not a log line."""
    *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
    lines = []
    for number, text in enumerate(whole, 1):
        try:
            lines.append(DECODER.decode(text))
        except msgspec.MsgspecError as error:
            raise LogError(f"line {number} of the daemon's log is not a log line: {error}") from error
    return lines


def bound_address(path: Path) -> str | None:
    """What `service_ready` says is bound, or None as long as it has not been written."""
    return next((line.addresses[0] for line in read(path) if line.event == "service_ready"), None)


def facts(path: Path) -> Facts:
    """The log of a daemon that has stopped. LogError if it does not end with `service_stopped`."""
    lines = read(path)
    if not lines or lines[-1].event != "service_stopped":
        raise LogError("the daemon's log does not end with service_stopped")
    totals = lines[-1]
    ends = [line for line in lines if line.event == "session_closed"]

    def middle(field: str) -> float | None:
        known = [value for line in ends if (value := getattr(line, field)) is not None]
        return median(known) if known else None

    return Facts(
        sessions=len(ends),
        closed=totals.closed,
        bytes_c2s=sum(line.bytes_c2s for line in ends),
        bytes_s2c=sum(line.bytes_s2c for line in ends),
        total_bytes_c2s=totals.bytes_c2s,
        total_bytes_s2c=totals.bytes_s2c,
        lines_dropped=totals.lines_dropped,
        engine_faults=sum(line.event == "engine_fault" for line in lines),
        reads=sum(line.reads for line in ends),
        writes=sum(line.writes for line in ends),
        partial_writes=sum(line.partial_writes for line in ends),
        would_block=sum(line.would_block for line in ends),
        pauses=sum(line.pauses for line in ends),
        paused_us=sum(line.paused_us for line in ends),
        peak_buffer=max((line.peak_buffer for line in ends), default=0),
        spliced_bytes=sum(line.spliced_bytes for line in ends),
        loop_lag_us=max((line.loop_lag_us for line in lines), default=0),
        most_open=max((line.sessions for line in ends), default=0),
        terminations=dict(Counter(line.termination or "null" for line in ends).most_common()),
        accept_wait_us=middle("accept_wait_us"),
        connect_us=middle("connect_us"),
        first_byte_us=middle("first_byte_us"),
        duration_us=middle("duration_us"),
    )


def disagreement(facts: Facts, sessions: int, bytes_c2s: int, bytes_s2c: int) -> str | None:
    """Where the log contradicts what the load did, as one line; None when they agree.

    Lines that the log says it dropped are no lost sessions: the totals still have to be equal.
    """
    pairs = [
        ("sessions closed", facts.closed, sessions),
        ("bytes from clients", facts.total_bytes_c2s, bytes_c2s),
        ("bytes to clients", facts.total_bytes_s2c, bytes_s2c),
    ]
    if not facts.lines_dropped:
        pairs += [
            ("session_closed lines", facts.sessions, sessions),
            ("bytes_c2s of the sessions", facts.bytes_c2s, bytes_c2s),
            ("bytes_s2c of the sessions", facts.bytes_s2c, bytes_s2c),
        ]
    wrong = [
        f"{name} {logged:,} in the log, {loaded:,} in the load"
        for name, logged, loaded in pairs
        if logged != loaded
    ]
    if facts.engine_faults:
        wrong.append(f"{facts.engine_faults} engine_fault lines")
    return "; ".join(wrong) or None
