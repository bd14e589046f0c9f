"""One thread, one selector, non-blocking sockets: `BlockingIOError` is an ordinary answer.

The loop asks the kernel which sockets are ready and does, for each, what can be done without
waiting: at most one read, sent on at once. Only what the kernel did not take is kept, and only then
interest in writing is registered. Interest is never set by hand: it is derived from the relays.
"""

import contextlib
import errno
import selectors
import socket
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from selectors import EVENT_READ, EVENT_WRITE
from typing import Any

from services import vocabulary
from services.core.datagrams import Datagrams, DatagramSession
from services.core.record import CLIENT, NO_TCP_INFO, UPSTREAM, Loss, Side
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
from services.engines.base import CHUNK, DATAGRAM, MOST_ACCEPTS, MOST_DATAGRAMS, PREFACE_CHUNK, Listening
from services.engines.deadlines import NEVER, Deadlines, Later


class _Leg:
    """One socket of a session, and the two relays that meet there (the same one for echo)."""

    __slots__ = (
        "delivers_at",
        "inbound",
        "info",
        "interest",
        "open",
        "opposite",
        "outbound",
        "pump",
        "session",
        "side",
        "sock",
        "waiting",
    )

    def __init__(self, session: Session, side: Side, sock: socket.socket) -> None:
        self.session = session
        self.side = side
        self.sock = sock
        self.open = True
        self.inbound = session.relay_from(side)
        self.outbound = session.relay_to(side)
        self.opposite = self  # where what is read here goes
        self.waiting = bytearray()  # what the kernel did not take yet
        self.delivers_at = NEVER  # when a look at the inbound relay's line is due
        self.interest = 0
        self.pump: Callable[[int], None] | None = None
        self.info = NO_TCP_INFO


