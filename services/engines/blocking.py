"""Threads and blocking calls: one thread for each relay, which waits in recv, then in send.

Backpressure is the blocking send. Control is by events under one lock, never held across I/O; a
relay's counters belong to the thread that pumps it. A thread cannot be interrupted, so a session is
ended by waking its threads (SHUT_RD wakes a reader, SO_SNDTIMEO a sender), and the last thread out
closes the sockets: no descriptor is closed while another thread uses it.
"""

import contextlib
import errno
import select
import socket
import struct
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from queue import SimpleQueue
from typing import Any

from services import vocabulary
from services.core.datagrams import Datagrams, DatagramSession
from services.core.record import CLIENT, NO_TCP_INFO, UPSTREAM, Loss, Side
from services.core.relay import Relay
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
from services.engines.base import CHUNK, DATAGRAM, MOST_DATAGRAMS, PREFACE_CHUNK, Listening
from services.engines.deadlines import NEVER, Deadlines, Later

# A sender, or a connecting thread, looks up this often whether its session still wants it.
LOOK_UP = 0.5
_SNDTIMEO = struct.pack("ll", 0, int(LOOK_UP * 1e6))
# A thread that waits for clients or deadlines comes round this often, so that one that hangs is missed.
ROUND = 1.0
MISSED_ROUNDS = 3
# The first read of a relay; it grows to CHUNK once reads fill it, so that idle threads stay small.
FIRST_READ = 4096


# A thread that wants the interpreter asks for it again this often (5 ms by default). Ours give it up at
# every system call anyway; thousands that wake at once would do nothing but ask.
SWITCH_INTERVAL = 0.1


class _Leg:
    """One socket of a session."""

    __slots__ = ("reset", "side", "sock")

    def __init__(self, side: Side, sock: socket.socket) -> None:
        self.side = side
        self.sock = sock
        self.reset = False  # how it is to be closed
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _SNDTIMEO)


class _Conversation:
    """A session's legs and those that are being dialled, and how many threads are at work on them."""

    __slots__ = ("dials", "legs", "threads")

    def __init__(self, client: _Leg) -> None:
        self.legs = {CLIENT: client}
        self.dials: dict[int, _Leg] = {}
        self.threads = 0


class _Acceptor:
    """The thread of one listener."""

    def __init__(self, listening: Listening, work: Callable[["_Acceptor"], None]) -> None:
        self.listening = listening
        self.thread = threading.Thread(target=work, args=(self,), daemon=True)
        self.stopping = sockets.Wakeup()
        self.poll = select.poll()
        self.poll.register(listening.socket, select.POLLIN)
        self.poll.register(self.stopping, select.POLLIN)
        self.seen = 0.0  # when it last came round


