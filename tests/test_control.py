"""The control socket and the commands that use it: what they show and change is what the daemon does, and
nobody who asks for something else can disturb the service.
"""

import json
import os
import pty
import re
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NoReturn, cast

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon, configuration
from hypothesis import given, settings
from hypothesis import strategies as st

from services import control, operate, web
from services.config import ConfigError, read
from services.core.addresses import Address
from services.core.service import Service
from services.engines.base import Engine
from services.vocabulary import EngineFault, Event

STATUS = b'{"version": 1, "ask": "status"}\n'
Run = Callable[..., subprocess.CompletedProcess[str]]


class Server:
    """Listens, and accepts what a test asks for."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.socket.settimeout(PATIENCE)
        self.address = Address("tcp", *self.socket.getsockname())

    def accept(self) -> socket.socket:
        accepted, _ = self.socket.accept()
        accepted.settimeout(PATIENCE)
        return accepted

    def is_left_alone(self) -> bool:
        self.socket.settimeout(0)
        try:
            self.socket.accept()[0].close()
        except BlockingIOError:
            return True
        finally:
            self.socket.settimeout(PATIENCE)
        return False


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found = [Server(), Server()]
    yield found
    for each in found:
        each.socket.close()


@pytest.fixture
def runtime(tmp_path: Path) -> Path:
    """The runtime directory of a test's daemons and commands."""
    return tmp_path


@pytest.fixture
def triptych(runtime: Path) -> Run:
    """Runs the command as its user would."""

    def run(*arguments: str, code: int = 0) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "services.cli", *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={**os.environ, "XDG_RUNTIME_DIR": str(runtime)},
        )
        assert done.returncode == code, done.stderr
        assert (done.stderr == "") is (code == 0), done.stderr
        return done

    return run


FRONT = {"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "pool"}
ECHO = {"name": "echo", "address": "127.0.0.1:0", "service": "echo"}


@pytest.fixture
def start(daemon: StartDaemon, runtime: Path) -> Callable[..., Daemon]:
    def begin(engine: str, listeners: Sequence[dict[str, object]], **more: Any) -> Daemon:
        return daemon(engine, listeners, prefix=["env", f"XDG_RUNTIME_DIR={runtime}"], **more)

    return begin


def socket_of(daemon: Daemon) -> Path:
    (line,) = [line for line in daemon.lines("interface_opened") if line["interface"] == "control"]
    return Path(Address.parse(line["address"]).host)


def connect(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), PATIENCE)


def ask(where: Path, request: bytes = STATUS) -> dict[str, Any]:
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(PATIENCE)
        client.connect(str(where))
        client.sendall(request)
        answer: dict[str, Any] = json.loads(b"".join(iter(lambda: client.recv(65536), b"")))
        assert answer["version"] == 1
        return answer


def status(daemon: Daemon) -> dict[str, Any]:
    found: dict[str, Any] = ask(socket_of(daemon))["status"]
    return found


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# Every engine -----------------------------------------------------------------------------------


