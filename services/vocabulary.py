"""The closed set of log events, one typed struct each.

A daemon can say nothing that is not written here: an event is an instance of one of these
structs, the log layer (`logs.py`) puts it into the envelope, and the JSON Schema that ships
as `log.schema.json` is generated from them. Fields are flat; a field that was never
reached, or that an I/O model cannot see, is null. Names end in their unit: `_us` is integer
microseconds, `bytes_` and `datagrams_` are counts.

Adding an event or a nullable field keeps `SCHEMA`; removing, renaming or changing the
meaning of one raises it.
"""

from typing import Annotated, Any, ClassVar, Literal

import msgspec
from msgspec import Meta, Struct

SCHEMA = 1

Level = Literal["debug", "info", "warning", "error"]
Count = Annotated[int, Meta(ge=0)]
Microseconds = Annotated[int, Meta(ge=0)]


class Envelope(Struct, frozen=True, kw_only=True):
    """What every line carries, put on by the log layer.

    `seq` counts the lines of one process, without gaps: a gap is a lost line.
    """

    timestamp: Annotated[str, Meta(pattern=r"^\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z$")]
    level: Level
    schema: Literal[1]
    engine: Annotated[str, Meta(pattern=r"^(blocking|nonblocking|twisted|-)$")]
    instance: str
    pid: Count
    worker: Count
    seq: Count


class Event(Struct, frozen=True, kw_only=True):
    """Base of all events: `NAME` is the line's `event`, `LEVEL` its severity."""

    NAME: ClassVar[str]
    LEVEL: ClassVar[Level] = "info"


class Totals(Event, frozen=True, kw_only=True):
    """What the process has done so far; checks use these, so that a dropped line is never
    mistaken for a lost session.
    """

    accepted: Count
    closed: Count
    refused: Count
    open_sessions: Count
    bytes_c2s: Count
    bytes_s2c: Count
    datagrams_c2s: Count
    datagrams_s2c: Count
    datagrams_dropped: Count
    lines_dropped: Count
    threads: Count | None
    open_descriptors: Count | None
    rss_bytes: Count | None
    cpu_us: Microseconds | None
    loop_lag_us: Microseconds


class ServiceReady(Event, frozen=True, kw_only=True):
    """Every listener is open; `addresses` are what was really bound (a port 0 resolved)."""

    NAME = "service_ready"
    addresses: list[str]
    start_us: Microseconds


class ServiceDraining(Event, frozen=True, kw_only=True):
    NAME = "service_draining"
    reason: str
    open_sessions: Count
    deadline_us: Microseconds


class ServiceStopped(Totals, frozen=True, kw_only=True):
    """The last line of a process; `cut` sessions were ended by the drain deadline."""

    NAME = "service_stopped"
    cut: Count


class ConfigReloaded(Event, frozen=True, kw_only=True):
    """A new configuration holds for new sessions; the listeners are told by name."""

    NAME = "config_reloaded"
    path: str
    added: list[str]
    removed: list[str]
    kept: list[str]


class ConfigRefused(Event, frozen=True, kw_only=True):
    """A new configuration has these faults; the old one stays."""

    NAME = "config_refused"
    LEVEL = "error"
    path: str
    faults: list[str]


class ListenerOpened(Event, frozen=True, kw_only=True):
    NAME = "listener_opened"
    listener: str
    service: Literal["echo", "proxy"]
    transport: Literal["tcp", "udp", "unix"]
    address: str
    inherited: bool


class ListenerClosed(Event, frozen=True, kw_only=True):
    """It accepts nobody any more, while the process goes on: a reload or the control interface said so."""

    NAME = "listener_closed"
    listener: str
    address: str


class InterfaceOpened(Event, frozen=True, kw_only=True):
    """Where this process itself answers: Prometheus, those who control its faults, or its operator."""

    NAME = "interface_opened"
    interface: Literal["metrics", "faults", "control"]
    address: str


