"""What the sessions of one listener added up to, for the metrics.

Integers only, written once when a session begins and once when it ends: while bytes move, nothing is
counted here. Durations are counted in buckets, so that many processes' can be added up.
"""

from bisect import bisect_left
from typing import Literal, NamedTuple

# Upper bounds of the buckets in microseconds, two for every power of ten: from a dial over loopback
# to the default idle timeout. There is one bucket more, for what is longer.
BOUNDS_US = (
    100,
    300,
    1_000,
    3_000,
    10_000,
    30_000,
    100_000,
    300_000,
    1_000_000,
    3_000_000,
    10_000_000,
    30_000_000,
    100_000_000,
    300_000_000,
    1_000_000_000,
    3_600_000_000,
)


class ListenerKey(NamedTuple):
    """One name may stand for sockets of both transports (systemd:NAME)."""

    listener: str
    service: Literal["echo", "proxy"]
    transport: str


class Histogram:
    __slots__ = ("counts", "sum_us")

    def __init__(self) -> None:
        self.counts = [0] * (len(BOUNDS_US) + 1)
        self.sum_us = 0

    def observe(self, us: int) -> None:
        self.counts[bisect_left(BOUNDS_US, us)] += 1
        self.sum_us += us


class Tally:
    """`closed` counts by termination; `connect` holds the sessions that reached an upstream."""

    __slots__ = ("accepted", "closed", "connect", "duration", "refused")

    def __init__(self) -> None:
        self.accepted = self.refused = 0
        self.closed: dict[str, int] = {}
        self.duration = Histogram()
        self.connect = Histogram()
