"""A pool deals, waits, passes over and checks the same way, whichever engine dials."""

import contextlib
import socket
import threading
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon

from services.core.addresses import Address


class Server:
    """Greets every client with its name, and then keeps it until the client ends. `mute` ones accept and
    say nothing.
    """

    def __init__(self, name: bytes, port: int = 0) -> None:
        self.name = name
        self.mute = False
        self.peers: list[str] = []
        self._socket = socket.create_server(("127.0.0.1", port))
        self.address = Address("tcp", *self._socket.getsockname())
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, peer = self._socket.accept()
                self.peers.append(peer[0])
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            if not self.mute:
                client.sendall(self.name)
            client.recv(1)

    def close(self) -> None:
        # wakes the accept
        self._socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._socket.close()


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    found = [Server(b"a"), Server(b"b"), Server(b"c")]
    yield found
    for each in found:
        with contextlib.suppress(OSError):
            each.close()


def serve(
    daemon: StartDaemon,
    engine: str,
    servers: Sequence[Server | Address],
    *,
    upstreams: Sequence[Mapping[str, object]] | None = None,
    lifetime: str | None = None,
    **settings: object,
) -> Daemon:
    addresses = [each.address if isinstance(each, Server) else each for each in servers]
    more = upstreams or [{} for _ in servers]
    pool = [{"address": str(each), **options} for each, options in zip(addresses, more, strict=True)]
    return daemon(
        engine,
        [{"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "pool"}],
        settings={
            "pool.pool.upstreams": pool,
            **{f"pool.pool.{key}": each for key, each in settings.items()},
            **({"timeouts.lifetime": lifetime} if lifetime else {}),
        },
    )


def connect(service: Daemon, source: str = "127.0.0.1") -> socket.socket:
    (address,) = service.addresses
    return socket.create_connection((address.host, address.port), PATIENCE, (source, 0))


def who(service: Daemon, source: str = "127.0.0.1") -> str:
    """The server that a new client comes to; empty where it comes to none."""
    with connect(service, source) as client:
        try:
            return client.recv(1).decode()
        except ConnectionResetError:
            return ""


def test_turns_are_dealt_by_weight(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers, upstreams=[{"weight": 2}, {}, {"backup": True}])
    assert "".join(who(service) for _ in range(6)) == "abaaba"


def test_the_least_busy_is_chosen(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers, balance="least_sessions")
    with connect(service) as one, connect(service) as two:
        taken = {one.recv(1).decode(), two.recv(1).decode()}
        assert taken | {who(service)} == set("abc")
        service.wait_for("session_closed")
        assert {who(service)} | taken == set("abc")


def test_a_client_keeps_its_server(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers, balance="source_hash")
    clients = {source: who(service, source) for source in (f"127.0.0.{number}" for number in range(2, 22))}
    assert len(set(clients.values())) > 1
    assert clients == {source: who(service, source) for source in clients}


def test_a_client_too_many_waits_for_another_to_leave(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    service = serve(daemon, engine, servers[:1], upstreams=[{"sessions": 1}], queue={"timeout": "20s"})
    with connect(service) as first, connect(service) as second:
        assert first.recv(1) == b"a"
        second.settimeout(0.3)
        with pytest.raises(TimeoutError):
            second.recv(1)
        second.settimeout(PATIENCE)
        first.close()
        assert second.recv(1) == b"a"
    lines = service.wait_for("session_closed", 2)
    assert sorted(line["queue_us"] >= 300_000 for line in lines) == [False, True]


def test_who_waits_too_long_is_told_so(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers[:1], upstreams=[{"sessions": 1}], queue={"timeout": "200ms"})
    with connect(service) as first:
        assert first.recv(1) == b"a"
        assert who(service) == ""
    line = service.wait_for("session_closed", predicate=lambda line: line["termination"] == "sQ")[0]
    assert (line["closed_by"], line["upstream"]) == ("service", None)
    assert line["queue_us"] >= 200_000


def test_a_server_that_refuses_is_passed_over_and_comes_back(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    service = serve(daemon, engine, servers[:2], eject={"failures": 2, "time": "500ms"})
    address = servers[0].address
    servers[0].close()
    # nobody notices: another server takes the session
    assert Counter(who(service) for _ in range(8)) == {"b": 8}
    (down, *_) = service.wait_for("upstream_down")
    assert (down["pool"], down["upstream"]) == ("pool", str(address))
    assert "2 dials in a row failed, the last with ECONNREFUSED" in down["reason"]
    servers[0] = Server(b"a", address.port)
    seen = ""
    while "a" not in seen:
        seen += who(service)
    (up,) = service.wait_for("upstream_up")
    assert up["upstream"] == str(address)


def test_a_server_that_accepts_and_never_speaks_is_found_by_its_health_check(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    check = {"interval": "100ms", "timeout": "200ms", "fall": 2, "rise": 2, "send": "?", "expect": "a"}
    service = serve(daemon, engine, servers[:1], health=check)
    assert who(service) == "a"
    servers[0].mute = True
    (down,) = service.wait_for("upstream_down")
    assert "2 checks in a row failed" in down["reason"]
    assert who(service) == ""
    servers[0].mute = False
    service.wait_for("upstream_up")
    assert who(service) == "a"
    line = service.wait_for("session_closed", predicate=lambda line: line["termination"] == "sQ")[0]
    assert line["error"] is None


def test_nobody_there_is_told_at_once(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    servers[0].close()
    service = serve(daemon, engine, servers[:1])
    assert who(service) == ""
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["error"]) == ("SC", "ECONNREFUSED")


def test_connections_come_from_the_source_that_was_given(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    service = serve(daemon, engine, servers[:1], source="127.0.0.9")
    assert who(service) == "a"
    assert servers[0].peers == ["127.0.0.9"]


def test_a_source_of_another_family_is_a_dial_that_fails(
    engine: str, daemon: StartDaemon, servers: list[Server]
) -> None:
    service = serve(daemon, engine, servers[:1], source="::1")
    assert who(service) == ""
    assert service.wait_for("session_closed")[0]["termination"] == "SC"


def test_a_lifetime_ends_a_session(engine: str, daemon: StartDaemon, servers: list[Server]) -> None:
    service = serve(daemon, engine, servers[:1], lifetime="300ms")
    with connect(service) as client:
        assert client.recv(1) == b"a"
        with pytest.raises(ConnectionResetError):
            client.recv(1)
    (line,) = service.wait_for("session_closed")
    assert (line["termination"], line["error"]) == ("KD", "ETIME")
    assert line["duration_us"] >= 300_000
