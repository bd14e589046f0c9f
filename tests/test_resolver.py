"""Names behind upstreams are looked up again: by real daemons, each with an /etc/hosts of its own."""

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon, configuration

from services.core.addresses import Address

# The daemon sees the test's files in a mount namespace of its own, and asks nobody else.
PRIVATE = (
    'mount --bind "$0/hosts" /etc/hosts && mount --bind "$0/nsswitch.conf" /etc/nsswitch.conf && exec "$@"'
)
# Every state of the file has this length: it is replaced in one write, and never seen half.
LENGTH = 200


class Hosts:
    """The names that a test's daemons can resolve."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "hosts"
        self._file.write_text(" " * LENGTH, encoding="utf-8")
        (folder / "nsswitch.conf").write_text("hosts: files\n", encoding="utf-8")
        self.prefix = ["unshare", "--mount", "sh", "-c", PRIVATE, str(folder)]

    def say(self, *lines: str) -> None:
        text = "".join(f"{line}\n" for line in lines).encode().ljust(LENGTH - 1) + b"\n"
        descriptor = os.open(self._file, os.O_WRONLY)
        try:
            assert os.write(descriptor, text) == LENGTH
        finally:
            os.close(descriptor)


@pytest.fixture
def hosts(tmp_path: Path) -> Hosts:
    return Hosts(tmp_path)


@pytest.fixture
def servers() -> Iterator[dict[str, socket.socket]]:
    """By their addresses; they have one port."""
    first = socket.create_server(("127.0.0.1", 0))
    second = socket.create_server(("127.0.0.2", first.getsockname()[1]))
    for each in (first, second):
        each.settimeout(PATIENCE)
    yield {"127.0.0.1": first, "127.0.0.2": second}
    first.close()
    second.close()


def named(servers: dict[str, socket.socket], name: str = "backend.test") -> Address:
    return Address("tcp", name, servers["127.0.0.1"].getsockname()[1])


FRONT = {"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "pool"}
ECHO = {"name": "echo", "address": "127.0.0.1:0", "service": "echo"}


def connect(address: Address) -> socket.socket:
    return socket.create_connection((address.host, address.port), PATIENCE)


def echoes(address: Address) -> bool:
    with connect(address) as client:
        client.sendall(b"hello")
        return client.recv(5) == b"hello"


def test_a_name_that_moves_takes_new_sessions_along_and_leaves_open_ones(
    engine: str, daemon: StartDaemon, hosts: Hosts, servers: dict[str, socket.socket]
) -> None:
    hosts.say("127.0.0.1 backend.test")
    upstream = named(servers)
    settings = {"pool.pool.resolve": "50ms"}
    service = daemon(engine, [FRONT], {"pool": [upstream]}, settings, prefix=hosts.prefix)
    (front,) = service.addresses
    with connect(front) as client, servers["127.0.0.1"].accept()[0] as server:
        hosts.say("127.0.0.2 backend.test")
        (line,) = service.wait_for("upstream_resolved")
        assert (line["pool"], line["upstream"]) == ("pool", str(upstream))
        assert line["addresses"] == [f"127.0.0.2:{upstream.port}"]
        with connect(front), servers["127.0.0.2"].accept()[0]:
            client.sendall(b"here")
            assert server.recv(4) == b"here"
    closed = {line["upstream_ip"] for line in service.wait_for("session_closed", 2)}
    assert closed == {"127.0.0.1", "127.0.0.2"}


def test_a_name_that_goes_keeps_its_addresses_and_is_told_of_once(
    daemon: StartDaemon, hosts: Hosts, servers: dict[str, socket.socket]
) -> None:
    hosts.say("127.0.0.1 backend.test", "127.0.0.1 other.test")
    upstreams = [named(servers), named(servers, "other.test")]
    settings = {"pool.pool.resolve": "50ms", "pool.pool.balance": "first"}
    service = daemon("nonblocking", [FRONT], {"pool": upstreams}, settings, prefix=hosts.prefix)
    (front,) = service.addresses
    hosts.say("127.0.0.2 other.test")
    # of the other name: so the first one was looked for in vain by now, or will be in its next turn
    service.wait_for("upstream_resolved")
    (lost,) = service.wait_for("upstream_unresolved")
    assert (lost["upstream"], lost["level"]) == (str(upstreams[0]), "error")
    assert "unknown host" in lost["reason"]
    assert lost["addresses"] == [f"127.0.0.1:{upstreams[0].port}"]
    with connect(front), servers["127.0.0.1"].accept()[0]:
        pass
    # several further turns
    for host in ("127.0.0.1", "127.0.0.2", "127.0.0.1"):
        before = len(service.lines("upstream_resolved"))
        hosts.say(f"{host} other.test")
        service.wait_for("upstream_resolved", before + 1)
    hosts.say("127.0.0.1 backend.test", "127.0.0.1 other.test")
    service.wait_for("upstream_resolved", predicate=lambda line: line["upstream"] == str(upstreams[0]))
    assert len(service.lines("upstream_unresolved")) == 1


def test_a_daemon_begins_without_an_upstream_whose_name_means_nothing_yet(
    engine: str, daemon: StartDaemon, hosts: Hosts, servers: dict[str, socket.socket]
) -> None:
    settings = {"pool.pool.resolve": "50ms"}
    service = daemon(engine, [FRONT, ECHO], {"pool": [named(servers)]}, settings, prefix=hosts.prefix)
    front, echo = service.addresses
    (line,) = service.lines("upstream_unresolved")
    assert line["addresses"] == []
    with connect(front) as client:
        assert client.recv(1) == b""
    (closed,) = service.wait_for("session_closed")
    assert (closed["termination"], closed["upstream"]) == ("sQ", None)
    assert echoes(echo)
    hosts.say("127.0.0.2 backend.test")
    service.wait_for("upstream_resolved")
    with connect(front), servers["127.0.0.2"].accept()[0]:
        pass


def test_a_reload_with_a_name_that_means_nothing_disturbs_nothing_else(
    tmp_path: Path, hosts: Hosts, servers: dict[str, socket.socket]
) -> None:
    hosts.say("127.0.0.1 backend.test")
    front = {**FRONT, "address": str(free())}
    service = Daemon(
        tmp_path, configuration("nonblocking", [front], {"pool": [named(servers)]}), hosts.prefix
    )
    try:
        with connect(service.addresses[0]) as client, servers["127.0.0.1"].accept()[0] as server:
            hosts.say()
            echo = {**ECHO, "address": str(free())}
            pools = {"pool": [named(servers), named(servers, "typo.test")]}
            file = tmp_path / "triptych.toml"
            file.write_text(configuration("nonblocking", [front, echo], pools), encoding="utf-8")
            os.kill(service.pid, signal.SIGHUP)
            lines = service.wait_for("upstream_unresolved", 2)
            assert {line["upstream"]: len(line["addresses"]) for line in lines} == {
                str(upstream): known for upstream, known in zip(pools["pool"], (1, 0), strict=True)
            }
            assert echoes(Address.parse(echo["address"]))
            with connect(service.addresses[0]), servers["127.0.0.1"].accept()[0]:
                client.sendall(b"here")
                assert server.recv(4) == b"here"
    finally:
        service.stop()


def test_a_name_that_would_lead_back_here_is_not_followed(
    daemon: StartDaemon, hosts: Hosts, servers: dict[str, socket.socket]
) -> None:
    hosts.say("127.0.0.2 backend.test")
    upstream = named(servers)
    servers["127.0.0.1"].close()
    front = {**FRONT, "address": f"127.0.0.1:{upstream.port}"}
    settings = {"pool.pool.resolve": "50ms"}
    service = daemon("nonblocking", [front], {"pool": [upstream]}, settings, prefix=hosts.prefix)
    hosts.say("127.0.0.1 backend.test")
    (line,) = service.wait_for("upstream_unresolved")
    assert "lead back to" in line["reason"]
    with connect(service.addresses[0]), servers["127.0.0.2"].accept()[0]:
        pass


def free() -> Address:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return Address("tcp", *server.getsockname())
