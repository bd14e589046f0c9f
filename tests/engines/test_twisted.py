"""What is Deferred in the Twisted engine, on the reactor of the test process."""

import socket
import time
from collections.abc import Iterator
from typing import Any

import pytest
import pytest_twisted
from twisted.internet import reactor
from twisted.internet.defer import Deferred
from twisted.internet.endpoints import TCP4ClientEndpoint, connectProtocol
from twisted.internet.protocol import Protocol
from twisted.internet.task import deferLater

from services import vocabulary
from services.core.addresses import Address
from services.core.admission import Limits
from services.core.service import Gauges, Policy, Service
from services.core.session import Timeouts
from services.engines import twisted
from services.engines.base import Listening


class Instruments:
    def __init__(self) -> None:
        self.events: list[vocabulary.Event] = []

    def emit(self, event: vocabulary.Event, /) -> None:
        self.events.append(event)

    def gauges(self) -> Gauges:
        return Gauges()

    def lines_dropped(self) -> int:
        return 0


class Rig:
    """The engine without its own `run`: the test's reactor is running already."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reactor: Any = reactor
        monkeypatch.setattr(twisted, "_Reactor", lambda: reactor)
        monkeypatch.setattr(twisted, "installReactor", lambda _: None)
        monkeypatch.setattr(reactor, "seconds", time.monotonic)  # put back after the test
        self.instruments = Instruments()
        self.service = Service(
            instruments=self.instruments,
            timeouts=Timeouts(drain=60.0),
            limits=Limits(),
            stats=1000.0,
            epoch=0.0,
            now=time.monotonic(),
        )
        self.engine = twisted.Engine([], self.service, time.monotonic)

    def listen(self, transport: str) -> tuple[Listening, Address]:
        kind = socket.SOCK_DGRAM if transport == "udp" else socket.SOCK_STREAM
        sock = socket.socket(socket.AF_INET, kind)
        sock.bind(("127.0.0.1", 0))
        if transport == "tcp":
            sock.listen()
        sock.setblocking(False)
        address = Address(transport, *sock.getsockname())  # type: ignore[arg-type]
        listening = Listening(Policy("echo", "echo", transport), sock, address)  # type: ignore[arg-type]
        self.engine._listen(listening)
        return listening, address

    def closed_lines(self) -> list[vocabulary.Event]:
        return [event for event in self.instruments.events if isinstance(event, vocabulary.SessionClosed)]


@pytest.fixture
def rig(monkeypatch: pytest.MonkeyPatch) -> Iterator[Rig]:
    made = Rig(monkeypatch)
    yield made
    timer = made.engine._service_timer
    if timer is not None and timer.active():
        timer.cancel()


class Caller(Protocol):
    """A client: `heard` fires with the first bytes that come back, `gone` when the connection ends."""

    transport: Any

    def __init__(self) -> None:
        self.heard: Deferred[bytes] = Deferred()
        self.gone: Deferred[None] = Deferred()

    def connectionMade(self) -> None:
        self.transport.write(b"hello")

    def dataReceived(self, data: bytes) -> None:
        self.heard.callback(data)

    def connectionLost(self, reason: Any = None) -> None:
        self.gone.callback(None)


def call(rig: Rig, address: Address) -> Caller:
    caller = Caller()
    connectProtocol(TCP4ClientEndpoint(rig.reactor, address.host, address.port), caller)
    return caller


@pytest_twisted.ensureDeferred
async def test_the_shutdown_waits_for_the_session_that_is_open(rig: Rig) -> None:
    _, address = rig.listen("tcp")
    caller = call(rig, address)
    assert await caller.heard == b"hello"
    shut_down = rig.engine._shut_down()
    await deferLater(rig.reactor, 0.05)
    assert not shut_down.called, "a session is open"
    caller.transport.loseConnection()
    await caller.gone
    await shut_down
    assert rig.service.drained
    assert len(rig.closed_lines()) == 1


@pytest_twisted.ensureDeferred
async def test_a_drained_udp_port_is_closed_when_its_deferred_fires(rig: Rig) -> None:
    listening, address = rig.listen("udp")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.connect((address.host, address.port))
        client.setblocking(False)
        client.send(b"hello")
        await deferLater(rig.reactor, 0.05)
        assert client.recv(100) == b"hello"
        await rig.engine._drain(listening)
        client.send(b"hello")
        with pytest.raises(ConnectionRefusedError):
            client.recv(100)
    assert len(rig.closed_lines()) == 1, "its sessions end with it"


@pytest_twisted.ensureDeferred
async def test_what_waits_in_the_backlog_is_accepted_before_the_listener_closes(rig: Rig) -> None:
    listening, address = rig.listen("tcp")
    waiting = [socket.create_connection((address.host, address.port)) for _ in range(40)]
    await rig.engine._drain(listening)
    assert rig.service.open_sessions == 40
    for client in waiting:
        client.close()
    while rig.service.open_sessions:
        await deferLater(rig.reactor, 0.01)
    assert len(rig.closed_lines()) == 40


def test_a_stepped_wall_clock_moves_no_timer(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rig.reactor.seconds()
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert 0.0 <= rig.reactor.seconds() - before < 10.0
