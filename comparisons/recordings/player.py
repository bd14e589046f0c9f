"""Plays both ends of a recording through a proxy, and checks every byte that arrives.

One thread and one loop hold the clients and the servers, so the two ends know of each other: a step is
sent once its side has received every earlier step of the other side, and, if the recording's timing
is kept, not before its time. A reset waits until the other side has received everything, because a
reset may destroy what is still under way. Steps of one side that are due together go out together. The
loop wakes to the millisecond, so steps that follow each other faster keep their order rather than their time.

Which conversation a new connection at the listener belongs to cannot be told from its bytes: clients of
a benchmark all say the same, and some servers speak first. So connections are opened one after the
other, the next once the listener has accepted the last; after that conversations run side by side.

What is not checked: a reset by a side that had already sent its end, because who has heard the end of
the other may never learn of more; and whether a UNIX socket was closed by a reset or an end, because to
its peer they are the same.
"""

import contextlib
import errno
import heapq
import itertools
import os
import selectors
import socket
import struct
from time import monotonic
from typing import Literal

import msgspec

from comparisons.recordings.format import Recording, Side
from comparisons.recordings.script import CLIENT, DATA, END, RESET, SERVER, SIDES, Script, alike
from services.core.addresses import Address

# seconds from a connection to the proxy until the listener has to see one from it
OPENING_LIMIT = 10.0
FAULTS_KEPT = 100
_BUFFER = 1 << 18

What = Literal[
    "not opened", "mismatch", "ended early", "reset", "end instead of reset", "deadline", "stranger"
]


class Fault(msgspec.Struct, frozen=True):
    """A conversation that did not go as recorded. `conversation` is its index in the recording (null: a
    connection that nobody opened), `repeat` the round it was played in, `end` the side that noticed, and
    `offset` the first wrong or missing byte of what that side should have received.
    """

    conversation: int | None
    repeat: int
    end: Side
    what: What
    offset: int
    detail: str


class Played(msgspec.Struct, frozen=True):
    """What came of it. Bytes count what arrived and was right. A latency runs from the client's data to the
    server's whole answer (all its data until the client's next), without the time in which the server
    side only waited for its schedule. A lag is how late a step was sent against the schedule; 0 at speed 0.
    `faults` holds the first hundred, and is empty if and only if nothing went wrong.
    """

    opened: int
    finished: int
    failed: int
    bytes_c2s: int
    bytes_s2c: int
    seconds: float
    latencies_us: list[int]
    lag_max_us: int
    lag_p99_us: int
    faults: list[Fault]


def play(
    recording: Recording,
    connect: Address,
    listener: socket.socket,
    *,
    speed: float = 0.0,
    concurrency: int = 64,
    repeat: int = 1,
    seconds: float | None = None,
    deadline: float = 60.0,
) -> Played:
    """Play `recording` with clients that connect to `connect` (an IP literal or a UNIX path) and servers
    behind `listener`, a listening stream socket, which stays open. `speed` 0 is as fast as it goes, 1 the
    recorded timing, 2 twice as fast. At most `concurrency` conversations run at a time. The recording is
    played `repeat` times, and again until `seconds` have passed. `deadline` seconds bound everything.
    """
    if not recording.conversations:
        raise ValueError("there is no conversation to play")
    player = _Player(
        recording,
        connect,
        listener,
        speed=speed,
        concurrency=concurrency,
        repeat=repeat,
        seconds=seconds,
        deadline=deadline,
    )
    try:
        return player.run()
    finally:
        player.selector.close()


class _End:
    """One side of a conversation that is being played: a socket, what it has sent and what it has heard."""

    __slots__ = (
        "awaited",
        "blocked",
        "ending",
        "heard",
        "held",
        "held_from",
        "may_send",
        "next",
        "peer",
        "play",
        "says",
        "sent",
        "side",
        "sock",
        "to_hear",
        "told",
        "waiting",
        "watched",
    )
    peer: "_End"

    def __init__(self, play: "_Play", side: int) -> None:
        script = play.script
        self.play, self.side = play, side
        self.sock: socket.socket | None = None
        self.says, self.to_hear = memoryview(script.streams[side]), script.streams[1 - side]
        self.next = script.following[side][0]  # own step to send next
        self.awaited = script.following[1 - side][0]  # the other's step to hear next
        self.may_send = self.sent = 0  # bytes of `says` that are due, and that the kernel took
        self.ending = False  # our FIN is due, and follows the last byte
        self.heard = 0  # bytes of `to_hear`
        self.told = False  # the other's end or reset was read: nothing more to come
        self.blocked = False  # the kernel takes no more, or has not connected yet
        self.waiting = False  # a timer is set for the next step
        self.held_from: float | None = None  # since when only the schedule holds that step back
        self.held = 0.0  # seconds so held back since the last question
        self.watched = 0


