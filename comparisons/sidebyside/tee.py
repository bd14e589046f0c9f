"""The front of `triptych shadow`: a client's bytes go to every engine, one engine's answer to the client, and
the other answers to a comparison.

It is no fourth engine and no proxy for its own sake. Its one rule is that the client meets the answering
engine and nobody else:

- the client is read as fast as the answering engine takes its bytes, and that engine as fast as the client
  takes its answer. Nothing ever waits for a shadow;
- in every turn of the loop all clients and their answers come first, then the shadows;
- what a shadow has not taken, and what of one answer has not been matched by the other, is kept up to
  `buffer` bytes each. A shadow that leaves more of the client's bytes untaken, or whose answer falls back
  further, is reset (`behind`). One whose answer runs ahead further is not read until the answering engine
  has caught up; if that has not come within `patience`, it is reset (`ahead`);
- a shadow is talked to as the client would: bytes that the client sent after so much of the answer go to it
  after as much of its own. A server that is told the next thing before it has answered the last one may object
  (PostgreSQL ends a connection on which anything follows the request for TLS before its answer). An answer that
  is shorter for good holds that up for 0.2 s once, not at every turn;
- each engine is told by a PROXY header (version 2) who the client is, and the session's id as its `pair`: so
  the engines' own logs name the client, and their lines of one session can be joined;
- half-close goes to all, a client's reset to all as a reset, the answering engine's end to the client as
  what it was. When the client is served, the shadows have `patience` to end too.

Sockets are told of by edges (EPOLLET): a flag remembers that there is something to read or room to write
until the kernel says otherwise. So nothing is registered anew to pause or resume, and a peer's reset is
heard of while its bytes are not read.
"""

import contextlib
import errno
import heapq
import itertools
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

from comparisons.sidebyside.streams import Comparison, Ended, Normaliser
from services.core.addresses import Address
from services.core.preface import header
from services.core.record import session_id
from services.core.session import Timeouts
from services.endpoints import Listener, bound_address
from services.engines.sockets import (
    CLIENT_GONE,
    EXHAUSTED_PAUSE,
    client_address,
    dial_socket,
    reset_on_close,
    set_options,
    sockaddr,
)

# read at once; what Twisted reads too
CHUNK = 64 * 1024
# kept for the client or for the answering engine before the other one is paused
HELD = 256 * 1024
# new clients a turn, so that a burst of them does not hold up those that are here
ACCEPTS = 16
# a shadow that has said less than the answering engine, and nothing for so long, has no more to say for now
PACE = 200_000_000  # nanoseconds
# the daemons' default: a silent peer is asked for, and given up like theirs
DEAD_PEER = Timeouts().idle

EDGES = select.EPOLLIN | select.EPOLLOUT | select.EPOLLRDHUP | select.EPOLLET
OVER = select.EPOLLRDHUP | select.EPOLLHUP | select.EPOLLERR


class Target(NamedTuple):
    """One engine, whose listener reads the PROXY protocol: `name` is the engine's or "control"; the first of
    several is the answering one.
    """

    name: str
    engine: str
    address: Address


