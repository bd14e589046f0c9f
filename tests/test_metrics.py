"""The metrics: what is exposed, to whom, and that nobody who asks can disturb the service.

The server is tested by itself, on real sockets, with a real core behind it; then daemons of every
engine, whose metrics must agree with their logs.
"""

import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from ipaddress import ip_network
from pathlib import Path

import pytest
from daemons import Daemon
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_text
from scraping import PATIENCE, SCRAPE, answer, ask, connect, series, value

from services import web
from services.core.addresses import Address
from services.core.admission import Limits, Lists
from services.core.record import CLIENT, Loss, Reason
from services.core.service import Gauges, Policy, Service
from services.core.session import Dialled, Lost, Timeouts
from services.core.tally import BOUNDS_US
from services.core.upstreams import Check, Choice, Ejection, Pool, Upstream
from services.metrics import Metrics
from services.status import Counted, of_admission, of_pool
from services.vocabulary import EngineFault, Event
from services.web import WebServer

ROOT = Path(__file__).parents[1]

# every family that is exposed, as PromQL names its series
COUNTERS = {
    "process_cpu_seconds_total",
    "triptych_admission_refused_total",
    "triptych_bytes_total",
    "triptych_config_reloads_total",
    "triptych_datagrams_dropped_total",
    "triptych_datagrams_total",
    "triptych_log_lines_dropped_total",
    "triptych_sessions_accepted_total",
    "triptych_sessions_closed_total",
    "triptych_sessions_refused_total",
    "triptych_upstream_checks_total",
    "triptych_upstream_chosen_total",
    "triptych_upstream_ejections_total",
    "triptych_upstream_failures_total",
}
GAUGES = {
    "process_max_fds",
    "process_open_fds",
    "process_resident_memory_bytes",
    "process_start_time_seconds",
    "process_threads",
    "triptych_build_info",
    "triptych_draining",
    "triptych_loop_lag_seconds",
    "triptych_pool_queued_sessions",
    "triptych_sessions_limit",
    "triptych_sessions_open",
    "triptych_upstream_sessions",
    "triptych_upstream_sessions_limit",
    "triptych_upstream_state",
    "triptych_upstream_weight",
}
HISTOGRAMS = {"triptych_connect_seconds", "triptych_session_duration_seconds"}
LABELS = {
    "cause",
    "direction",
    "engine",
    "le",
    "listener",
    "pool",
    "result",
    "service",
    "state",
    "termination",
    "transport",
    "unit",
    "upstream",
    "version",
}


# The server by itself ---------------------------------------------------------------------------


class Instruments:
    def emit(self, event: Event) -> None:
        """The core's own lines are tested elsewhere."""

    def gauges(self) -> Gauges:
        return Gauges(threads=3, open_descriptors=17, rss_bytes=20_000_000, cpu_us=1_230_000)

    def lines_dropped(self) -> int:
        return 5


def worked_service() -> Service:
    """One that has seen a little of everything."""
    service = Service(
        instruments=Instruments(),
        timeouts=Timeouts(),
        limits=Limits(sessions=500),
        stats=60.0,
        epoch=0.0,
        now=0.0,
    )
    local = Address.parse("127.0.0.1:7007")
    client = Address.parse("192.0.2.77:40001")
    pool = Pool("p", [Upstream("u", (Address.parse("127.0.0.1:1"),))])
    echo = Policy("echo", "echo", "tcp")
    proxy = Policy('a "name"\\ with\neverything', "proxy", "tcp", pool)
    for policy in (echo, proxy):
        service.tally(policy.name, policy.service, policy.transport)
    first = service.accept(echo, client, local, None, 1.0)
    assert first is not None
    one, _ = first
    one.handle(Lost(CLIENT, Loss(Reason.RESET, "ECONNRESET")), 1.5)
    service.retire(one, 1.5)
    service.accept(echo, client, local, None, 2.0)
    second = service.accept(proxy, client, local, None, 3.0)
    assert second is not None
    two, _ = second
    two.handle(Dialled(1), 3.0002)
    two.handle(Lost(CLIENT, Loss(Reason.RESET, "ECONNRESET")), 3.25)
    service.retire(two, 3.25)
    for _ in range(2):
        service.refuse(echo, None, "enough", 0.0)
    service.count_dropped_datagram()
    for _ in range(3):
        service.admission.refuse("192.0.2.77", Lists(deny=(ip_network("192.0.2.0/24"),)), 0, 3.0)
    return service


