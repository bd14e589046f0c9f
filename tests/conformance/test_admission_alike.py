"""Rule 23: a limit refuses at once and with a line, in every engine; nobody else notices."""

import socket
import time
from collections.abc import Mapping

import pytest
from conftest import StartDaemon
from daemons import PATIENCE, Daemon, Line

from services.core.addresses import Address


def serve(
    daemon: StartDaemon, engine: str, limits: Mapping[str, object], **listener: object
) -> tuple[Daemon, Address]:
    started = daemon(
        engine,
        [{"name": "front", "address": "127.0.0.1:0", "service": "echo", **listener}],
        settings={f"limits.{key}": value for key, value in limits.items()},
    )
    return started, started.addresses[0]


def connect(address: Address, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection((address.host, address.port), PATIENCE, (source, 0))


def echoes(client: socket.socket) -> bool:
    client.sendall(b"hello")
    return client.recv(5) == b"hello"


def is_served(address: Address, source: str = "127.0.0.1") -> bool:
    """Whether a new client gets an answer; a refusal is a reset, which may even meet its connect."""
    try:
        with connect(address, source) as client:
            return echoes(client)
    except ConnectionError:
        return False


def refusal(service: Daemon) -> Line:
    [line] = service.wait_for("session_refused")
    assert (line["listener"], line["state"], line["termination"], line["closed_by"]) == (
        "front",
        "REJ",
        "PQ",
        "service",
    )
    return line


def test_more_sessions_than_the_limit_are_reset(engine: str, daemon: StartDaemon) -> None:
    service, address = serve(daemon, engine, {"sessions": 2})
    with connect(address) as first, connect(address) as second:
        assert echoes(first)
        assert echoes(second)
        assert not is_served(address)
        assert refusal(service)["reason"] == "2 sessions are open"
        assert echoes(first)
    service.wait_for("session_closed", 2)
    assert is_served(address)


def test_a_client_takes_no_more_than_its_share(engine: str, daemon: StartDaemon) -> None:
    service, address = serve(daemon, engine, {"sessions_per_client": 1})
    with connect(address) as first:
        assert echoes(first)
        assert not is_served(address)
        assert is_served(address, "127.0.0.2")
    line = refusal(service)
    assert (line["client_ip"], line["reason"]) == ("127.0.0.1", "1 sessions of 127.0.0.1 are open")


def test_who_is_on_the_deny_list_is_reset(engine: str, daemon: StartDaemon) -> None:
    service, address = serve(daemon, engine, {}, deny=["127.0.0.2/32"])
    assert is_served(address)
    assert not is_served(address, "127.0.0.2")
    assert "deny list" in refusal(service)["reason"]


def test_a_rush_beyond_the_rate_is_reset_and_later_clients_are_served(
    engine: str, daemon: StartDaemon
) -> None:
    service, address = serve(daemon, engine, {"accept_rate": 20, "accept_burst": 5})
    served = sum(is_served(address) for _ in range(30))
    assert 5 <= served < 30
    deadline = time.monotonic() + PATIENCE
    while not is_served(address):
        assert time.monotonic() < deadline
    assert "20 new sessions a second" in service.lines("session_refused")[0]["reason"]


@pytest.mark.parametrize("limits", [{"sessions": 1}, {"sessions_per_client": 1}])
def test_datagrams_of_a_client_too_many_are_not_answered(
    engine: str, daemon: StartDaemon, limits: Mapping[str, object]
) -> None:
    service, address = serve(daemon, engine, limits, address="udp:127.0.0.1:0")
    with socket.socket(type=socket.SOCK_DGRAM) as first, socket.socket(type=socket.SOCK_DGRAM) as second:
        for client in (first, second):
            client.settimeout(PATIENCE)
            client.sendto(b"hello", (address.host, address.port))
        assert first.recv(5) == b"hello"
        refusal(service)
        first.sendto(b"again", (address.host, address.port))
        assert first.recv(5) == b"again"
