"""The state machine of one session: from accept to close, for every engine.

Theory of operation
===================

A session has a client leg and, for a proxy, an upstream leg. The engine owns the sockets; the
session owns the decisions. The engine tells the session what happened (an *event*) and performs,
in order, the *actions* it gets back. While bytes move, no events are needed: the engine moves them
and tells the session's relays how many (`relay.py`).

A session is in one phase (HAProxy's second termination letter)::

    Q  reading a PROXY header; choosing an upstream, or waiting for one
    C  connecting to it              (proxy)
    D  relaying
    L  relaying the last data: one side has ended its direction
    -  over

The rules, by their numbers in the behaviour table:

* Each direction ends on its own (1). When a relay's source has ended *and* its last byte was
  written, the engine says `Finished`; only then the FIN is passed on (3). When every relay is
  finished, both legs are closed in order.
* A half-closed session lives by its own, shorter timeout (2).
* A reset, or a dead peer (7), on one leg becomes a reset on the other (4). But where the lost leg
  had ended its direction before (we read its FIN, or a send met EPIPE, which proves one), that
  direction is still delivered to its end (5): what flows towards the lost leg is read and dropped,
  and the other leg is reset only once its kernel has had every byte acknowledged.
* A leg that is not being read (we are connecting, its relay is full, its end was read) cannot show
  its death by itself. While there is one, the deadline is never more than `PROBE_INTERVAL` away and
  asks for a probe (6, 9).
* An upstream's addresses are raced (17): the next one is dialled when one fails, or has not answered
  within `RACE`, and the first to answer wins. An upstream that has none left to dial is given up for
  another, within one budget (11). With no dial left, the client is told as a kernel would: reset if it
  sent data, else FIN.
* A session that finds every upstream full waits in its pool's queue. The end of another releases it:
  so `handle` and `expire` return what to do for that one as well.
* Behind another proxy, the first bytes are a PROXY header (16): it is read before anything else, in
  bounded time and size, and says who the client is. What an upstream is told of the client in the same
  way goes out before the first byte of the relay.

A leg's loss is remembered: it is delivered once, whatever its socket says later. After the session
is over every event is ignored, so an engine need not cancel what is already on its way.

Faults on purpose (`faults.py`) act on a session that relays: on its bytes by the relays' lines, on
itself by a deadline, which ends it as the operator would (`K`). So does a lifetime that is over.
Admission (23) decides before a session is made.
"""

import enum
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from msgspec import Struct

from services.core.addresses import Address
from services.core.faults import NEVER, AnyFault, Blackhole, Reset, hitting
from services.core.preface import Preface, PrefaceError, header
from services.core.record import (
    CLIENT,
    UPSTREAM,
    Counts,
    Ends,
    Loss,
    Reason,
    Record,
    Side,
    State,
    history,
    microseconds,
    state,
)
from services.core.relay import Relay
from services.core.upstreams import Pool, Upstream

# A leg that is not read is asked for its death this often: CLOSE_WAIT pile-ups (haproxy #136) end
# within it, and a second is what a poll(2) a paused session costs nothing at.
PROBE_INTERVAL = 1.0
# A dial that has not answered gets company after this long (RFC 8305's Connection Attempt Delay).
RACE = 0.25
# Waiting for the other leg's last acknowledgements before resetting it: a few round trips.
SETTLE_INTERVAL = 0.02


class Timeouts(Struct, frozen=True, kw_only=True):
    """All in seconds.

    Attributes:
        connect: the budget of all dials of a session.
        idle: no byte moved, either way.
        half_close: the same, once one side has ended.
        drain: from SIGTERM until open sessions are cut.
        lifetime: of a session in all, however busy it is; None is for ever.
        header: until a PROXY header is whole, where one is expected.
        dead_peer: data unacknowledged, or keepalive unanswered (TCP_USER_TIMEOUT); None is as idle,
            since it also ends a live peer that keeps its window at zero.
        udp_idle: a UDP session ends this long after its last datagram.
        progress: a line for a long session, this often.

    """

    connect: float = 5.0
    idle: float = 3600.0
    half_close: float = 60.0
    drain: float = 30.0
    header: float = 3.0
    lifetime: float | None = None
    dead_peer: float | None = None
    udp_idle: float = 30.0
    progress: float = 60.0


