"""Prometheus metrics: `GET /metrics` over TCP or a UNIX socket, from a thread of its own.

A daemon imports this module only if its configuration has [metrics], and hands it bound sockets. One
thread serves them all; a client that is slow, or talks no HTTP, costs a place among a few until
its time is up, or until a newer client needs the place. The thread never touches the engine's
state: it calls `collect`, which asks the engine and waits. An engine that does not answer in time
is told to Prometheus as 503, so that a loop that hangs shows as a target that is down.

Names and units follow Prometheus' conventions. Labels come from the configuration and from closed
sets, never from clients. Every series carries the engine, the process's own too: a target's labels
depend on who wrote the scrape configuration, and the three engines are to be compared.
"""

import math
import re
import resource
import select
import socket
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.metadata import version

from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector

from services.core.service import Snapshot
from services.core.tally import BOUNDS_US, Histogram
from services.engines.sockets import EXHAUSTED_PAUSE, Wakeup
from services.vocabulary import EngineFault, Event

# Prometheus and its relatives hold one connection each; these are for a few of them and some strays.
MOST_CLIENTS = 16
# Seconds for a request to come, and again for its answer to be taken. Prometheus gives up after 10.
PATIENCE = 5.0
# What follows the answer is read for so long, so that a reset does not overtake it (RFC 9112, 9.6).
LINGER = 1.0
# Bytes; Prometheus' own request head has about 400.
LONGEST_HEAD = 8192

PLAIN = "text/plain; charset=utf-8"
REASONS = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    405: "Method Not Allowed",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

# Their `le` labels, in seconds.
_BOUNDS = (*(str(us / 1e6) for us in BOUNDS_US), "+Inf")

# A head is printable ASCII but for its line ends and tabs: nothing else can be smuggled into an answer.
_HEAD = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.[01]\r\n((?:[\t -~]+\r\n)*)\r\n")
_ACCEPT = re.compile(r"^accept[ \t]*:(.*)\r$", re.IGNORECASE | re.MULTILINE)


class _Client:
    """One connection: its request is read, its answer is written, its end is awaited."""

    __slots__ = ("answer", "deadline", "request", "sock")

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.request = b""
        # None while the request is read; what is left to write; empty when all was written
        self.answer: memoryview | None = None
        self.deadline = now + PATIENCE


