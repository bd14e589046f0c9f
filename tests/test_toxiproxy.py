"""Toxiproxy's own clients drive the daemons: listeners come and go, faults act, and nobody who asks for
something else can disturb the service.

One daemon of each engine serves most tests, each of which makes proxies of its own to the daemon's echo.
"""

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest
import toxiproxy
from daemons import PATIENCE, Daemon, configuration
from hypothesis import given, settings
from hypothesis import strategies as st
from scraping import ask as ask_raw
from scraping import connect
from toxiproxy.api import APIConsumer
from toxiproxy.exceptions import InvalidToxic, NotFound, ProxyExists

from services import web
from services.config import ConfigError, read
from services.core.addresses import Address
from services.toxiproxy import TOXICS

# where .ci/run has npm install the other client
NODE_CLIENT = Path(sys.prefix, "npm")
TEXT = b"0123456789" * 1000


class Control:
    """A daemon and its control interface."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon
        (line,) = daemon.wait_for("interface_opened")
        self.where = Address.parse(line["address"])
        self.echo = daemon.addresses[0]
        self._made = 0

    def ask(self, method: str, path: str, body: object = None, agent: str = "test") -> tuple[int, Any]:
        """The status, and the JSON that came with it; None where there is none."""
        client = http.client.HTTPConnection(self.where.host, self.where.port, timeout=PATIENCE)
        text = body if isinstance(body, bytes) else json.dumps(body).encode() if body is not None else b""
        try:
            client.request(method, path, text, {"User-Agent": agent})
            answer = client.getresponse()
            return answer.status, json.loads(answer.read() or b"null")
        finally:
            client.close()

    def make(self, *toxics: dict[str, Any]) -> "Made":
        """A proxy to the echo, with these toxics."""
        self._made += 1
        name = f"proxy-{self._made}"
        status, proxy = self.ask("POST", "/proxies", {"name": name, "upstream": str(self.echo)})
        assert status == 201
        made = Made(self, name, Address.parse(proxy["listen"]))
        for toxic in toxics:
            made.add(toxic)
        return made


class Made:
    """A proxy of a test."""

    def __init__(self, control: Control, name: str, where: Address) -> None:
        self.control = control
        self.path = f"/proxies/{name}"
        self.name = name
        self.where = where

    def add(self, toxic: dict[str, Any]) -> Any:
        status, added = self.control.ask("POST", f"{self.path}/toxics", toxic)
        assert status == 200, added
        return added

    def connect(self) -> socket.socket:
        return connect(self.where)


def exchange(client: socket.socket, text: bytes = b"hello") -> float:
    """How long `text` takes there and back, in seconds."""
    began = time.monotonic()
    client.sendall(text)
    got = b""
    while len(got) < len(text):
        data = client.recv(65_536)
        assert data
        got += data
    assert got == text
    return time.monotonic() - began


def converse(client: socket.socket, text: bytes, *, end: bool = True) -> tuple[bytes, str, float]:
    """What comes back for `text`, how it ends, and after how many seconds."""
    began, got, ending = time.monotonic(), b"", "FIN"
    try:
        client.sendall(text)
        if end:
            client.shutdown(socket.SHUT_WR)
        while data := client.recv(65_536):
            got += data
    except ConnectionResetError:
        ending = "RST"
    return got, ending, time.monotonic() - began


def start(engine: str, directory: Path, **settings_: str) -> Daemon:
    echo = {"name": "echo", "address": "127.0.0.1:0", "service": "echo"}
    keys = {"faults.address": "127.0.0.1:0", **settings_}
    return Daemon(directory, configuration(engine, [echo], None, keys))


@pytest.fixture(scope="module")
def control(engine: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Control]:
    daemon = start(engine, tmp_path_factory.mktemp("controlled"))
    yield Control(daemon)
    daemon.stop()


# Real clients -----------------------------------------------------------------------------------


@pytest.fixture
def client(control: Control) -> toxiproxy.Toxiproxy:
    server = toxiproxy.Toxiproxy()
    server.update_api_consumer(control.where.host, control.where.port)
    return server


def test_toxiproxy_python_drives_a_proxy(control: Control, client: toxiproxy.Toxiproxy) -> None:
    assert client.running()
    assert b"version" in client.version()
    proxy = client.create(upstream=str(control.echo), name="python")
    where = Address.parse(proxy.listen)
    assert where.port
    with connect(where) as session:
        assert exchange(session) < PATIENCE
        proxy.add_toxic(type="latency", attributes={"latency": 150, "jitter": 10})
        assert exchange(session) >= 0.14
        toxic = proxy.get_toxic("latency_downstream")
        assert (toxic.type, toxic.stream, toxic.toxicity) == ("latency", "downstream", 1.0)
        assert toxic.attributes == {"latency": 150, "jitter": 10}
        proxy.destroy_toxic("latency_downstream")
        assert proxy.toxics() == {}
        exchange(session)
        with proxy.down():
            with pytest.raises(ConnectionRefusedError):
                connect(where)
            with pytest.raises(ConnectionResetError):
                session.recv(1)
            assert not client.get_proxy("python").enabled
    proxy.add_toxic(type="limit_data", name="cut", attributes={"bytes": 3})
    with connect(where) as session:
        assert converse(session, b"hello", end=False)[:2] == (b"hel", "FIN")
    assert client.reset()
    with connect(where) as session:
        exchange(session)
    assert client.populate([{"name": "python", "upstream": proxy.upstream, "listen": proxy.listen}]) == []
    assert client.destroy(proxy)
    assert client.get_proxy("python") is None


def test_toxiproxy_python_is_told_what_was_wrong(control: Control, client: toxiproxy.Toxiproxy) -> None:
    proxy = client.create(upstream=str(control.echo), name="errors")
    with pytest.raises(ProxyExists):
        client.create(upstream=str(control.echo), name="errors")
    with pytest.raises(InvalidToxic, match="invalid toxic type"):
        proxy.add_toxic(type="earthquake")
    with pytest.raises(InvalidToxic, match="either upstream or downstream"):
        proxy.add_toxic(type="latency", stream="sideways")
    proxy.add_toxic(type="timeout")
    with pytest.raises(ProxyExists, match="toxic already exists"):
        proxy.add_toxic(type="timeout")
    with pytest.raises(NotFound, match="toxic not found"):
        proxy.destroy_toxic("latency_downstream")
    proxy.destroy()
    with pytest.raises(NotFound, match="proxy not found"):
        APIConsumer.get("/proxies/errors")


def test_toxiproxy_node_client_drives_a_proxy(control: Control) -> None:
    assert NODE_CLIENT.is_dir(), (
        f"npm install --no-save --no-package-lock --prefix {NODE_CLIENT} toxiproxy-node-client@4"
    )
    script = Path(__file__).with_name("toxiproxy_client.mjs")
    done = subprocess.run(
        ["node", script, str(control.where), str(control.echo)],
        env={**os.environ, "CLIENT": f"{NODE_CLIENT}/"},
        capture_output=True,
        text=True,
        check=False,
        timeout=3 * PATIENCE,
    )
    assert (done.returncode, done.stderr) == (0, "")
    said = json.loads(done.stdout)
    ways = {step: (said[step]["got"], said[step]["how"]) for step in ("plain", "slow", "limited", "reset")}
    assert ways == {
        "plain": ("hello", "whole"),
        "slow": ("hello", "whole"),
        "limited": ("hel", "FIN"),
        "reset": ("hello", "whole"),
    }
    assert said["slow"]["ms"] >= 199
    assert said["added"] == {
        "name": "slow",
        "type": "latency",
        "stream": "upstream",
        "toxicity": 1,
        "attributes": {"latency": 200, "jitter": 0},
    }
    assert said["updated"] == said["read"] == {"latency": 1, "jitter": 1}
    assert said["disabled"]["how"] == "ECONNREFUSED"
    assert said["populated"] == ["node", "another"]
    assert (said["twice"][-3:], said["removed"][-3:]) == ("409", "404")
    assert said["version"].startswith("2.")


# Toxics -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("toxic", "attributes", "least"),
    [
        ("latency", {"latency": 120, "jitter": 0}, 0.12),
        ("bandwidth", {"rate": 50}, len(TEXT) / 50_000),
        ("slicer", {"average_size": 1000, "size_variation": 500, "delay": 10_000}, 0.05),
        ("slow_close", {"delay": 200}, 0.2),
    ],
)
@pytest.mark.parametrize("stream", ["upstream", "downstream"])
def test_a_toxic_that_delays_loses_nothing(
    control: Control, toxic: str, attributes: dict[str, int], least: float, stream: str
) -> None:
    proxy = control.make({"type": toxic, "stream": stream, "attributes": attributes})
    with proxy.connect() as session:
        got, ending, took = converse(session, TEXT)
    assert (got, ending) == (TEXT, "FIN")
    assert took >= least


def test_toxics_that_end_a_session_do_so_in_time(control: Control) -> None:
    for toxic, attributes, kept, end, least in (
        ("limit_data", {"bytes": 3000}, TEXT[:3000], "FIN", 0.0),
        ("timeout", {"timeout": 150}, b"", "FIN", 0.15),
        ("reset_peer", {"timeout": 150}, TEXT, "RST", 0.15),
    ):
        proxy = control.make({"type": toxic, "attributes": attributes})
        with proxy.connect() as session:
            got, ending, took = converse(session, TEXT, end=False)
        assert (got, ending) == (kept, end), toxic
        assert took >= least / 2  # the session began before its client knew


def test_a_reset_after_0_comes_at_once(control: Control) -> None:
    proxy = control.make({"type": "reset_peer"})
    with pytest.raises(ConnectionResetError), proxy.connect() as session:
        session.recv(1)


def test_a_timeout_of_0_never_comes(control: Control) -> None:
    proxy = control.make({"type": "timeout", "attributes": {"timeout": 0}})
    with proxy.connect() as session:
        session.settimeout(0.3)
        session.sendall(b"lost")
        with pytest.raises(TimeoutError):
            session.recv(1)
        session.settimeout(PATIENCE)
        # a stream with a hole must not go on
        control.ask("DELETE", f"{proxy.path}/toxics/timeout_downstream")
        assert session.recv(1) == b""


def test_a_link_without_bandwidth_holds_everything_until_it_is_mended(control: Control) -> None:
    """The way to cut a connection that Testcontainers' documentation shows."""
    proxy = control.make()
    with proxy.connect() as session:
        exchange(session)
        for stream in ("upstream", "downstream"):
            proxy.add({"name": stream, "type": "bandwidth", "stream": stream, "attributes": {"rate": 0}})
        session.sendall(TEXT)
        session.settimeout(0.3)
        with pytest.raises(TimeoutError):
            session.recv(1)
        session.settimeout(PATIENCE)
        for stream in ("upstream", "downstream"):
            status, _ = control.ask("DELETE", f"{proxy.path}/toxics/{stream}")
            assert status == 204
        session.shutdown(socket.SHUT_WR)
        assert b"".join(iter(lambda: session.recv(65_536), b"")) == TEXT