class _Play:
    """One conversation being played once. `due` is the time of its start."""

    __slots__ = ("asked_at", "client", "due", "index", "over", "repeat", "script", "server")

    def __init__(self, script: Script, index: int, repeat: int, due: float) -> None:
        self.script, self.index, self.repeat, self.due = script, index, repeat, due
        self.client, self.server = _End(self, CLIENT), _End(self, SERVER)
        self.client.peer, self.server.peer = self.server, self.client
        self.asked_at = 0.0
        self.over = False


class _Player:
    def __init__(
        self,
        recording: Recording,
        connect: Address,
        listener: socket.socket,
        *,
        speed: float,
        concurrency: int,
        repeat: int,
        seconds: float | None,
        deadline: float,
    ) -> None:
        self.scripts = [Script(each, recording.first_us) for each in recording.conversations]
        self.length = recording.duration_us
        self.connect, self.listener = connect, listener
        self.speed, self.concurrency = speed, concurrency
        self.repeat, self.seconds, self.deadline = repeat, seconds, deadline
        self.selector = selectors.DefaultSelector()
        self.view = memoryview(bytearray(_BUFFER))
        self.index = self.round = 0  # of the conversation to open next
        self.halted = False  # no further conversation is opened
        self.opening: _Play | None = None
        self.opening_limit = 0.0
        self.playing: set[_Play] = set()
        self.timers: list[tuple[float, int, _End]] = []
        self.serial = itertools.count()  # so that timers of one instant are never compared by their end
        self.began = 0.0
        self.tried = self.opened = self.finished = 0
        self.bytes = [0, 0]  # heard at each end
        self.latencies: list[float] = []
        self.lags: list[float] = []
        self.faults: list[Fault] = []

    def run(self) -> Played:
        self.listener.setblocking(False)
        self.selector.register(self.listener, selectors.EVENT_READ)
        self.began = now = monotonic()
        stop = self.began + self.deadline
        while now < stop and (self._more() or self.playing):
            wake = self._open(now, stop)
            if self.timers:
                wake = min(wake, self.timers[0][0])
            for key, mask in self.selector.select(max(wake - monotonic(), 0)):
                if key.data is None:
                    self._accept()
                else:
                    self._handle(key.data, mask)
            now = monotonic()
            while self.timers and self.timers[0][0] <= now:
                end = heapq.heappop(self.timers)[2]
                end.waiting = False
                self._advance(end)
        for play in list(self.playing):
            waiting = play.client if play.client.awaited < len(play.script.kinds) else play.server
            self._fail(waiting, "deadline", f"not finished after {self.deadline:g} s")
        if not self.halted and self._more():
            self._note(Fault(self.index, self.round, "client", "deadline", 0, "never opened"))
        total = max(self.tried, self.repeat * len(self.scripts))
        self.lags.sort()
        return Played(
            opened=self.opened,
            finished=self.finished,
            failed=total - self.finished,
            bytes_c2s=self.bytes[SERVER],
            bytes_s2c=self.bytes[CLIENT],
            seconds=monotonic() - self.began,
            latencies_us=[round(each * 1e6) for each in self.latencies],
            lag_max_us=round(self.lags[-1] * 1e6) if self.lags else 0,
            lag_p99_us=round(self.lags[len(self.lags) * 99 // 100] * 1e6) if self.lags else 0,
            faults=self.faults,
        )

    def _more(self) -> bool:
        """Whether a conversation is left to open; begins the next round when there has to be one."""
        if self.index == len(self.scripts) and (
            self.round + 1 < self.repeat
            or (self.seconds is not None and monotonic() - self.began < self.seconds)
        ):
            self.index, self.round = 0, self.round + 1
        return self.index < len(self.scripts) and not self.halted

    def _open(self, now: float, stop: float) -> float:
        """Open the next conversation if it is time. Until when the loop may sleep."""
        if self.opening:
            if now < self.opening_limit:
                return min(stop, self.opening_limit)
            # the listener may see it later still, and then nothing tells it from the next
            self.halted = True
            self._fail(
                self.opening.client, "not opened", f"the listener saw no connection in {OPENING_LIMIT:g} s"
            )
            return now
        if len(self.playing) >= self.concurrency or not self._more():
            return stop
        script, due = self.scripts[self.index], now
        if self.speed:
            due = self.began + (self.round * self.length + script.start) * 1e-6 / self.speed
            if now < due:
                return min(stop, due)
        self.opening = play = _Play(script, self.index, self.round, due)
        self.opening_limit = now + OPENING_LIMIT
        self.playing.add(play)
        self.index += 1
        self.tried += 1
        host = self.connect.host
        unix = self.connect.transport == "unix"
        try:
            play.client.sock = sock = socket.socket(
                socket.AF_UNIX if unix else socket.AF_INET6 if ":" in host else socket.AF_INET
            )
            _prepare(sock)
            error = sock.connect_ex(host if unix else (host, self.connect.port))
        except OSError as failure:
            error = failure.errno or errno.EIO
        if error not in {0, errno.EINPROGRESS}:
            self._fail(play.client, "not opened", os.strerror(error))
            return now
        play.client.blocked = True  # writable is connected
        self._watch(play.client)
        return self.opening_limit

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError:
            return  # it was reset while it waited: its client hears of it
        play = self.opening
        if not play or play.server.sock:
            sock.close()
            self._note(
                Fault(None, self.round, "server", "stranger", 0, "a connection that no client of ours made")
            )
            return
        play.server.sock = sock
        _prepare(sock)
        if not play.client.blocked:
            self._begin(play)

    def _handle(self, end: _End, mask: int) -> None:
        if end.play.over or not end.sock:
            return
        if end.play is self.opening:
            play = end.play
            if error := end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                self._fail(end, "not opened", os.strerror(error))
            elif play.server.sock:
                self._begin(play)
            elif mask & selectors.EVENT_READ:
                # the server's end has said nothing yet, so this can only be an end
                self._fail(end, "not opened", "closed before the listener saw a connection")
            else:
                end.blocked = False
                self._watch(end)
            return
        if mask & selectors.EVENT_WRITE and end.blocked:
            self._flush(end)
            self._settle(end.play)
        if mask & selectors.EVENT_READ and not end.told and not end.play.over:
            self._hear(end)

    def _begin(self, play: _Play) -> None:
        self.opening = None
        self.opened += 1
        play.client.blocked = False
        for end in (play.client, play.server):
            if not play.over:
                self._watch(end)
                self._advance(end)

    def _advance(self, end: _End) -> None:
        """Send what may be sent: the other side's earlier steps are all here, and it is time."""
        play, now = end.play, monotonic()
        script = play.script
        while end.next < end.awaited and not play.over:
            index = end.next
            kind = script.kinds[index]
            if kind == RESET and end.peer.awaited < index:
                break  # the other side has not heard everything
            if self.speed:
                due = play.due + script.whens[index] * 1e-6 / self.speed
                if now < due:
                    if not end.waiting:
                        end.waiting, end.held_from = True, now
                        heapq.heappush(self.timers, (due, next(self.serial), end))
                    break
                self.lags.append(now - due)
                if end.held_from is not None:
                    end.held += now - end.held_from
                    end.held_from = None
            if kind == DATA:
                end.may_send = script.marks[index]
                if end.side == CLIENT:
                    play.asked_at, play.server.held = now, 0.0
            elif kind == END:
                end.ending = True
            else:
                self._reset(end)
            end.next = script.following[end.side][index + 1]
        if not play.over:
            self._flush(end)
            self._settle(play)

    def _flush(self, end: _End) -> None:
        sock = end.sock
        if not sock:
            return
        try:
            while end.sent < end.may_send:
                end.sent += sock.send(end.says[end.sent : end.may_send])
            if end.ending:
                sock.shutdown(socket.SHUT_WR)
                end.ending = False
        except BlockingIOError:
            end.blocked = True
        except OSError as error:
            self._lost(end, error)
            return
        else:
            end.blocked = False
        self._watch(end)

    def _hear(self, end: _End) -> None:
        """Read once and compare."""
        if not end.sock:
            return
        play, peer, script = end.play, end.peer, end.play.script
        try:
            count = end.sock.recv_into(self.view)
        except BlockingIOError:
            return
        except OSError as error:
            self._lost(end, error)
            return
        if not count:
            self._told(end)
            return
        heard, awaited = end.heard, end.awaited
        data = self.view[:count]
        if heard + count > peer.sent or not end.to_hear.startswith(data, heard):
            end.heard += alike(data, end.to_hear[heard : peer.sent])
            self._fail(end, "mismatch", f"among {count} bytes read from byte {heard} on")
            return
        end.heard = heard = heard + count
        self.bytes[end.side] += count
        while (
            awaited < len(script.kinds) and script.kinds[awaited] == DATA and script.marks[awaited] <= heard
        ):
            if script.answers[awaited]:
                self.latencies.append(monotonic() - play.asked_at - play.server.held)
            awaited = script.following[peer.side][awaited + 1]
        if awaited != end.awaited:
            self._heard(end, awaited)

    def _heard(self, end: _End, awaited: int) -> None:
        """The other side's steps up to `awaited` are here: both may have something to do now."""
        end.awaited = awaited
        self._advance(end)
        kinds = end.play.script.kinds
        if awaited < len(kinds) and kinds[awaited] == RESET:
            # the one step that waits for what the other side has heard
            self._advance(end.peer)

    def _told(self, end: _End) -> None:
        """The end of the other side was read."""
        script, peer, awaited = end.play.script, end.peer, end.awaited
        played = awaited < len(script.kinds) and peer.next > awaited
        kind = script.kinds[awaited] if played else None
        if kind == RESET and end.sock and end.sock.family == socket.AF_UNIX:
            kind = END  # it has no reset of its own: closing reads as an end
        if kind == END and not peer.ending:
            end.told = True
            self._watch(end)
            self._heard(end, script.following[peer.side][awaited + 1])
        elif kind == RESET:
            self._fail(end, "end instead of reset", "the other side was reset, this one heard an end")
        else:
            self._fail(end, "ended early", f"{len(end.to_hear) - end.heard} bytes short")

    def _lost(self, end: _End, error: OSError) -> None:
        """A call said that the connection is gone: as recorded, or not."""
        script, awaited = end.play.script, end.awaited
        if (
            awaited < len(script.kinds)
            and script.kinds[awaited] == RESET
            and end.peer.next > awaited
            and error.errno == errno.ECONNRESET
        ):
            end.told = True
            self._heard(end, len(script.kinds))
        else:
            self._fail(end, "reset", os.strerror(error.errno or 0))

    def _reset(self, end: _End) -> None:
        self._drop(end)
        if end.peer.told:
            end.peer.awaited = len(end.play.script.kinds)

    def _settle(self, play: _Play) -> None:
        """Close the conversation once both sides have said and heard everything."""
        if play.over:
            return
        count = len(play.script.kinds)
        for end in (play.client, play.server):
            if end.next < count or end.awaited < count or end.sent < end.may_send or end.ending:
                return
        self.finished += 1
        self._over(play)
        for end in (play.client, play.server):
            if end.sock:
                self._unwatch(end)
                end.sock.close()

    def _fail(self, end: _End, what: What, detail: str) -> None:
        play = end.play
        self._note(Fault(play.index, play.repeat, SIDES[end.side], what, end.heard, detail))
        if play is self.opening:
            self.opening = None
            # what the proxy may have opened for it all the same must not be taken for the next
            if not play.server.sock:
                with contextlib.suppress(OSError):
                    self.listener.accept()[0].close()
        self._over(play)
        self._drop(play.client)
        self._drop(play.server)

    def _over(self, play: _Play) -> None:
        play.over = True
        self.playing.discard(play)

    def _note(self, fault: Fault) -> None:
        if len(self.faults) < FAULTS_KEPT:
            self.faults.append(fault)

    def _watch(self, end: _End) -> None:
        """Have the selector tell what this side can use: interest follows from state."""
        if not end.sock:
            return
        mask = 0 if end.told else selectors.EVENT_READ
        if end.blocked:
            mask |= selectors.EVENT_WRITE
        if mask == end.watched:
            return
        if not end.watched:
            self.selector.register(end.sock, mask, end)
        elif mask:
            self.selector.modify(end.sock, mask, end)
        else:
            self.selector.unregister(end.sock)
        end.watched = mask

    def _unwatch(self, end: _End) -> None:
        if end.watched and end.sock:
            self.selector.unregister(end.sock)
            end.watched = 0

    def _drop(self, end: _End) -> None:
        """Close with a reset."""
        if end.sock:
            self._unwatch(end)
            with contextlib.suppress(OSError):
                end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            end.sock.close()
            end.sock = None


def _prepare(sock: socket.socket) -> None:
    sock.setblocking(False)
    if sock.family != socket.AF_UNIX:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