class ListenerExposed(Event, frozen=True, kw_only=True):
    """The listener can be reached from other hosts: `risk` says what that offers them."""

    NAME = "listener_exposed"
    LEVEL = "warning"
    listener: str
    address: str
    risk: str


class ListenerPaused(Event, frozen=True, kw_only=True):
    NAME = "listener_paused"
    LEVEL = "warning"
    listener: str
    error: str
    pause_us: Microseconds


class UpstreamUp(Event, frozen=True, kw_only=True):
    NAME = "upstream_up"
    pool: str
    upstream: str
    reason: str


class UpstreamDown(Event, frozen=True, kw_only=True):
    NAME = "upstream_down"
    LEVEL = "error"
    pool: str
    upstream: str
    reason: str


class UpstreamChanged(Event, frozen=True, kw_only=True):
    """The operator drained, enabled or weighted an upstream: what holds for new sessions now."""

    NAME = "upstream_changed"
    pool: str
    upstream: str
    draining: bool
    weight: Count


class UpstreamResolved(Event, frozen=True, kw_only=True):
    """The name of an upstream stands for other addresses than before; new sessions are for these."""

    NAME = "upstream_resolved"
    pool: str
    upstream: str
    addresses: list[str]


class UpstreamUnresolved(Event, frozen=True, kw_only=True):
    """The name of an upstream could not be resolved, for this reason, and `addresses` stay: those that it
    had last. Said once, until it can be again.
    """

    NAME = "upstream_unresolved"
    LEVEL = "error"
    pool: str
    upstream: str
    reason: str
    addresses: list[str]


class FaultsChanged(Event, frozen=True, kw_only=True):
    """The control interface gave a listener these faults, by their names, and no others."""

    NAME = "faults_changed"
    listener: str
    faults: list[str]


class Session(Event, frozen=True, kw_only=True):
    """Who: the fields that identify a session. `session` sorts by time; `pair` joins
    sessions that split, shadow or replay made from one.
    """

    session: Annotated[str, Meta(min_length=26, max_length=26)]
    pair: str | None
    service: Literal["echo", "proxy"]
    listener: str
    transport: Literal["tcp", "udp", "unix"]
    client_ip: str | None
    client_port: Count | None
    local_ip: str | None
    local_port: Count | None


class SessionOpened(Session, frozen=True, kw_only=True):
    NAME = "session_opened"
    LEVEL = "debug"


class SessionProgress(Session, frozen=True, kw_only=True):
    """A long session so far; the same fields as `session_closed`.

    `client_first_us`, `client_end_us` and `upstream_end_us` are from accept to the first byte read
    from the client, and to the end that was read from either side. `paused_c2s_us` is how long the
    client was not read because the upstream did not take, `paused_s2c_us` the reverse; of an echo,
    whose sink is the client, all is the latter.
    """

    NAME = "session_progress"
    upstream: str | None
    upstream_ip: str | None
    upstream_port: Count | None
    accept_wait_us: Microseconds | None
    queue_us: Microseconds | None
    connect_us: Microseconds | None
    first_byte_us: Microseconds | None
    duration_us: Microseconds
    max_gap_us: Microseconds
    client_first_us: Microseconds | None
    client_end_us: Microseconds | None
    upstream_end_us: Microseconds | None
    bytes_c2s: Count
    bytes_s2c: Count
    datagrams_c2s: Count | None
    datagrams_s2c: Count | None
    reads: Count
    writes: Count
    partial_writes: Count
    would_block: Count
    pauses: Count
    paused_us: Microseconds
    paused_c2s_us: Microseconds | None
    paused_s2c_us: Microseconds | None
    longest_pause_us: Microseconds | None
    peak_buffer: Count
    spliced_bytes: Count
    loop_lag_us: Microseconds
    state: Literal["SF", "S0", "S1", "S2", "S3", "RSTO", "RSTR", "REJ"]
    history: str
    termination: Annotated[str, Meta(pattern=r"^[CSPRIDKcs-][QCDL-]$")] | None
    closed_by: Literal["client", "upstream", "service"] | None
    error: str | None
    faults: str | None
    via_ip: str | None
    via_port: Count | None
    sessions: Count
    client_rtt_us: Microseconds | None
    client_retrans: Count | None
    upstream_rtt_us: Microseconds | None
    upstream_retrans: Count | None


