"""Prometheus metrics: `GET /metrics`, as `web.py` serves it.

A daemon imports this module only if its configuration has [metrics]. It never touches the engine's
state: it calls `collect`, which asks the engine and waits. An engine that does not answer in time is
told to Prometheus as 503, so that a loop that hangs shows as a target that is down.

Names and units follow Prometheus' conventions. Labels come from the configuration and from closed
sets, never from clients. Every series carries the engine, the process's own too: a target's labels
depend on who wrote the scrape configuration, and the three engines are to be compared.
"""

import resource
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version
from typing import get_args

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from services.core.tally import BOUNDS_US, Histogram
from services.status import Counted, UpstreamState
from services.web import Request, Response

# Their `le` labels, in seconds.
_BOUNDS = (*(str(us / 1e6) for us in BOUNDS_US), "+Inf")


class Metrics:
    """Answers Prometheus.

    Args:
        collect: asks the engine. TimeoutError means that it gave no answer.
        engine, instance: as in the log's envelope.
        started: when the process began, in seconds since 1970.
        reloads: how many reloads ended in each way so far; read, never written.

    """

    def __init__(
        self,
        collect: Callable[[], Counted],
        *,
        engine: str,
        instance: str,
        started: float,
        reloads: Mapping[str, int],
    ) -> None:
        self._collect = collect
        self._identity = {"engine": engine, "unit": instance, "version": version("triptych")}
        self._started = started
        self._reloads = reloads

    def respond(self, request: Request) -> Response:
        if request.path != "/metrics":
            return Response(404, "the metrics are at /metrics\n")
        if request.method not in {"GET", "HEAD"}:
            return Response(405, "metrics can only be read\n", allow="GET, HEAD")
        try:
            encode, kind = choose_encoder(request.fields.get("accept", ""))
        except (TypeError, ValueError):  # versions and schemes that nobody ever heard of
            encode, kind = choose_encoder("")
        families = _Families(self._collect(), self._identity, self._started, self._reloads)
        return Response(200, encode(families), kind)


