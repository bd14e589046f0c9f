"""What a running daemon is doing, as one document: what `triptych status` shows and the metrics count.

The structs are its specification; names and units are the log's. It is taken where the engine's state
may be touched, at one moment, and in bounded time: of the open sessions it holds so many, the oldest.
Sessions of UDP are in the figures of their listeners and not among those that are listed.
"""

import heapq
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from msgspec import Struct

from services import vocabulary
from services.core.admission import Admission
from services.core.record import CLIENT
from services.core.service import Service, Snapshot
from services.core.session import Phase, Session
from services.core.upstreams import Balance, Pool, Upstream
from services.listeners import Held

UpstreamState = Literal["up", "down", "ejected", "draining", "unresolved"]
WaitsFor = Literal[
    "client to introduce itself",
    "a free upstream",
    "upstream to connect",
    "client to read",
    "upstream to read",
    "client to send",
    "upstream to send",
    "either to send",
]


class ListenerStatus(Struct, frozen=True, kw_only=True):
    """`addresses` are what is bound; none where it is disabled. Counts are since the daemon's start."""

    listener: str
    service: Literal["echo", "proxy"]
    transport: str
    addresses: list[str]
    pool: str | None
    open_sessions: int
    accepted: int
    refused: int
    faults: list[str]


class UpstreamStatus(Struct, frozen=True, kw_only=True):
    """`limit` is of its sessions; null is any number. `accepted` and what follows are counts since it was
    configured.
    """

    upstream: str
    addresses: list[str]
    state: UpstreamState
    weight: int
    backup: bool
    sessions: int
    limit: int | None
    accepted: int
    failed_dials: int
    ejections: int
    passed_checks: int
    failed_checks: int


class PoolStatus(Struct, frozen=True, kw_only=True):
    """`queued` sessions wait, of `queue_limit` that may."""

    pool: str
    balance: Balance
    queued: int
    queue_limit: int
    upstreams: list[UpstreamStatus]


class AdmissionStatus(Struct, frozen=True, kw_only=True):
    """The limits, null where there is none, and how full they are.

    `clients` are counted only where there is a limit for each, and the one that has the most sessions has
    `most_of_one_client`. `tokens` new sessions may come at once. `refused` is by what for.
    """

    sessions: int
    sessions_limit: int | None
    clients: int
    most_of_one_client: int
    sessions_per_client_limit: int | None
    accept_rate: int | None
    tokens: int | None
    refused: dict[str, int]


class SessionStatus(Struct, frozen=True, kw_only=True):
    """As in its log line, so far. `idle_us` is since a byte moved."""

    session: str
    listener: str
    client: str | None
    upstream: str | None
    upstream_address: str | None
    duration_us: int
    idle_us: int
    bytes_c2s: int
    bytes_s2c: int
    state: str
    history: str
    phase: Literal["header", "queue", "connecting", "relaying", "last data"]
    waits_for: WaitsFor


class Status(Struct, frozen=True, kw_only=True):
    """`sessions` are the oldest that are open; `more_sessions` are left out."""

    triptych: str
    engine: str
    instance: str
    pid: int
    uptime_us: int
    draining: bool
    totals: vocabulary.EngineStats
    listeners: list[ListenerStatus]
    pools: list[PoolStatus]
    admission: AdmissionStatus
    sessions: list[SessionStatus]
    more_sessions: int


class Counted(NamedTuple):
    """What the metrics tell, at one moment; nothing in it changes any more."""

    service: Snapshot
    pools: Sequence[PoolStatus]
    admission: AdmissionStatus


def of_listeners(service: Service, held: Iterable[Held]) -> list[ListenerStatus]:
    found = []
    for each in held:
        policy = each.policy
        tally = service.tally(policy.name, policy.service, policy.transport)
        found.append(
            ListenerStatus(
                listener=policy.name,
                service=policy.service,
                transport=policy.transport,
                addresses=[str(listening.address) for listening in each.listening],
                pool=each.pool.name if each.pool else None,
                open_sessions=tally.accepted - sum(tally.closed.values()),
                accepted=tally.accepted,
                refused=tally.refused,
                faults=[fault.label for fault in policy.faults],
            )
        )
    return found