def test_toxicity_hits_some_sessions_and_the_same_ones_again(control: Control) -> None:
    toxic = {"type": "limit_data", "toxicity": 0.5, "attributes": {"bytes": 0}}
    fates = []
    for _ in range(2):
        proxy, hit = control.make(toxic), []
        for _ in range(16):
            with proxy.connect() as session:
                hit.append(converse(session, b"hello")[0])
        fates.append(hit)
    assert set(fates[0]) == {b"hello", b""}
    assert fates[0] == fates[1]


def test_a_toxic_is_read_as_it_was_written(control: Control) -> None:
    # inside, since pytest-twisted wraps a property anew for each engine
    @given(
        kind=st.sampled_from(sorted(TOXICS)),
        stream=st.sampled_from(["upstream", "downstream"]),
        toxicity=st.floats(0, 1),
        numbers=st.lists(st.integers(1, 2**31 - 1), min_size=3, max_size=3),
        update=st.integers(1, 2**31 - 1),
    )
    @settings(max_examples=20, deadline=None)
    def check(kind: str, stream: str, toxicity: float, numbers: list[int], update: int) -> None:
        proxy = control.make()
        names = [attribute.name for attribute in TOXICS[kind][1]]
        wanted = {"name": "one", "type": kind, "stream": stream, "toxicity": toxicity}
        attributes = dict(zip(names, numbers, strict=False))
        where = f"{proxy.path}/toxics/one"
        assert proxy.add({**wanted, "attributes": attributes}) == {**wanted, "attributes": attributes}
        assert control.ask("GET", where) == (200, {**wanted, "attributes": attributes})
        attributes[names[-1]] = update
        changed = control.ask("PATCH", where, {"attributes": {names[-1]: update}})
        assert changed == (200, {**wanted, "attributes": attributes})
        wanted["toxicity"] = 1.0
        assert control.ask("POST", where, {"toxicity": 1}) == (200, {**wanted, "attributes": attributes})
        assert control.ask("DELETE", proxy.path) == (204, None)

    check()


