"""The names behind upstreams, looked up again and again: in one thread, never in an engine (rule 17).

A name that stands for other addresses than before has its new sessions dialled there; open ones stay. A
name that cannot be resolved any more keeps the addresses that it had, and says so once: a resolver that
is down must not take servers with it that are up. For the same reason a daemon that reads a file begins
without an upstream whose name cannot be resolved yet, and a reload takes the file: the line says so, the
other pools serve, and the upstream joins as soon as its name means something. (`triptych proxy` refuses,
since somebody is looking.) A name that would lead back to this daemon counts as one that cannot be
resolved.

The order of the addresses behind a name is the system's (RFC 6724), taken when the set changes: a name
server that rotates them is no news. How long an answer is valid is not told by getaddrinfo(3), so there is
an interval for each pool; it varies by a tenth.
"""

import heapq
import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from ipaddress import ip_address
from typing import NamedTuple

from services.config import Config
from services.core.addresses import Address
from services.core.upstreams import Pool, Upstream
from services.endpoints import EndpointError, resolve
from services.vocabulary import Event, UpstreamUnresolved


class Name(NamedTuple):
    """An upstream that is configured by a name."""

    pool: str
    upstream: str


def build_pools(config: Config) -> tuple[dict[str, Pool], dict[Name, EndpointError]]:
    """The pools of a configuration, and why some of their names mean nothing at this moment."""
    unresolved: dict[Name, EndpointError] = {}

    def addresses(pool: str, address: Address) -> tuple[Address, ...]:
        try:
            return tuple(resolve(address))
        except EndpointError as error:
            unresolved[Name(pool, str(address))] = error
            return ()

    pools = {
        name: Pool(
            name,
            [
                Upstream(
                    str(each.address),
                    addresses(name, each.address),
                    weight=each.weight,
                    backup=each.backup,
                    limit=each.sessions,
                    proxy_protocol=each.proxy_protocol,
                )
                for each in pool.upstreams
            ],
            pool,
        )
        for name, pool in config.pools.items()
    }
    return pools, unresolved


class Resolver:
    """The thread of one configuration; there is none where it has no names.

    Args:
        unresolved: what `build_pools` found.
        vet: raises EndpointError where an upstream must not have these addresses.
        moved: called in the thread with an upstream and its new addresses.

    """

    def __init__(
        self,
        config: Config,
        pools: Mapping[str, Pool],
        unresolved: Mapping[Name, EndpointError],
        *,
        vet: Callable[[Name, Sequence[Address]], None],
        moved: Callable[[Name, Sequence[Address]], None],
        emit: Callable[[Event], None],
    ) -> None:
        self._pools = pools
        self._vet = vet
        self._moved = moved
        self._emit = emit
        self._stopping = threading.Event()
        self._failing: set[Name] = set()
        for name, error in unresolved.items():
            self._fail(name, error)
        found = {
            Name(pool, str(each.address)): (each.address, settings.resolve)
            for pool, settings in config.pools.items()
            for each in settings.upstreams
            if _is_name(each.address)
        }
        if found:
            threading.Thread(target=self._keep_looking, args=(found,), name="resolver", daemon=True).start()

    def stop(self) -> None:
        """Nothing is told any more."""
        self._stopping.set()

    def _keep_looking(self, names: Mapping[Name, tuple[Address, float]]) -> None:
        due = [(_from_now(interval), name) for name, (_, interval) in names.items()]
        heapq.heapify(due)
        while not self._stopping.wait(max(0.0, due[0][0] - time.monotonic())):
            name = due[0][1]
            address, interval = names[name]
            self._look_up(name, address)
            heapq.heapreplace(due, (_from_now(interval), name))

    def _look_up(self, name: Name, address: Address) -> None:
        try:
            found = resolve(address)
            self._vet(name, found)
        except EndpointError as error:
            if name not in self._failing and not self._stopping.is_set():
                self._fail(name, error)
            return
        if self._stopping.is_set():
            return
        if name in self._failing or set(found) != set(self._addresses(name)):
            self._failing.discard(name)
            self._moved(name, found)

    def _fail(self, name: Name, error: EndpointError) -> None:
        self._failing.add(name)
        self._emit(
            UpstreamUnresolved(
                pool=name.pool,
                upstream=name.upstream,
                reason=error.message,
                addresses=[str(each) for each in self._addresses(name)],
            )
        )

    def _addresses(self, name: Name) -> Sequence[Address]:
        # looked for each time: a reload may go on with the objects of the pool before
        return next(each.addresses for each in self._pools[name.pool].upstreams if each.name == name.upstream)


def _from_now(interval: float) -> float:
    return time.monotonic() + interval * random.uniform(0.9, 1.1)  # noqa: S311  nothing secret about it


def _is_name(address: Address) -> bool:
    try:
        ip_address(address.host)
    except ValueError:
        return address.transport != "unix"
    return False