# What the engine tells the session ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Accepted:
    """The client leg is there. Always the first event."""


@dataclass(frozen=True, slots=True)
class Received:
    """While a preface is read: what the client sent next; nothing is its end."""

    data: bytes


@dataclass(frozen=True, slots=True)
class Dialled:
    """Dial number `attempt` is connected: the upstream leg is there."""

    attempt: int


@dataclass(frozen=True, slots=True)
class DialFailed:
    attempt: int
    loss: Loss


@dataclass(frozen=True, slots=True)
class Finished:
    """The relay's source has ended and its last byte has left user space."""

    relay: Relay


@dataclass(frozen=True, slots=True)
class Lost:
    """A socket call on `leg` failed for good."""

    leg: Side
    loss: Loss


@dataclass(frozen=True, slots=True)
class Probed:
    """The answer to a probe: is the leg lost, and how much lies in its kernel buffers (bytes)?"""

    leg: Side
    loss: Loss | None
    unread: int
    unsent: int


@dataclass(frozen=True, slots=True)
class Cut:
    """The session must end now: `K` by the operator or the drain deadline, `R` for want of a
    resource, `I` because of a bug of ours.
    """

    cause: Literal["K", "R", "I"]
    error: str | None = None


Event = Accepted | Received | Dialled | DialFailed | Finished | Lost | Probed | Cut


# What the session asks of the engine ------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Dial:
    """Connect to `address`, from `source` if that is given (an IP address of this machine); answer with
    `Dialled` or `DialFailed`.
    """

    attempt: int
    address: Address
    source: str | None = None


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give dial number `attempt` up; nothing is answered."""

    attempt: int


@dataclass(frozen=True, slots=True)
class ReadPreface:
    """Read the client leg, and answer with `Received`, as long as the session `reads_preface`."""


@dataclass(frozen=True, slots=True)
class Send:
    """Write `data` to `leg`, to which nothing was written before: its buffer has room."""

    leg: Side
    data: bytes


@dataclass(frozen=True, slots=True)
class BeginRelay:
    """Move bytes on every relay of the session, from now on. `rest` came from the client before: it is
    the first that its relay receives.
    """

    rest: bytes = b""


@dataclass(frozen=True, slots=True)
class Deliver:
    """What the relay's line holds may be due earlier than it said."""

    relay: Relay


@dataclass(frozen=True, slots=True)
class SendEnd:
    """Pass FIN to `leg`: shut its write side down."""

    leg: Side


@dataclass(frozen=True, slots=True)
class Discard:
    """Drop what waits for `relay`'s sink and what is still read from its source."""

    relay: Relay


@dataclass(frozen=True, slots=True)
class Probe:
    """Ask the kernel, without waiting, about `leg`; answer with `Probed`."""

    leg: Side


@dataclass(frozen=True, slots=True)
class Abort:
    """Reset `leg` (linger 0) and let go of it."""

    leg: Side


@dataclass(frozen=True, slots=True)
class Close:
    """Close `leg` in order: the kernel delivers what it still holds, then FIN."""

    leg: Side


Action = ReadPreface | Dial | Cancel | Send | BeginRelay | Deliver | SendEnd | Discard | Probe | Abort | Close
Actions = Sequence[tuple["Session", Action]]


class Phase(enum.Enum):
    CHOOSING = "Q"
    CONNECTING = "C"
    RELAYING = "D"
    OVER = "-"


# HAProxy's first letter for a session that one side ended
_CAUSE = {CLIENT: "C", UPSTREAM: "S"}
_NAME: dict[Side, Literal["client", "upstream"]] = {CLIENT: "client", UPSTREAM: "upstream"}


