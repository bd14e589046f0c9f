"""The service of one process: admits and retires sessions, owns the pools and the service's timers.

Not thread-safe, like the sessions: an engine with threads serialises every call. Health is checked
outside of the engine (`services/health.py`); what is found is posted to the pools.
"""

import bisect
import copy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from services import vocabulary
from services.core.addresses import Address, Transport
from services.core.admission import Admission, Limits, Lists
from services.core.faults import AnyFault
from services.core.preface import Preface
from services.core.record import NO_TCP_INFO, Counts, Record, TcpInfo, identity, line, microseconds
from services.core.session import Accepted, Actions, Cut, Session, Timeouts
from services.core.tally import ListenerKey, Tally
from services.core.upstreams import Pool

# How late a timer runs is measured this often while sessions are open (Node's monitorEventLoopDelay
# samples every 10 ms by default; ten wake-ups a second are not noticed in an idle process).
LAG_INTERVAL = 0.1
# A timer this late gets a line of its own: longer than any scheduling hiccup, shorter than a watchdog.
STALL = 1.0
# A listener tells of clients that it refuses at once, and of more of them once in this time.
REFUSAL_INTERVAL = 1.0
# Lags are kept for the sessions still open; of a steadily falling series only this many.
LAGS_KEPT = 1024


@dataclass(eq=False, slots=True)
class Policy:
    """What the core needs to know of a listener. A reload changes it in place, for the next sessions."""

    name: str
    service: Literal["echo", "proxy"]
    transport: Transport
    pool: Pool | None = None
    answer_low_ports: bool = False
    lists: Lists | None = None
    proxy_protocol: bool = False
    faults: tuple[AnyFault, ...] = ()
    # how many sessions there were: what a fault's draws depend on
    sessions: int = 0


@dataclass(eq=False, slots=True)
class _Refusals:
    """Of one listener since its last line: how many, and the last of them."""

    told_at: float
    untold: int = 0
    last: tuple[Address | None, str] = (None, "")


class Gauges(NamedTuple):
    """The process as the kernel sees it, at one moment; None is not known here."""

    threads: int | None = None
    open_descriptors: int | None = None
    rss_bytes: int | None = None
    cpu_us: int | None = None


class Snapshot(NamedTuple):
    """All that the metrics tell, at one moment; nothing in it changes any more."""

    totals: vocabulary.EngineStats
    tallies: Mapping[ListenerKey, Tally]
    draining: bool


class Instruments(Protocol):
    """What the core cannot do itself."""

    def emit(self, event: vocabulary.Event, /) -> None:
        """Write a log line. Never waits."""

    def gauges(self) -> Gauges: ...

    def lines_dropped(self) -> int: ...


class Ledger(Protocol):
    """Open sessions that are not `Session`s but count in the totals and expire: a UDP socket's."""

    def __len__(self) -> int: ...

    def counts(self) -> Iterable[Counts]: ...

    def deadline(self) -> float: ...

    def expire(self, now: float) -> Actions: ...


def _descriptors(service: Literal["echo", "proxy"], transport: str) -> int:
    """Of a session: one for each leg. Clients of datagrams share their listener's socket."""
    legs = 2 if service == "proxy" else 1
    return legs - 1 if transport == "udp" else legs