def counted(service: Service) -> Counted:
    first = Upstream("u", (Address.parse("127.0.0.1:1"),), weight=2, limit=7)
    second = Upstream("v", (Address.parse("127.0.0.1:2"),))
    pool = Pool("p", [first, second], Choice(eject=Ejection(failures=1), health=Check(fall=1)))
    pool.choose(None, [], 3.0)
    pool.failed(second, "ECONNREFUSED", 3.0)
    pool.checked("u", None)
    pool.checked("u", "ETIMEDOUT")
    return Counted(
        service.snapshot(4.0),
        [of_pool(pool, 4.0)],
        of_admission(service.admission, service.open_sessions, 4.0),
    )


class Stage:
    """A server, and what it was asked for and said."""

    def __init__(self, sock: socket.socket, where: Address, collect: Callable[[], Counted]) -> None:
        self.where = where
        self.collect = collect
        self.said: list[Event] = []
        sock.setblocking(False)
        metrics = Metrics(
            lambda: self.collect(),  # noqa: PLW0108  a test may set another one meanwhile
            engine="twisted",
            instance="front",
            started=1_700_000_000.0,
            reloads={"accepted": 4, "refused": 1},
        )
        self.server = WebServer("metrics", [sock], metrics.respond, self.said.append)
        self.server.start()


@pytest.fixture(params=[pytest.param(name, id=name) for name in ("tcp", "unix")])
def stage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Stage]:
    if request.param == "tcp":
        sock = socket.create_server(("127.0.0.1", 0), backlog=64)
        where = Address("tcp", *sock.getsockname())
    else:
        where = Address("unix", str(tmp_path / "metrics.sock"))
        sock = socket.socket(socket.AF_UNIX)
        sock.bind(where.host)
        sock.listen(64)
    service = worked_service()
    made = Stage(sock, where, lambda: counted(service))
    yield made
    if sock.fileno() != -1:  # a test may have closed it
        made.server.close()
    assert sock.fileno() == -1, "the server's end closes its sockets"


def test_a_scrape_tells_what_the_core_has_counted(stage: Stage) -> None:
    response = ask(stage.where)
    assert response.status == 200
    assert response.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert int(response.headers["content-length"]) == len(response.body.encode())
    found = series(response.body)
    assert value(found, "triptych_sessions_accepted_total", listener="echo") == 2
    assert value(found, "triptych_sessions_open", listener="echo") == 1
    assert value(found, "triptych_sessions_refused_total", listener="echo") == 2
    assert value(found, "triptych_sessions_closed_total", listener="echo", termination="CD") == 1
    assert value(found, "triptych_session_duration_seconds_sum", service="echo") == 0.5
    assert value(found, "triptych_session_duration_seconds_bucket", service="echo", le="0.3") == 0
    assert value(found, "triptych_session_duration_seconds_bucket", service="echo", le="1.0") == 1
    assert value(found, "triptych_connect_seconds_count", service="proxy") == 1
    assert value(found, "triptych_datagrams_dropped_total") == 1
    assert value(found, "triptych_log_lines_dropped_total") == 5
    assert value(found, "triptych_config_reloads_total", result="accepted") == 4
    assert value(found, "triptych_draining") == 0
    assert value(found, "triptych_build_info", unit="front", engine="twisted") == 1
    assert value(found, "process_cpu_seconds_total") == 1.23
    assert value(found, "process_max_fds") == resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert value(found, "process_start_time_seconds") == 1_700_000_000


def test_a_scrape_tells_how_pools_health_and_admission_are(stage: Stage) -> None:
    found = series(ask(stage.where).body)
    assert value(found, "triptych_pool_queued_sessions", pool="p") == 0
    assert value(found, "triptych_upstream_state", upstream="u", state="down") == 1
    assert value(found, "triptych_upstream_state", upstream="u", state="up") == 0
    assert value(found, "triptych_upstream_state", upstream="v", state="ejected") == 1
    assert value(found, "triptych_upstream_weight", upstream="u") == 2
    assert value(found, "triptych_upstream_sessions", upstream="u") == 1
    assert value(found, "triptych_upstream_sessions_limit") == 7
    assert value(found, "triptych_upstream_chosen_total", upstream="u") == 1
    assert value(found, "triptych_upstream_failures_total", upstream="v") == 1
    assert value(found, "triptych_upstream_ejections_total", upstream="v") == 1
    assert value(found, "triptych_upstream_checks_total", upstream="u", result="passed") == 1
    assert value(found, "triptych_upstream_checks_total", upstream="u", result="failed") == 1
    assert value(found, "triptych_admission_refused_total", cause="list") == 3
    assert value(found, "triptych_admission_refused_total", cause="rate") == 0
    assert value(found, "triptych_sessions_limit") == 500