class Engine:
    """See `base.py` for the contract."""

    def __init__(self, listeners: Sequence[Listening], service: Service, clock: Callable[[], float]) -> None:
        self._listeners = set(listeners)
        self._service = service
        self._clock = clock
        self._selector = selectors.DefaultSelector()
        self._wakeup = sockets.Wakeup()
        self._posted: deque[Callable[[], Actions | None]] = deque()
        self._legs: dict[Session, dict[Side, _Leg]] = {}
        # those that are not connected yet, by the numbers of their dials
        self._dials: dict[tuple[Session, int], _Leg] = {}
        self._datagrams: dict[Listening, Datagrams] = {}
        # of UDP sessions whose datagrams go to an upstream
        self._outward: dict[DatagramSession, socket.socket] = {}
        self._deadlines = Deadlines()
        self._service_deadline = service.deadline()
        self._later = Later()

    def run(self) -> None:
        select, clock = self._selector.select, self._clock
        self._selector.register(self._wakeup, EVENT_READ, self._run_posted)
        for listening in self._listeners:
            self._listen(listening)
        while not self._service.drained:
            now, due = clock(), self._next_deadline()
            if now >= due:
                self._expire(now)
                continue
            for key, events in select(due - now):
                try:
                    key.data(events)
                except Exception as error:  # noqa: BLE001  a bug of ours costs one session, not the loop
                    self._fault(key.data, error)
        self._selector.close()
        self._wakeup.close()

    def stop(self, reason: str) -> None:
        self.post(partial(self._stop, reason))

    def listen(self, listening: Listening) -> None:
        self.post(partial(self._listen, listening))

    def unlisten(self, listening: Listening) -> None:
        self.post(partial(self._drain, listening))

    def check(self, done: Callable[[], None]) -> None:
        self.post(done)

    def post(self, function: Callable[[], Actions | None]) -> None:
        self._posted.append(function)
        self._wakeup.wake()

    def _run_posted(self, _events: int) -> None:
        self._wakeup.clear()
        while self._posted:
            self._perform(self._posted.popleft()() or (), self._clock())
        self._service_deadline = self._service.deadline()

    # Beginning ----------------------------------------------------------------------------------

    def _accept(self, listening: Listening, _events: int, most: float = MOST_ACCEPTS) -> None:
        if listening not in self._listeners:  # it went in this very round
            return
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
            self._legs[session] = {CLIENT: _Leg(session, CLIENT, sock)}
            self._deadlines.arm(session)
            self._perform(actions, now)
            self._service_deadline = self._service.deadline()

    def _dial(self, session: Session, dial: Dial, now: float) -> None:
        try:
            sock = sockets.dial_socket(dial.address, self._service.dead_peer, dial.source)
        except OSError as error:
            self._tell(session, DialFailed(dial.attempt, sockets.loss_of(error)), now)
            return
        sock.setblocking(False)
        leg = self._dials[session, dial.attempt] = _Leg(session, UPSTREAM, sock)
        self._connect(leg, dial, 0)

    def _connect(self, leg: _Leg, dial: Dial, _events: int) -> None:
        """Begin, or look after, a connection attempt: connect(2) may be called until it is connected."""
        if not leg.open:
            return
        number = leg.sock.connect_ex(sockets.sockaddr(dial.address))
        if number in {errno.EINPROGRESS, errno.EALREADY}:
            if not leg.interest:
                leg.interest = EVENT_WRITE
                self._selector.register(leg.sock, EVENT_WRITE, partial(self._connect, leg, dial))
            return
        if number == errno.EAGAIN:  # a UNIX listener's backlog is full, and no event tells when it is not
            self._later.call(self._clock() + sockets.EXHAUSTED_PAUSE, partial(self._connect, leg, dial, 0))
            return
        now = self._clock()
        self._unwatch(leg)
        del self._dials[leg.session, dial.attempt]
        loss = sockets.loss_of_errno(number) if number else None
        if loss is None or number in sockets.CONNECTED_AND_LOST:
            self._legs[leg.session][UPSTREAM] = leg
            self._tell(leg.session, Dialled(dial.attempt), now)
            if loss is not None:
                self._tell(leg.session, Lost(UPSTREAM, loss), now)
        else:
            leg.open = False
            leg.sock.close()
            self._tell(leg.session, DialFailed(dial.attempt, loss), now)

    def _perform(self, actions: Actions, now: float) -> None:
        for session, action in actions:
            legs = self._legs.get(session)
            if legs is None:  # an earlier action ended it
                continue
            match action:
                case BeginRelay(rest):
                    for leg in legs.values():
                        leg.opposite = legs[leg.inbound.sink]
                        self._watch(leg, now)
                    if rest:
                        self._pass_on(legs[CLIENT], rest, now)
                case ReadPreface():
                    leg = legs[CLIENT]
                    leg.interest = EVENT_READ
                    self._selector.register(leg.sock, EVENT_READ, partial(self._read_preface, leg))
                case Send(side, data):
                    self._send_first(legs[side], data, now)
                case Dial():
                    self._dial(session, action, now)
                case SendEnd(side):
                    self._half_close(legs[side])
                case Close(side):
                    self._close(legs[side], now)
                case Abort(side):
                    self._close(legs[side], now, reset=True)
                case Cancel(attempt):
                    self._cancel(session, attempt)
                case Probe(side):
                    self._tell(session, sockets.probe(side, legs[side].sock), now)
                case Discard(relay):
                    legs[relay.sink].waiting.clear()
                    self._watch(legs[relay.sink], now)
                    self._watch(legs[relay.source], now)
                case Deliver(relay):
                    self._deliver(legs[relay.source], now)
            if not session.over:
                self._deadlines.arm(session)

    def _tell(self, session: Session, event: Event, now: float) -> None:
        self._perform(session.handle(event, now), now)

    def _read_preface(self, leg: _Leg, _events: int) -> None:
        now = self._clock()
        try:
            data = leg.sock.recv(PREFACE_CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._tell(leg.session, Lost(leg.side, sockets.loss_of(error)), now)
            return
        actions = leg.session.handle(Received(data), now)
        if not leg.session.reads_preface:
            self._unwatch(leg)
        self._perform(actions, now)

    def _send_first(self, leg: _Leg, data: bytes, now: float) -> None:
        try:
            leg.sock.send(data)
        except OSError as error:
            self._tell(leg.session, Lost(leg.side, sockets.loss_of(error)), now)

    # Relaying -----------------------------------------------------------------------------------

    def _pump(self, leg: _Leg, events: int) -> None:
        """`leg` is ready. What was read is sent on at once; interest changes only where that fails."""
        now = self._clock()
        if events & EVENT_WRITE and leg.waiting:
            self._flush(leg, now)
        relay = leg.inbound
        if not events & EVENT_READ or relay.room <= 0 or not leg.open:
            return
        try:
            data = leg.sock.recv(min(CHUNK, relay.room))
        except BlockingIOError:
            relay.blocked()
            return
        except OSError as error:
            self._tell(leg.session, Lost(leg.side, sockets.loss_of(error)), now)
            if not leg.open:
                return
            data = b""  # its loss was known; that it can no longer be read is its end
        if not data:
            relay.ended(now)
            self._watch(leg, now)
            if relay.line is not None:
                self._deliver(leg, now)
            elif relay.finished:
                self._tell(leg.session, Finished(relay), now)
            else:
                self._deadlines.arm(leg.session)
            return
        self._pass_on(leg, data, now)

    def _pass_on(self, leg: _Leg, data: bytes, now: float) -> None:
        """What was read from `leg` is its relay's."""
        relay = leg.inbound
        relay.received(len(data), now)
        if relay.discarding:
            return
        if relay.line is None:
            self._forward(leg, data, now)
        else:
            relay.carry(data, now)
            self._deliver(leg, now)

    def _forward(self, leg: _Leg, data: bytes, now: float) -> None:
        """Send what came from `leg` on; keep what the kernel does not take."""
        relay, sink, size = leg.inbound, leg.opposite, len(data)
        if not sink.waiting:
            try:
                sent = sink.sock.send(data)
            except BlockingIOError:
                relay.blocked()
                sent = 0
            except OSError as error:
                self._tell(leg.session, Lost(sink.side, sockets.loss_of(error)), now)
                return
            if sent:
                relay.sent(sent, now)
            if sent == size:
                return
            data = data[sent:]
        sink.waiting += data
        self._watch(sink, now)
        self._watch(leg, now)
        self._deadlines.arm(leg.session)

    def _deliver(self, leg: _Leg, now: float) -> None:
        """Send on what comes out of the line of `leg`'s relay; come again when more is due."""
        relay, sink = leg.inbound, leg.opposite
        while leg.open and sink.open and not sink.waiting and (piece := relay.deliver(now)):
            self._forward(leg, piece, now)
        if leg.session.over:
            return
        self._watch(leg, now)
        self._deadlines.arm(leg.session)
        if relay.finished:
            self._tell(leg.session, Finished(relay), now)
        elif not sink.waiting and (due := relay.due()) < leg.delivers_at:
            leg.delivers_at = due
            self._later.call(due, partial(self._deliver_again, leg))

    def _deliver_again(self, leg: _Leg) -> None:
        leg.delivers_at = NEVER
        self._deliver(leg, self._clock())

    def _flush(self, leg: _Leg, now: float) -> None:
        relay = leg.outbound
        try:
            sent = leg.sock.send(leg.waiting)
        except BlockingIOError:
            relay.blocked()
            return
        except OSError as error:
            self._tell(leg.session, Lost(leg.side, sockets.loss_of(error)), now)
            return
        del leg.waiting[:sent]
        relay.sent(sent, now)
        source = self._legs[leg.session][relay.source]
        self._watch(leg, now)
        self._watch(source, now)
        if relay.line is not None:
            self._deliver(source, now)
        elif relay.finished:
            self._tell(leg.session, Finished(relay), now)

    def _watch(self, leg: _Leg, now: float) -> None:
        """Derive what the selector should report of `leg` from its relays."""
        interest = 0
        if leg.open:
            if leg.inbound.wants_read:
                interest = EVENT_READ
            elif leg.inbound.ended_at is None:
                leg.inbound.pause(now)
            if leg.outbound.wants_write:
                interest |= EVENT_WRITE
        if interest == leg.interest:
            return
        if not interest:
            self._unwatch(leg)
        elif leg.interest:
            self._selector.modify(leg.sock, interest, leg.pump)
        else:
            leg.pump = leg.pump or partial(self._pump, leg)
            self._selector.register(leg.sock, interest, leg.pump)
        leg.interest = interest

    def _unwatch(self, leg: _Leg) -> None:
        if leg.interest:
            self._selector.unregister(leg.sock)
            leg.interest = 0

    def _half_close(self, leg: _Leg) -> None:
        # a leg that was reset meanwhile says so to its next read or probe
        with contextlib.suppress(OSError):
            leg.sock.shutdown(socket.SHUT_WR)

    # Time ---------------------------------------------------------------------------------------

    def _next_deadline(self) -> float:
        return min(self._deadlines.next(), self._service_deadline, self._later.next())

    def _expire(self, now: float) -> None:
        self._perform(self._service.expire(now), now)
        self._service_deadline = self._service.deadline()
        while (session := self._deadlines.pop(now)) is not None:
            self._perform(self._service.expire_session(session, now), now)
            if not session.over:
                self._deadlines.arm(session)
        while (function := self._later.pop(now)) is not None:
            function()

    def _fault(self, callback: Any, error: Exception) -> None:
        """`callback` is the partial whose call raised: its first argument says whose fault it is."""
        now = self._clock()
        leg = callback.args[0] if isinstance(callback, partial) else None
        session = leg.session if isinstance(leg, _Leg) else None
        self._service.fault(session, repr(error), traceback.format_exc())
        if session is not None:
            self._tell(session, Cut("I", type(error).__name__), now)

    # Ending -------------------------------------------------------------------------------------

    def _close(self, leg: _Leg, now: float, *, reset: bool = False) -> None:
        """Let go of `leg`; with the last one of its session, the session is retired."""
        if leg.open:
            leg.open = False
            self._unwatch(leg)
            leg.info = sockets.tcp_info(leg.sock)
            if reset:
                sockets.reset_on_close(leg.sock)
            leg.sock.close()
        legs = self._legs[leg.session]
        if leg.session.over and not any(each.open for each in legs.values()):
            del self._legs[leg.session]
            self._deadlines.forget(leg.session)
            infos = [legs[side].info if side in legs else NO_TCP_INFO for side in Side]
            self._service.retire(leg.session, now, *infos)

    def _cancel(self, session: Session, attempt: int) -> None:
        leg = self._dials.pop((session, attempt), None)
        if leg is not None:
            leg.open = False
            self._unwatch(leg)
            leg.sock.close()

    def _drain(self, listening: Listening) -> None:
        """Accept what already waits, then stop listening."""
        if listening.policy.transport == "udp":
            now = self._clock()
            self._perform(self._datagrams.pop(listening).close(now), now)
        else:
            self._accept(listening, EVENT_READ, most=NEVER)
        self._ignore(listening)
        listening.socket.close()
        self._listeners.discard(listening)

    def _stop(self, reason: str) -> None:
        for listening in list(self._listeners):
            self._drain(listening)
        self._service.drain(reason, self._clock())

    # Listeners ----------------------------------------------------------------------------------

    def _listen(self, listening: Listening) -> None:
        self._listeners.add(listening)
        if listening.policy.transport == "udp":
            self._datagrams[listening] = Datagrams(
                listening.policy, listening.address, self._service, self._release
            )
        self._await(listening)

    def _await(self, listening: Listening) -> None:
        if listening in self._listeners:
            ready = self._answer if listening.policy.transport == "udp" else self._accept
            self._selector.register(listening.socket, EVENT_READ, partial(ready, listening))

    def _ignore(self, listening: Listening) -> None:
        if listening.socket in self._selector.get_map():
            self._selector.unregister(listening.socket)

    def _pause(self, listening: Listening, loss: Loss) -> None:
        """Out of descriptors: open sessions go on, and accepting is tried again a little later."""
        self._ignore(listening)
        self._later.call(self._clock() + sockets.EXHAUSTED_PAUSE, partial(self._await, listening))
        self._service.emit(
            vocabulary.ListenerPaused(
                listener=listening.policy.name,
                error=loss.error,
                pause_us=int(sockets.EXHAUSTED_PAUSE * 1e6),
            )
        )

    def _answer(self, listening: Listening, _events: int) -> None:
        """Echo the datagrams that wait. What the kernel will not take at once is dropped and counted."""
        if listening not in self._listeners:  # it went in this very round
            return
        sock, datagrams = listening.socket, self._datagrams[listening]
        for _ in range(MOST_DATAGRAMS):
            try:
                data, peer = sock.recvfrom(DATAGRAM)
            except BlockingIOError:
                break
            except OSError:  # ICMP about an earlier reply
                continue
            now = self._clock()
            session = datagrams.received(peer[0], peer[1], len(data), now)
            if session is None:
                continue
            if session.upstream is None:
                self._at(datagrams.replies(session, now), now, self._reply, listening, session, data, peer)
            else:
                self._at(datagrams.forwards(now), now, self._send_on, listening, session, data, peer)
        self._service_deadline = self._service.deadline()

    def _at(self, times: Sequence[float], now: float, send: Callable[..., None], *datagram: Any) -> None:
        for due in times:
            if due > now:
                self._later.call(due, partial(send, *datagram))
            else:
                send(*datagram)

    def _send_on(self, listening: Listening, session: DatagramSession, data: bytes, peer: Any) -> None:
        """To the upstream, by the session's own socket."""
        datagrams = self._datagrams.get(listening)
        if datagrams is None or not datagrams.holds(session):  # gone before it was due
            return
        try:
            sock = self._outward.get(session)
            if sock is None:
                assert session.address is not None
                sock = self._outward[session] = sockets.datagram_socket(session.address, session.source)
                self._selector.register(
                    sock, EVENT_READ, partial(self._return, listening, session, sock, peer)
                )
            sock.send(data)
        except OSError as error:
            datagrams.dropped()
            self._lose_upstream(datagrams, session, error)

    def _return(
        self, listening: Listening, session: DatagramSession, sock: socket.socket, peer: Any, _events: int
    ) -> None:
        """What the upstream sent back is for the client."""
        datagrams = self._datagrams[listening]
        for _ in range(MOST_DATAGRAMS):
            try:
                data = sock.recv(DATAGRAM)
            except BlockingIOError:
                break
            except OSError as error:
                self._lose_upstream(datagrams, session, error)
                return
            now = self._clock()
            self._at(datagrams.replies(session, now), now, self._reply, listening, session, data, peer)
        self._service_deadline = self._service.deadline()

    def _lose_upstream(self, datagrams: Datagrams, session: DatagramSession, error: OSError) -> None:
        if error.errno == errno.ECONNREFUSED:
            now = self._clock()
            self._perform(datagrams.lost(session, "ECONNREFUSED", now), now)

    def _release(self, session: DatagramSession) -> None:
        sock = self._outward.pop(session, None)
        if sock is not None:
            self._selector.unregister(sock)
            sock.close()

    def _reply(self, listening: Listening, session: DatagramSession, data: bytes, peer: Any) -> None:
        datagrams = self._datagrams.get(listening)
        if datagrams is None:  # its listener went before it was due
            return
        try:
            listening.socket.sendto(data, peer)
        except OSError:
            datagrams.dropped()
        else:
            session.answered(len(data), self._clock())