# Listeners --------------------------------------------------------------------------------------


def test_a_port_can_be_had_again_at_once(control: Control) -> None:
    proxy = control.make()
    wanted = {"name": proxy.name, "upstream": str(control.echo), "listen": str(proxy.where)}
    for _ in range(10):
        with proxy.connect() as session:
            exchange(session)
            assert control.ask("POST", proxy.path, {"enabled": False})[1]["enabled"] is False
            with pytest.raises(ConnectionRefusedError):
                proxy.connect()
            assert control.ask("PATCH", proxy.path, {"enabled": True})[1]["listen"] == str(proxy.where)
            with pytest.raises(ConnectionResetError):
                session.recv(1)
        assert control.ask("DELETE", proxy.path) == (204, None)
        status, made = control.ask("POST", "/proxies", wanted)
        assert (status, made["listen"]) == (201, str(proxy.where))


def test_proxies_come_and_go_under_load(control: Control) -> None:
    """Its daemon's end says that no session was lost, and that nothing went wrong inside."""
    proxy, over = control.make(), threading.Event()

    def knock() -> None:
        while not over.is_set():
            with suppress(OSError), proxy.connect() as session:
                session.sendall(b"hello")
                session.recv(5)

    clients = [threading.Thread(target=knock) for _ in range(4)]
    for client in clients:
        client.start()
    try:
        for _ in range(40):
            for enabled in (False, True):
                assert control.ask("PATCH", proxy.path, {"enabled": enabled})[0] == 200
    finally:
        over.set()
        for client in clients:
            client.join()
    with proxy.connect() as session:
        exchange(session)
    assert not control.daemon.lines("engine_fault")