def test_names_and_labels_are_a_closed_set_without_clients(stage: Stage) -> None:
    body = ask(stage.where).body
    kinds: dict[str, set[str]] = {"counter": set(), "gauge": set(), "histogram": set()}
    for family in parse_text(body):
        # the parser drops a counter's suffix, which is part of what is queried
        kinds[family.type].add(family.name + ("_total" if family.type == "counter" else ""))
        for sample in family.samples:
            assert sample.labels.keys() <= LABELS
            assert sample.labels["engine"] == "twisted"
    assert kinds == {"counter": COUNTERS, "gauge": GAUGES, "histogram": HISTOGRAMS}
    assert "192.0.2.77" not in body


def test_promtool_finds_nothing_to_complain_of(stage: Stage) -> None:
    lint = subprocess.run(
        ["promtool", "check", "metrics"],
        input=ask(stage.where).body,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (lint.returncode, lint.stdout, lint.stderr) == (0, "", "")


def test_openmetrics_is_spoken_to_those_who_ask_for_it(stage: Stage) -> None:
    request = (
        b"GET /metrics?format=any HTTP/1.1\r\nHost: triptych\r\n"
        b"aCCept: application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5\r\n\r\n"
    )
    response = ask(stage.where, request)
    assert response.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    found = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in openmetrics.text_string_to_metric_families(response.body)  # type: ignore[no-untyped-call]  # it has no types
        for sample in family.samples
    }
    assert found == series(ask(stage.where).body)


def test_head_is_the_answer_without_its_body(stage: Stage) -> None:
    whole, head = ask(stage.where), ask(stage.where, SCRAPE.replace(b"GET", b"HEAD"))
    assert (head.status, head.headers, head.body) == (200, whole.headers, "")


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        pytest.param(b"GET / HTTP/1.1\r\n\r\n", 404, id="another path"),
        pytest.param(b"GET /metrics/ HTTP/1.1\r\n\r\n", 404, id="a path below"),
        pytest.param(b"POST /metrics HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", 405, id="post"),
        pytest.param(b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n", 400, id="TLS"),
        pytest.param(b"GET /metrics HTTP/2.0\r\n\r\n", 400, id="another version"),
        pytest.param(b"GET /metrics\r\n\r\n", 400, id="no version"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nAccept: a\nX: b\r\n\r\n", 400, id="a bare line feed"),
        pytest.param(b"GET /metrics HTTP/1.1\r\nAccept: \xff\r\n\r\n", 400, id="not ASCII"),
        pytest.param(b"GET /" + b"a" * 9000 + b" HTTP/1.1\r\n\r\n", 431, id="too long"),
        pytest.param(b"a" * 100_000, 431, id="without end"),
        pytest.param(b"\r\n\r\n", 400, id="nothing"),
    ],
)
def test_what_is_no_scrape_is_told_so(stage: Stage, request_: bytes, status: int) -> None:
    response = ask(stage.where, request_)
    assert response.status == status
    assert response.headers["connection"] == "close"
    assert response.headers.get("allow") == ("GET, HEAD" if status == 405 else None)
    assert ask(stage.where).status == 200


@given(
    accept=st.text(st.characters(min_codepoint=32, max_codepoint=126)),
    prefix=st.sampled_from(
        [
            "",
            "text/plain;version=",
            "application/openmetrics-text;version=",
            "text/plain;version=1.0.0;escaping=",
        ]
    ),
)
@settings(max_examples=200, deadline=None)
def test_no_wish_for_a_format_goes_unanswered(any_wish: Stage, accept: str, prefix: str) -> None:
    request = f"GET /metrics HTTP/1.1\r\nAccept: {prefix}{accept}\r\n\r\n".encode()
    assert ask(any_wish.where, request).status == 200
    assert any_wish.said == []