def test_status_tells_what_each_listener_pool_and_session_does(
    engine: str, start: Callable[..., Daemon], servers: list[Server], triptych: Run
) -> None:
    udp = {"name": "udp", "address": "udp:127.0.0.1:0", "service": "echo"}
    upstreams = [{"address": str(servers[0].address), "sessions": 1, "weight": 3}]
    options = {
        "pool.pool.upstreams": upstreams,
        "limits.sessions_per_client": 9,
        "limits.accept_rate": 50,
    }
    daemon = start(
        engine,
        [FRONT, {**ECHO, "proxy_protocol": True}, udp],
        settings=options,
    )
    front, echo, datagrams = daemon.addresses
    with connect(front) as client, servers[0].accept() as server, ExitStack() as stack:
        client.sendall(b"hello")
        assert server.recv(5) == b"hello"
        server.sendall(b"hi")
        assert client.recv(2) == b"hi"
        stack.enter_context(connect(front))  # a second one, which waits for the first to go
        stack.enter_context(connect(echo))  # which does not introduce itself
        talker = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        talker.settimeout(PATIENCE)
        talker.sendto(b"a", (datagrams.host, datagrams.port))
        assert talker.recv(10) == b"a"
        wait_until(lambda: len(status(daemon)["sessions"]) == 3)
        told = json.loads(triptych("status", "--json").stdout)
        assert (told["engine"], told["pid"], told["draining"]) == (engine, daemon.pid, False)
        assert told["uptime_us"] > 0
        listeners = {each["listener"]: each for each in told["listeners"]}
        assert listeners["front"]["addresses"] == [str(front)]
        assert {name: each["open_sessions"] for name, each in listeners.items()} == {
            "front": 2,
            "echo": 1,
            "udp": 1,
        }
        (pool,) = told["pools"]
        assert (pool["pool"], pool["queued"], pool["balance"]) == ("pool", 1, "round_robin")
        (upstream,) = pool["upstreams"]
        assert (upstream["state"], upstream["weight"], upstream["sessions"]) == ("up", 3, 1)
        assert (upstream["limit"], upstream["accepted"]) == (1, 1)
        admission = told["admission"]
        assert (admission["sessions"], admission["clients"], admission["most_of_one_client"]) == (4, 1, 4)
        assert admission["sessions_per_client_limit"] == 9
        assert 0 < admission["tokens"] <= 50
        sessions = {each["phase"]: each for each in told["sessions"]}
        assert {phase: each["waits_for"] for phase, each in sessions.items()} == {
            "relaying": "either to send",
            "queue": "a free upstream",
            "header": "client to introduce itself",
        }
        relaying = sessions["relaying"]
        assert (relaying["bytes_c2s"], relaying["bytes_s2c"], relaying["history"]) == (5, 2, "ShDd")
        assert relaying["upstream_address"] == str(servers[0].address)
        client.shutdown(socket.SHUT_WR)
        assert server.recv(1) == b""
        wait_until(lambda: status(daemon)["sessions"][0]["phase"] == "last data")
        (half_closed, *_) = status(daemon)["sessions"]
        assert half_closed["waits_for"] == "upstream to send"
        # the same, as a table
        shown = triptych("status").stdout
        assert f"{engine} (pid {daemon.pid}): up " in shown
        assert re.search(rf"front +{front} +proxy +pool +2 +2 ", shown)
        assert re.search(rf"pool +{servers[0].address} +up +3 +1 +1 ", shown)
        assert half_closed["session"] in shown
        assert max(map(len, shown.splitlines())) < 140


def test_a_stalled_reader_is_who_its_session_waits_for(
    engine: str, start: Callable[..., Daemon], servers: list[Server]
) -> None:
    daemon = start(engine, [FRONT], pools={"pool": [servers[0].address]})
    with connect(daemon.addresses[0]) as client, servers[0].accept() as server:
        client.setblocking(False)

        def stuck() -> bool:
            try:
                while True:
                    client.send(bytes(65536))
            except BlockingIOError:
                (session,) = status(daemon)["sessions"]
                return bool(session["waits_for"] == "upstream to read")

        wait_until(stuck)
        server.close()


def test_a_drained_upstream_keeps_its_sessions_and_gets_no_new_ones_until_enabled(
    engine: str, start: Callable[..., Daemon], servers: list[Server], triptych: Run
) -> None:
    one, two = servers
    daemon = start(engine, [FRONT], pools={"pool": [one.address, two.address]})
    (front,) = daemon.addresses
    with connect(front) as client, one.accept() as server:
        said = triptych("upstream", "drain", "pool", str(one.address)).stdout
        assert said == f"{socket_of(daemon)}: pool {one.address}: draining, weight 1, 1 open sessions\n"
        (line,) = daemon.wait_for("upstream_changed")
        assert (line["upstream"], line["draining"], line["weight"]) == (str(one.address), True, 1)
        for _ in range(3):
            with connect(front), two.accept():
                pass
        assert one.is_left_alone()
        client.sendall(b"still here")
        assert server.recv(10) == b"still here"
        # said again, nothing changes and nothing is logged
        triptych("upstream", "drain", "pool", str(one.address))
        triptych("upstream", "enable", "pool", str(one.address))
        assert len(daemon.wait_for("upstream_changed", 2)) == 2
        with ExitStack() as stack:
            for _ in range(2):
                stack.enter_context(connect(front))
            stack.enter_context(one.accept())
            stack.enter_context(two.accept())


