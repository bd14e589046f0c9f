"""The Twisted reactor: transports, protocols and producers, through their public interfaces only.

The transport owns what waits to be written, and when a FIN may go out. It lets us know that it is full
(`pauseProducing`) or empty again (`resumeProducing`), and that everything is written and the FIN is out
(`writeConnectionLost`). So a relay's end is handed to the transport as soon as it is read, and is
`Finished` when the transport says so; bytes count as sent once a transport that is not full has them.

Listening sockets are read by descriptors of our own and the clients adopted (`IReactorSocket`): a port
of Twisted's accepts and closes clients when descriptors run out, and on a UNIX socket it changes the
mode, cuts the backlog to 50 and removes the path of a socket that is not ours.
"""

import errno
import os
import socket
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Final

from twisted.internet.defer import Deferred, DeferredList, maybeDeferred, succeed
from twisted.internet.error import CannotListenError, ConnectionAborted, ConnectionDone, ConnectionLost
from twisted.internet.interfaces import IHalfCloseableProtocol, IPushProducer, IReadDescriptor
from twisted.internet.main import installReactor
from twisted.internet.protocol import ClientFactory, DatagramProtocol, Protocol
from twisted.logger import LogEvent, LogLevel, formatEvent, globalLogBeginner
from twisted.python.failure import Failure
from zope.interface import implementer

from services import vocabulary
from services.core.datagrams import Datagrams, DatagramSession
from services.core.record import CLIENT, NO_TCP_INFO, UPSTREAM, Loss, Reason, Side
from services.core.service import Service
from services.core.session import (
    Abort,
    Actions,
    BeginRelay,
    Cancel,
    Close,
    Cut,
    Deliver,
    Dial,
    DialFailed,
    Dialled,
    Discard,
    Event,
    Finished,
    Lost,
    Probe,
    ReadPreface,
    Received,
    Send,
    SendEnd,
    Session,
)
from services.engines import sockets
from services.engines.base import CHUNK, DATAGRAM, MOST_ACCEPTS, Listening
from services.engines.deadlines import NEVER

try:
    from twisted.internet.epollreactor import EPollReactor as _Reactor
except ImportError:  # not Linux
    from twisted.internet.pollreactor import PollReactor as _Reactor  # type: ignore[assignment]

# How a transport says that its connection is gone; anything else is an exception of ours.
_GONE: Final = (ConnectionDone, ConnectionLost, ConnectionAborted)


