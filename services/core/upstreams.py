"""A pool, the choice among its upstreams, and who waits for one.

An upstream may take new sessions unless the operator drains it, a health check found it down, it was
ejected, or it has as many sessions as it may. Ejection is passive health: dials that failed in a row
take an upstream out of the choice for a while, twice as long each time. It is a hint and no verdict:
where nothing else is left, an ejected upstream is dialled all the same. Backups are for when no other
upstream may be chosen. Where all that may be chosen are full, sessions wait in turn, so many and so
long as the pool allows. An upstream whose name was never resolved has no address, and is not chosen.

The choices (`Balance`): `round_robin` deals turns by weight, spread evenly; `least_sessions` takes the
one with the fewest for its weight; `random` takes the better of two drawn at random, which needs no
counting across processes (Mitzenmacher, 2001); `source_hash` keeps a client's address with an upstream,
and moves only the clients of one that comes or goes (rendezvous hashing, Thaler and Ravishankar, 1998);
`first` fills them in their order.
"""

import hashlib
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, Protocol

from msgspec import Meta, Struct

from services import vocabulary
from services.core.addresses import Address
from services.core.preface import Version

Balance = Literal["round_robin", "least_sessions", "random", "source_hash", "first"]
Number = Annotated[int, Meta(ge=1)]

# An ejection lasts at most so many times as long as the first one.
MOST_DOUBLINGS = 6


class Queue(Struct, frozen=True, kw_only=True):
    """For sessions that find every upstream full: how many may wait, and how long (seconds)."""

    sessions: Number = 1000
    timeout: float = 5.0


class Ejection(Struct, frozen=True, kw_only=True):
    """After `failures` dials that failed in a row, for `time` seconds at first."""

    failures: Number = 3
    time: float = 10.0


class Check(Struct, frozen=True, kw_only=True):
    """An active health check: connect every `interval`, and if `send` is given, send it and wait for
    `expect`. `fall` failures in a row are down, `rise` successes up again. Seconds.
    """

    interval: float = 2.0
    timeout: float = 2.0
    fall: Number = 3
    rise: Number = 2
    send: str | None = None
    expect: str | None = None


class Choice(Struct, frozen=True, kw_only=True):
    """How a pool chooses. `retries` is how many further upstreams a session tries when a dial failed,
    `source` the IP address of this machine that its connections come from.
    """

    balance: Balance = "round_robin"
    retries: Annotated[int, Meta(ge=0)] = 1
    source: str | None = None
    queue: Queue = Queue()
    eject: Ejection = Ejection()
    health: Check | None = None


class Waiting(Protocol):
    """A session in a pool's queue. What `resume` returns is for the engine."""

    def resume(self, now: float, /) -> Any: ...


@dataclass(eq=False, slots=True)
class Upstream:
    """One server: `name` as configured, `addresses` as resolved, tried in their order.

    Attributes:
        limit: sessions that it may have; None is any number.
        proxy_protocol: in which version it is told of its clients.
        configured_weight: the file's, where the operator has set another one since.
        draining: by the operator: no new sessions.
        up: what health checks found.
        chosen, failed_dials, times_ejected, passed_checks, failed_checks: so often in its life.

    """

    name: str
    addresses: tuple[Address, ...]
    weight: int = 1
    backup: bool = False
    limit: int | None = None
    proxy_protocol: Version | None = None
    sessions: int = 0
    draining: bool = False
    up: bool = True
    checks: int = 0  # in a row, that said otherwise than `up`
    failures: int = 0  # dials in a row
    ejections: int = 0  # since it last answered
    ejected_until: float = 0.0
    turn: float = 0.0  # how much it is behind in round robin
    chosen: int = 0
    failed_dials: int = 0
    times_ejected: int = 0
    passed_checks: int = 0
    failed_checks: int = 0
    configured_weight: int = field(init=False)

    def __post_init__(self) -> None:
        self.configured_weight = self.weight

    @property
    def has_room(self) -> bool:
        return self.limit is None or self.sessions < self.limit