def test_a_proxy_can_be_moved_and_sent_elsewhere(control: Control) -> None:
    proxy, other = control.make({"type": "latency"}), control.make()
    with proxy.connect() as session:
        exchange(session)
        status, changed = control.ask("PATCH", proxy.path, {"upstream": str(other.where)})
        assert (status, changed["upstream"], changed["listen"]) == (200, str(other.where), str(proxy.where))
        with pytest.raises(ConnectionResetError):
            session.recv(1)
    with proxy.connect() as session:
        exchange(session)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        free = Address("tcp", *taken.getsockname())
    status, moved = control.ask("POST", proxy.path, {"listen": str(free)})
    assert (status, moved["listen"], len(moved["toxics"])) == (200, str(free), 1)
    with pytest.raises(ConnectionRefusedError):
        proxy.connect()
    with connect(free) as session:
        exchange(session)
    # what would lead back is refused, and nothing has changed
    status, error = control.ask("PATCH", other.path, {"upstream": str(free)})
    assert status == 400
    assert "lead back" in error["error"]
    with connect(free) as session:
        exchange(session)


def test_populate_makes_what_is_missing_and_mends_what_differs(control: Control) -> None:
    stays, differs = control.make({"type": "latency"}), control.make({"type": "latency"})
    assert control.ask("POST", stays.path, {"enabled": False})[0] == 200
    wanted = [
        {"name": stays.name, "listen": str(stays.where), "upstream": str(control.echo)},
        {"name": differs.name, "listen": str(differs.where), "upstream": str(stays.where)},
        {"name": "asleep", "listen": "127.0.0.1:0", "upstream": str(control.echo), "enabled": False},
    ]
    status, answer = control.ask("POST", "/populate", wanted)
    assert status == 201
    assert [
        (each["name"], each["upstream"], each["enabled"], len(each["toxics"])) for each in answer["proxies"]
    ] == [
        (stays.name, str(control.echo), True, 1),
        (differs.name, str(stays.where), True, 0),
        ("asleep", str(control.echo), False, 0),
    ]
    assert control.ask("POST", "/reset") == (204, None)
    status, asleep = control.ask("GET", "/proxies/asleep")
    assert asleep["enabled"]
    with connect(Address.parse(asleep["listen"])) as session:
        exchange(session)
    assert control.ask("DELETE", "/proxies/asleep") == (204, None)