class Leg:
    """One socket of a session, which never blocks."""

    __slots__ = (
        "broken",
        "ended",
        "finishing",
        "over",
        "queue",
        "queued",
        "readable",
        "reset",
        "socket",
        "writable",
    )

    def __init__(self, sock: socket.socket) -> None:
        self.socket = sock
        self.readable = self.writable = False
        # its last bytes are in the kernel's buffer, if not read yet: a short read is not the last one
        self.over = False
        # what is sent is lost: the peer has reset the connection, or is gone
        self.broken = False
        # sending has taken the error that reading would have told
        self.reset = False
        # how its bytes ended
        self.ended: Ended | None = None
        self.queue: deque[bytes | memoryview] = deque()
        self.queued = 0
        # a FIN is due once the queue is empty
        self.finishing = False

    def tell(self, events: int) -> None:
        """What the kernel says of it."""
        if events & (select.EPOLLIN | OVER):
            self.readable = True
        if events & select.EPOLLOUT:
            self.writable = True
        if events & OVER:
            self.over = True
        if events & select.EPOLLERR:
            self.broken = True

    def read(self) -> bytes:
        """What is there, at most a chunk. Nothing: it has ended, or is not readable any more."""
        try:
            data = self.socket.recv(CHUNK)
        except BlockingIOError:
            self.readable = False
            return b""
        except ConnectionRefusedError:
            self.ended, self.broken = "refused", True
            return b""
        except OSError:
            # a reset, or a peer that has been silent for too long
            self.ended, self.broken = "rst", True
            return b""
        if not data:
            self.ended = "rst" if self.reset else "fin"
        elif len(data) < CHUNK and not self.over:
            self.readable = False
        return data

    def put(self, data: bytes) -> None:
        """To be sent, after what waits already."""
        if not self.broken:
            self.queue.append(data)
            self.queued += len(data)

    def flush(self) -> None:
        """Send what there is room for."""
        queue = self.queue
        while queue and self.writable and not self.broken:
            data = queue[0]
            try:
                sent = self.socket.send(data)
            except BlockingIOError:
                self.writable = False
                return
            except OSError as error:
                self.broken = True
                # EPIPE: its FIN came before, and is what reading will tell
                self.reset = error.errno != errno.EPIPE
                break
            self.queued -= sent
            if sent == len(data):
                queue.popleft()
            else:
                queue[0] = memoryview(data)[sent:]
        if self.broken:
            queue.clear()
            self.queued = 0
        elif self.finishing and not queue and self.writable:
            self.finishing = False
            try:
                self.socket.shutdown(socket.SHUT_WR)
            except OSError:
                self.broken = True

    @property
    def drained(self) -> bool:
        """Whether all that it was given has been sent, or never will be."""
        return self.broken or not (self.queue or self.finishing)


class Answer(Leg):
    """The leg to one engine, with what is told of its answer; times are nanoseconds since the session began."""

    __slots__ = (
        "closing",
        "comparison",
        "first_byte",
        "held_since",
        "last_byte",
        "max_gap",
        "missing",
        "received",
        "target",
        "untold",
        "untold_bytes",
    )

    def __init__(self, sock: socket.socket, target: Target, comparison: Comparison | None) -> None:
        super().__init__(sock)
        self.target = target
        # with the answering engine, which has none itself
        self.comparison = comparison
        # the order of closing, in Zeek's letters: F the client's FIN was passed on, f its FIN, r its reset
        self.closing = ""
        self.received = 0
        self.first_byte: int | None = None
        self.last_byte = 0
        self.max_gap = 0
        # it is not read, since it is so far ahead
        self.held_since: int | None = None
        # what the client has sent and it is not to hear yet: after how much of an answer that was, and when.
        # No bytes: FIN.
        self.untold: deque[tuple[bytes, int, int]] = deque()
        self.untold_bytes = 0
        # so much shorter than the answer its own seems to be
        self.missing = 0

    def take(self, age: int) -> bytes:
        """`read`, and what there is to tell of it."""
        data = self.read()
        if data:
            self.received += len(data)
            if self.first_byte is None:
                self.first_byte = age
            else:
                self.max_gap = max(self.max_gap, age - self.last_byte)
            self.last_byte = age
        elif self.ended:
            self.note_end()
        return data

    def hold(self, data: bytes, after: int, age: int) -> None:
        """To be told once it has said as much as the client had heard."""
        self.untold.append((data, after, age))
        self.untold_bytes += len(data)

    def tell_on(self, age: int) -> None:
        """Put what it may hear now."""
        while self.untold:
            data, after, since = self.untold[0]
            if self.received >= after:
                self.missing = 0
            elif self.received + self.missing < after and not self.ended:
                if age < max(since, self.last_byte) + PACE:
                    return
                self.missing = after - self.received
            self.untold.popleft()
            self.untold_bytes -= len(data)
            if data:
                self.put(data)
            else:
                self.finishing = True

    def note_end(self) -> None:
        self.closing += {"fin": "f", "rst": "r"}.get(self.ended or "", "")

    def flush(self) -> None:
        was_finishing = self.finishing
        super().flush()
        if was_finishing and not self.finishing and not self.broken:
            self.closing += "F"