def test_a_session_is_reset_on_both_sides_when_the_operator_closes_it(
    engine: str, start: Callable[..., Daemon], servers: list[Server], triptych: Run
) -> None:
    daemon = start(engine, [FRONT], pools={"pool": [servers[0].address]})
    with (
        connect(daemon.addresses[0]) as client,
        servers[0].accept() as server,
        connect(daemon.addresses[0]) as other,
        servers[0].accept() as its_server,
    ):
        client.sendall(b"a")
        assert server.recv(1) == b"a"
        wait_until(lambda: status(daemon)["sessions"][0]["bytes_c2s"] == 1)
        (identity, _) = [each["session"] for each in status(daemon)["sessions"]]
        assert identity in triptych("session", "close", identity).stdout
        for side in (client, server):
            with pytest.raises(ConnectionResetError):
                side.recv(1)
        other.sendall(b"b")
        assert its_server.recv(1) == b"b"
    (line,) = daemon.wait_for("session_closed", predicate=lambda each: each["session"] == identity)
    assert (line["termination"], line["closed_by"], line["state"]) == ("KD", "service", "RSTR")
    assert "is open" in triptych("session", "close", identity, code=65).stderr


def test_what_the_operator_said_outlives_a_reload_and_the_file_has_the_last_word_on_weights(
    engine: str, servers: list[Server], runtime: Path
) -> None:
    one, two = (str(each.address) for each in servers)
    file = runtime / "triptych.toml"

    def config(*weights: int) -> str:
        upstreams = [
            {"address": each, "weight": weight} for each, weight in zip((one, two), weights, strict=True)
        ]
        return configuration(engine, [FRONT], settings={"pool.pool.upstreams": upstreams})

    daemon = Daemon(runtime, config(1, 1), ["env", f"XDG_RUNTIME_DIR={runtime}"])
    try:
        where = socket_of(daemon)

        def change(**request: object) -> None:
            request = {"version": 1, "pool": "pool", "upstream": one, **request}
            assert "pool" in ask(where, json.dumps(request).encode() + b"\n")

        def state() -> list[tuple[str, int]]:
            (pool,) = ask(where)["status"]["pools"]
            return [(each["state"], each["weight"]) for each in pool["upstreams"]]

        def reload(*weights: int) -> None:
            before = len(daemon.lines("config_reloaded"))
            file.write_text(config(*weights), encoding="utf-8")
            os.kill(daemon.pid, signal.SIGHUP)
            daemon.wait_for("config_reloaded", before + 1)

        change(ask="drain")
        change(ask="weight", weight=7)
        assert state() == [("draining", 7), ("up", 1)]
        reload(1, 5)
        wait_until(lambda: state() == [("draining", 7), ("up", 5)])
        reload(2, 5)
        wait_until(lambda: state() == [("draining", 2), ("up", 5)])
        change(ask="enable")
        assert state() == [("up", 2), ("up", 5)]
    finally:
        daemon.stop()


# Bad clients ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    """One echo, for those who do not talk the protocol."""
    folder = tmp_path_factory.mktemp("standing")
    started = Daemon(folder, configuration("nonblocking", [ECHO]), ["env", f"XDG_RUNTIME_DIR={folder}"])
    yield started
    started.stop()


@given(st.binary(max_size=200).filter(lambda data: b"\n" not in data))
@settings(max_examples=60, deadline=None)
def test_garbage_is_told_so(standing: Daemon, garbage: bytes) -> None:
    answer = ask(socket_of(standing), garbage + b"\n")
    assert answer["fault"] == "invalid"
    assert answer["error"]


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


@given(
    st.dictionaries(
        st.sampled_from(["version", "ask", "pool", "upstream", "weight", "session", "sessions", "more"]),
        st.sampled_from(["status", "drain", "enable", "weight", "close", 1]) | json_values,
    )
)
@settings(max_examples=60, deadline=None)
def test_a_request_that_is_nearly_one_is_answered(standing: Daemon, request: dict[str, object]) -> None:
    answer = ask(socket_of(standing), json.dumps(request).encode() + b"\n")
    assert answer.get("fault") in {"invalid", "unknown"} or "status" in answer