def test_a_reload_keeps_what_the_control_interface_made(engine: str, tmp_path: Path) -> None:
    """Its listeners, and its faults until the file has others."""
    front: dict[str, Any] = {
        "name": "front",
        "address": "localhost:0",
        "service": "proxy",
        "pool": "pool",
        "faults": [{"type": "latency", "delay": "5ms"}],
    }
    pools = {"pool": [Address("tcp", "127.0.0.1", 9), Address("unix", "/nowhere")]}
    echo = {"name": "echo", "address": "127.0.0.1:0", "service": "echo"}
    udp = {"name": "udp", "address": "udp:127.0.0.1:0", "service": "echo"}
    keys = {"faults.address": f"unix:{tmp_path}/c.sock"}
    daemon = Daemon(tmp_path, configuration(engine, [echo, front, udp], pools, keys))

    def ask(method: str, path: str, body: object = None) -> Any:
        text = json.dumps(body) if body is not None else ""
        head = f"{method} {path} HTTP/1.1\r\nContent-Length: {len(text)}\r\n\r\n"
        answer = ask_raw(Address("unix", f"{tmp_path}/c.sock"), (head + text).encode())
        assert answer.status < 300, answer
        return json.loads(answer.body or "null")

    def reload(listeners: list[dict[str, Any]]) -> dict[str, Any]:
        count = len(daemon.lines("config_reloaded")) + 1
        text = configuration(engine, listeners, pools, keys)
        (tmp_path / "triptych.toml").write_text(text, encoding="utf-8")
        os.kill(daemon.pid, signal.SIGHUP)
        return daemon.wait_for("config_reloaded", count)[-1]

    try:
        shown = ask("GET", "/proxies")
        assert shown.keys() == {"echo", "front"}
        assert shown["echo"]["upstream"] == ""
        assert shown["front"]["upstream"] == "127.0.0.1:9,unix:/nowhere"
        assert shown["front"]["toxics"][0]["attributes"] == {"latency": 5, "jitter": 0}
        ask("POST", "/proxies", {"name": "made", "upstream": shown["echo"]["listen"]})
        ask("POST", "/proxies/front/toxics", {"type": "timeout"})
        ask("POST", "/proxies/front", {"enabled": False})
        line = reload([echo, front, udp])
        assert (line["added"], line["removed"], line["kept"]) == ([], [], ["echo", "front", "udp"])
        kept = ask("GET", "/proxies")
        assert kept.keys() == {"echo", "front", "made"}
        assert not kept["front"]["enabled"]
        assert [each["name"] for each in kept["front"]["toxics"]] == [
            "latency_downstream",
            "timeout_downstream",
        ]
        reload([echo, {**front, "faults": []}])
        daemon.wait_for("faults_changed", predicate=lambda line: not line["faults"])
        assert ask("GET", "/proxies/front/toxics") == []
        assert ask("POST", "/proxies/front", {"enabled": True})["listen"] == shown["front"]["listen"]
        # a name means one listener
        (tmp_path / "triptych.toml").write_text(
            configuration(engine, [echo, {**echo, "name": "made"}], None, keys), encoding="utf-8"
        )
        os.kill(daemon.pid, signal.SIGHUP)
        (line,) = daemon.wait_for("config_refused")
        assert "'made' was made over the control interface" in line["faults"][0]
        ask("DELETE", "/proxies/made")
        assert reload([echo])["removed"] == ["front"]
        assert ask("GET", "/proxies").keys() == {"echo"}
    finally:
        daemon.stop()
    assert not (tmp_path / "c.sock").exists()