class MetricsServer:
    """Args:
    sockets: bound, listening, non-blocking; closed at the end of the thread.
    collect: called in this server's thread. TimeoutError means that the engine gave no answer.
    emit: where a fault of this server is told.
    engine, instance: as in the log's envelope.
    started: when the process began, in seconds since 1970.
    reloads: how many reloads ended in each way so far; read, never written.

    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        collect: Callable[[], Snapshot],
        *,
        emit: Callable[[Event], None],
        engine: str,
        instance: str,
        started: float,
        reloads: Mapping[str, int],
    ) -> None:
        self._listeners = {sock.fileno(): sock for sock in sockets}
        self._collect = collect
        self._emit = emit
        self._identity = {"engine": engine, "unit": instance, "version": version("triptych")}
        self._started = started
        self._reloads = reloads
        self._closing = Wakeup()
        # oldest first, by descriptor
        self._clients: dict[int, _Client] = {}
        self._accept_at = 0.0
        self._thread = threading.Thread(target=self._run, name="metrics", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, which closes the sockets. A `collect` that still waits is left behind."""
        self._closing.wake()
        self._thread.join(LINGER)

    def _run(self) -> None:
        closing = self._closing.fileno()
        while True:
            ready = self._ready()
            if closing in ready:
                break
            now = time.monotonic()
            for descriptor in ready:
                if descriptor in self._listeners:
                    self._accept(self._listeners[descriptor], now)
                elif descriptor in self._clients:  # it may have made room for a newer one just now
                    self._serve(self._clients[descriptor], now)
            for client in [each for each in self._clients.values() if each.deadline <= now]:
                self._drop(client)
        for sock in (*self._listeners.values(), *(client.sock for client in self._clients.values())):
            sock.close()
        self._closing.close()

    def _ready(self) -> list[int]:
        """The descriptors that something can be done with; waits for one, or for a deadline."""
        poll = select.poll()
        poll.register(self._closing, select.POLLIN)
        now = time.monotonic()
        deadlines = [client.deadline for client in self._clients.values()]
        if self._accept_at <= now:
            for descriptor in self._listeners:
                poll.register(descriptor, select.POLLIN)
        else:
            deadlines.append(self._accept_at)
        for descriptor, client in self._clients.items():
            poll.register(descriptor, select.POLLOUT if client.answer else select.POLLIN)
        wait = max(0, math.ceil((min(deadlines) - now) * 1000)) if deadlines else None
        return [descriptor for descriptor, _ in poll.poll(wait)]

    def _accept(self, listener: socket.socket, now: float) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:  # another process with the same socket was faster
            return
        except OSError:  # no descriptor to be had, or the client is gone: a pause is right for both
            self._accept_at = now + EXHAUSTED_PAUSE
            return
        sock.setblocking(False)
        if len(self._clients) == MOST_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        self._clients[sock.fileno()] = _Client(sock, now)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        client.sock.close()

    def _serve(self, client: _Client, now: float) -> None:
        """The one step that can be done without waiting."""
        try:
            if client.answer:
                client.answer = client.answer[client.sock.send(client.answer) :]
                if not client.answer:
                    client.sock.shutdown(socket.SHUT_WR)
                    client.deadline = now + LINGER
                return
            data = client.sock.recv(LONGEST_HEAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        elif client.answer is None:
            client.request += data
            head, end, _ = client.request.partition(b"\r\n\r\n")
            if end or len(client.request) > LONGEST_HEAD:
                client.answer = memoryview(self._answer(head + end))
                client.deadline = time.monotonic() + PATIENCE  # collecting may have taken a while

    # The answer ---------------------------------------------------------------------------------

    def _answer(self, head: bytes) -> bytes:
        """The whole HTTP response to a request's head, which may be anything."""
        if len(head) > LONGEST_HEAD:
            return _response(431, f"a request's head may have {LONGEST_HEAD} bytes\n")
        request = _HEAD.fullmatch(head)
        if request is None:
            return _response(400, "this is no HTTP/1 request\n")
        method, target, fields = (part.decode("ascii") for part in request.groups())
        if target.partition("?")[0] != "/metrics":
            return _response(404, "the metrics are at /metrics\n")
        if method not in {"GET", "HEAD"}:
            return _response(405, "metrics can only be read\n", extra="Allow: GET, HEAD\r\n")
        accept = ",".join(_ACCEPT.findall(fields))
        try:
            text, kind = self._exposition(accept)
        except TimeoutError:
            return _response(503, "the engine gave no answer in time\n", method)
        except Exception as error:  # noqa: BLE001  a bug of ours costs one answer, not the thread
            self._emit(EngineFault(session=None, error=repr(error), traceback=traceback.format_exc()))
            return _response(500, "this is a fault of the daemon; its log has more\n", method)
        return _response(200, text, method, kind)

    def _exposition(self, accept: str) -> tuple[bytes, str]:
        try:
            encode, kind = choose_encoder(accept)
        except (TypeError, ValueError):  # versions and schemes that nobody ever heard of
            encode, kind = choose_encoder("")
        families = _Families(self._collect(), self._identity, self._started, self._reloads)
        return encode(families), kind


def _response(
    status: int, body: str | bytes, method: str = "GET", kind: str = PLAIN, extra: str = ""
) -> bytes:
    content = body.encode() if isinstance(body, str) else body
    head = (
        f"HTTP/1.1 {status} {REASONS[status]}\r\nContent-Type: {kind}\r\n"
        f"Content-Length: {len(content)}\r\n{extra}Connection: close\r\n\r\n"
    )
    return head.encode("ascii") + (b"" if method == "HEAD" else content)


class _Families(Collector):
    """A snapshot as Prometheus' metric families."""

    def __init__(
        self, snapshot: Snapshot, identity: dict[str, str], started: float, reloads: Mapping[str, int]
    ) -> None:
        self._snapshot = snapshot
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
