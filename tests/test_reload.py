"""SIGHUP, the service manager's notifications and its watchdog, on every engine."""

import os
import signal
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
from daemons import PATIENCE, Daemon, configuration

from services.core.addresses import Address


class Reloadable:
    """A daemon whose configuration file can be written anew, and the manager it reports to."""

    def __init__(self, engine: str, directory: Path) -> None:
        self.engine = engine
        self._directory = directory
        self.manager = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.manager.bind(str(directory / "notify"))
        self.manager.settimeout(PATIENCE)
        self._reloads = 0
        self._refusals = 0

    def start(self, listeners: Sequence[Mapping[str, object]], watchdog: float = 60.0) -> Daemon:
        environment = [f"NOTIFY_SOCKET={self._directory}/notify", f"WATCHDOG_USEC={int(watchdog * 1e6)}"]
        config = configuration(self.engine, listeners)
        self.daemon = Daemon(self._directory, config, ["env", *environment])
        return self.daemon

    def write(self, text: str) -> None:
        (self._directory / "triptych.toml").write_text(text, encoding="utf-8")

    def reload(
        self, listeners: Sequence[Mapping[str, object]], settings: Mapping[str, str] | None = None
    ) -> dict[str, object]:
        self.write(configuration(self.engine, listeners, None, settings))
        os.kill(self.daemon.pid, signal.SIGHUP)
        self._reloads += 1
        return self.daemon.wait_for("config_reloaded", self._reloads)[-1]

    def refuse(self, text: str) -> list[str]:
        self.write(text)
        os.kill(self.daemon.pid, signal.SIGHUP)
        self._refusals += 1
        faults: list[str] = self.daemon.wait_for("config_refused", self._refusals)[-1]["faults"]
        return faults

    def told(self, wanted: str) -> str:
        """The first notification from now on that contains `wanted`."""
        while wanted not in (text := self.manager.recv(4096).decode()):
            pass
        return text


@pytest.fixture
def service(engine: str, tmp_path: Path) -> Iterator[Reloadable]:
    reloadable = Reloadable(engine, tmp_path)
    yield reloadable
    reloadable.manager.close()
    reloadable.daemon.stop()


def echo(name: str, address: object = "127.0.0.1:0") -> dict[str, object]:
    return {"name": name, "address": str(address), "service": "echo"}


def connect(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), PATIENCE)


def exchange(client: socket.socket) -> None:
    client.sendall(b"hello")
    assert client.recv(5) == b"hello"


def free() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Address("tcp", *server.getsockname())


def test_a_reload_adds_and_removes_listeners_and_loses_no_session(service: Reloadable) -> None:
    stays, goes, comes = free(), free(), free()
    service.start([echo("stays", stays), echo("goes", goes)])
    with connect(stays) as on_what_stays, connect(goes) as on_what_goes:
        exchange(on_what_stays)
        exchange(on_what_goes)
        line = service.reload([echo("stays", stays), echo("comes", comes)])
        assert (line["added"], line["removed"], line["kept"]) == (["comes"], ["goes"], ["stays"])
        service.told("READY=1")
        exchange(on_what_stays)
        exchange(on_what_goes)
        with connect(comes) as client, connect(stays) as another:
            exchange(client)
            exchange(another)
        refused = None
        while refused is None:  # the listener goes with the engine's next step
            try:
                connect(goes).close()
            except ConnectionRefusedError as error:
                refused = error
    service.reload([echo("stays", stays), echo("goes", goes)])
    connected = None
    while connected is None:
        try:
            connected = connect(goes)
        except ConnectionRefusedError:
            continue
    with connected:
        exchange(connected)


def test_a_udp_listener_comes_and_goes_too(service: Reloadable) -> None:
    address = free()._replace(transport="udp")
    service.start([echo("tcp")])
    service.reload([echo("tcp"), echo("udp", address)])
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address.host, address.port))
        service.daemon.wait_for("listener_opened", 2)
        exchange_datagram(client)
        service.reload([echo("tcp")])
        service.daemon.wait_for("session_closed", 1, lambda line: line["transport"] == "udp")


def exchange_datagram(client: socket.socket) -> None:
    client.settimeout(0.2)
    for _ in range(int(PATIENCE / 0.2)):
        try:
            client.send(b"hello")
            assert client.recv(100) == b"hello"
        except (ConnectionRefusedError, TimeoutError):
            continue
        else:
            return
    raise AssertionError("no answer")


def test_new_timeouts_hold_for_new_sessions_only(service: Reloadable) -> None:
    address = free()
    service.start([echo("echo", address)])
    with connect(address) as old:
        exchange(old)
        service.reload([echo("echo", address)], {"timeouts.idle": "300ms"})
        service.told("READY=1")
        with connect(address) as new:
            exchange(new)
            with pytest.raises(ConnectionResetError):
                new.recv(1)
        (line,) = service.daemon.wait_for("session_closed")
        assert (line["termination"], line["closed_by"]) == ("cD", "service")
        exchange(old)