def test_listeners_of_every_kind_are_controlled_as_far_as_they_can_be(engine: str, tmp_path: Path) -> None:
    # what a service manager does: a listening socket as descriptor 3, under a name
    activate = (
        "import os, socket, sys\n"
        "given = socket.create_server(('127.0.0.1', 0))\n"
        "os.dup2(given.fileno(), 3)\n"
        "os.set_inheritable(3, True)\n"
        "os.environ |= {'LISTEN_PID': str(os.getpid()), 'LISTEN_FDS': '1', 'LISTEN_FDNAMES': 'given'}\n"
        "os.execv(sys.argv[1], sys.argv[1:])\n"
    )
    listeners = [
        {"name": "given", "address": "systemd:given", "service": "echo"},
        {"name": "local", "address": f"unix:{tmp_path}/l.sock", "service": "echo"},
    ]
    config = configuration(engine, listeners, None, {"faults.address": "127.0.0.1:0"})
    control = Control(Daemon(tmp_path, config, [sys.executable, "-c", activate]))
    try:
        status, answer = control.ask("POST", "/proxies/given", {"enabled": False})
        assert (status, answer["error"]) == (
            400,
            "given: its socket is the service manager's, and would stay open",
        )
        assert control.ask("DELETE", "/proxies/given")[0] == 400
        limit = {"type": "limit_data", "attributes": {"bytes": 3}}
        assert control.ask("POST", "/proxies/given/toxics", limit)[0] == 200
        with connect(control.daemon.addresses[0]) as session:
            assert converse(session, b"hello", end=False)[0] == b"hel"
        local = Address("unix", f"{tmp_path}/l.sock")
        for enabled in (False, True):
            status, answer = control.ask("POST", "/proxies/local", {"enabled": enabled})
            assert (status, answer["listen"], answer["enabled"]) == (200, str(local), enabled)
            assert Path(local.host).exists() == enabled
        with connect(local) as session:
            exchange(session)
    finally:
        control.daemon.stop()
    assert not Path(local.host).exists()


def test_a_daemon_may_begin_without_any_listener(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, configuration("nonblocking", [], None, {"faults.address": "127.0.0.1:0"}))
    try:
        (line,) = daemon.wait_for("interface_opened")
        assert (
            json.loads(ask_raw(Address.parse(line["address"]), b"GET /proxies HTTP/1.1\r\n\r\n").body) == {}
        )
    finally:
        daemon.stop()


def test_the_interface_is_not_asked_by_datagrams() -> None:
    with pytest.raises(ConfigError, match=r"faults\.address: faults are asked for over HTTP"):
        read({"faults": {"address": "udp:127.0.0.1:8474"}})