class Session:
    """One client, and the engines that get its bytes. Over when `settled`."""

    def __init__(
        self,
        client: Leg,
        peer: Address | None,
        answers: Sequence[Answer],
        buffer: int,
        patience: int,
        forget: Callable[[Leg], None],
    ) -> None:
        self.id = session_id(time.time())
        self.peer = peer
        self.client = client
        self.answers = answers
        self.answer, *self.others = answers
        self.received = 0
        # the client is being served
        self.open = True
        self.settled = False
        # nanoseconds until the client was served
        self.duration = 0
        # when the next look at it is due, if one is
        self.reminded: int | None = None
        self._began = time.monotonic_ns()
        self._buffer, self._patience, self._forget = buffer, patience, forget
        # of the answer, for the comparisons
        self._fresh: list[bytes] = []
        self._closed: set[Leg] = set()
        # when the shadows' patience is over
        self._until: int | None = None

    def serve(self, now: int) -> bool:
        """The client and its answer. Whether there is more to do at once."""
        if not self.open:
            return False
        client, answer = self.client, self.answer
        answer.flush()
        client.flush()
        if client.readable and not client.ended:
            if answer.queued < HELD:
                data = client.read()
                if data:
                    self.received += len(data)
                    answer.put(data)
                elif client.ended == "fin":
                    answer.finishing = True
                if data or client.ended == "fin":
                    answer.flush()
                    # what is queued for it the client has not heard
                    heard = answer.received - client.queued
                    for each in self.others:
                        if each not in self._closed:
                            each.hold(data, heard, now - self._began)
            elif client.broken:
                client.ended = "rst"
        if answer.readable and not answer.ended:
            if client.queued < HELD:
                data = answer.take(now - self._began)
                if data:
                    self._fresh.append(data)
                    client.put(data)
                elif answer.ended == "fin":
                    client.finishing = True
                client.flush()
            elif answer.broken:
                answer.ended = "rst"
                answer.note_end()
        self._conclude(now)
        return (client.readable and not client.ended and answer.queued < HELD) or (
            answer.readable and not answer.ended and client.queued < HELD
        )

    def shadow(self, now: int) -> bool:
        """The comparisons. Whether there is more to do at once."""
        fresh, self._fresh = self._fresh, []
        more = False
        for each in self.others:
            comparison = each.comparison
            assert comparison is not None
            for data in fresh:
                comparison.answer(data)
            if self.answer.ended:
                comparison.end_answer(whole=self.answer.ended == "fin")
            if each not in self._closed:
                more |= self._follow(each, comparison, now)
            if each.ended:
                comparison.end_reply(whole=each.ended == "fin")
        self.settled = not self.open and self._closed.issuperset(self.others)
        return more

    def expire(self, now: int) -> None:
        """A time has come that `due` asked for."""
        for each in self.others:
            late = each.held_since is not None and now >= each.held_since + self._patience
            # while the client does not read, nobody can catch up
            if late and each not in self._closed and self.client.queued < HELD:
                self._detach(each, "ahead")
        if self._until is not None and now >= self._until:
            for each in self.others:
                if each not in self._closed:
                    self._detach(each, "timeout")

    def due(self, now: int) -> int | None:
        """When to look again at what may not have happened by then."""
        times = []
        for each in self.others:
            if each not in self._closed:
                if each.held_since is not None:
                    times.append(each.held_since + self._patience)
                if each.untold:
                    times.append(self._began + max(each.untold[0][2], each.last_byte) + PACE)
        if self._until is not None:
            times.append(self._until)
        # one that is late waits for the client: look again after as long
        return min((at if at > now else now + self._patience for at in times), default=None)

    def cut(self, now: int) -> None:
        """End it at once, with a reset to all that are still here."""
        for each in self.answers:
            if each not in self._closed:
                each.ended = each.ended or "cut"
                self._reset(each)
        if self.open:
            self._reset(self.client)
            self._stop_serving(now)

    def _conclude(self, now: int) -> None:
        """Whether the client has been served, and how that ended."""
        client, answer = self.client, self.answer
        if client.ended == "rst" or (client.ended and client.broken) or answer.ended == "refused":
            self.cut(now)
        elif answer.ended and answer.ended != "fin":
            self._reset(client)
            self._reset(answer)
            self._stop_serving(now)
        elif answer.ended and client.drained:
            if client.ended and answer.drained:
                self._close(client)
                self._close(answer)
                self._stop_serving(now)
            elif answer.broken:
                # it said all it had to say, and hears nothing any more
                self._reset(client)
                self._reset(answer)
                self._stop_serving(now)

    def _stop_serving(self, now: int) -> None:
        self.open = False
        self.duration = now - self._began
        self._until = now + self._patience

    def _follow(self, each: Answer, comparison: Comparison, now: int) -> bool:
        each.tell_on(now - self._began)
        each.flush()
        if each.queued + each.untold_bytes > self._buffer or comparison.behind > self._buffer:
            self._detach(each, "behind")
            return False
        if each.readable and not each.ended:
            # once there is nothing to find, nothing is kept: then what counts is the length
            lead = each.received - self.answer.received if comparison.over else comparison.ahead
            if lead < self._buffer:
                each.held_since = None
                data = each.take(now - self._began)
                if data:
                    comparison.reply(data)
                    # it may hear more now
                    return each.readable or bool(each.untold)
            elif each.broken:
                each.ended = "rst"
                each.note_end()
            elif self.answer.ended:
                # nobody will catch up with it
                self._detach(each, "ahead")
                return False
            elif each.held_since is None:
                each.held_since = now
        if each.ended and each.ended != "fin":
            self._reset(each)
        elif each.ended and not self.open and each.drained and not each.untold:
            self._close(each)
        return False

    def _detach(self, each: Answer, reason: Ended) -> None:
        each.ended = each.ended or reason
        self._reset(each)

    def _reset(self, leg: Leg) -> None:
        reset_on_close(leg.socket)
        self._close(leg)

    def _close(self, leg: Leg) -> None:
        self._forget(leg)
        leg.socket.close()
        leg.readable, leg.broken = False, True
        leg.queue.clear()
        if isinstance(leg, Answer):
            leg.untold.clear()
        self._closed.add(leg)