class Service:
    """Args:
    timeouts, limits: what every session gets, and how many there may be.
    descriptors: for the sessions of this process, which open no more than so many.
    stats: seconds between two `engine_stats` lines.
    epoch: the wall clock minus the engine's monotonic clock, in seconds.

    """

    def __init__(
        self,
        *,
        instruments: Instruments,
        timeouts: Timeouts,
        limits: Limits,
        stats: float,
        epoch: float,
        now: float,
        descriptors: float = float("inf"),
    ) -> None:
        self.timeouts = timeouts
        # left for sessions
        self._descriptors = descriptors
        self.buffer = limits.buffer
        self.datagram_rate = limits.datagram_rate
        self.admission = Admission(limits, now)
        self._refusals: dict[Policy, _Refusals] = {}
        self.sessions: set[Session] = set()
        self.emit = instruments.emit
        self._instruments = instruments
        self._epoch = epoch
        self._stats = stats
        self._stats_at = now + stats
        self._lag_at = float("inf")
        # (when, how much), falling in lag and rising in time: the largest since any moment is one look-up
        self._lags: list[tuple[float, float]] = []
        self._drain_at = float("inf")
        self.draining = False
        self._ledgers: list[Ledger] = []
        self._tallies: dict[ListenerKey, Tally] = {}
        self._accepted = self._closed = self._refused = self._cut = 0
        self._bytes_c2s = self._bytes_s2c = self._datagrams_c2s = self._datagrams_s2c = 0
        self._datagrams_dropped = 0

    # Sessions -----------------------------------------------------------------------------------

    def accept(
        self, policy: Policy, client: Address | None, local: Address, accept_wait: float | None, now: float
    ) -> tuple[Session, Actions] | None:
        """A client was accepted: its session, and what to do first. None where it is refused: it is
        to be reset.

        Args:
            client: None for a UNIX socket's nameless peer.
            accept_wait: seconds in the backlog; None where the transport does not tell.

        """
        if not self.admit(policy, client, now):
            return None
        record = self.open_record(policy, client, local, accept_wait, now)
        policy.sessions += 1
        session = Session(
            record,
            self.timeouts,
            self.buffer,
            policy.pool,
            policy.sessions,
            policy.faults,
            Preface() if policy.proxy_protocol else None,
            self._readmit,
        )
        self.sessions.add(session)
        return session, session.handle(Accepted(), now)

    def has_room(self, policy: Policy) -> bool:
        """Are there descriptors for one more session? If not, its clients wait in the backlog (rule 10)."""
        return self._descriptors >= _descriptors(policy.service, policy.transport)

    def admit(self, policy: Policy, client: Address | None, now: float) -> bool:
        """May this client become a session? If not, that is counted and told."""
        host = client.host if client else None
        reason = self.admission.refuse(host, policy.lists, self.open_sessions, now)
        if reason is not None:
            self.refuse(policy, client, reason, now)
        return reason is None

    def _readmit(self, record: Record) -> str | None:
        """A header has said who the client is: the limit for each client is for that one."""
        self.admission.leave(record.admission)
        record.admission = None
        host = record.client.host if record.client and record.client.transport == "tcp" else None
        reason = self.admission.crowded(host) if host is not None else None
        if reason is None:
            record.admission = self.admission.enter(host)
        return reason

    def refuse(self, policy: Policy, client: Address | None, reason: str, now: float) -> None:
        """Count a refusal; a flood of them must not write our log."""
        self._refused += 1
        self.tally(policy.name, policy.service, policy.transport).refused += 1
        refusals = self._refusals.get(policy)
        if refusals is None:
            refusals = self._refusals[policy] = _Refusals(float("-inf"))
        refusals.untold += 1
        refusals.last = client, reason
        if now >= refusals.told_at + REFUSAL_INTERVAL:
            self._tell_refusals(policy, refusals, now)

    def _tell_refusals(self, policy: Policy, refusals: _Refusals, now: float) -> None:
        client, reason = refusals.last
        self.emit(
            vocabulary.SessionRefused(
                service=policy.service,
                listener=policy.name,
                transport=policy.transport,
                client_ip=client.host if client else None,
                client_port=client.port if client else None,
                termination="PQ",
                reason=reason,
                refused=refusals.untold,
            )
        )
        refusals.told_at, refusals.untold = now, 0

    def _expire_refusals(self, now: float) -> None:
        for policy, refusals in list(self._refusals.items()):
            if now >= refusals.told_at + REFUSAL_INTERVAL:
                if refusals.untold:
                    self._tell_refusals(policy, refusals, now)
                else:
                    del self._refusals[policy]

    def open_record(
        self, policy: Policy, client: Address | None, local: Address, accept_wait: float | None, now: float
    ) -> Record:
        """A record for a new session of either kind, counted as accepted."""
        record = Record(
            wall=now + self._epoch,
            now=now,
            service=policy.service,
            listener=policy.name,
            client=client,
            local=local,
            accept_wait=accept_wait,
        )
        record.admission = self.admission.enter(client.host if client else None)
        self._descriptors -= _descriptors(policy.service, policy.transport)
        self._accepted += 1
        self.tally(policy.name, policy.service, local.transport).accepted += 1
        if self._lag_at == float("inf"):
            self._lag_at = now + LAG_INTERVAL
        self.emit(vocabulary.SessionOpened(**identity(record)))
        return record

    def retire(
        self,
        session: Session,
        now: float,
        client_info: TcpInfo = NO_TCP_INFO,
        upstream_info: TcpInfo = NO_TCP_INFO,
    ) -> None:
        """The last leg of `session` is closed: count it, and write its line."""
        letters, state = session.story()
        counts = session.counts(now)
        record = session.record
        if record.refusal is not None:
            client = record.client
            self.emit(
                vocabulary.IntroductionRefused(
                    session=record.id,
                    listener=record.listener,
                    client_ip=client.host if client else None,
                    client_port=client.port if client else None,
                    reason=record.refusal,
                )
            )
        self.emit(
            line(
                vocabulary.SessionClosed,
                session.record,
                counts,
                letters=letters,
                state=state,
                now=now,
                lag=self.lag_since(session.record.opened_at),
                sessions=self.open_sessions,
                client_info=client_info,
                upstream_info=upstream_info,
            )
        )
        self.sessions.discard(session)
        self.count_closed(session.record, counts, now)

    def count_closed(self, record: Record, counts: Counts, now: float) -> None:
        self._closed += 1
        self._descriptors += _descriptors(record.service, record.local.transport)
        self.admission.leave(record.admission)
        tally = self.tally(record.listener, record.service, record.local.transport)
        termination = record.termination
        assert termination is not None, "a session that is closed has ended in some way"
        tally.closed[termination] = tally.closed.get(termination, 0) + 1
        tally.duration.observe(max(0, int((now - record.opened_at) * 1e6)))
        connect_us = microseconds(record.dialled_at, record.connected_at)
        if connect_us is not None:
            tally.connect.observe(connect_us)
        self._bytes_c2s += counts.bytes_c2s
        self._bytes_s2c += counts.bytes_s2c
        self._datagrams_c2s += counts.datagrams_c2s or 0
        self._datagrams_s2c += counts.datagrams_s2c or 0

    def tally(self, listener: str, service: Literal["echo", "proxy"], transport: str) -> Tally:
        """The listener's sums. Asked for when it is opened, so that they are told from zero on."""
        key = ListenerKey(listener, service, transport)
        tally = self._tallies.get(key)
        if tally is None:
            tally = self._tallies[key] = Tally()
        return tally

    def count_dropped_datagram(self) -> None:
        self._datagrams_dropped += 1

    def change_faults(self, policy: Policy, faults: tuple[AnyFault, ...], now: float) -> Actions:
        """The listener's faults are these from now on, for its open sessions too."""
        policy.faults = faults
        self.emit(vocabulary.FaultsChanged(listener=policy.name, faults=[fault.label for fault in faults]))
        return [
            action
            for session in self.sessions
            if session.record.listener == policy.name
            for action in session.refault(faults, now)
        ]

    def cut(self, policy: Policy, now: float) -> Actions:
        """The operator ends every session of a listener."""
        return [
            action
            for session in self.sessions
            if session.record.listener == policy.name
            for action in session.handle(Cut("K"), now)
        ]

    def expire_session(self, session: Session, now: float) -> Actions:
        """`session.expire`, with the progress line that may be due."""
        actions, progress = session.expire(now)
        if progress:
            letters, state = session.story()
            self.emit(
                line(
                    vocabulary.SessionProgress,
                    session.record,
                    session.counts(now),
                    letters=letters,
                    state=state,
                    now=now,
                    lag=self.lag_since(session.record.opened_at),
                    sessions=self.open_sessions,
                )
            )
        return actions

    def fault(self, session: Session | None, error: str, traceback: str) -> None:
        """A bug of ours surfaced; the engine cuts `session` and goes on."""
        self.emit(
            vocabulary.EngineFault(
                session=session.record.id if session else None, error=error, traceback=traceback
            )
        )

    def reconfigure(self, timeouts: Timeouts, limits: Limits, stats: float, now: float) -> None:
        """From the next session on. What is open keeps what it was admitted with; but the drain, and
        UDP sessions, which have no end of their own, go by the new times.
        """
        self.timeouts = timeouts
        self.buffer = limits.buffer
        self.datagram_rate = limits.datagram_rate
        self.admission.change(limits, now)
        self._stats_at += stats - self._stats
        self._stats = stats

    @property
    def dead_peer(self) -> float:
        """Seconds after which the kernel gives up on a peer (`Timeouts.dead_peer`)."""
        return self.timeouts.dead_peer or self.timeouts.idle

    # Drain --------------------------------------------------------------------------------------

    def drain(self, reason: str, now: float) -> None:
        """No new sessions from now on; open ones may finish until the deadline.

        A second SIGINT, from an impatient operator, cuts them now. A second SIGTERM is nothing new: a
        service manager and a supervisor may both send one.
        """
        if self.draining:
            if reason == "SIGINT":
                self._drain_at = now
            return
        self.draining = True
        self._drain_at = now + self.timeouts.drain
        self.emit(
            vocabulary.ServiceDraining(
                reason=reason,
                open_sessions=self.open_sessions,
                deadline_us=int(self.timeouts.drain * 1e6),
            )
        )

    @property
    def drained(self) -> bool:
        return self.draining and not self.sessions

    @property
    def open_sessions(self) -> int:
        return len(self.sessions) + sum(map(len, self._ledgers))

    def stopped(self, now: float) -> int:
        """The last line, after those that refusals still wait for. Returns how many sessions the drain
        deadline cut.
        """
        self._expire_refusals(float("inf"))
        self.emit(vocabulary.ServiceStopped(**self._totals(now), cut=self._cut))
        return self._cut

    # Time ---------------------------------------------------------------------------------------

    def deadline(self) -> float:
        """When `expire` wants to be called."""
        own = min(self._stats_at, self._lag_at, self._drain_at)
        for refusals in self._refusals.values():
            own = min(own, refusals.told_at + REFUSAL_INTERVAL)
        return min(own, *(ledger.deadline() for ledger in self._ledgers)) if self._ledgers else own

    def expire(self, now: float) -> Actions:
        """What is due at `now`."""
        if now >= self._lag_at:
            self._measure_lag(now - self._lag_at, now)
        actions = [action for ledger in self._ledgers for action in ledger.expire(now)]
        self._expire_refusals(now)
        if now >= self._stats_at:
            self._stats_at = now + self._stats
            self.emit(vocabulary.EngineStats(**self._totals(now)))
        if now < self._drain_at:
            return actions
        self._drain_at = float("inf")
        open_sessions = [session for session in self.sessions if not session.over]
        self._cut += len(open_sessions)
        return actions + [action for session in open_sessions for action in session.handle(Cut("K"), now)]

    def lag_since(self, moment: float) -> float:
        """The latest that a timer ran since `moment`, in seconds."""
        at = bisect.bisect_left(self._lags, (moment, 0.0))
        return self._lags[at][1] if at < len(self._lags) else 0.0

    def _measure_lag(self, lag: float, now: float) -> None:
        while self._lags and self._lags[-1][1] <= lag:
            self._lags.pop()
        self._lags.append((now, lag))
        del self._lags[:-LAGS_KEPT]
        if lag >= STALL:
            self.emit(vocabulary.EngineStalled(loop_lag_us=int(lag * 1e6), open_sessions=self.open_sessions))
        self._lag_at = now + LAG_INTERVAL if self.open_sessions else float("inf")

    # Totals -------------------------------------------------------------------------------------

    def keep(self, ledger: Ledger) -> None:
        """Add a UDP listener's sessions to the totals."""
        self._ledgers.append(ledger)

    def drop(self, ledger: Ledger) -> None:
        """Its listener is closed, and its sessions with it."""
        self._ledgers.remove(ledger)

    def snapshot(self, now: float) -> Snapshot:
        return Snapshot(
            vocabulary.EngineStats(**self._totals(now)), copy.deepcopy(self._tallies), self.draining
        )

    def _totals(self, now: float) -> dict[str, Any]:
        bytes_c2s, bytes_s2c = self._bytes_c2s, self._bytes_s2c
        datagrams_c2s, datagrams_s2c = self._datagrams_c2s, self._datagrams_s2c
        for session in self.sessions:
            bytes_c2s += session.relays[0].bytes_in
            bytes_s2c += session.relays[-1].bytes_out
        for ledger in self._ledgers:
            for counts in ledger.counts():
                bytes_c2s += counts.bytes_c2s
                bytes_s2c += counts.bytes_s2c
                datagrams_c2s += counts.datagrams_c2s or 0
                datagrams_s2c += counts.datagrams_s2c or 0
        return {
            "accepted": self._accepted,
            "closed": self._closed,
            "refused": self._refused,
            "open_sessions": self.open_sessions,
            "bytes_c2s": bytes_c2s,
            "bytes_s2c": bytes_s2c,
            "datagrams_c2s": datagrams_c2s,
            "datagrams_s2c": datagrams_s2c,
            "datagrams_dropped": self._datagrams_dropped,
            "lines_dropped": self._instruments.lines_dropped(),
            "loop_lag_us": int(self.lag_since(now - self._stats) * 1e6),
            **self._instruments.gauges()._asdict(),
        }
