"""The workloads: each a load with its numbers, in the order in which they are run and reported."""

from typing import Literal

import msgspec

from comparisons.load.bulk import PIECE
from comparisons.load.job import Kind


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """`service` is what the daemon is started as. A proxied workload names its upstream: the `echo` or the
    `source` of the upstream process, or `load`, where the load process plays the upstream as well.
    `headline` is the figure that `ratio` compares; `quick_connections` replaces `connections` in a quick run.
    """

    name: str
    title: str
    about: str
    kind: Kind
    service: Literal["echo", "proxy"]
    upstream: Literal["echo", "source", "load"] | None = None
    connections: int = 1
    quick_connections: int | None = None
    size: int = 64
    stalled: bool = False
    recording: str | None = None
    unit: Literal["req/s", "conn/s", "Gbit/s"] = "req/s"
    headline: Literal["throughput", "pss_bytes_per_session"] = "throughput"

    @property
    def reference(self) -> str:
        """What `ratio` is a ratio to: direct is no process, so it has no memory to compare with."""
        if self.headline != "throughput":
            return "the least memory"
        return "direct" if self.upstream else "the best"


WORKLOADS = (
    Workload(
        name="echo-1-64",
        title="Echo, 1 connection, 64 B",
        about="One client sends 64 bytes, waits for them, sends the next: the bare cost of being woken up.",
        kind="round_trips",
        service="echo",
    ),
    Workload(
        name="echo-64-64",
        title="Echo, 64 connections, 64 B",
        about="64 clients in a closed loop: the cost of a short message when there is always work.",
        kind="round_trips",
        service="echo",
        connections=64,
    ),
    Workload(
        name="echo-1-16k",
        title="Echo, 1 connection, 16 KiB",
        about="One client, longer messages: copying begins to count.",
        kind="round_trips",
        service="echo",
        size=16 * 2**10,
    ),
    Workload(
        name="echo-64-16k",
        title="Echo, 64 connections, 16 KiB",
        about="64 clients, longer messages: copying, and fairness among them.",
        kind="round_trips",
        service="echo",
        connections=64,
        size=16 * 2**10,
    ),
    Workload(
        name="bulk",
        title="Proxy, one bulk stream",
        about="One connection through the proxy, the upstream sends as fast as it can.",
        kind="bulk",
        service="proxy",
        upstream="source",
        size=PIECE,
        unit="Gbit/s",
    ),
    Workload(
        name="burst",
        title="Echo, burst of new connections",
        about="Connect, 64 bytes there and back, close; up to 64 at a time: the cost of a session's beginning and end.",
        kind="burst",
        service="echo",
        unit="conn/s",
    ),
    Workload(
        name="idle",
        title="Proxy, many idle connections",
        about="Connections that are opened, used once and left alone: what a waiting session holds in memory.",
        kind="idle",
        service="proxy",
        upstream="echo",
        connections=2000,
        quick_connections=500,
        unit="conn/s",
        headline="pss_bytes_per_session",
    ),
    Workload(
        name="stalled",
        title="Proxy, 16 fast clients beside one that does not read",
        about="One client sends up to 32 MiB and reads nothing while 16 others exchange 64 bytes; their figures are shown.",
        kind="round_trips",
        service="proxy",
        upstream="echo",
        connections=16,
        stalled=True,
    ),
    Workload(
        name="replay-redis",
        title="Proxy, replay of real Redis conversations",
        about="A recorded Redis client and server, both ends played again as fast as the order of bytes allows.",
        kind="replay",
        service="proxy",
        upstream="load",
        recording="redis",
    ),
    Workload(
        name="replay-http",
        title="Proxy, replay of a real HTTP exchange",
        about="A recorded HTTP client and nginx, both ends played again as fast as the order of bytes allows.",
        kind="replay",
        service="proxy",
        upstream="load",
        recording="http",
    ),
)