@implementer(IHalfCloseableProtocol, IPushProducer)
class _Leg(Protocol):
    """A session's transport; for the opposite transport, the producer of what is read here."""

    # one of TCP's or UNIX's; the interfaces differ in nothing that is used here
    transport: Any

    def __init__(self, engine: "Engine", session: Session, side: Side) -> None:
        self.engine = engine
        self.session = session
        self.side = side
        self.inbound = session.relay_from(side)
        self.outbound = session.relay_to(side)
        self.opposite = self
        self.dial: Dial | None = None
        self.open = False
        self.released = False
        # the transport holds more than its buffer size, and has paused its producer
        self.full = False
        # the transport held nothing when it was told that no more would come
        self.emptied = False
        # when a look at the inbound relay's line is due, and whether its end has come out
        self.delivers_at = NEVER
        self.delivered = False
        self.info = NO_TCP_INFO

    def connectionMade(self) -> None:  # noqa: N802  the names here and below are Twisted's
        self.open = True
        # a transport holds what exceeds its buffer size by one read: together, the relay's limit
        self.transport.bufferSize = max(1, min(CHUNK, self.inbound.limit // 2))
        if self.dial is not None:
            self.engine._dialled(self, self.dial)  # noqa: SLF001

    def dial_failed(self, reason: Failure) -> None:
        if self.dial is not None:
            self.engine._dial_failed(self, self.dial, reason)  # noqa: SLF001

    def dataReceived(self, data: bytes) -> None:  # noqa: N802
        self.engine._pump(self, data)  # noqa: SLF001  a leg is a part of its engine

    def readConnectionLost(self) -> None:  # noqa: N802
        self.engine._ended(self)  # noqa: SLF001

    def writeConnectionLost(self) -> None:  # noqa: N802
        self.engine._flushed(self)  # noqa: SLF001

    def connectionLost(self, reason: Failure = Failure(ConnectionDone())) -> None:  # noqa: B008, N802
        self.engine._gone(self, reason)  # noqa: SLF001

    def pauseProducing(self) -> None:  # noqa: N802
        self.opposite.full = True
        self.transport.pauseProducing()
        self.inbound.pause(self.engine._clock())  # noqa: SLF001
        self.engine._arm(self.session)  # noqa: SLF001

    def resumeProducing(self) -> None:  # noqa: N802
        self.opposite.full = False
        relay = self.inbound
        if relay.waiting:
            relay.sent(relay.waiting, self.engine._clock())  # noqa: SLF001
        if relay.line is not None:
            self.engine._deliver(self)  # noqa: SLF001
        elif relay.ended_at is None:
            self.transport.resumeProducing()

    def stopProducing(self) -> None:  # noqa: N802
        """The opposite transport is gone; the session decides what becomes of this one."""


class _Adoption(ClientFactory):
    """Gives a transport, accepted or dialled, to the leg that waits for it."""

    noisy = False

    def __init__(self, leg: _Leg) -> None:
        self._leg = leg

    def buildProtocol(self, addr: object) -> _Leg:  # noqa: ARG002, N802
        return self._leg

    def clientConnectionFailed(self, connector: object, reason: Failure) -> None:  # noqa: ARG002, N802
        self._leg.dial_failed(reason)


@implementer(IReadDescriptor)
class _Acceptor:
    """A listening socket as the reactor sees it."""

    def __init__(self, engine: "Engine", listening: Listening) -> None:
        self._engine = engine
        self._listening = listening

    def fileno(self) -> int:
        return self._listening.socket.fileno()

    def doRead(self) -> None:  # noqa: N802
        self._engine._accept(self._listening)  # noqa: SLF001

    def logPrefix(self) -> str:  # noqa: N802
        return self._listening.policy.name

    def connectionLost(self, reason: Failure) -> None:  # noqa: N802
        """The reactor cannot poll it any more; its socket is closed by the drain."""


class _Answerer(DatagramProtocol):
    """A UDP socket: echoes what comes. What the kernel will not take at once is dropped and counted."""

    transport: Any

    def __init__(self, engine: "Engine", datagrams: Datagrams) -> None:
        self._engine = engine
        self.datagrams = datagrams

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: N802
        self._engine._answer(self, datagram, addr)  # noqa: SLF001


class _Outward(DatagramProtocol):
    """A UDP session's own socket to its upstream."""

    transport: Any

    def __init__(
        self, engine: "Engine", answerer: _Answerer, session: DatagramSession, peer: tuple[str, int]
    ) -> None:
        self._engine = engine
        self._answerer = answerer
        self._session = session
        self._peer = peer

    def startProtocol(self) -> None:  # noqa: N802
        address = self._session.address
        assert address is not None
        self.transport.connect(address.host, address.port)

    def datagramReceived(self, datagram: bytes, addr: Any) -> None:  # noqa: ARG002, N802
        self._engine._return(self._answerer, self._session, datagram, self._peer)  # noqa: SLF001

    def connectionRefused(self) -> None:  # noqa: N802
        self._engine._lose_upstream(self._answerer, self._session)  # noqa: SLF001

    def stopProtocol(self) -> None:  # noqa: N802
        """Asked for, or because an ICMP error came with nothing to read: the reactor takes that for the
        end of the port.
        """
        self._engine._lose_upstream(self._answerer, self._session)  # noqa: SLF001


class Engine:
    """See `base.py` for the contract."""

    def __init__(self, listeners: Sequence[Listening], service: Service, clock: Callable[[], float]) -> None:
        self._listeners = list(listeners)
        self._service = service
        self._clock = clock
        self._reactor: Any = _Reactor()
        # the reactor's own clock is the wall's: when that is set, every timer would move
        self._reactor.seconds = clock
        installReactor(self._reactor)
        self._legs: dict[Session, dict[Side, _Leg]] = {}
        self._connectors: dict[tuple[Session, int], Any] = {}
        self._timers: dict[Session, Any] = {}
        self._service_timer: Any = None
        self._acceptors: dict[Listening, _Acceptor] = {}
        self._answerers: dict[Listening, tuple[_Answerer, Any]] = {}
        # of UDP sessions whose datagrams go to an upstream
        self._outward: dict[DatagramSession, tuple[_Outward, Any]] = {}
        self._spare = os.open(os.devnull, os.O_RDONLY)
        self._reason = ""
        self._drained: Deferred[None] = Deferred()

    def run(self) -> None:
        observers: Any = [self._observe]
        globalLogBeginner.beginLoggingTo(observers, redirectStandardIO=False, discardBuffer=True)
        for listening in self._listeners:
            self._listen(listening)
        self._arm_service()
        self._reactor.addSystemEventTrigger("before", "shutdown", self._shut_down)
        self._reactor.run(installSignalHandlers=False)
        os.close(self._spare)

    def stop(self, reason: str) -> None:
        self._reactor.callFromThread(self._stop, reason)

    def listen(self, listening: Listening) -> None:
        self._reactor.callFromThread(self._listen, listening)

    def unlisten(self, listening: Listening) -> None:
        self._reactor.callFromThread(self._drain, listening)

    def check(self, done: Callable[[], None]) -> None:
        self._reactor.callFromThread(done)

    def post(self, function: Callable[[], Actions | None]) -> None:
        self._reactor.callFromThread(lambda: self._perform(function() or ()))

    # Beginning ----------------------------------------------------------------------------------

    def _accept(self, listening: Listening, most: float = MOST_ACCEPTS) -> None:
        accepted = 0
        while accepted < most:
            if not self._service.has_room(listening.policy):
                self._pause(listening, sockets.NO_DESCRIPTORS)
                return
            try:
                sock, peer = listening.socket.accept()
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno in sockets.CLIENT_GONE:
                    continue
                self._pause(listening, sockets.loss_of(error))
                return
            accepted += 1
            sock.setblocking(False)
            now = self._clock()
            admitted = self._service.accept(
                listening.policy,
                sockets.client_address(peer),
                sockets.local_address(listening.address, sock),
                sockets.accept_wait(sock),
                now,
            )
            if admitted is None:
                sockets.refuse(sock)
                continue
            session, actions = admitted
            sockets.complete_options(sock, self._service.dead_peer)
            leg = _Leg(self, session, CLIENT)
            self._legs[session] = {CLIENT: leg}
            if self._adopt(sock, leg):
                leg.transport.pauseProducing()
            else:
                actions = session.handle(Lost(CLIENT, Loss(Reason.RESET, "ECONNRESET")), now)
            self._arm(session)
            self._perform(actions)
            self._arm_service()

    def _adopt(self, sock: socket.socket, leg: _Leg) -> bool:
        """Give the reactor a connected socket; False if it is no longer one. It duplicates the
        descriptor, so where that one was the last there is, a spare one makes room for a moment.
        """
        adopt = partial(self._reactor.adoptStreamConnection, sock.fileno(), sock.family, _Adoption(leg))
        with sock:
            try:
                adopt()
            except OSError as error:
                if error.errno == errno.ENOTCONN:  # reset since it was accepted: it has no peer to name
                    return False
                os.close(self._spare)
                try:
                    adopt()
                except OSError:
                    return False
                finally:
                    sock.close()
                    self._spare = os.open(os.devnull, os.O_RDONLY)
        return True

    def _dial(self, session: Session, dial: Dial) -> None:
        leg = _Leg(self, session, UPSTREAM)
        leg.dial = dial
        host, port = dial.address.host, dial.address.port
        if dial.address.transport == "unix":
            connector = self._reactor.connectUNIX(host, _Adoption(leg), timeout=None)
        else:
            source = (dial.source, 0) if dial.source else None
            connector = self._reactor.connectTCP(host, port, _Adoption(leg), timeout=None, bindAddress=source)
        if leg.dial is not None:  # it has not failed at once
            self._connectors[session, dial.attempt] = connector

    def _dialled(self, leg: _Leg, dial: Dial) -> None:
        self._connectors.pop((leg.session, dial.attempt), None)
        self._legs[leg.session][UPSTREAM] = leg
        sockets.set_options(leg.transport.getHandle(), self._service.dead_peer)
        self._tell(leg.session, Dialled(dial.attempt))

    def _dial_failed(self, leg: _Leg, dial: Dial, reason: Failure) -> None:
        assert reason.value is not None
        self._connectors.pop((leg.session, dial.attempt), None)
        leg.dial = None
        loss = sockets.loss_of(reason.value)
        if loss.reason in {Reason.RESET, Reason.BROKEN}:
            # it was connected and lost again before the reactor looked; there is no transport to read
            if leg.session.awaits(dial.attempt):
                self._legs[leg.session][UPSTREAM] = leg
            self._tell(leg.session, Dialled(dial.attempt))
            self._tell(leg.session, Lost(UPSTREAM, Loss(Reason.RESET, loss.error)))
        else:
            self._tell(leg.session, DialFailed(dial.attempt, loss))

    def _perform(self, actions: Actions) -> None:
        for session, action in actions:
            legs = self._legs.get(session)
            if legs is None:  # an earlier action ended it
                continue
            match action:
                case BeginRelay(rest) if all(leg.open for leg in legs.values()):
                    for leg in legs.values():
                        leg.opposite = legs[leg.inbound.sink]
                        leg.opposite.transport.registerProducer(leg, True)
                        leg.transport.resumeProducing()
                    if rest:
                        self._pump(legs[CLIENT], rest)
                case ReadPreface() if legs[CLIENT].open:
                    legs[CLIENT].transport.resumeProducing()
                case Send(side, data) if legs[side].open:
                    legs[side].transport.write(data)
                case Dial():
                    self._dial(session, action)
                case BeginRelay() | ReadPreface() | Send() | SendEnd():
                    pass  # a leg is lost already; the transport did, after the last byte (`_ended`)
                case Close(side):
                    self._close(legs[side])
                case Abort(side):
                    self._close(legs[side], reset=True)
                case Cancel(attempt):
                    if (session, attempt) in self._connectors:
                        self._connectors.pop((session, attempt)).disconnect()
                case Probe(side):
                    if legs[side].open:
                        self._tell(session, sockets.probe(side, legs[side].transport.getHandle()))
                case Discard(relay):
                    self._discard(legs[relay.source], legs[relay.sink])
                case Deliver(relay):
                    self._deliver(legs[relay.source])
            self._arm(session)

    def _tell(self, session: Session, event: Event) -> None:
        self._perform(session.handle(event, self._clock()))
        self._arm(session)

    # Relaying -----------------------------------------------------------------------------------

    def _read_preface(self, leg: _Leg, data: bytes) -> None:
        actions = leg.session.handle(Received(data), self._clock())
        if leg.open and not leg.session.reads_preface:
            leg.transport.pauseProducing()
        self._perform(actions)
        self._arm(leg.session)

    def _pump(self, leg: _Leg, data: bytes) -> None:
        """Hand over what was read. Handing over may pause us: then it counts as waiting."""
        if leg.session.reads_preface:
            self._read_preface(leg, data)
            return
        now = self._clock()
        relay = leg.inbound
        size = len(data)
        relay.received(size, now)
        if relay.discarding:
            return
        if relay.line is not None:
            relay.carry(data, now)
            self._deliver(leg)
            return
        sink = leg.opposite
        sink.transport.write(data)
        if not sink.full:
            relay.sent(size, now)

    def _deliver(self, leg: _Leg) -> None:
        """Write what comes out of the line of `leg`'s relay; come again when more is due."""
        relay, sink, now = leg.inbound, leg.opposite, self._clock()
        while sink.open and not sink.full and (piece := relay.deliver(now)):
            sink.transport.write(piece)
            if not sink.full:
                relay.sent(len(piece), now)
        if leg.session.over or relay.discarding or leg.delivered:
            return
        if relay.line is not None and relay.line.over and not sink.full:
            leg.delivered = True
            if relay.ended_at is not None and sink.open:
                self._half_close(sink)
            else:
                self._tell(leg.session, Finished(relay))
        elif not sink.full and (due := relay.due()) < leg.delivers_at:
            leg.delivers_at = due
            self._reactor.callLater(max(0.0, due - now), self._deliver_again, leg)
        if leg.open and relay.ended_at is None:
            # a transport reads as much as its buffer size at once
            if relay.room < min(relay.limit, leg.transport.bufferSize) or not relay.wants_read or sink.full:
                leg.transport.pauseProducing()
                relay.pause(now)
            else:
                leg.transport.resumeProducing()
        self._arm(leg.session)

    def _deliver_again(self, leg: _Leg) -> None:
        leg.delivers_at = NEVER
        if not leg.session.over:
            self._deliver(leg)

    def _ended(self, leg: _Leg) -> None:
        """The end of what `leg` sends was read, or nothing more can be."""
        if leg.session.reads_preface:
            self._read_preface(leg, b"")
            return
        relay = leg.inbound
        relay.ended(self._clock())
        if relay.discarding:
            self._tell(leg.session, Finished(relay))
        elif relay.line is not None:
            self._deliver(leg)
        else:
            self._half_close(leg.opposite)
            self._arm(leg.session)

    def _flushed(self, leg: _Leg) -> None:
        """Everything was written to `leg`, and FIN after it."""
        leg.emptied = False
        relay = leg.outbound
        if relay.waiting:
            relay.sent(relay.waiting, self._clock())
        self._tell(leg.session, Finished(relay))

    def _discard(self, source: _Leg, sink: _Leg) -> None:
        """Write nothing more to `sink`, and read on from `source`."""
        if sink.open:
            sink.transport.unregisterProducer()
        sink.full = False
        if source.open and source.inbound.ended_at is None:
            source.transport.resumeProducing()

    def _half_close(self, leg: _Leg) -> None:
        leg.emptied = leg.transport not in self._reactor.getWriters()
        # a transport that still has a producer would ask it for more instead
        leg.transport.unregisterProducer()
        leg.transport.loseWriteConnection()

    # Time ---------------------------------------------------------------------------------------

    def _arm(self, session: Session) -> None:
        if session.over:
            return
        due = session.deadline()
        timer = self._timers.get(session)
        if timer is not None and timer.active():
            if timer.getTime() <= due:
                return
            timer.cancel()
        if due < NEVER:
            delay = max(0.0, due - self._clock())
            self._timers[session] = self._reactor.callLater(delay, self._expire, session)

    def _expire(self, session: Session) -> None:
        self._perform(self._service.expire_session(session, self._clock()))
        self._arm(session)

    def _arm_service(self) -> None:
        due = self._service.deadline()
        timer = self._service_timer
        if timer is not None and timer.active():
            if timer.getTime() <= due:
                return
            timer.cancel()
        delay = max(0.0, due - self._clock())
        self._service_timer = self._reactor.callLater(delay, self._expire_service)

    def _expire_service(self) -> None:
        self._perform(self._service.expire(self._clock()))
        self._arm_service()

    def _observe(self, event: LogEvent) -> None:
        """Twisted's own log: what it says of a failure is a fault; that ports and factories start and
        stop, we say ourselves.
        """
        failure = event.get("log_failure")
        if failure is not None:
            self._service.fault(None, repr(failure.value), failure.getTraceback())
        elif event["log_level"] >= LogLevel.error:
            self._service.fault(None, formatEvent(event), "")

    # Ending -------------------------------------------------------------------------------------

    def _close(self, leg: _Leg, *, reset: bool = False) -> None:
        """Ask the transport to go; it answers with `_gone`."""
        if leg.open and not leg.released:
            leg.released = True
            leg.info = sockets.tcp_info(leg.transport.getHandle())
            if reset:
                leg.transport.abortConnection()
            else:
                leg.transport.loseConnection()
        self._retire(leg.session)

    def _gone(self, leg: _Leg, reason: Failure) -> None:
        """The transport is closed: because it was asked to, or because its connection was lost.

        It does not say which errno it met. A connection lost after its peer's FIN was a send that
        met EPIPE; before it, a reset. A UNIX peer that closes takes both directions at once, before
        the transport can say that its last, empty write is done.
        """
        leg.open = False
        if leg.emptied:
            self._flushed(leg)
        if not leg.released:
            ended = leg.inbound.ended_at is not None
            loss = Loss(Reason.BROKEN, "EPIPE") if ended else Loss(Reason.RESET, "ECONNRESET")
            fault = reason.check(*_GONE) is None
            self._tell(leg.session, Cut("I", type(reason.value).__name__) if fault else Lost(leg.side, loss))
            if not leg.session.over and not ended:
                self._ended(leg)
        self._retire(leg.session)

    def _retire(self, session: Session) -> None:
        """With its last leg, a session that is over is done."""
        legs = self._legs.get(session)
        if legs is None or not session.over or any(leg.open for leg in legs.values()):
            return
        del self._legs[session]
        timer = self._timers.pop(session, None)
        if timer is not None and timer.active():
            timer.cancel()
        infos = [legs[side].info if side in legs else NO_TCP_INFO for side in Side]
        self._service.retire(session, self._clock(), *infos)
        if self._service.drained:
            self._finish()

    def _drain(self, listening: Listening) -> Deferred[Any]:
        """Accept what already waits, then stop listening."""
        closed: Deferred[Any] = succeed(None)
        if listening in self._acceptors:
            self._accept(listening, most=NEVER)
            self._reactor.removeReader(self._acceptors.pop(listening))
        elif listening in self._answerers:
            answerer, port = self._answerers.pop(listening)
            self._perform(answerer.datagrams.close(self._clock()))
            closed = maybeDeferred(port.stopListening)
        listening.socket.close()
        return closed

    def _stop(self, reason: str) -> None:
        if self._service.draining:
            self._service.drain(reason, self._clock())
            self._arm_service()
        else:
            self._reason = reason
            self._reactor.stop()

    def _shut_down(self) -> Deferred[Any]:
        """What the reactor does, and waits for, before it stops."""
        closed = [self._drain(listening) for listening in [*self._acceptors, *self._answerers]]
        self._service.drain(self._reason, self._clock())
        self._arm_service()
        if self._service.drained:
            self._finish()
        return DeferredList([*closed, self._drained])

    def _finish(self) -> None:
        if not self._drained.called:
            self._drained.callback(None)

    # Listeners ----------------------------------------------------------------------------------

    def _listen(self, listening: Listening) -> None:
        if listening.policy.transport == "udp":
            datagrams = Datagrams(listening.policy, listening.address, self._service, self._release)
            answerer = _Answerer(self, datagrams)
            sock = listening.socket
            port = self._reactor.adoptDatagramPort(sock.fileno(), sock.family, answerer, DATAGRAM)
            self._answerers[listening] = (answerer, port)
        else:
            self._acceptors[listening] = _Acceptor(self, listening)
            self._reactor.addReader(self._acceptors[listening])

    def _pause(self, listening: Listening, loss: Loss) -> None:
        """Out of descriptors: open sessions go on, and accepting is tried again a little later."""
        self._reactor.removeReader(self._acceptors[listening])
        self._reactor.callLater(sockets.EXHAUSTED_PAUSE, self._resume, listening)
        self._service.emit(
            vocabulary.ListenerPaused(
                listener=listening.policy.name,
                error=loss.error,
                pause_us=int(sockets.EXHAUSTED_PAUSE * 1e6),
            )
        )

    def _resume(self, listening: Listening) -> None:
        if listening in self._acceptors:
            self._reactor.addReader(self._acceptors[listening])

    def _answer(self, answerer: _Answerer, datagram: bytes, peer: tuple[str, int]) -> None:
        host, port = peer[:2]
        now = self._clock()
        session = answerer.datagrams.received(host, port, len(datagram), now)
        if session is not None and session.upstream is None:
            times = answerer.datagrams.replies(session, now)
            self._at(times, now, self._reply, answerer, session, datagram, peer)
        elif session is not None:
            times = answerer.datagrams.forwards(now)
            self._at(times, now, self._send_on, answerer, session, datagram, peer)
        self._arm_service()

    def _at(self, times: Sequence[float], now: float, send: Callable[..., None], *datagram: Any) -> None:
        for due in times:
            if due > now:
                self._reactor.callLater(due - now, send, *datagram)
            else:
                send(*datagram)

    def _send_on(
        self, answerer: _Answerer, session: DatagramSession, datagram: bytes, peer: tuple[str, int]
    ) -> None:
        """To the upstream, by the session's own port."""
        if not answerer.datagrams.holds(session):  # gone before it was due
            return
        try:
            if session not in self._outward:
                assert session.address is not None
                outward = _Outward(self, answerer, session, peer)
                interface = session.source or ("::" if ":" in session.address.host else "")
                port = self._reactor.listenUDP(0, outward, interface, DATAGRAM)
                self._outward[session] = (outward, port)
            self._outward[session][0].transport.write(datagram)
        except (OSError, CannotListenError) as error:
            answerer.datagrams.dropped()
            if isinstance(error, ConnectionRefusedError):
                self._lose_upstream(answerer, session)

    def _return(
        self, answerer: _Answerer, session: DatagramSession, datagram: bytes, peer: tuple[str, int]
    ) -> None:
        """What the upstream sent back is for the client."""
        now = self._clock()
        times = answerer.datagrams.replies(session, now)
        self._at(times, now, self._reply, answerer, session, datagram, peer)
        self._arm_service()

    def _lose_upstream(self, answerer: _Answerer, session: DatagramSession) -> None:
        self._perform(answerer.datagrams.lost(session, "ECONNREFUSED", self._clock()))

    def _release(self, session: DatagramSession) -> None:
        outward = self._outward.pop(session, None)
        if outward is not None:
            outward[1].stopListening()

    def _reply(
        self, answerer: _Answerer, session: DatagramSession, datagram: bytes, peer: tuple[str, int]
    ) -> None:
        if answerer.transport is None:  # its port was closed before it was due
            return
        try:
            answerer.transport.write(datagram, peer)
        except OSError:
            answerer.datagrams.dropped()
        else:
            session.answered(len(datagram), self._clock())
