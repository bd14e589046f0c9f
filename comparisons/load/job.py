"""What a load process is asked to do, and what it answers: one JSON line each way."""

from typing import Literal

import msgspec

Kind = Literal["round_trips", "bulk", "burst", "idle", "replay"]


class Job(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`seconds` is the measured window. `daemon` is the process whose CPU and memory are read;
    null when there is no proxy. `listener` is an inherited descriptor: the replay's upstream.
    """

    kind: Kind
    address: str
    connections: int = 1
    size: int = 64
    seconds: float = 0.5
    stalled: bool = False
    seed: int = 1
    recording: str | None = None
    listener: int | None = None
    daemon: int | None = None


class Latency(msgspec.Struct, frozen=True, kw_only=True):
    """Microseconds, from an HDR histogram with three significant digits."""

    p50: float
    p90: float
    p99: float
    max: float


class Outcome(msgspec.Struct, kw_only=True):
    """`sessions`, `exchanges` (answers), `bytes_sent` and `bytes_received` cover the whole life of the load, because the
    daemon's log does; the other figures are those of the window. Without a daemon its figures are null.
    """

    sessions: int = 0
    exchanges: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0
    seconds: float = 0.0
    requests: int = 0
    payload_bytes: int = 0
    latency: Latency | None = None
    daemon_cpu_us: int | None = None
    load_cpu_us: int = 0
    pss_before: int | None = None
    pss_bytes: int | None = None
    threads: int | None = None
    absorbed_bytes: int | None = None
    fault: str | None = None


class Broken(Exception):  # noqa: N818  it names what became of the cell
    """The subject did what a correct echo or proxy never does; the text says what."""