class SessionClosed(SessionProgress, frozen=True, kw_only=True):
    """The canonical line: one for every session, when its last leg is closed."""

    NAME = "session_closed"
    termination: Annotated[str, Meta(pattern=r"^[CSPRIDKcs-][QCDL-]$")]
    closed_by: Literal["client", "upstream", "service"]


class SessionRefused(Event, frozen=True, kw_only=True):
    """A client that never became a session; `refused` of them since the last such line."""

    NAME = "session_refused"
    LEVEL = "warning"
    service: Literal["echo", "proxy"]
    listener: str
    transport: Literal["tcp", "udp", "unix"]
    client_ip: str | None
    client_port: Count | None
    state: Literal["REJ"] = "REJ"
    termination: str
    closed_by: Literal["service"] = "service"
    reason: str
    refused: Count


class IntroductionRefused(Event, frozen=True, kw_only=True):
    """A client that was accepted by another proxy's word is no session: its PROXY header is wrong, or
    whom it names may not come in.
    """

    NAME = "introduction_refused"
    LEVEL = "warning"
    session: str
    listener: str
    client_ip: str | None
    client_port: Count | None
    reason: str


class EngineStats(Totals, frozen=True, kw_only=True):
    NAME = "engine_stats"


class EngineStalled(Event, frozen=True, kw_only=True):
    """The engine ran a timer this late: something held its loop or its threads."""

    NAME = "engine_stalled"
    LEVEL = "warning"
    loop_lag_us: Microseconds
    open_sessions: Count


class EngineDegraded(Event, frozen=True, kw_only=True):
    """The engine does without something that this system lacks."""

    NAME = "engine_degraded"
    LEVEL = "warning"
    lacking: str
    instead: str


class EngineFault(Event, frozen=True, kw_only=True):
    """A bug of ours: the session it happened in was cut, the others go on."""

    NAME = "engine_fault"
    LEVEL = "error"
    session: str | None
    error: str
    traceback: str


class LogDropped(Event, frozen=True, kw_only=True):
    """The log's reader stalled; `lines` were dropped rather than stall the traffic."""

    NAME = "log_dropped"
    LEVEL = "warning"
    lines: Count


EVENTS: tuple[type[Event], ...] = (
    ServiceReady,
    ServiceDraining,
    ServiceStopped,
    ConfigReloaded,
    ConfigRefused,
    ListenerOpened,
    ListenerClosed,
    InterfaceOpened,
    ListenerExposed,
    ListenerPaused,
    UpstreamUp,
    UpstreamDown,
    UpstreamChanged,
    UpstreamResolved,
    UpstreamUnresolved,
    FaultsChanged,
    SessionOpened,
    SessionProgress,
    SessionClosed,
    SessionRefused,
    IntroductionRefused,
    EngineStats,
    EngineStalled,
    EngineDegraded,
    EngineFault,
    LogDropped,
)


def json_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of one log line: the envelope and exactly one event."""
    envelope, definitions = msgspec.json.schema_components([Envelope], ref_template="#/$defs/{name}")
    events, more = msgspec.json.schema_components(EVENTS, ref_template="#/$defs/{name}")
    definitions.update(more)
    for kind in EVENTS:
        definition = definitions[kind.__name__]
        definition["properties"] = {
            "event": {"const": kind.NAME},
            **definitions["Envelope"]["properties"],
            **definition["properties"],
        }
        definition["required"] = list(definition["properties"])
        definition["additionalProperties"] = False
    del envelope, definitions["Envelope"]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A Triptych log line",
        "oneOf": list(events),
        "$defs": definitions,
    }
