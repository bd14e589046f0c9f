"""What is known of a session: stamped while it lives, one log line when it ends.

The letters are Zeek's (`history`, `state`) and HAProxy's (`termination`); both are derived here,
once, from stamps and causes, so that they mean the same in every engine.
"""

import enum
import random
from typing import Any, Literal, NamedTuple

from services import vocabulary
from services.core.addresses import Address
from services.core.preface import Introduction

State = Literal["SF", "S0", "S1", "S2", "S3", "RSTO", "RSTR", "REJ"]


class Side(enum.Enum):
    """A leg's name: which of a session's two sockets. Echo has only the client's."""

    CLIENT = "client"
    UPSTREAM = "upstream"

    # sides are compared on every control event: identity is all they need
    __hash__ = object.__hash__


CLIENT, UPSTREAM = Side.CLIENT, Side.UPSTREAM


class Reason(enum.Enum):
    """Why a leg or a dial was lost: the closed set that errno and Twisted's Failures map to."""

    RESET = "reset by peer"
    TIMED_OUT = "no answer in time"
    # send to a peer that had ended its own direction and then reset, or closed altogether
    BROKEN = "broken pipe"
    REFUSED = "refused"
    UNREACHABLE = "unreachable"
    EXHAUSTED = "out of a resource"
    OTHER = "other"


class Loss(NamedTuple):
    """A leg or a dial that is gone: `error` is the errno's name, as logged."""

    reason: Reason
    error: str


class TcpInfo(NamedTuple):
    """What the kernel says of a TCP leg at its close (TCP_INFO); None is not a TCP leg."""

    rtt_us: int | None = None
    retrans: int | None = None


NO_TCP_INFO = TcpInfo()

_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = [high + low for high in _BASE32 for low in _BASE32]


def session_id(wall: float) -> str:
    """26 characters, sortable by time: 50 bits of microseconds since 1970, 80 random ones.

    Crockford's alphabet keeps the order of the number; 130 bits are 13 pairs of 2 x 5.
    """
    number = (int(wall * 1e6) & (1 << 50) - 1) << 80 | random.getrandbits(80)
    pairs = _PAIRS
    return "".join([pairs[number >> shift & 1023] for shift in range(120, -1, -10)])


class Record:
    """One session's stamps (monotonic seconds) and counts. `None` is never reached."""

    __slots__ = (
        "accept_wait",
        "admission",
        "client",
        "closed_at",
        "closed_by",
        "connected_at",
        "dialled_at",
        "error",
        "faults",
        "first_byte_at",
        "id",
        "listener",
        "local",
        "max_gap",
        "moved_at",
        "opened_at",
        "our_end_at",
        "our_reset_at",
        "pair",
        "peer_reset_at",
        "queued",
        "queued_at",
        "refusal",
        "service",
        "termination",
        "tlvs",
        "unread",
        "upstream",
        "upstream_address",
        "via",
    )

    def __init__(
        self,
        *,
        wall: float,
        now: float,
        service: Literal["echo", "proxy"],
        listener: str,
        client: Address | None,
        local: Address,
        accept_wait: float | None = None,
    ) -> None:
        self.id = session_id(wall)
        self.pair: str | None = None
        # what its client was counted as (`admission.py`)
        self.admission: object = None
        self.service = service
        self.listener = listener
        self.client = client
        self.local = local
        self.accept_wait = accept_wait
        # the proxy that the client came by, and what it said beside addresses
        self.via: Address | None = None
        self.tlvs = b""
        # why a client that was accepted is no session after all
        self.refusal: str | None = None
        self.upstream: str | None = None
        self.upstream_address: Address | None = None
        self.opened_at = now
        # seconds in a pool's queue, and since when again
        self.queued = 0.0
        self.queued_at: float | None = None
        self.dialled_at: float | None = None
        self.connected_at: float | None = None
        self.first_byte_at: float | None = None
        # the last moment a byte moved, and the longest time without one
        self.moved_at = now
        self.max_gap = 0.0
        # the client's connection as the wire shows it
        self.unread = False
        self.our_end_at: float | None = None
        self.our_reset_at: float | None = None
        self.peer_reset_at: float | None = None
        self.closed_at: float | None = None
        self.termination: str | None = None
        self.closed_by: Literal["client", "upstream", "service"] | None = None
        self.error: str | None = None
        # the labels of the faults that it met on purpose, with commas
        self.faults: str | None = None

    def introduce(self, introduction: Introduction) -> None:
        """The client is who its PROXY header says, and not the proxy that sent it."""
        if introduction.client is not None and introduction.local is not None:
            self.via = self.client
            self.client, self.local = introduction.client, introduction.local
        self.tlvs = introduction.tlvs
        self.pair = introduction.pair