def test_a_bad_file_is_refused_with_every_fault_and_the_old_one_stays(service: Reloadable) -> None:
    address, in_use = free(), socket.create_server(("127.0.0.1", 0))
    service.start([echo("echo", address)])
    with in_use, connect(address) as client:
        assert len(service.refuse('engine = "gevent"\nfoo = 1\n')) == 3
        assert service.refuse("[[listener")[0].startswith("not TOML")
        taken = echo("taken", Address("tcp", *in_use.getsockname()))
        faults = service.refuse(configuration(service.engine, [echo("echo", address), taken]))
        assert "already in use" in faults[0]
        other = next(name for name in ("blocking", "twisted") if name != service.engine)
        faults = service.refuse(configuration(other, [echo("echo", address)]))
        assert "only a restart" in faults[0]
        exchange(client)


def test_a_rotated_log_loses_no_line(service: Reloadable, tmp_path: Path) -> None:
    address = free()
    daemon = service.start([echo("echo", address)])
    rotated = tmp_path / "log.jsonl.1"
    with connect(address) as client:
        exchange(client)
    daemon.wait_for("session_closed")
    before = daemon.lines()
    (tmp_path / "log.jsonl").rename(rotated)
    os.kill(daemon.pid, signal.SIGHUP)
    service.told("RELOADING=1")
    service.told("READY=1")
    with connect(address) as client:
        exchange(client)
    daemon.follow_rotation()
    daemon.wait_for("session_closed", 2)
    assert rotated.read_bytes().count(b"\n") == len(before)


def test_the_manager_is_told_what_goes_on(service: Reloadable) -> None:
    address = free()
    daemon = service.start([echo("echo", address)], watchdog=0.6)
    ready = service.told("READY=1")
    assert f"STATUS={service.engine} on {address}; 0 sessions" in ready
    with connect(address) as client:
        exchange(client)
        assert "WATCHDOG=1" in service.told("; 1 sessions")
        os.kill(daemon.pid, signal.SIGTERM)
        service.told("STOPPING=1")
        assert "EXTEND_TIMEOUT_USEC=" in service.told("draining; 1 sessions")
    daemon.ended()


def test_a_daemon_that_hangs_is_silent(service: Reloadable) -> None:
    """The ping comes from the engine's own threads, so a stopped process sends none."""
    daemon = service.start([echo("echo")], watchdog=0.6)
    service.told("WATCHDOG=1")
    os.kill(daemon.pid, signal.SIGSTOP)
    try:
        service.manager.settimeout(0.7)
        with pytest.raises(TimeoutError):
            service.told("nothing that is ever said")
    finally:
        os.kill(daemon.pid, signal.SIGCONT)
        service.manager.settimeout(PATIENCE)
    service.told("WATCHDOG=1")


def test_a_daemon_that_drains_takes_nothing_new_up(service: Reloadable) -> None:
    address = free()
    daemon = service.start([echo("echo", address)])
    with connect(address) as client:
        exchange(client)
        os.kill(daemon.pid, signal.SIGTERM)
        daemon.wait_for("service_draining")
        faults = service.refuse(configuration(service.engine, [echo("echo", address), echo("new")]))
        assert faults == ["this daemon is draining; its successor reads the file"]
        exchange(client)
    daemon.ended()


def test_a_reload_changes_the_faults_of_open_sessions(service: Reloadable) -> None:
    address = free()
    service.start([echo("front", address)])
    with connect(address) as client:
        exchange(client)
        slow = {**echo("front", address), "faults": [{"type": "latency", "delay": "200ms"}]}
        service.reload([slow])
        (line,) = service.daemon.wait_for("faults_changed")
        assert (line["listener"], line["faults"]) == ("front", ["latency_downstream"])
        began = time.monotonic()
        exchange(client)
        assert time.monotonic() - began >= 0.2
        service.reload([slow])
        service.reload([echo("front", address)])
        assert service.daemon.wait_for("faults_changed", 2)[-1]["faults"] == []
        began = time.monotonic()
        exchange(client)
        assert time.monotonic() - began < 0.2


def test_a_reload_that_would_make_a_loop_is_refused(service: Reloadable) -> None:
    address, other = free(), free()
    front = {"name": "front", "address": str(address), "service": "proxy", "pool": "pool"}
    service.start([echo("stays", other)])
    [fault] = service.refuse(
        configuration(service.engine, [echo("stays", other), front], {"pool": [address]})
    )
    assert "lead back to" in fault
    with connect(other) as client:
        exchange(client)