@pytest.mark.parametrize(
    ("request_", "error"),
    [
        pytest.param(b"x" * 5000, "may have 4096 bytes", id="endless"),
        pytest.param(b"[" * 4000 + b"\n", "", id="deep"),
        pytest.param(
            b'{"version": 2, "ask": "status"}\n', "Invalid enum value 2 - at `$.version`", id="version"
        ),
        pytest.param(b'{"version": 1, "ask": "reboot"}\n', "reboot", id="ask"),
        pytest.param(b'{"version": 1, "ask": "status", "sessions": 100000}\n', "<= 200", id="many"),
    ],
)
def test_a_wrong_request_is_told_what_is_wrong(standing: Daemon, request_: bytes, error: str) -> None:
    answer = ask(socket_of(standing), request_)
    assert answer["fault"] == "invalid"
    assert error in answer["error"]


def test_those_who_stall_hold_up_nobody(standing: Daemon) -> None:
    where = str(socket_of(standing))
    with ExitStack() as stack:
        for number in range(2 * web.MOST_CLIENTS):
            stalling = stack.enter_context(socket.socket(socket.AF_UNIX))
            stalling.connect(where)
            stalling.sendall(STATUS[: number % len(STATUS)].rstrip(b"\n"))
        began = time.monotonic()
        assert "status" in ask(Path(where))
        with connect(standing.addresses[0]) as client:
            client.sendall(b"hello")
            assert client.recv(5) == b"hello"
        assert time.monotonic() - began < web.PATIENCE / 2


class Hasty:
    """Of an engine only what the control socket uses; everything is done at once, or nothing ever is."""

    def __init__(self, *, hangs: bool) -> None:
        self._hangs = hangs

    def post(self, function: Callable[[], object]) -> None:
        if not self._hangs:
            function()


def control_of(engine: Hasty, said: list[Event]) -> control.Control:
    def broken() -> NoReturn:
        raise KeyError("surprise")

    return control.Control(
        [],
        engine=cast("Engine", engine),
        service=cast("Service", None),
        held=broken,
        pools=broken,
        identity={},
        uptime_us=lambda: 0,
        clock=time.monotonic,
        emit=said.append,
    )


def test_an_engine_that_gives_no_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control, "PATIENCE", 0.05)
    said: list[Event] = []
    answer = json.loads(control_of(Hasty(hangs=True), said).answer(STATUS) or b"")
    assert (answer["fault"], answer["error"]) == ("unavailable", "the engine gave no answer in time")
    assert said == []


def test_a_fault_of_ours_costs_one_answer_and_is_logged() -> None:
    said: list[Event] = []
    answer = json.loads(control_of(Hasty(hangs=False), said).answer(STATUS) or b"")
    assert answer["fault"] == "unavailable"
    (fault,) = said
    assert isinstance(fault, EngineFault)
    assert fault.error == "KeyError('surprise')"


def test_only_its_owner_may_open_the_socket_and_it_goes_with_the_daemon(
    daemon: StartDaemon, runtime: Path
) -> None:
    where = runtime / "own" / "c.sock"
    where.parent.mkdir(mode=0o755)
    started = daemon(
        "nonblocking",
        [ECHO],
        settings={"control.address": f"unix:{where}"},
        prefix=[
            "sh",
            "-c",
            'umask 0 && exec "$@"',
            "sh",
        ],
    )
    assert stat.S_IMODE(where.stat().st_mode) == 0o600
    assert status(started)["engine"] == "nonblocking"
    started.stop()
    assert not where.exists()


def test_a_place_that_cannot_be_had_by_default_is_no_reason_not_to_serve(
    daemon: StartDaemon, runtime: Path
) -> None:
    started = daemon("nonblocking", [ECHO], prefix=["env", f"XDG_RUNTIME_DIR={runtime}/none"])
    (line,) = started.lines("engine_degraded")
    assert line["instead"] == "no control socket"
    assert "No such file" in line["lacking"]


def test_only_unix_sockets_are_for_control() -> None:
    with pytest.raises(ConfigError, match=r"control.address: a daemon is controlled on its own machine"):
        read({"listener": [ECHO], "control": {"address": "127.0.0.1:1"}})


# The commands -----------------------------------------------------------------------------------


