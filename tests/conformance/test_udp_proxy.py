"""A UDP proxy: sessions by client address, boundaries kept, an end when nobody speaks any more; the same
in every engine, and good enough for real DNS.
"""

import contextlib
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon

from services.core.addresses import Address


class Server:
    """Answers each datagram with its name and the datagram; `!N` is answered by N datagrams."""

    def __init__(self, name: bytes, family: socket.AddressFamily = socket.AF_INET) -> None:
        self.name = name
        self.socket = socket.socket(family, socket.SOCK_DGRAM)
        self.socket.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        self.address = Address("udp", *self.socket.getsockname()[:2])
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                data, peer = self.socket.recvfrom(65_536)
                if data == b"end of the test":
                    return
                for number in range(int(data[1:]) if data[:1] == b"!" else 1):
                    self.socket.sendto(self.name + (data if data[:1] != b"!" else b"%d" % number), peer)

    def close(self) -> None:
        with socket.socket(self.socket.family, socket.SOCK_DGRAM) as last:
            last.sendto(b"end of the test", self.socket.getsockname())
        self._thread.join()
        self.socket.close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found = [Server(b"a"), Server(b"b")]
    yield found
    for each in found:
        if each.socket.fileno() >= 0:
            each.close()


def serve(
    daemon: StartDaemon,
    engine: str,
    *upstreams: Address,
    **settings: object,
) -> Daemon:
    return daemon(
        engine,
        [{"name": "front", "address": "udp:127.0.0.1:0", "service": "proxy", "pool": "pool"}],
        {"pool": upstreams},
        settings=settings,
    )


def client(service: Daemon) -> socket.socket:
    (address,) = service.addresses
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_DGRAM)
    sock.settimeout(PATIENCE)
    sock.connect((address.host, address.port))
    return sock


def ask(sock: socket.socket, data: bytes) -> bytes:
    sock.send(data)
    return sock.recv(65_536)


@pytest.mark.parametrize("data", [b"", b"x", bytes(9000), b"y" * 65_506], ids=len)
def test_a_datagram_arrives_whole_and_its_answer_too(
    engine: str, daemon: StartDaemon, servers: list[Server], data: bytes
) -> None:
    service = serve(daemon, engine, servers[0].address)
    with client(service) as one:
        assert ask(one, data) == b"a" + data


def test_a_client_keeps_its_upstream_and_many_answers_reach_it_in_order(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    service = serve(daemon, engine, servers[0].address, servers[1].address, **{"timeouts.udp_idle": "400ms"})
    with client(service) as one, client(service) as two:
        assert {ask(one, b"")[:1], ask(two, b"")[:1]} == {b"a", b"b"}
        name = ask(one, b"")
        one.send(b"!20")
        assert [one.recv(10) for _ in range(20)] == [name + b"%d" % number for number in range(20)]
        assert ask(one, b"again") == name + b"again"
    closed = service.wait_for("session_closed", 2)
    assert {line["termination"] for line in closed} == {"--"}
    busy = max(closed, key=lambda line: int(line["datagrams_s2c"]))
    assert (busy["datagrams_c2s"], busy["datagrams_s2c"], busy["transport"]) == (4, 23, "udp")
    assert busy["upstream"].startswith("udp:127.0.0.1:")


def test_an_upstream_that_is_not_there_is_heard_of_and_another_takes_over(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    gone = servers[0].address
    servers[0].close()
    service = serve(daemon, engine, gone, servers[1].address, **{"pool.pool.eject": {"failures": 1}})
    with client(service) as one:
        one.send(b"lost")
        (line,) = service.wait_for("session_closed")
        assert (line["termination"], line["closed_by"], line["error"]) == ("SD", "upstream", "ECONNREFUSED")
        assert ask(one, b"x") == b"bx"
    assert service.wait_for("upstream_down")[0]["upstream"] == str(gone)


def test_both_families_go_together(engine: str, daemon: StartDaemon) -> None:
    server = Server(b"6", socket.AF_INET6)
    try:
        service = serve(daemon, engine, server.address)
        with client(service) as one:
            assert ask(one, b"x") == b"6x"
    finally:
        server.close()


def test_a_source_is_answered_only_so_often(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers[0].address, **{"limits.datagram_rate": 3})
    with client(service) as one:
        one.send(b"!50")
        assert [one.recv(10) for _ in range(3)] == [b"a0", b"a1", b"a2"]
        time.sleep(0.5)  # at three a second, the next one has come by now
        assert ask(one, b"x")[:1] == b"a"
    stopped = service.stop()
    assert stopped["datagrams_dropped"] >= 40


@contextlib.contextmanager
def name_server(directory: Path) -> Iterator[Address]:
    """A dnsmasq that knows host1 to host20, once it answers."""
    records = [f"--host-record=host{number}.example.test,192.0.2.{number}" for number in range(1, 21)]
    command = ["dnsmasq", "--keep-in-foreground", "--no-resolv", "--no-hosts", "--conf-file=/dev/null"]
    command += ["--user=root", "--listen-address=127.0.0.1", "--bind-interfaces", "--pid-file=", *records]
    deadline = time.monotonic() + PATIENCE
    while True:
        with socket.socket(type=socket.SOCK_DGRAM) as probe:
            probe.bind(("127.0.0.1", 0))
            address = Address("udp", *probe.getsockname())
        output = directory / "dnsmasq.txt"
        with output.open("wb") as said:
            process = subprocess.Popen([*command, f"--port={address.port}"], stdout=said, stderr=said)
        try:
            # another program may have taken the port meanwhile
            while process.poll() is None:
                if dig(address, "+tries=1", "+time=1", "host1.example.test") == ["192.0.2.1"]:
                    yield address
                    return
                assert time.monotonic() < deadline, output.read_text()
        finally:
            process.terminate()
            process.wait(PATIENCE)
        assert time.monotonic() < deadline, output.read_text()


def dig(server: Address, *arguments: str) -> list[str]:
    command = ["dig", "+short", f"@{server.host}", "-p", str(server.port), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60).stdout.split()


def test_dig_and_a_name_server_do_not_notice(engine: str, daemon: StartDaemon, tmp_path: Path) -> None:
    with name_server(tmp_path) as server:
        service = serve(daemon, engine, server)
        names = [f"host{number}.example.test" for number in range(1, 21)]
        found = dig(service.addresses[0], "+tries=3", *names)
    assert found == [f"192.0.2.{number}" for number in range(1, 21)]
