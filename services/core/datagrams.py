"""UDP sessions: one client address until it has been silent for a while.

A datagram does not fit a relay: it is answered whole, at once, or dropped and counted. The table of
one listener is bounded. UDP proxying and reply rate limits come with the complete proxy.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from ipaddress import ip_address

from services import vocabulary
from services.core.addresses import Address
from services.core.faults import Fates
from services.core.record import Counts, Record, State, line
from services.core.service import Policy, Service

# Clients one listener remembers. A record is under 1 KiB, so a flood of spoofed sources costs 64 MiB
# at most before it is refused.
MOST_CLIENTS = 65_536


class DatagramSession:
    """One client's counters. The engine calls `answered` for a reply that the kernel took."""

    __slots__ = ("bytes_in", "bytes_out", "datagrams_in", "datagrams_out", "peak", "record")

    def __init__(self, record: Record) -> None:
        self.record = record
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

    """

    def __init__(self, policy: Policy, local: Address, service: Service) -> None:
        self._policy = policy
        self._local = local
        self._service = service
        # oldest activity first: the head is the next to expire
        self._sessions: OrderedDict[tuple[str, int], DatagramSession] = OrderedDict()
        self._fates = Fates(())
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

    def replies(self, now: float) -> Sequence[float]:
        """When to answer the datagram just received, as often as there are times: once and at once,
        unless a fault of the listener has it otherwise.
        """
        faults = self._policy.faults
        if faults is not self._fates.faults:
            self._fates = Fates(faults)
        if not faults:
            return (now,)
        times = tuple(self._fates.of_next(now))
        if not times:
            self.dropped()
        return times

    def dropped(self) -> None:
        """A reply that the kernel would not take at once."""
        self._service.count_dropped_datagram()

    def deadline(self) -> float:
        """When the session that has been silent for longest expires."""
        for session in self._sessions.values():
            return session.record.moved_at + self._service.timeouts.udp_idle
        return float("inf")

    def expire(self, now: float) -> None:
        while self.deadline() <= now:
            self._retire(now)

    def close(self, now: float) -> None:
        """The socket is closed: every session ends with it."""
        while self._sessions:
            self._retire(now)
        self._service.drop(self)

    def counts(self) -> Iterable[Counts]:
        return (session.counts() for session in self._sessions.values())

    def _admit(self, key: tuple[str, int], now: float) -> DatagramSession | None:
        host, port = key
        reason = None
        if port < 1024 and not self._policy.answer_low_ports:
            # CVE-1999-0103: two echo services, or echo and chargen, that answer each other for ever
            reason = "a source port below 1024 is another service's"
        elif ip_address(host.partition("%")[0]).is_multicast or host == "255.255.255.255":
            reason = "the source address is not one host's"
        elif len(self._sessions) >= MOST_CLIENTS:
            reason = f"{MOST_CLIENTS} clients are open"
        client = Address("udp", host, port)
        if reason is not None:
            self._service.refuse(self._policy, client, reason, now)
            return None
        if not self._service.admit(self._policy, client, now):
            return None
        record = self._service.open_record(self._policy, client, self._local, None, now)
        record.faults = ",".join(fault.label for fault in self._policy.faults) or None
        session = self._sessions[key] = DatagramSession(record)
        return session

    def _retire(self, now: float) -> None:
        _, session = self._sessions.popitem(last=False)
        record = session.record
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