class Pool:
    """A named group of upstreams. Not thread-safe. `emit` is where it tells of those that come and go."""

    def __init__(
        self,
        name: str,
        upstreams: Sequence[Upstream],
        choice: Choice = Choice(),  # noqa: B008  frozen
        emit: Callable[[vocabulary.Event], object] = lambda _: None,
    ) -> None:
        self.name = name
        self.upstreams = tuple(upstreams)
        self.choice = choice
        self.emit = emit
        self.queue: deque[Waiting] = deque()
        self._random = random.Random()  # noqa: S311  a choice of servers is no secret

    # Choosing -----------------------------------------------------------------------------------

    def choose(self, client: str | None, tried: Sequence[Upstream], now: float) -> Upstream | None:
        """An upstream that takes one more session, and now has it; None where there is none.

        Args:
            client: its address; None where it has none (UNIX sockets).
            tried: those that this session dialled in vain.

        """
        among = [each for each in self._eligible(tried, now) if each.has_room]
        if not among:
            return None
        chosen = self._pick(among, client) if len(among) > 1 else among[0]
        chosen.sessions += 1
        chosen.chosen += 1
        return chosen

    def is_full(self, tried: Sequence[Upstream], now: float) -> bool:
        """Is there an upstream to wait for, and room to wait?"""
        return bool(self._eligible(tried, now)) and len(self.queue) < self.choice.queue.sessions

    def further(self, tried: Sequence[Upstream]) -> int:
        """How many upstreams a session could still try."""
        return sum(1 for each in self.upstreams if each not in tried)

    def _eligible(self, tried: Sequence[Upstream], now: float) -> list[Upstream]:
        may = [
            each
            for each in self.upstreams
            if each.up and not each.draining and each.addresses and each not in tried
        ]
        answering = [each for each in may if each.ejected_until <= now]
        for group in (answering, may):
            for backup in (False, True):
                if found := [each for each in group if each.backup is backup]:
                    return found
        return []

    def _pick(self, among: Sequence[Upstream], client: str | None) -> Upstream:
        match self.choice.balance:
            case "least_sessions":
                least = min(each.sessions / each.weight for each in among)
                return self._in_turn([each for each in among if each.sessions / each.weight == least])
            case "random":
                weights = [each.weight for each in among]
                two = self._random.choices(among, weights, k=2)
                return min(two, key=lambda each: each.sessions / each.weight)
            case "source_hash" if client is not None:
                return max(among, key=lambda each: _affinity(client, each))
            case "first":
                return among[0]
            case _:
                return self._in_turn(among)

    def _in_turn(self, among: Sequence[Upstream]) -> Upstream:
        """Each gets as many turns as its weight, and they are spread as evenly as can be."""
        for each in among:
            each.turn += each.weight
        chosen = max(among, key=lambda each: each.turn)
        chosen.turn -= sum(each.weight for each in among)
        return chosen

    # Waiting ------------------------------------------------------------------------------------

    def wait(self, session: Waiting) -> None:
        self.queue.append(session)

    def leave(self, session: Waiting) -> None:
        """It waits no longer. Asked for again, nothing happens."""
        if session in self.queue:
            self.queue.remove(session)

    def release(self, upstream: Upstream) -> Waiting | None:
        """A session of `upstream` has ended. Who is next in the queue, if one can be had now."""
        upstream.sessions -= 1
        return self.queue.popleft() if self.queue and upstream.has_room else None

    # Health -------------------------------------------------------------------------------------

    def answered(self, upstream: Upstream) -> None:
        """A dial was successful."""
        upstream.failures = 0
        if upstream.ejections:
            upstream.ejections, upstream.ejected_until = 0, 0.0
            self._tell_up(upstream, "it takes connections again")

    def failed(self, upstream: Upstream, error: str, now: float) -> None:
        """A dial was not."""
        upstream.failures += 1
        upstream.failed_dials += 1
        eject = self.choice.eject
        if upstream.failures >= eject.failures and upstream.ejected_until <= now:
            seconds = eject.time * 2 ** min(upstream.ejections, MOST_DOUBLINGS)
            upstream.ejected_until = now + seconds
            upstream.ejections += 1
            upstream.times_ejected += 1
            reason = f"{upstream.failures} dials in a row failed, the last with {error}"
            self._tell_down(upstream, f"{reason}; passed over for {seconds:g} s")

    def checked(self, name: str, error: str | None) -> None:
        """What a health check of the upstream of this name found: None is well."""
        check = self.choice.health
        upstream = next((each for each in self.upstreams if each.name == name), None)
        if check is None or upstream is None:  # configured otherwise meanwhile
            return
        if error is None:
            upstream.passed_checks += 1
        else:
            upstream.failed_checks += 1
        if (error is None) is upstream.up:
            upstream.checks = 0
            return
        upstream.checks += 1
        if upstream.checks < (check.fall if upstream.up else check.rise):
            return
        upstream.up, upstream.checks = not upstream.up, 0
        if error is None:
            self._tell_up(upstream, f"{check.rise} checks in a row went well")
        else:
            self._tell_down(upstream, f"{check.fall} checks in a row failed, the last with {error}")

    def _tell_up(self, upstream: Upstream, reason: str) -> None:
        self.emit(vocabulary.UpstreamUp(pool=self.name, upstream=upstream.name, reason=reason))

    def _tell_down(self, upstream: Upstream, reason: str) -> None:
        self.emit(vocabulary.UpstreamDown(pool=self.name, upstream=upstream.name, reason=reason))

    # The operator, and names --------------------------------------------------------------------

    def change(self, name: str, *, draining: bool | None = None, weight: int | None = None) -> bool:
        """The operator drains, enables or weights the upstreams of this name, for new sessions. Whether
        there is one.
        """
        found = [each for each in self.upstreams if each.name == name]
        for each in found:
            before = each.draining, each.weight
            each.draining = each.draining if draining is None else draining
            each.weight = each.weight if weight is None else weight
            if before != (each.draining, each.weight):
                self.emit(
                    vocabulary.UpstreamChanged(
                        pool=self.name, upstream=name, draining=each.draining, weight=each.weight
                    )
                )
        return bool(found)

    def moved(self, name: str, addresses: Sequence[Address]) -> None:
        """The name of an upstream stands for these addresses from now on: open sessions stay where they
        are, and what is known of dials to the old ones says nothing of the new ones.
        """
        for each in self.upstreams:
            if each.name == name:
                each.addresses = tuple(addresses)
                each.failures, each.ejections, each.ejected_until = 0, 0, 0.0
                self.emit(
                    vocabulary.UpstreamResolved(
                        pool=self.name, upstream=name, addresses=[str(address) for address in addresses]
                    )
                )

    # Reload -------------------------------------------------------------------------------------

    def succeed(self, former: "Pool") -> None:
        """Take over what `former` knows of the upstreams of the same name, and its queue. Those objects
        go on as ours, so that sessions that hold them are still counted.

        What the operator said holds on: one that drains stays so, and its weight is the operator's until
        the file has another one than before. A name that could not be resolved keeps its addresses.
        """
        known = {each.name: each for each in former.upstreams}
        kept = []
        for each in self.upstreams:
            old = known.get(each.name)
            if old is not None:
                old.addresses, old.backup = each.addresses or old.addresses, each.backup
                old.limit, old.proxy_protocol = each.limit, each.proxy_protocol
                if each.weight != old.configured_weight:
                    old.weight = old.configured_weight = each.weight
            kept.append(old or each)
        self.upstreams = tuple(kept)
        self.queue = former.queue


def _affinity(client: str, upstream: Upstream) -> float:
    """The highest wins; each upstream wins as often as its weight among others'."""
    digest = hashlib.blake2b(f"{client} {upstream.name}".encode(), digest_size=8).digest()
    share = (int.from_bytes(digest) + 1) / (2**64 + 1)
    return -upstream.weight / math.log(share)