def of_pool(pool: Pool, now: float) -> PoolStatus:
    return PoolStatus(
        pool=pool.name,
        balance=pool.choice.balance,
        queued=len(pool.queue),
        queue_limit=pool.choice.queue.sessions,
        upstreams=[_of_upstream(each, now) for each in pool.upstreams],
    )


def of_admission(admission: Admission, open_sessions: int, now: float) -> AdmissionStatus:
    limits, clients, most_of_one, tokens, refused = admission.fullness(now)
    return AdmissionStatus(
        sessions=open_sessions,
        sessions_limit=limits.sessions,
        clients=clients,
        most_of_one_client=most_of_one,
        sessions_per_client_limit=limits.sessions_per_client,
        accept_rate=limits.accept_rate,
        tokens=None if limits.accept_rate is None else int(tokens),
        refused={str(cause): count for cause, count in refused.items()},
    )


def of_sessions(sessions: Iterable[Session], most: int, now: float) -> Sequence[SessionStatus]:
    """The oldest that are open, at most so many."""
    oldest = heapq.nsmallest(most, sessions, key=lambda each: each.record.opened_at)
    return [_of_session(each, now) for each in oldest if not each.over]


def _of_upstream(upstream: Upstream, now: float) -> UpstreamStatus:
    state: UpstreamState = "up"
    if upstream.draining:
        state = "draining"
    elif not upstream.addresses:
        state = "unresolved"
    elif not upstream.up:
        state = "down"
    elif upstream.ejected_until > now:
        state = "ejected"
    return UpstreamStatus(
        upstream=upstream.name,
        addresses=[str(each) for each in upstream.addresses],
        state=state,
        weight=upstream.weight,
        backup=upstream.backup,
        sessions=upstream.sessions,
        limit=upstream.limit,
        accepted=upstream.chosen,
        failed_dials=upstream.failed_dials,
        ejections=upstream.times_ejected,
        passed_checks=upstream.passed_checks,
        failed_checks=upstream.failed_checks,
    )


def _of_session(session: Session, now: float) -> SessionStatus:
    record = session.record
    history, state = session.story()
    phase, waits_for = _standing(session)
    address = record.upstream_address
    return SessionStatus(
        session=record.id,
        listener=record.listener,
        client=str(record.client) if record.client else None,
        upstream=record.upstream,
        upstream_address=str(address) if address else None,
        duration_us=max(0, int((now - record.opened_at) * 1e6)),
        idle_us=max(0, int((now - record.moved_at) * 1e6)),
        bytes_c2s=session.relays[0].bytes_in,
        bytes_s2c=session.relays[-1].bytes_out,
        state=state,
        history=history,
        phase=phase,
        waits_for=waits_for,
    )


def _standing(
    session: Session,
) -> tuple[Literal["header", "queue", "connecting", "relaying", "last data"], WaitsFor]:
    """What it does, and who has to move for it to go on."""
    if session.reads_preface:
        return "header", "client to introduce itself"
    if session.phase is Phase.CHOOSING:
        return "queue", "a free upstream"
    if session.phase is not Phase.RELAYING:
        return "connecting", "upstream to connect"
    ended = any(relay.ended_at is not None or relay.peer_ended for relay in session.relays)
    phase: Literal["relaying", "last data"] = "last data" if ended else "relaying"
    stuck = [relay.sink for relay in session.relays if relay.waiting and not relay.discarding]
    if stuck:
        return phase, "client to read" if stuck[0] is CLIENT else "upstream to read"
    speakers = {relay.source for relay in session.relays if relay.ended_at is None}
    if len(speakers) == 2:
        return phase, "either to send"
    return phase, "client to send" if CLIENT in speakers else "upstream to send"