@given(garbage=st.binary(max_size=300))
@settings(max_examples=200, deadline=None)
def test_garbage_does_not_disturb(any_wish: Stage, garbage: bytes) -> None:
    assert ask(any_wish.where, garbage + b"\r\n\r\n").status in web.REASONS
    assert any_wish.said == []


@pytest.fixture(scope="module")
def any_wish(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    """One server for all the examples of a property."""
    where = Address("unix", str(tmp_path_factory.mktemp("metrics") / "metrics.sock"))
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(where.host)
    sock.listen()
    service = worked_service()
    made = Stage(sock, where, lambda: counted(service))
    yield made
    made.server.close()


def test_a_request_may_come_byte_by_byte(stage: Stage) -> None:
    with connect(stage.where) as client:
        for at in range(len(SCRAPE)):
            client.send(SCRAPE[at : at + 1])
            time.sleep(0.001)
        assert answer(client).status == 200


def test_a_client_that_ended_its_own_side_is_answered(stage: Stage) -> None:
    with connect(stage.where) as client:
        client.sendall(SCRAPE)
        client.shutdown(socket.SHUT_WR)
        assert answer(client).status == 200


def test_silent_clients_make_room_for_one_that_asks(stage: Stage) -> None:
    threads = threading.active_count()
    with ExitStack() as stack:
        silent = [stack.enter_context(connect(stage.where)) for _ in range(3 * web.MOST_CLIENTS)]
        began = time.monotonic()
        assert ask(stage.where).status == 200
        assert time.monotonic() - began < web.PATIENCE / 2
        assert threading.active_count() == threads
        # the oldest were sent away for it, before their time was up
        assert silent[0].recv(1) == b""
        assert time.monotonic() - began < web.PATIENCE / 2


def test_a_slow_client_is_sent_away_in_time(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE", 0.3)
    with connect(stage.where) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\n")
        began = time.monotonic()
        with suppress(ConnectionError):
            while time.monotonic() - began < PATIENCE:
                # a byte now and then buys no time
                client.sendall(b"X")
                time.sleep(0.05)
        assert 0.2 < time.monotonic() - began < PATIENCE / 2


def test_a_client_that_does_not_read_holds_up_nobody(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web, "PATIENCE", 1.0)
    service = worked_service()
    for number in range(1200):
        service.tally(f"listener {number}", "proxy", "tcp")
    stage.collect = lambda: counted(service)  # megabytes: more than the kernel holds
    with connect(stage.where) as lazy, connect(stage.where) as slow:
        lazy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 65536)
        lazy.sendall(SCRAPE)
        slow.sendall(SCRAPE)
        response = answer(slow)
        assert int(response.headers["content-length"]) == len(response.body.encode()) > 5_000_000
        time.sleep(
            1.5
        )  # time is the script: longer than the patience set above, and the kernel tells nothing yet
        # cut, and not with an end that looks complete
        received = 0
        try:
            while data := lazy.recv(65536):
                received += len(data)
        except ConnectionResetError:
            pass
        assert received < len(response.body)


def test_an_engine_that_does_not_answer_is_unavailable(stage: Stage) -> None:
    answers = stage.collect

    def hangs() -> Counted:
        raise TimeoutError

    stage.collect = hangs
    assert ask(stage.where).status == 503
    head = ask(stage.where, SCRAPE.replace(b"GET", b"HEAD"))
    assert (head.status, head.body) == (503, "")
    assert stage.said == []
    stage.collect = answers
    assert ask(stage.where).status == 200


def test_a_fault_of_ours_costs_one_answer_and_is_logged(stage: Stage) -> None:
    answers = stage.collect

    def broken() -> Counted:
        raise KeyError("surprise")

    stage.collect = broken
    assert ask(stage.where).status == 500
    [fault] = stage.said
    assert isinstance(fault, EngineFault)
    assert (fault.session, fault.error) == (None, "KeyError('surprise')")
    assert "in broken" in fault.traceback
    stage.collect = answers
    assert ask(stage.where).status == 200


def test_without_descriptors_it_waits_for_them(stage: Stage) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    where = stage.where
    with socket.socket(socket.AF_UNIX if where.transport == "unix" else socket.AF_INET) as client:
        client.settimeout(PATIENCE)
        with closing(socket.socket()) as probe:
            lowest = probe.fileno()
        # the lowest free descriptor is beyond the limit now
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, hard))
        try:
            client.connect(where.host if where.transport == "unix" else (where.host, where.port))
            client.sendall(SCRAPE)
            busy = time.process_time()
            time.sleep(0.5)
            busy = time.process_time() - busy
            with pytest.raises(OSError, match="Too many open files"):
                socket.socket()
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert busy < 0.25, "it spins"
        assert answer(client).status == 200