def test_a_change_is_made_in_every_daemon_that_knows_the_upstream(
    start: Callable[..., Daemon], servers: list[Server], triptych: Run
) -> None:
    address = str(servers[0].address)
    proxies = [start(each, [FRONT], pools={"pool": [servers[0].address]}) for each in ("blocking", "twisted")]
    echo = start("nonblocking", [ECHO])
    said = triptych("upstream", "weight", "pool", address, "4").stdout
    assert said.count("weight 4") == 2
    assert str(socket_of(echo)) not in said
    for each in proxies:
        each.wait_for("upstream_changed")
    assert triptych("status").stdout.count("(pid ") == 3
    one = str(socket_of(proxies[0]))
    assert triptych("status", "--socket", one).stdout.count("(pid ") == 1
    # one that hangs is told, and the others are shown all the same
    os.kill(echo.pid, signal.SIGSTOP)
    try:
        hung = triptych("status", code=69)
        assert hung.stdout.count("(pid ") == 2
        assert "no answer in time" in hung.stderr
    finally:
        os.kill(echo.pid, signal.SIGCONT)


def test_a_fault_is_one_line_and_its_exit_code(
    start: Callable[..., Daemon], servers: list[Server], triptych: Run, runtime: Path
) -> None:
    assert "no daemon was found" in triptych("status", code=69).stderr
    start("nonblocking", [FRONT], pools={"pool": [servers[0].address]})
    (runtime / "triptych" / "1.sock").write_text("of a daemon that was killed", encoding="utf-8")
    faults = {
        ("status", "--socket", f"{runtime}/nobody.sock"): (69, "no daemon listens there"),
        ("status", "--watch"): (64, "--watch is for a terminal"),
        ("upstream", "drain", "pol", "x"): (65, 'there is no pool "pol" (there are: pool)'),
        ("upstream", "drain", "pool", "x"): (65, 'in pool "pool" called "x" (there are: 127'),
        ("upstream", "weight", "pool", "x", "0"): (64, "0 is not in the range"),
        ("session", "close", "x"): (65, 'no session "x" is open'),
        ("upstream",): (64, ""),
    }
    for arguments, (code, error) in faults.items():
        done = triptych(*arguments, code=code)
        assert error in done.stderr
        assert arguments == ("upstream",) or done.stderr.count("\n") == 1
    # what answers there is something else
    with socket.socket(socket.AF_UNIX) as other:
        other.bind(str(runtime / "other.sock"))
        other.listen()
        asking = subprocess.Popen(
            [sys.executable, "-m", "services.cli", "status", "--socket", str(runtime / "other.sock")],
            stderr=subprocess.PIPE,
            text=True,
        )
        other.settimeout(PATIENCE)
        accepted, _ = other.accept()
        with accepted:
            assert b"status" in accepted.recv(4096)
            accepted.sendall(b"220 mail.example\r\n")
        _, said = asking.communicate(timeout=PATIENCE)
        assert (asking.returncode, "no control socket of Triptych" in said) == (69, True)


def test_a_live_table_goes_on_until_it_is_interrupted(start: Callable[..., Daemon], runtime: Path) -> None:
    daemon = start("nonblocking", [ECHO])
    main, terminal = pty.openpty()
    watching = subprocess.Popen(
        [sys.executable, "-m", "services.cli", "status", "--watch"],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "XDG_RUNTIME_DIR": str(runtime), "COLUMNS": "160", "LINES": "40"},
    )
    os.close(terminal)
    shown = b""

    def show(wanted: bytes) -> None:
        nonlocal shown
        while wanted not in shown:
            assert select.select([main], [], [], PATIENCE)[0], shown
            shown += os.read(main, 4096)
        shown = shown.partition(wanted)[2]

    try:
        show(b"pid %d" % daemon.pid)
        with connect(daemon.addresses[0]) as client:
            client.sendall(b"x")
            show(b"client to send")
        daemon.stop()
        show(b"no daemon was found")
        watching.send_signal(signal.SIGINT)
        assert watching.wait(PATIENCE) == 0
    finally:
        watching.kill()
        watching.wait()
        os.close(main)


@given(st.integers(0, 2**60))
def test_durations_and_sizes_are_short(number: int) -> None:
    assert len(operate._duration(number)) <= 12  # noqa: SLF001  the column's width
    assert operate.NUMBER.fullmatch(operate._size(number))  # noqa: SLF001  as above


def test_an_own_daemon_is_found_before_a_system_s(tmp_path: Path) -> None:
    environment = {"RUNTIME_DIRECTORY": f"{tmp_path}/a:{tmp_path}/b", "XDG_RUNTIME_DIR": str(tmp_path)}
    assert control.folders(environment) == [tmp_path / "a", tmp_path / "triptych"]
    assert control.folders({}) == []