class Tee:
    """All sessions, one turn after the other.

    Args:
        targets: the engines; the first one answers.
        buffer: bytes that are kept for the sake of one shadow, each way.
        patience: seconds that a shadow may stand off from the answering engine.
        most: sessions at a time; more clients wait in the backlog until one ends.
        settled: called with each session that is over.

    """

    def __init__(
        self,
        listeners: Iterable[Listener],
        targets: Sequence[Target],
        normalisers: Sequence[Normaliser],
        *,
        buffer: int,
        patience: float,
        most: int,
        settled: Callable[[Session], None],
    ) -> None:
        self._listeners = {sock.fileno(): sock for each in listeners for sock in each.sockets}
        self._targets, self._normalisers = targets, normalisers
        self._buffer, self._patience, self._most = buffer, int(patience * 1e9), most
        self._settled = settled
        self._epoll = select.epoll()
        # every leg that is open, by its descriptor
        self._legs: dict[int, tuple[Leg, Session]] = {}
        self._watched: dict[int, Callable[[], None]] = {}
        # with something to do, in order
        self._busy: dict[Session, None] = {}
        self._reminders: list[tuple[int, int, Session]] = []
        self._reminder = itertools.count()
        self._accepting = False
        self._exhausted_until = 0
        self.closing = False
        self.sessions: set[Session] = set()
        self.accepted = 0

    @property
    def serving(self) -> int:
        """Sessions whose client is being served; the others wait for their shadows."""
        return sum(session.open for session in self.sessions)

    def watch(self, descriptor: int, call: Callable[[], None]) -> None:
        """Call it when the descriptor is readable, and again as long as it is."""
        self._watched[descriptor] = call
        self._epoll.register(descriptor, select.EPOLLIN)

    def unwatch(self, descriptor: int) -> None:
        del self._watched[descriptor]
        self._epoll.unregister(descriptor)

    def stop_accepting(self) -> None:
        """Take who already waits, then nobody any more."""
        while self._accept():
            pass
        self.closing = True
        self._listen(wanted=False)

    def cut(self) -> int:
        """End all sessions in the next turn; how many clients were being served."""
        cut = self.serving
        for session in self.sessions:
            session.cut(time.monotonic_ns())
            self._busy[session] = None
        return cut

    def turn(self, until: float) -> None:
        """Wait for something to do, at most until then (monotonic seconds), and do it."""
        now = time.monotonic_ns()
        full = len(self.sessions) >= self._most
        self._listen(wanted=not self.closing and not full and now >= self._exhausted_until)
        times = [int(until * 1e9)] + [at for at, _, _ in self._reminders[:1]]
        if now < self._exhausted_until:
            times.append(self._exhausted_until)
        wait = 0 if self._busy else max(0, min(times) - now)
        # in whole milliseconds and rounded up: less would be waited for by spinning
        events = self._epoll.poll(-(-wait // 1_000_000) / 1000)
        now = time.monotonic_ns()
        accepting = False
        for descriptor, mask in events:
            if descriptor in self._legs:
                leg, session = self._legs[descriptor]
                leg.tell(mask)
                self._busy[session] = None
            elif descriptor in self._watched:
                self._watched[descriptor]()
            else:
                accepting = True
        if accepting:
            self._accept()
        busy, self._busy = self._busy, {}
        for session in busy:
            if session.serve(now):
                self._busy[session] = None
        for session in busy:
            if session.shadow(now):
                self._busy[session] = None
            self._look(session, now)
        while self._reminders and self._reminders[0][0] <= now:
            at, _, session = heapq.heappop(self._reminders)
            if at == session.reminded:
                session.reminded = None
            if not session.settled:
                session.expire(now)
                session.shadow(now)
                self._look(session, now)

    def _listen(self, *, wanted: bool) -> None:
        if wanted != self._accepting:
            self._accepting = wanted
            for descriptor in self._listeners:
                if wanted:
                    self._epoll.register(descriptor, select.EPOLLIN)
                else:
                    self._epoll.unregister(descriptor)

    def _accept(self) -> bool:
        """Takes up to ACCEPTS clients from each listener. Whether there may be more."""
        more = False
        for listener in self._listeners.values():
            for _ in range(ACCEPTS):
                if len(self.sessions) >= self._most:
                    return False
                try:
                    client, peer = listener.accept()
                    self._begin(client, peer)
                except BlockingIOError:
                    break
                except OSError as error:
                    if error.errno not in CLIENT_GONE:
                        self._exhausted_until = time.monotonic_ns() + int(EXHAUSTED_PAUSE * 1e9)
                        return False
            else:
                more = True
        return more

    def _begin(self, client: socket.socket, peer: object) -> None:
        """A session with its engines, all being dialled. OSError: there are no descriptors for it."""
        with contextlib.ExitStack() as undo:
            undo.callback(client.close)
            client.setblocking(False)
            set_options(client, DEAD_PEER)
            answers = []
            for number, target in enumerate(self._targets):
                sock = dial_socket(target.address, DEAD_PEER)
                undo.callback(sock.close)
                sock.setblocking(False)
                answer = Answer(sock, target, Comparison(self._normalisers) if number else None)
                if sock.connect_ex(sockaddr(target.address)) not in {0, errno.EINPROGRESS}:
                    answer.ended, answer.broken = "refused", True
                answers.append(answer)
            undo.pop_all()
        session = Session(
            Leg(client), client_address(peer), answers, self._buffer, self._patience, self._forget
        )
        introduction = header("v2", session.peer, bound_address(client), pair=session.id)
        for answer in answers:
            answer.put(introduction)
        for leg in (session.client, *answers):
            self._legs[leg.socket.fileno()] = leg, session
            self._epoll.register(leg.socket, EDGES)
        self.sessions.add(session)
        self.accepted += 1
        self._busy[session] = None

    def _forget(self, leg: Leg) -> None:
        """Before it is closed: its descriptor may be another one's in this very turn."""
        del self._legs[leg.socket.fileno()]

    def _look(self, session: Session, now: int) -> None:
        """What follows from what was done."""
        if session.settled:
            if session in self.sessions:
                self.sessions.remove(session)
                self._settled(session)
        elif (at := session.due(now)) is not None and (session.reminded is None or at < session.reminded):
            session.reminded = at
            heapq.heappush(self._reminders, (at, next(self._reminder), session))