class Session:
    """One client from accept to close. Not thread-safe: the engine serialises `handle` and `expire`.

    Args:
        record: who it is; stamped until it becomes the session's log line.
        timeouts: for all its life, whatever is reloaded meanwhile.
        buffer: bytes that a relay may hold.
        pool: where a proxy dials; None is echo.
        number: how many sessions its listener had before, and itself.
        faults: the listener's, from which those that hit this session are drawn.
        preface: where a PROXY header has to come first.
        readmit: why a client may not have a session after all, now that it is known who it is.

    """

    __slots__ = (
        "_attempt",
        "_broken",
        "_candidates",
        "_connect_ends",
        "_dial_loss",
        "_dials",
        "_endings",
        "_fault_at",
        "_faults",
        "_gave_up",
        "_life_ends",
        "_lost",
        "_number",
        "_pool",
        "_preface",
        "_probed_at",
        "_progress_at",
        "_race_at",
        "_readmit",
        "_rest",
        "_retries",
        "_timeouts",
        "_tried",
        "_upstream",
        "_waits_until",
        "phase",
        "record",
        "relays",
    )

    def __init__(
        self,
        record: Record,
        timeouts: Timeouts,
        buffer: int,
        pool: Pool | None,
        number: int = 1,
        faults: Sequence[AnyFault] = (),
        preface: Preface | None = None,
        readmit: Callable[[Record], str | None] = lambda _: None,
    ) -> None:
        self.record = record
        self.phase = Phase.CHOOSING
        self.relays: tuple[Relay, ...] = (
            (Relay(record, CLIENT, CLIENT, buffer),)
            if pool is None
            else (Relay(record, CLIENT, UPSTREAM, buffer), Relay(record, UPSTREAM, CLIENT, buffer))
        )
        self._timeouts = timeouts
        self._pool = pool
        self._attempt = 0
        # those on their way, by their numbers
        self._dials: dict[int, Address] = {}
        self._race_at = NEVER
        self._retries = pool.choice.retries if pool else 0
        self._candidates: list[Address] = []
        self._tried: list[Upstream] = []
        # the one that this session counts for
        self._upstream: Upstream | None = None
        # of all dials together, and of this upstream's dials or the queue
        self._connect_ends = self._waits_until = 0.0
        self._dial_loss: Loss | None = None
        self._gave_up = False
        self._lost: list[Side] = []
        # the leg whose peer is gone but whose own direction is still being delivered (rule 5)
        self._broken: Side | None = None
        self._probed_at = record.opened_at
        self._progress_at = record.opened_at + timeouts.progress
        self._number = number
        self._life_ends = record.opened_at + timeouts.lifetime if timeouts.lifetime else NEVER
        self._faults = faults
        self._preface = preface
        self._readmit = readmit
        self._rest = b""
        # the faults that end the session, and when the first of them does
        self._endings: dict[AnyFault, float] = {}
        self._fault_at = NEVER

    @property
    def over(self) -> bool:
        return self.phase is Phase.OVER

    @property
    def reads_preface(self) -> bool:
        return self._preface is not None and self.phase is not Phase.OVER

    def awaits(self, attempt: int) -> bool:
        """Is dial number `attempt` still wanted?"""
        return self.phase is Phase.CONNECTING and attempt in self._dials

    def handle(self, event: Event, now: float) -> Actions:
        """What to do about `event`, in order. Nothing, once the session is over."""
        if self.phase is Phase.OVER:
            return ()
        match event:
            case Finished(relay):
                return self._finished(relay, now)
            case Lost(leg, loss):
                return self._lose(leg, loss, now)
            case Accepted():
                if self._preface is None:
                    return self._admitted(now)
                self._waits_until = now + self._timeouts.header
                return self._do(ReadPreface())
            case Received(data):
                return self._read_preface(data, now)
            case Dialled(attempt):
                return self._dialled(attempt, now) if self.awaits(attempt) else ()
            case DialFailed(attempt, loss):
                return self._dial_failed(attempt, loss, now) if self.awaits(attempt) else ()
            case Probed():
                return self._probed(event, now)
            case _:  # Cut
                return self._end(event.cause + self._letter(), None, now, event.error)

    def relay_from(self, leg: Side) -> Relay:
        return self.relays[0] if leg is CLIENT else self.relays[1]

    def relay_to(self, leg: Side) -> Relay:
        return self.relays[-1] if leg is CLIENT else self.relays[0]

    def counts(self, now: float) -> Counts:
        """What moved so far. For echo: what came in, and what went back."""
        relays = self.relays
        opened = self.record.opened_at
        # those that are open now, too
        lasting = [now - at if (at := relay.paused_at) is not None else 0.0 for relay in relays]
        paused = [int((r.paused_time + pause) * 1e6) for r, pause in zip(relays, lasting, strict=True)]
        longest = max(max(r.longest_pause, pause) for r, pause in zip(relays, lasting, strict=True))
        proxied = len(relays) == 2
        return Counts(
            client_first_us=microseconds(opened, relays[0].first_in),
            client_end_us=microseconds(opened, relays[0].ended_at),
            upstream_end_us=microseconds(opened, relays[1].ended_at) if proxied else None,
            bytes_c2s=relays[0].bytes_in,
            bytes_s2c=relays[-1].bytes_out,
            datagrams_c2s=None,
            datagrams_s2c=None,
            reads=sum(relay.reads for relay in relays),
            writes=sum(relay.writes for relay in relays),
            partial_writes=sum(relay.partial_writes for relay in relays),
            would_block=sum(relay.would_block for relay in relays),
            pauses=sum(relay.pauses for relay in relays),
            paused_us=sum(paused),
            paused_c2s_us=paused[0] if proxied else None,
            paused_s2c_us=paused[-1],
            longest_pause_us=int(longest * 1e6),
            peak_buffer=max(relay.peak for relay in relays),
            spliced_bytes=sum(relay.spliced for relay in relays),
        )

    def story(self) -> tuple[str, State]:
        """History and state of the client's connection, so far or in the end."""
        from_client, to_client = self.relays[0], self.relays[-1]
        end = self.record.peer_reset_at if from_client.peer_ended else None
        ends = Ends(from_client.first_in, to_client.first_out, from_client.ended_at or end)
        letters = history(self.record, ends)
        return letters, state(letters, ended=self.phase is Phase.OVER)

    # The preface --------------------------------------------------------------------------------

    def _read_preface(self, data: bytes, now: float) -> Actions:
        if self._preface is None:
            return ()
        record = self.record
        record.unread = record.unread or bool(data)
        try:
            introduction = self._preface.feed(data)
        except PrefaceError as error:
            return self._refuse_client("PQ", f"PROXY header: {error}", "EPROTO", now)
        if introduction is None:
            return ()
        self._preface = None
        record.unread = False
        self._rest = introduction.rest
        record.introduce(introduction)
        reason = self._readmit(record)
        if reason is not None:
            return self._refuse_client("PQ", reason, None, now)
        return self._admitted(now)

    def _refuse_client(self, termination: str, reason: str, error: str | None, now: float) -> Actions:
        self.record.refusal = reason
        return self._end(termination, None, now, error)

    def _admitted(self, now: float) -> Actions:
        return self._begin(now) if self._pool is None else self._choose(now)

    # Connecting ---------------------------------------------------------------------------------

    def _choose(self, now: float) -> Actions:
        """An upstream that was not tried yet, and the dial of its first address; or a place in the queue."""
        assert self._pool is not None
        upstream = self._chosen(now)
        if upstream is not None:
            return self._turn_to(upstream, now)
        if not self._pool.is_full(self._tried, now):
            return self._give_up()
        self.phase = Phase.CHOOSING
        self.record.queued_at = now
        self._waits_until = now + self._pool.choice.queue.timeout
        self._pool.wait(self)
        return ()

    def _chosen(self, now: float) -> Upstream | None:
        assert self._pool is not None
        client = self.record.client
        return self._pool.choose(client.host if client else None, self._tried, now)

    def _turn_to(self, upstream: Upstream, now: float) -> Actions:
        record = self.record
        if record.queued_at is not None:
            record.queued += now - record.queued_at
            record.queued_at = None
            self._connect_ends = 0.0
        self._upstream = upstream
        self._tried.append(upstream)
        assert self._pool is not None
        source = self._pool.choice.source
        # one family cannot be reached from an address of the other
        self._candidates = [
            each
            for each in upstream.addresses
            if source is None or each.transport == "unix" or (":" in each.host) == (":" in source)
        ]
        record.upstream = upstream.name
        if record.dialled_at is None:
            record.dialled_at = now
        self._connect_ends = self._connect_ends or now + self._timeouts.connect
        # what is left of the budget is shared with the upstreams that may still follow
        self._waits_until = now + (self._connect_ends - now) / (1 + self._further_upstreams())
        if self._candidates:
            return self._dial(now)
        self.phase = Phase.CONNECTING
        self._dial_loss = loss = Loss(Reason.UNREACHABLE, "EAFNOSUPPORT")
        return self._give_upstream_up(loss, now)

    def resume(self, now: float) -> Actions:
        """The pool has taken this session from its queue: there is room."""
        return () if self.phase is Phase.OVER else self._choose(now)

    def _look_again(self, now: float) -> Actions:
        """While waiting: an upstream may have come up without any session's end."""
        assert self._pool is not None
        upstream = self._chosen(now)
        if upstream is None:
            return ()
        self._pool.leave(self)
        return self._turn_to(upstream, now)

    def _let_go(self, now: float) -> Actions:
        """The upstream is rid of this session, and the next in the queue may have it."""
        upstream, self._upstream = self._upstream, None
        if upstream is None or self._pool is None:
            return ()
        waiting = self._pool.release(upstream)
        return waiting.resume(now) if waiting else ()

    def _dial(self, now: float) -> Actions:
        self.phase = Phase.CONNECTING
        self._attempt += 1
        self.record.upstream_address = address = self._candidates.pop(0)
        self._dials[self._attempt] = address
        # the last of them is to have its chance too
        self._race_at = now + min(RACE, (self._waits_until - now) / (1 + len(self._candidates)))
        assert self._pool is not None
        return self._do(Dial(self._attempt, address, self._pool.choice.source))

    def _further_upstreams(self) -> int:
        assert self._pool is not None
        return min(self._retries, self._pool.further(self._tried))

    def _dial_failed(self, attempt: int, loss: Loss, now: float) -> Actions:
        self._dial_loss = loss
        del self._dials[attempt]
        if self._candidates:
            return self._dial(now)
        return () if self._dials else self._give_upstream_up(loss, now)

    def _give_upstream_up(self, loss: Loss, now: float) -> Actions:
        assert self._pool is not None
        assert self._upstream is not None
        self._pool.failed(self._upstream, loss.error, now)
        others = self._let_go(now)
        if self._further_upstreams() > 0:
            self._retries -= 1
            return [*self._choose(now), *others]
        return [*self._give_up(), *others]

    def _give_up(self) -> Actions:
        """No dial is left. How to tell the client depends on whether it has sent anything."""
        self._gave_up = True
        return self._do(Probe(CLIENT))

    def _dialled(self, attempt: int, now: float) -> Actions:
        assert self._pool is not None
        assert self._upstream is not None
        self._pool.answered(self._upstream)
        record = self.record
        record.connected_at = now
        record.upstream_address = self._dials.pop(attempt)
        late = self._cancel_dials()
        version = self._upstream.proxy_protocol
        if version is None:
            return [*late, *self._begin(now)]
        told = header(version, record.client, record.local, record.tlvs, record.pair)
        return [*late, *self._do(Send(UPSTREAM, told)), *self._begin(now)]

    def _cancel_dials(self) -> Actions:
        dials, self._dials = self._dials, {}
        return self._do(*(Cancel(attempt) for attempt in dials))

    def _begin(self, now: float) -> Actions:
        self.phase = Phase.RELAYING
        self.record.moved_at = now
        if self._faults:
            self._suffer(now)
        rest, self._rest = self._rest, b""
        return self._do(BeginRelay(rest))

    # Faults on purpose --------------------------------------------------------------------------

    def refault(self, faults: Sequence[AnyFault], now: float) -> Actions:
        """The listener's faults have changed, while this session is open."""
        self._faults = faults
        if self.phase is not Phase.RELAYING:
            return ()
        self._suffer(now)
        lossy = [relay for relay in self.relays if relay.line is not None and relay.line.lossy]
        if lossy and not any(isinstance(fault, Blackhole) for fault in self._faults):
            # a stream with a hole must not go on as if it were whole
            return self._end("K" + self._letter(), None, now, orderly=True)
        return self._do(*(Deliver(relay) for relay in self.relays if relay.line is not None))

    def _suffer(self, now: float) -> None:
        self._faults = faults = hitting(self._faults, self._number)
        self.record.faults = ",".join(fault.label for fault in faults) or None
        for relay, direction in zip(self.relays, ("upstream", "downstream"), strict=False):
            own = [fault for fault in faults if len(self.relays) == 1 or fault.direction == direction]
            relay.suffer(own, self._number, now)
        self._endings = {
            fault: self._endings.get(fault, now + fault.after)
            for fault in faults
            if isinstance(fault, Reset | Blackhole) and fault.after is not None
        }
        self._fault_at = min(self._endings.values(), default=NEVER)

    def _fault_due(self, now: float) -> Actions:
        first = min(self._endings, key=self._endings.__getitem__)
        return self._end("K" + self._letter(), None, now, orderly=isinstance(first, Blackhole))

    # Ending -------------------------------------------------------------------------------------

    def _finished(self, relay: Relay, now: float) -> Actions:
        if relay.finished_at is not None:
            return ()
        relay.finished_at = now
        if relay.line is not None and relay.line.exhausted and relay.ended_at is None:
            return self._end("K" + self._letter(), None, now, orderly=True)
        if not relay.discarding and relay.sink is CLIENT:
            self.record.our_end_at = now
        if all(each.finished_at is not None for each in self.relays):
            if self._broken is not None:
                return self._end_broken(self._broken, now)
            first = min(self.relays, key=lambda each: each.ended_at or now)
            return self._end("--", first.source, now, orderly=True)
        if relay.discarding:
            return ()
        if self._broken is not None:
            return self._do(SendEnd(relay.sink), Probe(relay.sink))
        return self._do(SendEnd(relay.sink))

    def _lose(self, leg: Side, loss: Loss, now: float) -> Actions:
        if leg in self._lost:
            return ()
        self._lost.append(leg)
        if leg is CLIENT:
            self.record.peer_reset_at = now
        if self._broken is not None:  # both are gone; the first is the cause
            return self._end_broken(self._broken, now)
        if self.phase is not Phase.RELAYING:
            return self._end(_CAUSE[leg] + self.phase.value, leg, now, loss.error)
        outgoing = self.relay_from(leg)
        if loss.reason is Reason.BROKEN:
            outgoing.peer_ended = True
        if len(self.relays) == 1 or not (outgoing.peer_ended or outgoing.ended_at is not None):
            return self._end(_CAUSE[leg] + self._letter(), leg, now, loss.error)
        self._broken = leg
        self.record.error = loss.error
        incoming = self.relay_to(leg)
        incoming.discard()
        if incoming.ended_at is not None:
            incoming.finished_at = now
        if outgoing.finished_at is None:
            return self._do(Discard(incoming))
        if incoming.finished_at is not None:
            return self._end_broken(leg, now)
        return self._do(Discard(incoming), Probe(outgoing.sink))

    def _probed(self, probed: Probed, now: float) -> Actions:
        if probed.loss is not None:
            return self._lose(probed.leg, probed.loss, now)
        if self._gave_up:
            return self._refuse(probed.unread, now)
        if (
            self._broken is not None
            and probed.leg is not self._broken
            and probed.unsent == 0
            and self.relay_from(self._broken).finished_at is not None
        ):
            return self._end_broken(self._broken, now)
        return ()

    def _refuse(self, unread: int, now: float) -> Actions:
        record = self.record
        loss = self._dial_loss
        termination = "sQ" if loss is None else "sC" if loss.reason is Reason.TIMED_OUT else "SC"
        if not unread:
            record.our_end_at = now
        record.unread = unread > 0
        return self._end(termination, None, now, loss.error if loss else None, orderly=not unread)

    def _end_broken(self, leg: Side, now: float) -> Actions:
        """The direction from the lost leg is delivered. Where the other one has ended as well,
        nothing is left to reset.
        """
        orderly = all(relay.finished_at is not None for relay in self.relays)
        return self._end(_CAUSE[leg] + "L", leg, now, self.record.error, orderly=orderly)

    def _end(
        self,
        termination: str,
        by: Side | None,
        now: float,
        error: str | None = None,
        *,
        orderly: bool = False,
    ) -> Actions:
        """Let go of every leg: in order where nothing is cut, else by reset (rule 4)."""
        record = self.record
        legs = [CLIENT, UPSTREAM] if self.phase is Phase.RELAYING and len(self.relays) == 2 else [CLIENT]
        actions: list[Action] = []
        cancelled = self._cancel_dials()
        if record.queued_at is not None and self._pool is not None:
            self._pool.leave(self)
            record.queued += now - record.queued_at
            record.queued_at = None
        self.phase = Phase.OVER
        record.termination = termination
        record.closed_by = "service" if by is None else _NAME[by]
        record.error = error
        if not orderly and CLIENT not in self._lost:
            record.our_reset_at = now
        if orderly and termination[0] == "K" and record.our_end_at is None:
            record.our_end_at = now
        actions.extend(Close(leg) if orderly else Abort(leg) for leg in legs)
        return [*cancelled, *self._do(*actions), *self._let_go(now)]

    def _letter(self) -> str:
        """HAProxy's second letter for the phase the session is in."""
        if self.phase is Phase.RELAYING and any(
            relay.peer_ended or relay.ended_at is not None for relay in self.relays
        ):
            return "L"
        return self.phase.value

    # Time ---------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When `expire` wants to be called, if nothing happens before; it may find nothing to do."""
        times = [self._progress_at, self._patience_ends(), self._fault_at, self._life_ends]
        if self._dials and self._candidates:
            times.append(self._race_at)
        if self._unread_legs():
            times.append(self._probed_at + self._probe_interval())
        return min(times)

    def expire(self, now: float) -> tuple[Actions, bool]:
        """What is due at `now`, and whether a progress line is."""
        if self.phase is Phase.OVER:
            return (), False
        progress = now >= self._progress_at
        if progress:
            self._progress_at = now + self._timeouts.progress
        if now >= self._fault_at:
            return self._fault_due(now), progress
        if now >= self._life_ends:
            return self._end("K" + self._letter(), None, now, "ETIME"), progress
        if now >= self._patience_ends():
            return self._out_of_patience(now), progress
        if self._dials and self._candidates and now >= self._race_at:
            return self._dial(now), progress
        legs = self._unread_legs()
        if legs and now >= self._probed_at + self._probe_interval():
            self._probed_at = now
            probes = self._do(*(Probe(leg) for leg in legs))
            if self.record.queued_at is not None:
                return [*self._look_again(now), *probes], progress
            return probes, progress
        return (), progress

    def _patience_ends(self) -> float:
        if self.phase is not Phase.RELAYING:
            return float("inf") if self._gave_up else self._waits_until
        timeouts = self._timeouts
        moved = self.record.moved_at
        ends = [relay.ended_at for relay in self.relays if relay.ended_at is not None]
        if ends:
            return max(moved, *ends) + timeouts.half_close
        return moved + timeouts.idle

    def _out_of_patience(self, now: float) -> Actions:
        if self._preface is not None:
            reason = f"PROXY header: it was not whole within {self._timeouts.header:g} s"
            return self._refuse_client("cQ", reason, "ETIMEDOUT", now)
        if self.phase is Phase.CHOOSING:
            assert self._pool is not None
            self._pool.leave(self)
            return self._give_up()
        if self.phase is not Phase.RELAYING:
            late = self._cancel_dials()
            self._candidates = []
            self._dial_loss = loss = Loss(Reason.TIMED_OUT, "ETIMEDOUT")
            return [*late, *self._give_upstream_up(loss, now)]
        side = "c" if self._awaited() is CLIENT else "s"
        return self._end(side + self._letter(), None, now)

    def _awaited(self) -> Side:
        """Whose turn it was when nothing moved any more."""
        for relay in self.relays:
            if relay.pending:
                return relay.sink
        if len(self.relays) == 1:
            return CLIENT
        to_upstream, to_client = self.relays
        if to_upstream.ended_at is not None:
            return UPSTREAM
        if to_client.ended_at is not None:
            return CLIENT
        # the side that spoke last is not the one that was waited for
        return UPSTREAM if to_upstream.last_in > to_client.last_in else CLIENT

    def _unread_legs(self) -> list[Side]:
        """The legs whose death no read would show."""
        if self.phase is not Phase.RELAYING:
            return [CLIENT]
        if self._broken is not None:
            return [self.relay_from(self._broken).sink]
        return [relay.source for relay in self.relays if relay.pending or relay.ended_at is not None]

    def _probe_interval(self) -> float:
        """Shorter while nothing but the other leg's acknowledgements is waited for."""
        if self._broken is not None and self.relay_from(self._broken).finished_at is not None:
            return SETTLE_INTERVAL
        return PROBE_INTERVAL

    def _do(self, *actions: Action) -> Actions:
        return [(self, action) for action in actions]