class Engine:
    """See `base.py` for the contract."""

    def __init__(self, listeners: Sequence[Listening], service: Service, clock: Callable[[], float]) -> None:
        self._listeners = list(listeners)
        self._service = service
        self._clock = clock
        self._posted: SimpleQueue[Callable[[], None]] = SimpleQueue()
        # guards everything below, the service and the sessions
        self._lock = threading.Lock()
        self._conversations: dict[Session, _Conversation] = {}
        self._deadlines = Deadlines()
        self._later = Later()
        # of UDP sessions whose datagrams go to an upstream
        self._outward: dict[DatagramSession, socket.socket] = {}
        self._rearmed = threading.Condition(self._lock)
        self._stopped = False
        self._acceptors: dict[Listening, _Acceptor] = {}
        # when the timer thread last came round
        self._timer_seen = clock()

    def run(self) -> None:
        sys.setswitchinterval(SWITCH_INTERVAL)
        timer = threading.Thread(target=self._expire, daemon=True)
        timer.start()
        for listening in self._listeners:
            self._listen(listening)
        while not self._service.drained:
            self._posted.get()()
        with self._lock:
            self._stopped = True
            self._rearmed.notify()
        timer.join()

    def stop(self, reason: str) -> None:
        self._posted.put(partial(self._stop, reason))

    def listen(self, listening: Listening) -> None:
        self._posted.put(partial(self._listen, listening))

    def unlisten(self, listening: Listening) -> None:
        self._posted.put(partial(self._unlisten, listening))

    def check(self, done: Callable[[], None]) -> None:
        self._posted.put(partial(self._check, done))

    def post(self, function: Callable[[], Actions | None]) -> None:
        self._posted.put(partial(self._run_posted, function))

    def _run_posted(self, function: Callable[[], Actions | None]) -> None:
        with self._lock:
            actions = function() or ()
            self._rearmed.notify()
            sessions = self._enter(actions)
        self._perform(actions)
        for each in sessions:
            self._leave(each)

    def _check(self, done: Callable[[], None]) -> None:
        seen = [acceptor.seen for acceptor in self._acceptors.values()] + [self._timer_seen]
        if min(seen) > self._clock() - MISSED_ROUNDS * ROUND:
            done()

    # Beginning ----------------------------------------------------------------------------------

    def _accept(self, acceptor: _Acceptor) -> None:
        """The thread of one listener: waits for clients, or for the end."""
        while self._wait(acceptor):
            self._accept_waiting(acceptor.listening)
        self._drain(acceptor)

    def _wait(self, acceptor: _Acceptor) -> bool:
        """Until something waits at the listener, or a round is over; False when it is time to stop."""
        acceptor.seen = self._clock()
        ready = acceptor.poll.poll(ROUND * 1000)
        return all(fd != acceptor.stopping.fileno() for fd, _ in ready)

    def _accept_waiting(self, listening: Listening) -> None:
        """All that wait: this thread has nothing else to do, and the open sessions have their own."""
        while True:
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
            client, local = sockets.client_address(peer), sockets.local_address(listening.address, sock)
            waited = sockets.accept_wait(sock)
            with self._lock:
                now = self._clock()
                admitted = self._service.accept(listening.policy, client, local, waited, now)
                if admitted is not None:
                    session, actions = admitted
                    conversation = self._conversations[session] = _Conversation(_Leg(CLIENT, sock))
                    conversation.threads += 1
                    self._arm(session)
                self._rearmed.notify()
            if admitted is None:
                sockets.refuse(sock)
                continue
            sockets.complete_options(sock, self._service.dead_peer)
            self._perform(actions)
            self._leave(session)

    def _dial(self, session: Session, dial: Dial) -> None:
        """The thread of one dial. connect(2) waits for LOOK_UP at most, and may be called again."""
        try:
            sock = sockets.dial_socket(dial.address, self._service.dead_peer, dial.source)
        except OSError as error:
            self._tell(session, DialFailed(dial.attempt, sockets.loss_of(error)))
            return
        leg = _Leg(UPSTREAM, sock)
        with self._lock:
            if not session.awaits(dial.attempt):  # given up before it began
                sock.close()
                return
            conversation = self._conversations[session]
            conversation.dials[dial.attempt] = leg
        number = errno.EINPROGRESS
        while number in {errno.EINPROGRESS, errno.EALREADY, errno.EAGAIN} and session.awaits(dial.attempt):
            number = sock.connect_ex(sockets.sockaddr(dial.address))
        loss = sockets.loss_of_errno(number) if number else None
        connected = loss is None or number in sockets.CONNECTED_AND_LOST
        with self._lock:
            conversation.dials.pop(dial.attempt, None)
            won = connected and session.awaits(dial.attempt)
            if won:
                conversation.legs[UPSTREAM] = leg
                actions = session.handle(Dialled(dial.attempt), self._clock())
                sessions = self._enter(actions)
        if not won:
            sock.close()
            self._tell(session, DialFailed(dial.attempt, sockets.loss_of_errno(number)))
            return
        self._perform(actions)
        for each in sessions:
            self._leave(each)
        if loss is not None:
            self._tell(session, Lost(UPSTREAM, loss))

    def _perform(self, actions: Actions) -> None:
        for session, action in actions:
            legs = self._conversations[session].legs
            match action:
                case BeginRelay(rest):
                    for relay in session.relays:
                        first = rest if relay.source is CLIENT else b""
                        self._spawn(session, self._pump, relay, legs[relay.source], legs[relay.sink], first)
                case ReadPreface():
                    self._spawn(session, self._read_preface, legs[CLIENT])
                case Send(side, data):
                    self._send_first(session, legs[side], data)
                case Dial():
                    self._spawn(session, self._dial, action)
                case SendEnd(side):
                    self._half_close(legs[side])
                case Close(side):
                    if any(relay.finished_at is None for relay in session.relays):
                        self._close(legs[side])
                case Abort(side):
                    self._close(legs[side], reset=True)
                case Cancel(attempt):
                    self._cancel(session, attempt)
                case Probe(side):
                    self._tell(session, sockets.probe(side, legs[side].sock))
                case Discard() | Deliver():
                    pass  # the relay's own thread sees it

    def _read_preface(self, session: Session, leg: _Leg) -> None:
        """The thread of one PROXY header."""
        while session.reads_preface:
            try:
                data = leg.sock.recv(PREFACE_CHUNK)
            except OSError as error:
                self._tell(session, Lost(leg.side, sockets.loss_of(error)))
                return
            self._tell(session, Received(data))

    def _send_first(self, session: Session, leg: _Leg, data: bytes) -> None:
        try:
            leg.sock.send(data)
        except OSError as error:
            self._tell(session, Lost(leg.side, sockets.loss_of(error)))

    # Relaying -----------------------------------------------------------------------------------

    def _pump(self, session: Session, relay: Relay, source: _Leg, sink: _Leg, first: bytes) -> None:
        """The thread of one relay: waits for bytes, and until the sink has taken them. `first` came with
        a preface.
        """
        recv, clock = source.sock.recv, self._clock
        size = min(FIRST_READ, relay.limit)
        while not session.over:
            try:
                data = first or recv(size if relay.line is None else min(size, relay.room))
                first = b""
            except OSError as error:
                self._tell(session, Lost(source.side, sockets.loss_of(error)))
                data = b""  # if its loss was known: that it can no longer be read is its end
            if session.over:
                return
            if not data:
                relay.ended(clock())
                if relay.line is None:
                    self._tell(session, Finished(relay))
                    return
            else:
                now = clock()
                relay.received(len(data), now)
                if len(data) == size:
                    size = min(4 * size, CHUNK, relay.limit)
                if relay.line is None or relay.discarding:
                    if not relay.discarding:
                        self._send(session, relay, sink, data)
                    continue
                relay.carry(data, now)
            self._deliver(session, relay, source, sink)
            if relay.finished:
                self._tell(session, Finished(relay))
                return

    def _deliver(self, session: Session, relay: Relay, source: _Leg, sink: _Leg) -> None:
        """Send what comes out of the relay's line, each piece at its time, until there is something to
        read again. Waiting for a time or for bytes, whichever comes first, is what poll(2) is for.
        """
        poll = select.poll()
        poll.register(source.sock, select.POLLIN)
        while not session.over:
            now = self._clock()
            if piece := relay.deliver(now):
                self._send(session, relay, sink, piece)
                continue
            if relay.finished:
                return
            wait = min(relay.due() - now, LOOK_UP)
            if not relay.wants_read:
                if relay.ended_at is None:
                    relay.pause(now)
                time.sleep(max(wait, 0.0))
            elif (relay.due() == NEVER and not relay.held) or poll.poll(wait * 1000):
                return

    def _send(self, session: Session, relay: Relay, sink: _Leg, data: bytes) -> None:
        """Until the sink has taken `data`, or is not to get it any more."""
        rest = memoryview(data)
        while not session.over and not relay.discarding:
            # before: by the time this thread runs again, the other may have read the peer's answer
            now = self._clock()
            try:
                sent = sink.sock.send(rest)
            except BlockingIOError:
                relay.blocked()
                relay.pause(now)
                with self._lock:
                    self._arm(session)
            except OSError as error:
                self._tell(session, Lost(sink.side, sockets.loss_of(error)))
            else:
                if sent < len(rest):  # it waited for room until SO_SNDTIMEO
                    relay.pause(now)
                relay.sent(sent, now if relay.paused_at is None else self._clock())
                if sent == len(rest):
                    return
                rest = rest[sent:]

    def _half_close(self, leg: _Leg) -> None:
        # a leg that was reset meanwhile says so to its next read or probe
        with contextlib.suppress(OSError):
            leg.sock.shutdown(socket.SHUT_WR)

    # Time ---------------------------------------------------------------------------------------

    def _arm(self, session: Session) -> None:
        """With the lock held."""
        if not session.over and self._deadlines.arm(session):
            self._rearmed.notify()

    def _expire(self) -> None:
        """The timer thread."""
        while True:
            with self._lock:
                now = self._clock()
                while not self._stopped and now < (due := self._next_deadline()):
                    self._rearmed.wait(min(due - now, ROUND))
                    now = self._timer_seen = self._clock()
                if self._stopped:
                    return
                session = self._deadlines.pop(now)
                later = self._later.pop(now)
                actions = [*self._service.expire(now)]
                if session is not None:
                    actions += self._service.expire_session(session, now)
                    self._arm(session)
                sessions = self._enter(actions)
            self._perform(actions)
            for each in sessions:
                self._leave(each)
            if later is not None:
                later()

    def _next_deadline(self) -> float:
        return min(self._deadlines.next(), self._service.deadline(), self._later.next())

    # Threads ------------------------------------------------------------------------------------

    def _tell(self, session: Session, event: Event) -> None:
        """Hand an event to the session and do what it says."""
        with self._lock:
            actions = session.handle(event, self._clock())
            self._arm(session)
            sessions = self._enter(actions)
        self._perform(actions)
        for each in sessions:
            self._leave(each)

    def _enter(self, actions: Actions) -> set[Session]:
        """With the lock held: this thread is about to work on the legs of these sessions."""
        sessions = {session for session, _ in actions}
        for session in sessions:
            self._conversations[session].threads += 1
            self._arm(session)
        return sessions

    def _spawn(self, session: Session, work: Callable[..., None], *arguments: object) -> None:
        with self._lock:
            self._conversations[session].threads += 1
        thread = threading.Thread(target=self._work, args=(session, work, *arguments), daemon=True)
        try:
            thread.start()
        except RuntimeError:  # the system has no further thread (pthread_create(3): EAGAIN)
            self._tell(session, Cut("R", "EAGAIN"))
            self._leave(session)

    def _work(self, session: Session, work: Callable[..., None], *arguments: object) -> None:
        """A session's thread, from its first line to its last."""
        try:
            work(session, *arguments)
        except Exception as error:  # noqa: BLE001  a bug of ours costs one session
            with self._lock:
                self._service.fault(session, repr(error), traceback.format_exc())
            self._tell(session, Cut("I", type(error).__name__))
        finally:
            self._leave(session)

    def _leave(self, session: Session) -> None:
        """The calling thread is done with the session; the last one out closes its sockets."""
        with self._lock:
            conversation = self._conversations[session]
            conversation.threads -= 1
            if conversation.threads or not session.over:
                return
            del self._conversations[session]
            self._deadlines.forget(session)
        infos = dict.fromkeys(Side, NO_TCP_INFO)
        for side, leg in conversation.legs.items():
            if leg.sock.fileno() >= 0:
                infos[side] = sockets.tcp_info(leg.sock)
                if leg.reset:
                    sockets.reset_on_close(leg.sock)
                leg.sock.close()
        with self._lock:
            self._service.retire(session, self._clock(), infos[CLIENT], infos[UPSTREAM])
            drained = self._service.drained
        if drained:
            self._posted.put(lambda: None)  # `run` looks again

    # Ending -------------------------------------------------------------------------------------

    def _close(self, leg: _Leg, *, reset: bool = False) -> None:
        """Wake the thread that reads the leg; one that sends wakes by itself, and the last one out closes."""
        leg.reset = reset
        with contextlib.suppress(OSError):
            leg.sock.shutdown(socket.SHUT_RD)

    def _cancel(self, session: Session, attempt: int) -> None:
        """Wake the thread that waits in connect."""
        leg = self._conversations[session].dials.get(attempt)
        if leg is not None:
            with contextlib.suppress(OSError):
                leg.sock.shutdown(socket.SHUT_RDWR)

    def _drain(self, acceptor: _Acceptor) -> None:
        """The acceptor's last act: accept what already waits, then stop listening."""
        if acceptor.listening.policy.transport != "udp":
            self._accept_waiting(acceptor.listening)
        acceptor.listening.socket.close()
        acceptor.stopping.close()

    def _stop(self, reason: str) -> None:
        acceptors = list(self._acceptors.values())
        for acceptor in acceptors:
            self._unlisten(acceptor.listening)
        for acceptor in acceptors:
            acceptor.thread.join()
        with self._lock:
            self._service.drain(reason, self._clock())
            self._rearmed.notify()

    # Listeners ----------------------------------------------------------------------------------

    def _listen(self, listening: Listening) -> None:
        work = self._answer if listening.policy.transport == "udp" else self._accept
        acceptor = self._acceptors[listening] = _Acceptor(listening, work)
        acceptor.seen = self._clock()
        acceptor.thread.start()

    def _unlisten(self, listening: Listening) -> None:
        self._acceptors.pop(listening).stopping.wake()

    def _pause(self, listening: Listening, loss: Loss) -> None:
        """Out of descriptors: open sessions go on, and accepting is tried again a little later."""
        self._service.emit(
            vocabulary.ListenerPaused(
                listener=listening.policy.name,
                error=loss.error,
                pause_us=int(sockets.EXHAUSTED_PAUSE * 1e6),
            )
        )
        time.sleep(sockets.EXHAUSTED_PAUSE)

    def _answer(self, acceptor: _Acceptor) -> None:
        """The thread of one UDP socket: echoes what comes, or passes it on. What the kernel will not take
        at once is dropped and counted.
        """
        listening, sock = acceptor.listening, acceptor.listening.socket
        with self._lock:
            datagrams = Datagrams(listening.policy, listening.address, self._service, self._release)
        while self._wait(acceptor):
            for _ in range(MOST_DATAGRAMS):
                try:
                    data, peer = sock.recvfrom(DATAGRAM)
                except BlockingIOError:
                    break
                except OSError:  # ICMP about an earlier reply
                    continue
                with self._lock:
                    now = self._clock()
                    session = datagrams.received(peer[0], peer[1], len(data), now)
                    if session is None:
                        continue
                    proxied = session.upstream is not None
                    times = datagrams.forwards(now) if proxied else datagrams.replies(session, now)
                    self._rearmed.notify()
                send = self._send_on if proxied else self._reply
                self._at(times, now, send, sock, datagrams, session, data, peer)
        with self._lock:
            actions = datagrams.close(self._clock())
            sessions = self._enter(actions)
        self._perform(actions)
        for each in sessions:
            self._leave(each)
        self._drain(acceptor)

    def _at(self, times: Sequence[float], now: float, send: Callable[..., None], *datagram: Any) -> None:
        for due in times:
            if due > now:
                with self._lock:
                    self._later.call(due, partial(send, *datagram))
                    self._rearmed.notify()
            else:
                send(*datagram)

    def _send_on(
        self, sock: socket.socket, datagrams: Datagrams, session: DatagramSession, data: bytes, peer: Any
    ) -> None:
        """To the upstream, by the session's own socket, which a thread of its own listens to."""
        try:
            # nothing here waits, UDP's send neither; without the lock the session could end in between
            with self._lock:
                if not datagrams.holds(session):  # gone before it was due
                    return
                outward = self._outward.get(session)
                if outward is None:
                    assert session.address is not None
                    outward = self._outward[session] = sockets.datagram_socket(
                        session.address, session.source
                    )
                    work = (sock, outward, datagrams, session, peer)
                    threading.Thread(target=self._return, args=work, daemon=True).start()
                outward.send(data)
        except (OSError, RuntimeError) as error:  # RuntimeError: no thread to be had
            with self._lock:
                datagrams.dropped()
            self._lose_upstream(datagrams, session, error)

    def _return(
        self,
        sock: socket.socket,
        outward: socket.socket,
        datagrams: Datagrams,
        session: DatagramSession,
        peer: Any,
    ) -> None:
        """The thread of one session's upstream: what is sent back is for the client."""
        poll = select.poll()
        poll.register(outward, select.POLLIN)
        while True:
            poll.poll()
            with self._lock:
                if self._outward.get(session) is not outward:  # released
                    break
            try:
                data = outward.recv(DATAGRAM)
            except BlockingIOError:
                continue
            except OSError as error:
                self._lose_upstream(datagrams, session, error)
                continue
            with self._lock:
                now = self._clock()
                times = datagrams.replies(session, now)
                self._rearmed.notify()
            self._at(times, now, self._reply, sock, datagrams, session, data, peer)
        outward.close()

    def _lose_upstream(self, datagrams: Datagrams, session: DatagramSession, error: Exception) -> None:
        if isinstance(error, ConnectionRefusedError):
            with self._lock:
                actions = datagrams.lost(session, "ECONNREFUSED", self._clock())
                sessions = self._enter(actions)
            self._perform(actions)
            for each in sessions:
                self._leave(each)

    def _release(self, session: DatagramSession) -> None:
        """With the lock held: wake the session's thread, which closes its socket."""
        outward = self._outward.pop(session, None)
        if outward is not None:
            with contextlib.suppress(OSError):
                outward.shutdown(socket.SHUT_RDWR)

    def _reply(
        self, sock: socket.socket, datagrams: Datagrams, session: DatagramSession, data: bytes, peer: Any
    ) -> None:
        try:
            sock.sendto(data, peer)
        except OSError:
            with self._lock:
                datagrams.dropped()
        else:
            session.answered(len(data), self._clock())