class Counts(NamedTuple):
    """What moved and when, and how the I/O model behaved while it did; the names are the log line's."""

    client_first_us: int | None
    client_end_us: int | None
    upstream_end_us: int | None
    bytes_c2s: int
    bytes_s2c: int
    datagrams_c2s: int | None
    datagrams_s2c: int | None
    reads: int
    writes: int
    partial_writes: int
    would_block: int
    pauses: int
    paused_us: int
    paused_c2s_us: int | None
    paused_s2c_us: int | None
    longest_pause_us: int
    peak_buffer: int
    spliced_bytes: int


class Ends(NamedTuple):
    """When the client's two directions first carried data, and when the client ended its own."""

    first_in: float | None
    first_out: float | None
    client_end: float | None


def history(record: Record, ends: Ends) -> str:
    """Zeek's letters for the client's TCP connection, each at its first occurrence.

    `S h` handshake, `D d` data, `F f` FIN, `R r` reset; upper case came from the client.
    """
    first_in, first_out, client_end = ends
    if first_in is None and record.unread:  # it lay in the kernel when we closed
        first_in = record.our_reset_at
    if client_end is not None and record.peer_reset_at is not None:
        client_end = min(client_end, record.peer_reset_at)  # a client sends nothing after its reset
    stamps = (
        (first_in, "D"),
        (first_out, "d"),
        (client_end, "F"),
        (record.our_end_at, "f"),
        (record.peer_reset_at, "R"),
        (record.our_reset_at, "r"),
    )
    # of two letters at one stamp, the cause stands before its effect
    letters = sorted((stamp, index) for index, (stamp, _) in enumerate(stamps) if stamp is not None)
    return "Sh" + "".join(stamps[index][1] for _, index in letters)


def state(letters: str, *, ended: bool) -> State:
    """Zeek's conn_state for `letters` of a connection that was established."""
    if "R" in letters and ("r" not in letters or letters.index("R") < letters.index("r")):
        return "RSTO"
    if "r" in letters:
        return "RSTR"
    if ended or ("F" in letters and "f" in letters):
        return "SF"
    if "F" in letters:
        return "S2"
    return "S3" if "f" in letters else "S1"


def microseconds(start: float | None, end: float | None) -> int | None:
    """From `start` to `end` (seconds) in whole microseconds; None where either was not reached."""
    if start is None or end is None:
        return None
    return max(0, int((end - start) * 1e6))


def line(
    kind: type[vocabulary.SessionProgress],
    record: Record,
    counts: Counts,
    *,
    letters: str,
    state: State,
    now: float,
    lag: float,
    sessions: int,
    client_info: TcpInfo = NO_TCP_INFO,
    upstream_info: TcpInfo = NO_TCP_INFO,
) -> vocabulary.SessionProgress:
    """The log line of `record`: `session_closed`, or `session_progress` while it is open."""
    upstream = record.upstream_address
    return kind(
        **identity(record),
        upstream=record.upstream,
        upstream_ip=upstream.host if upstream else None,
        upstream_port=upstream.port if upstream and upstream.transport != "unix" else None,
        accept_wait_us=microseconds(0.0, record.accept_wait),
        queue_us=int(record.queued * 1e6) if record.service == "proxy" else None,
        connect_us=microseconds(record.dialled_at, record.connected_at),
        first_byte_us=microseconds(record.opened_at, record.first_byte_at),
        duration_us=max(0, int((now - record.opened_at) * 1e6)),
        max_gap_us=int(max(record.max_gap, 0.0) * 1e6),
        loop_lag_us=int(lag * 1e6),
        state=state,
        history=letters,
        termination=record.termination,
        closed_by=record.closed_by,
        error=record.error,
        faults=record.faults,
        via_ip=record.via.host if record.via else None,
        via_port=record.via.port if record.via else None,
        sessions=sessions,
        client_rtt_us=client_info.rtt_us,
        client_retrans=client_info.retrans,
        upstream_rtt_us=upstream_info.rtt_us,
        upstream_retrans=upstream_info.retrans,
        **counts._asdict(),
    )


def identity(record: Record) -> dict[str, Any]:
    """The fields that say who a session is (`vocabulary.Session`). A UNIX client has no name of
    its own; its `local_ip` is the path it connected to.
    """
    client, local = record.client, record.local
    named = local.transport != "unix"
    return {
        "session": record.id,
        "pair": record.pair,
        "service": record.service,
        "listener": record.listener,
        "transport": local.transport,
        "client_ip": client.host if client else None,
        "client_port": client.port if client else None,
        "local_ip": local.host,
        "local_port": local.port if named else None,
    }