def test_a_draining_daemon_answers_and_changes_nothing(engine: str, tmp_path: Path) -> None:
    control = Control(start(engine, tmp_path))
    proxy = control.make()
    with proxy.connect() as session:
        exchange(session)
        os.kill(control.daemon.pid, signal.SIGTERM)
        control.daemon.wait_for("service_draining")
        assert control.ask("GET", proxy.path)[0] == 200
        for method, path, body in (
            ("DELETE", proxy.path, None),
            ("POST", "/reset", None),
            ("POST", f"{proxy.path}/toxics", {"type": "timeout"}),
            ("POST", "/proxies", {"name": "late", "upstream": str(control.echo)}),
        ):
            status, error = control.ask(method, path, body)
            assert (status, error["error"]) == (503, "this daemon is draining")
        exchange(session)
    control.daemon.ended()
    with pytest.raises(ConnectionRefusedError):
        connect(control.where)


def test_an_interface_that_others_can_reach_is_warned_about(tmp_path: Path) -> None:
    daemon = start("nonblocking", tmp_path, **{"faults.address": "0.0.0.0:0"})
    try:
        (line,) = daemon.wait_for("listener_exposed")
        assert line["listener"] == "faults"
        assert "open ports here" in line["risk"]
        control = Control(daemon)
        proxy = {"name": "wide", "listen": ":0", "upstream": str(control.echo)}
        assert control.ask("POST", "/proxies", proxy)[1]["listen"].startswith("0.0.0.0:")
        assert daemon.wait_for("listener_exposed", 2)[1]["listener"] == "wide"
    finally:
        daemon.stop()


# Whoever asks for something else ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "error"),
    [
        ("GET", "/proxies/none", None, 404, "proxy not found"),
        ("DELETE", "/proxies/none", None, 404, "proxy not found"),
        ("GET", "/proxies/echo/toxics/none", None, 404, "toxic not found"),
        ("PATCH", "/proxies/echo/toxics/none", {}, 404, "toxic not found"),
        ("GET", "/nothing", None, 404, "there is nothing of this name"),
        ("GET", "/reset", None, 405, "method not allowed"),
        ("PUT", "/proxies/echo", {}, 405, "method not allowed"),
        ("POST", "/proxies", b"", 400, "bad request body"),
        ("POST", "/proxies", b"{", 400, "bad request body"),
        ("POST", "/proxies", b"[" * 5000, 400, "bad request body"),
        ("POST", "/proxies", [], 400, "bad request body"),
        ("POST", "/proxies", {"upstream": "127.0.0.1:9"}, 400, "missing required field: name"),
        ("POST", "/proxies", {"name": "a"}, 400, "missing required field: upstream"),
        ("POST", "/proxies", {"name": "a", "upstream": "b"}, 400, "upstream: 'b': expected HOST:PORT"),
        ("POST", "/proxies", {"name": "a", "upstream": "udp:b:1"}, 400, "expected HOST:PORT"),
        ("POST", "/proxies", {"name": "a", "upstream": "127.0.0.1:0"}, 400, "expected HOST:PORT"),
        ("POST", "/proxies", {"name": "a", "upstream": "b:1", "listen": "unix:/a"}, 400, "listen: 'unix:/a'"),
        ("POST", "/proxies", {"name": "a", "upstream": "x" * 64 + ":1"}, 500, "unknown host"),
        ("POST", "/proxies", {"name": "echo", "upstream": "127.0.0.1:9"}, 409, "proxy already exists"),
        ("POST", "/proxies/echo", {"upstream": "127.0.0.1:9"}, 400, "an echo has no upstream"),
        ("POST", "/populate", {}, 400, "bad request body"),
        ("POST", "/populate", [{"name": "a"}], 400, "missing required field: upstream at proxy 1"),
        ("POST", "/populate", [{"name": "a", "upstream": "b:1"}] * 2, 400, "the same name"),
        ("POST", "/proxies/echo/toxics", {"type": "slicer"}, 400, "average_size: expected a number from 1"),
        (
            "POST",
            "/proxies/echo/toxics",
            {"type": "latency", "attributes": {"latency": "5"}},
            400,
            "latency: expected a number",
        ),
        (
            "POST",
            "/proxies/echo/toxics",
            {"type": "latency", "attributes": {"latency": 1e300}},
            400,
            "latency: expected a number",
        ),
        ("POST", "/proxies/echo/toxics", {"type": "timeout", "toxicity": 2}, 400, "from 0 to 1"),
        ("POST", "/proxies/echo/toxics", {"type": "latency", "stream": ""}, 400, "either upstream or"),
    ],
)
def test_a_bad_request_is_told_what_was_wrong(
    control: Control, method: str, path: str, body: object, status: int, error: str
) -> None:
    got, answer = control.ask(method, path, body)
    assert (got, answer["status"]) == (status, status)
    assert error in answer["error"]
    assert "\n" not in answer["error"]


