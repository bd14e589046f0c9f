"""UDP sessions: one client address until it has been silent for a while.

A datagram does not fit a relay: it is passed on whole, at once, or dropped and counted. An echo answers
it; a proxy sends it to the upstream that its session was given, by a socket of the session's own, and
what comes back there goes to the client. The table of one listener is bounded, and how often one
source is answered can be: its address may be forged, and then it is somebody else who gets the answers.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from ipaddress import ip_address

from services import vocabulary
from services.core.addresses import Address
from services.core.faults import Direction, Fates
from services.core.record import Counts, Record, State, line
from services.core.service import Policy, Service
from services.core.session import Action, Actions, Session
from services.core.upstreams import Upstream

# Clients one listener remembers. A record is under 1 KiB, so a flood of spoofed sources costs 64 MiB
# at most before it is refused.
MOST_CLIENTS = 65_536


class DatagramSession:
    """One client's counters. The engine calls `answered` for a reply that the kernel took. `upstream` is
    where a proxy sends what the client does, at `address`; an echo has none.
    """

    __slots__ = (
        "address",
        "bytes_in",
        "bytes_out",
        "datagrams_in",
        "datagrams_out",
        "peak",
        "record",
        "source",
        "upstream",
    )

    def __init__(self, record: Record, upstream: Upstream | None = None, source: str | None = None) -> None:
        self.record = record
        self.source = source  # where its own socket is to come from
        self.upstream = upstream
        self.address = record.upstream_address = upstream.addresses[0] if upstream else None
        self.bytes_in = self.bytes_out = self.datagrams_in = self.datagrams_out = self.peak = 0

    def received(self, n: int, now: float) -> None:
        record = self.record
        self.datagrams_in += 1
        self.bytes_in += n
        self.peak = max(self.peak, n)
        record.max_gap = max(record.max_gap, now - record.moved_at)
        record.moved_at = now

    def answered(self, n: int, now: float) -> None:
        self.datagrams_out += 1
        self.bytes_out += n
        if self.record.first_byte_at is None:
            self.record.first_byte_at = now

    def counts(self) -> Counts:
        return Counts(
            client_first_us=0,
            client_end_us=None,
            upstream_end_us=None,
            bytes_c2s=self.bytes_in,
            bytes_s2c=self.bytes_out,
            datagrams_c2s=self.datagrams_in,
            datagrams_s2c=self.datagrams_out,
            reads=self.datagrams_in,
            writes=self.datagrams_out,
            partial_writes=0,
            would_block=max(0, self.datagrams_in - self.datagrams_out),
            pauses=0,
            paused_us=0,
            paused_c2s_us=None,
            paused_s2c_us=None,
            longest_pause_us=0,
            peak_buffer=self.peak,
            spliced_bytes=0,
        )

    def story(self) -> tuple[str, State]:
        """UDP has no handshake and no end: only who has spoken."""
        return ("Dd", "SF") if self.datagrams_out else ("D", "S0")


class Datagrams:
    """The sessions of one UDP socket, by client address. Not thread-safe.

    Args:
        local: the bound address, as logged.
        release: told of each session that has ended.

    """

    def __init__(
        self,
        policy: Policy,
        local: Address,
        service: Service,
        release: Callable[[DatagramSession], object] = lambda _: None,
    ) -> None:
        self._release = release
        self._policy = policy
        self._local = local
        self._service = service
        # oldest activity first: the head is the next to expire
        self._sessions: OrderedDict[tuple[str, int], DatagramSession] = OrderedDict()
        self._fates: dict[Direction | None, Fates] = {}
        self._answers = Rates()
        service.keep(self)

    def __len__(self) -> int:
        return len(self._sessions)

    def received(self, host: str, port: int, n: int, now: float) -> DatagramSession | None:
        """A datagram of `n` bytes came from `host`, `port`: its session, or None where it must not be
        answered (rule 19).
        """
        key = (host, port)
        session = self._sessions.get(key)
        if session is None:
            session = self._admit(key, now)
            if session is None:
                return None
        else:
            self._sessions.move_to_end(key)
        session.received(n, now)
        return session

    def forwards(self, now: float) -> Sequence[float]:
        """When to send the datagram just received to the upstream, as often as there are times: once and
        at once, unless a fault of the listener has it otherwise.
        """
        return self._dues("upstream", now)

    def replies(self, session: DatagramSession, now: float) -> Sequence[float]:
        """The same for one that goes to the client; never where its source is answered too often. One
        that comes from an upstream keeps the session open.
        """
        if session.upstream is not None and self.holds(session):
            session.record.moved_at = now
            self._sessions.move_to_end(self._key(session))
        most = self._service.datagram_rate
        client = session.record.client
        if most is not None and client is not None and not self._answers.allow(client.host, most, now):
            self.dropped()
            return ()
        return self._dues("downstream" if session.upstream else None, now)

    def _dues(self, direction: Direction | None, now: float) -> Sequence[float]:
        """An echo has one direction, which is both: None."""
        faults = self._policy.faults
        if not faults:
            return (now,)
        fates = self._fates.get(direction)
        if fates is None or fates.origin is not faults:
            own = [fault for fault in faults if direction in {None, fault.direction}]
            fates = self._fates[direction] = Fates(own, faults)
        times = tuple(fates.of_next(now))
        if not times:
            self.dropped()
        return times

    def holds(self, session: DatagramSession) -> bool:
        """Is it still open?"""
        return self._sessions.get(self._key(session)) is session

    def lost(self, session: DatagramSession, error: str, now: float) -> Actions:
        """The session's upstream is not there (ICMP): the client's next datagram begins another."""
        if not self.holds(session):
            return ()
        assert session.upstream is not None
        assert self._policy.pool is not None
        self._policy.pool.failed(session.upstream, error, now)
        record = session.record
        record.termination, record.closed_by, record.error = "SD", "upstream", error
        return self._retire(self._sessions.pop(self._key(session)), now)

    def _key(self, session: DatagramSession) -> tuple[str, int]:
        client = session.record.client
        assert client is not None
        return client.host, client.port

    def dropped(self) -> None:
        """A reply that the kernel would not take at once."""
        self._service.count_dropped_datagram()

    def deadline(self) -> float:
        """When the session that has been silent for longest expires."""
        for session in self._sessions.values():
            return session.record.moved_at + self._service.timeouts.udp_idle
        return float("inf")

    def expire(self, now: float) -> Actions:
        actions: list[tuple[Session, Action]] = []
        while self.deadline() <= now:
            actions += self._retire(self._sessions.popitem(last=False)[1], now)
        return actions

    def close(self, now: float) -> Actions:
        """The socket is closed: every session ends with it."""
        actions: list[tuple[Session, Action]] = []
        while self._sessions:
            actions += self._retire(self._sessions.popitem(last=False)[1], now)
        self._service.drop(self)
        return actions

    def counts(self) -> Iterable[Counts]:
        return (session.counts() for session in self._sessions.values())

    def _admit(self, key: tuple[str, int], now: float) -> DatagramSession | None:
        host, port = key
        reason = None
        echo = self._policy.service == "echo"
        if echo and port < 1024 and not self._policy.answer_low_ports:
            # CVE-1999-0103: two echo services, or echo and chargen, that answer each other for ever
            reason = "a source port below 1024 is another service's"
        elif ip_address(host.partition("%")[0]).is_multicast or host == "255.255.255.255":
            reason = "the source address is not one host's"
        elif len(self._sessions) >= MOST_CLIENTS:
            reason = f"{MOST_CLIENTS} clients are open"
        elif not self._service.has_room(self._policy):
            reason = "there is no descriptor for a socket to its upstream"
        client = Address("udp", host, port)
        if reason is not None:
            self._service.refuse(self._policy, client, reason, now)
            return None
        if not self._service.admit(self._policy, client, now):
            return None
        upstream = self._policy.pool.choose(host, (), now) if self._policy.pool else None
        if self._policy.pool and upstream is None:
            self._service.refuse(self._policy, client, "no upstream takes a further session", now)
            return None
        record = self._service.open_record(self._policy, client, self._local, None, now)
        record.upstream = upstream.name if upstream else None
        record.faults = ",".join(fault.label for fault in self._policy.faults) or None
        session = self._sessions[key] = DatagramSession(
            record, upstream, self._policy.pool.choice.source if self._policy.pool else None
        )
        return session

    def _retire(self, session: DatagramSession, now: float) -> Actions:
        record = session.record
        if record.termination is None:
            record.termination = "--"
            record.closed_by = "service"
        letters, state = session.story()
        counts = session.counts()
        self._service.emit(
            line(
                vocabulary.SessionClosed,
                record,
                counts,
                letters=letters,
                state=state,
                now=now,
                lag=self._service.lag_since(record.opened_at),
                sessions=self._service.open_sessions + 1,
            )
        )
        self._service.count_closed(record, counts, now)
        self._release(session)
        pool = self._policy.pool
        waiting = pool.release(session.upstream) if pool and session.upstream else None
        actions: Actions = waiting.resume(now) if waiting else ()
        return actions


class Rates:
    """How often each source was answered lately, for as many sources as a table has clients."""

    def __init__(self) -> None:
        # answers left, and as of when; the least recently asked for is first
        self._left: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def allow(self, host: str, most: int, now: float) -> bool:
        """One more answer to `host`, with `most` a second and at once?"""
        left, since = self._left.pop(host, (float(most), now))
        left = min(float(most), left + (now - since) * most)
        self._left[host] = (left - 1 if left >= 1 else left, now)
        if len(self._left) > MOST_CLIENTS:
            self._left.popitem(last=False)
        return left >= 1
