"""A pool, and the choice among its upstreams.

Round robin for now; weights, other balancing, health and queues (issue of the complete proxy) are
further state of `Upstream` and further rules of `choose`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from services.core.addresses import Address


@dataclass(frozen=True, slots=True)
class Upstream:
    """One server: `name` as configured, `addresses` as resolved, tried in their order."""

    name: str
    addresses: tuple[Address, ...]


class Pool:
    """A named group of upstreams. Not thread-safe: it is asked by sessions only."""

    def __init__(self, name: str, upstreams: Sequence[Upstream]) -> None:
        self.name = name
        self.upstreams = tuple(upstreams)
        self._next = 0

    def choose(self, tried: Sequence[Upstream]) -> Upstream | None:
        """The next upstream in turn that is not among `tried`; None where there is none."""
        for offset in range(len(self.upstreams)):
            upstream = self.upstreams[(self._next + offset) % len(self.upstreams)]
            if upstream not in tried:
                self._next = (self._next + offset + 1) % len(self.upstreams)
                return upstream
        return None