def test_a_port_in_use_is_told_and_leaves_nothing_behind(control: Control) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        where = "{}:{}".format(*taken.getsockname())
        proxy = {"name": "taken", "listen": where, "upstream": str(control.echo)}
        status, answer = control.ask("POST", "/proxies", proxy)
    assert (status, answer["error"]) == (
        500,
        f"{where}: already in use; stop what uses it or choose another port",
    )
    assert control.ask("GET", "/proxies/taken")[0] == 404


def test_browsers_are_refused(control: Control) -> None:
    status, answer = control.ask("GET", "/proxies", agent="Mozilla/5.0 (X11; Linux x86_64)")
    assert (status, answer["error"]) == (403, "User agent not allowed")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        ("Content-Length: 70000", 413),
        ("Content-Length: " + "9" * 5000, 413),
        ("Content-Length: -1", 400),
        ("Content-Length: 2\r\nContent-Length: 2", 400),
        ("Transfer-Encoding: chunked", 411),
        ("X: " + "y" * 9000, 431),
    ],
)
def test_what_cannot_be_read_is_refused(control: Control, head: str, status: int) -> None:
    assert ask_raw(control.where, f"POST /reset HTTP/1.1\r\n{head}\r\n\r\n{{}}".encode()).status == status


def test_stalled_clients_do_not_hold_up_others(control: Control) -> None:
    proxy = control.make()
    with ExitStack() as stack:
        for _ in range(web.MOST_CLIENTS + 2):
            stalled = stack.enter_context(connect(control.where))
            stalled.sendall(b"POST /proxies HTTP/1.1\r\nContent-Length: 100\r\n\r\n{")
        began = time.monotonic()
        assert control.ask("GET", proxy.path)[0] == 200
        assert time.monotonic() - began < web.PATIENCE / 2
        with proxy.connect() as session:
            exchange(session)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ("type", "name", "stream", "toxicity", "attributes", "enabled", "listen")
PATHS = ("/populate", "/proxies/echo", "/proxies/echo/toxics", "/proxies/echo/toxics/a", "/%ff/..//")


def test_garbage_does_not_disturb(engine: str, tmp_path: Path) -> None:
    control = Control(start(engine, tmp_path))

    @given(
        method=st.sampled_from(["GET", "POST", "PATCH", "DELETE"]),
        path=st.sampled_from(PATHS),
        body=st.binary(max_size=50)
        | JSON_VALUES.map(lambda value: json.dumps(value).encode())
        | st.fixed_dictionaries({}, optional=dict.fromkeys(FIELDS, JSON_VALUES)).map(
            lambda value: json.dumps({"type": "latency", **value}).encode()
        ),
    )
    @settings(max_examples=80, deadline=None)
    def check(method: str, path: str, body: bytes) -> None:
        head = f"{method} {path} HTTP/1.1\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        assert ask_raw(control.where, head + body).status in web.REASONS
        assert ask_raw(control.where, body + b"\r\n\r\n").status in web.REASONS

    try:
        check()
        assert control.ask("GET", "/version")[0] == 200
    finally:
        control.daemon.stop()