def test_its_end_is_the_end_of_its_clients(stage: Stage) -> None:
    with connect(stage.where) as client:
        client.sendall(b"GET /met")
        ask(stage.where)
        stage.server.close()
        assert client.recv(1) == b""
        with pytest.raises(ConnectionError):
            connect(stage.where)


def test_prometheus_client_is_loaded_only_where_metrics_are_wanted() -> None:
    script = (
        "import sys, services.cli, services.daemon; print(any('prometheus' in each for each in sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout == "False\n"


# Daemons ----------------------------------------------------------------------------------------


@pytest.fixture
def metrics_at(tmp_path: Path) -> Address:
    return Address("unix", str(tmp_path / "m.sock"))


@pytest.fixture
def upstream() -> Iterator[Address]:
    """Sends back what it gets, one client after the other."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            while True:
                try:
                    client, _ = server.accept()
                except OSError:
                    return
                with client:
                    while data := client.recv(65536):
                        client.sendall(data)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield Address("tcp", *server.getsockname())
        server.shutdown(socket.SHUT_RDWR)
        thread.join(PATIENCE)


def converse(where: Address, size: int) -> None:
    with connect(where) as client:
        client.sendall(b"x" * size)
        client.shutdown(socket.SHUT_WR)
        assert len(b"".join(iter(lambda: client.recv(65536), b""))) == size


def test_metrics_agree_with_the_log(
    engine: str, daemon: Callable[..., Daemon], metrics_at: Address, upstream: Address, tmp_path: Path
) -> None:
    nobody = Address("unix", str(tmp_path / "nobody.sock"))
    running = daemon(
        engine,
        [
            {"name": "echo", "address": "127.0.0.1:0", "service": "echo"},
            {"name": "local", "address": f"unix:{tmp_path}/echo.sock", "service": "echo"},
            {"name": "datagrams", "address": "udp:127.0.0.1:0", "service": "echo"},
            {"name": "proxy", "address": "127.0.0.1:0", "service": "proxy", "pool": "up"},
            {"name": "broken", "address": "127.0.0.1:0", "service": "proxy", "pool": "down"},
        ],
        {"up": [upstream], "down": [nobody]},
        {"metrics.address": str(metrics_at), "timeouts.udp_idle": "200ms"},
    )
    echo, local, datagrams, proxy, broken = running.addresses
    before = series(ask(metrics_at).body)
    for listener in ("echo", "local", "datagrams", "proxy", "broken"):
        # a counter that is not told from zero on loses its first step
        assert value(before, "triptych_sessions_accepted_total", listener=listener) == 0
        assert value(before, "triptych_sessions_refused_total", listener=listener) == 0

    for size in (1, 1000, 70_000):
        for where in (echo, local, proxy):
            converse(where, size)
    with connect(broken) as client:
        assert client.recv(1) == b""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(b"hello", (datagrams.host, datagrams.port))
        assert client.recv(100) == b"hello"
    # open while we look
    with connect(echo) as held:
        held.sendall(b"held")
        assert held.recv(4) == b"held"
        closed = running.wait_for("session_closed", 11)
        found = series(ask(metrics_at).body)
        assert value(found, "triptych_sessions_open", listener="echo") == 1
        assert value(found, "triptych_sessions_open") == 1
        assert value(found, "triptych_bytes_total", direction="c2s") == 4 + sum(
            line["bytes_c2s"] for line in closed
        )
    closed = running.wait_for("session_closed", 12)
    found = series(ask(metrics_at).body)
    for pool, listener, failures in (("up", "proxy", 0), ("down", "broken", 1)):
        dialled = sum(line["listener"] == listener for line in closed)
        assert value(found, "triptych_upstream_chosen_total", pool=pool) == dialled
        assert value(found, "triptych_upstream_failures_total", pool=pool) == failures
        assert value(found, "triptych_upstream_sessions", pool=pool) == 0

    ways = Counter(
        (line["listener"], line["service"], line["transport"], line["termination"]) for line in closed
    )
    assert ways == {
        tuple(dict(labels)[name] for name in ("listener", "service", "transport", "termination")): count
        for (name, labels), count in found.items()
        if name == "triptych_sessions_closed_total"
    }
    assert ways["broken", "proxy", "tcp", "SC"] == 1
    for listener in ("echo", "local", "datagrams", "proxy", "broken"):
        lines = [line for line in closed if line["listener"] == listener]
        assert value(found, "triptych_sessions_accepted_total", listener=listener) == len(lines)
        for metric, field in (("session_duration", "duration_us"), ("connect", "connect_us")):
            if metric == "connect" and listener not in {"proxy", "broken"}:
                continue
            times = [line[field] for line in lines if line[field] is not None]
            name = f"triptych_{metric}_seconds"
            assert value(found, f"{name}_sum", listener=listener) == pytest.approx(sum(times) / 1e6)
            assert value(found, f"{name}_count", listener=listener) == len(times)
            for bound in BOUNDS_US:
                below = sum(each <= bound for each in times)
                assert value(found, f"{name}_bucket", listener=listener, le=str(bound / 1e6)) == below, (
                    f"{name} of {listener} up to {bound} us: {times}"
                )
    for direction in ("c2s", "s2c"):
        for unit in ("bytes", "datagrams"):
            total = sum(line[f"{unit}_{direction}"] or 0 for line in closed)
            assert value(found, f"triptych_{unit}_total", direction=direction) == total
    assert value(found, "process_threads") >= 2
    assert time.time() - PATIENCE * 3 < value(found, "process_start_time_seconds") < time.time() + 1
    assert {dict(labels)["engine"] for _, labels in found} == {engine}


def test_scrapes_in_the_middle_of_traffic_all_succeed(
    engine: str, daemon: Callable[..., Daemon], metrics_at: Address
) -> None:
    running = daemon(
        engine,
        [{"name": "echo", "address": "127.0.0.1:0", "service": "echo"}],
        settings={"metrics.address": str(metrics_at)},
    )
    [echo] = running.addresses

    def talk() -> None:
        for _ in range(60):
            converse(echo, 3000)

    clients = [threading.Thread(target=talk, daemon=True) for _ in range(4)]
    for client in clients:
        client.start()
    seen = [0.0]
    while any(client.is_alive() for client in clients):
        response = ask(metrics_at)
        assert response.status == 200
        seen.append(value(series(response.body), "triptych_bytes_total", direction="c2s"))
    assert seen == sorted(seen), "a counter never falls, also when an open session becomes a closed one"
    running.wait_for("session_closed", 240)
    found = series(ask(metrics_at).body)
    assert value(found, "triptych_sessions_closed_total") == 240
    assert value(found, "triptych_bytes_total", direction="c2s") == 240 * 3000


def test_a_draining_daemon_says_so(engine: str, daemon: Callable[..., Daemon], metrics_at: Address) -> None:
    running = daemon(
        engine,
        [{"name": "echo", "address": "127.0.0.1:0", "service": "echo"}],
        settings={"metrics.address": str(metrics_at)},
    )
    [echo] = running.addresses
    with connect(echo) as held:
        held.sendall(b"held")
        assert held.recv(4) == b"held"
        assert value(series(ask(metrics_at).body), "triptych_draining") == 0
        os.kill(running.pid, 15)
        running.wait_for("service_draining")
        found = series(ask(metrics_at).body)
        assert value(found, "triptych_draining") == 1
        assert value(found, "triptych_sessions_open") == 1
    running.ended()


def test_an_address_in_use_is_one_line(tmp_path: Path) -> None:
    config = tmp_path / "triptych.toml"
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        config.write_text(
            f'metrics.address = "127.0.0.1:{port}"\n'
            'listener = [{ name = "echo", address = "127.0.0.1:0", service = "echo" }]\n',
            encoding="utf-8",
        )
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", "serve", "--config", config],
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )
    assert done.returncode == 69
    assert (
        done.stderr
        == f"triptych: 127.0.0.1:{port}: already in use; stop what uses it or choose another port\n"
    )