class _Families(Collector):
    """What was counted as Prometheus' metric families."""

    def __init__(
        self, counted: Counted, identity: dict[str, str], started: float, reloads: Mapping[str, int]
    ) -> None:
        self._snapshot, self._pools, self._admission = counted
        self._identity = identity
        self._engine = identity["engine"]
        self._started = started
        self._reloads = reloads

    def collect(self) -> Iterator[Metric]:
        info = InfoMetricFamily("triptych_build", "What runs: unit is the log's instance.")
        info.add_metric((), self._identity)
        yield info
        yield from self._sessions()
        yield from self._traffic()
        yield from self._upstreams()
        yield from self._admitted()
        yield from self._service()
        yield from self._process()

    def _sessions(self) -> Iterator[Metric]:
        labels = ("engine", "listener", "service", "transport")
        accepted = CounterMetricFamily("triptych_sessions_accepted", "Sessions that began.", labels=labels)
        refused = CounterMetricFamily(
            "triptych_sessions_refused", "Clients that never became a session.", labels=labels
        )
        closed = CounterMetricFamily(
            "triptych_sessions_closed",
            "Sessions that ended, by HAProxy's two letters for how.",
            labels=(*labels, "termination"),
        )
        opened = GaugeMetricFamily("triptych_sessions_open", "Sessions that are open.", labels=labels)
        duration = HistogramMetricFamily(
            "triptych_session_duration_seconds",
            "From accept to close, of sessions that ended.",
            labels=labels,
        )
        connect = HistogramMetricFamily(
            "triptych_connect_seconds",
            "From the first dial to a connected upstream, of sessions that ended.",
            labels=labels,
        )
        for key, tally in self._snapshot.tallies.items():
            values = (self._engine, *key)
            accepted.add_metric(values, tally.accepted)
            refused.add_metric(values, tally.refused)
            for termination, count in tally.closed.items():
                closed.add_metric((*values, termination), count)
            opened.add_metric(values, tally.accepted - sum(tally.closed.values()))
            _fill(duration, values, tally.duration)
            if key.service == "proxy":
                _fill(connect, values, tally.connect)
        yield from (accepted, refused, closed, opened, duration, connect)

    def _traffic(self) -> Iterator[Metric]:
        totals = self._snapshot.totals
        moved = CounterMetricFamily(
            "triptych_bytes",
            "Bytes from clients (c2s) and to clients (s2c), of open sessions too.",
            labels=("engine", "direction"),
        )
        moved.add_metric((self._engine, "c2s"), totals.bytes_c2s)
        moved.add_metric((self._engine, "s2c"), totals.bytes_s2c)
        datagrams = CounterMetricFamily(
            "triptych_datagrams",
            "Datagrams from clients (c2s) and to clients (s2c).",
            labels=("engine", "direction"),
        )
        datagrams.add_metric((self._engine, "c2s"), totals.datagrams_c2s)
        datagrams.add_metric((self._engine, "s2c"), totals.datagrams_s2c)
        yield from (moved, datagrams)
        yield self._counter(
            "triptych_datagrams_dropped", "Replies that the kernel would not take.", totals.datagrams_dropped
        )

    def _upstreams(self) -> Iterator[Metric]:
        queued = GaugeMetricFamily(
            "triptych_pool_queued_sessions",
            "Sessions that wait for an upstream with room.",
            labels=("engine", "pool"),
        )
        labels = ("engine", "pool", "upstream")
        # by states, so that an alert can tell what the operator wanted from what happened
        states = GaugeMetricFamily(
            "triptych_upstream_state",
            "1 for the state that the upstream is in; new sessions are for those that are up.",
            labels=(*labels, "state"),
        )
        weight = GaugeMetricFamily("triptych_upstream_weight", "Its share of new sessions.", labels=labels)
        sessions = GaugeMetricFamily("triptych_upstream_sessions", "Sessions that it has.", labels=labels)
        limit = GaugeMetricFamily(
            "triptych_upstream_sessions_limit",
            "Sessions that it may have, where there is a limit.",
            labels=labels,
        )
        chosen = CounterMetricFamily(
            "triptych_upstream_chosen", "Sessions that were dialled to it.", labels=labels
        )
        failed = CounterMetricFamily(
            "triptych_upstream_failures", "Sessions that could not be connected to it.", labels=labels
        )
        ejections = CounterMetricFamily(
            "triptych_upstream_ejections", "Times that it was passed over for a while.", labels=labels
        )
        checks = CounterMetricFamily(
            "triptych_upstream_checks", "Health checks, by their result.", labels=(*labels, "result")
        )
        for pool in self._pools:
            queued.add_metric((self._engine, pool.pool), pool.queued)
            # of one name there may be several, which are told as one series
            for each in {each.upstream: each for each in pool.upstreams}.values():
                values = (self._engine, pool.pool, each.upstream)
                for state in get_args(UpstreamState):
                    states.add_metric((*values, state), float(each.state == state))
                weight.add_metric(values, each.weight)
                sessions.add_metric(values, each.sessions)
                if each.limit is not None:
                    limit.add_metric(values, each.limit)
                chosen.add_metric(values, each.accepted)
                failed.add_metric(values, each.failed_dials)
                ejections.add_metric(values, each.ejections)
                checks.add_metric((*values, "passed"), each.passed_checks)
                checks.add_metric((*values, "failed"), each.failed_checks)
        yield from (queued, states, weight, sessions, limit, chosen, failed, ejections, checks)

    def _admitted(self) -> Iterator[Metric]:
        admission = self._admission
        refused = CounterMetricFamily(
            "triptych_admission_refused",
            "Clients refused by a list or a limit: list, sessions, client (its own limit) or rate.",
            labels=("engine", "cause"),
        )
        for cause, count in admission.refused.items():
            refused.add_metric((self._engine, cause), count)
        yield refused
        if admission.sessions_limit is not None:
            yield self._gauge(
                "triptych_sessions_limit", "Sessions that may be open at one time.", admission.sessions_limit
            )

    def _service(self) -> Iterator[Metric]:
        totals = self._snapshot.totals
        yield self._counter(
            "triptych_log_lines_dropped",
            "Log lines that were lost, because their reader stalled or failed.",
            totals.lines_dropped,
        )
        yield self._gauge(
            "triptych_loop_lag_seconds",
            "The latest that a timer ran in the last statistics interval, while sessions were open.",
            totals.loop_lag_us / 1e6,
        )
        yield self._gauge(
            "triptych_draining", "1 while no new sessions are taken.", int(self._snapshot.draining)
        )
        reloads = CounterMetricFamily(
            "triptych_config_reloads", "Reloads of the configuration.", labels=("engine", "result")
        )
        for result, count in self._reloads.items():
            reloads.add_metric((self._engine, result), count)
        yield reloads

    def _process(self) -> Iterator[Metric]:
        """The standard names, from our own gauges: prometheus_client's collector needs /proc/stat,
        and yields nothing at all in a unit with ProcSubset=pid.
        """
        totals = self._snapshot.totals
        if totals.cpu_us is not None:
            yield self._counter("process_cpu_seconds", "User and system CPU time.", totals.cpu_us / 1e6)
        if totals.rss_bytes is not None:
            yield self._gauge("process_resident_memory_bytes", "Resident memory.", totals.rss_bytes)
        if totals.open_descriptors is not None:
            yield self._gauge("process_open_fds", "Open file descriptors.", totals.open_descriptors)
        if totals.threads is not None:
            yield self._gauge("process_threads", "Threads.", totals.threads)
        limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        yield self._gauge("process_max_fds", "The limit of open file descriptors.", limit)
        yield self._gauge("process_start_time_seconds", "Start, in seconds since 1970.", self._started)

    def _counter(self, name: str, text: str, value: float) -> Metric:
        family = CounterMetricFamily(name, text, labels=("engine",))
        family.add_metric((self._engine,), value)
        return family

    def _gauge(self, name: str, text: str, value: float) -> Metric:
        family = GaugeMetricFamily(name, text, labels=("engine",))
        family.add_metric((self._engine,), value)
        return family


def _fill(family: HistogramMetricFamily, labels: Sequence[str], histogram: Histogram) -> None:
    """Prometheus' buckets each hold all below them as well."""
    buckets, below = [], 0
    for bound, count in zip(_BOUNDS, histogram.counts, strict=True):
        below += count
        buckets.append((bound, below))
    family.add_metric(labels, buckets, histogram.sum_us / 1e6)
