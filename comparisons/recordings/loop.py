"""Stream sockets in one loop: what recording and replaying have in common.

A `Stream` sends what it is given in order, reads unless it is told to pause, and tells its owner of data, of
the peer's FIN, and of a reset, each in that order and the last two once. The kernel reports a reset once,
to whichever call comes first, so a send that failed is remembered until everything that the peer had
said before is read. A stream that neither reads nor writes is looked at once a second: its peer may be gone.

The loop wakes to the millisecond. Nothing here knows of recordings.
"""

import contextlib
import errno
import fcntl
import heapq
import itertools
import os
import select
import selectors
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Sequence
from time import monotonic
from typing import Any, Protocol

from services.core.addresses import Address

CHUNK = 1 << 16
DIAL_LIMIT = 5.0  # seconds, as a daemon's timeouts.connect
PROBE = 1.0  # seconds between two looks at streams that are not watched
ACCEPT_PAUSE = 0.1  # seconds without accepting after descriptors ran out; HAProxy pauses as long
LONGEST_WAIT = 3600.0  # seconds; a selector refuses what a recording may ask for

LINGER_RESET = struct.pack("ii", 1, 0)  # on, 0 s: close sends RST


class Owner(Protocol):
    def heard(self, stream: "Stream", data: bytes) -> None:
        """Bytes came."""

    def ended(self, stream: "Stream") -> None:
        """The peer's FIN came: nothing more to hear, all may still be said."""

    def lost(self, stream: "Stream", error: OSError) -> None:
        """The connection was reset: nothing comes, nothing goes."""

    def drained(self, stream: "Stream") -> None:
        """Everything that was given to send is with the kernel, an end too."""


class Loop:
    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._serial = itertools.count()  # so that two timers of one instant are never compared further
        self._posted: deque[Callable[[], None]] = deque()
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self.watch(self._woken, selectors.EVENT_READ, lambda _mask: self._woken.recv(CHUNK))
        self.unwatched: set[Stream] = set()

    def run(self, over: Callable[[], bool]) -> None:
        self.at(monotonic() + PROBE, self._probe)
        while not over():
            wait = self._timers[0][0] - monotonic()
            for key, mask in self._selector.select(min(max(wait, 0), LONGEST_WAIT)):
                key.data(mask)
            now = monotonic()
            while self._timers[0][0] <= now:
                heapq.heappop(self._timers)[2]()
            while self._posted:
                self._posted.popleft()()

    def close(self) -> None:
        self._selector.close()
        self._woken.close()
        self._waker.close()

    def at(self, when: float, call: Callable[[], None]) -> None:
        """Call it at that time of the monotonic clock. There is no cancel: it asks whether it is still wanted."""
        heapq.heappush(self._timers, (when, next(self._serial), call))

    def post(self, call: Callable[[], None]) -> None:
        """Have the loop call it soon: the one entry from other threads and from signal handlers."""
        self._posted.append(call)
        with contextlib.suppress(OSError):  # it is full of wakes, or closed
            self._waker.send(b"\0")

    def watch(self, sock: socket.socket, mask: int, ready: Callable[[int], object]) -> None:
        """Interest of a socket, 0 for none."""
        known = self._selector.get_map().get(sock)
        if known and not mask:
            self._selector.unregister(sock)
        elif known and known.events != mask:
            self._selector.modify(sock, mask, ready)
        elif known:
            return
        elif mask:
            self._selector.register(sock, mask, ready)

    def listen(self, listener: socket.socket, accepted: Callable[[socket.socket, Any], None]) -> None:
        """Hand over every connection, until `watch(listener, 0)`."""

        def ready(_mask: int) -> None:
            try:
                sock, peer = listener.accept()
            except OSError as error:
                if error.errno in {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}:
                    self.watch(listener, 0, ready)
                    self.at(monotonic() + ACCEPT_PAUSE, lambda: self._resume(listener, ready))
                return  # else it was reset while it waited
            accepted(sock, peer)

        self.watch(listener, selectors.EVENT_READ, ready)

    def dial(
        self, addresses: Sequence[Address], done: Callable[[socket.socket | OSError], None]
    ) -> Callable[[], None]:
        """Connect to the first of them that answers; returns what cancels it. `done` may be called at once."""
        return _Dial(self, addresses, done).cancel

    def _resume(self, listener: socket.socket, ready: Callable[[int], None]) -> None:
        if listener.fileno() >= 0:
            self.watch(listener, selectors.EVENT_READ, ready)

    def _probe(self) -> None:
        self.at(monotonic() + PROBE, self._probe)
        poll = select.poll()
        streams = {stream.sock.fileno(): stream for stream in self.unwatched}
        for descriptor in streams:
            poll.register(descriptor, 0)  # errors are always told
        for descriptor, found in poll.poll(0):
            if found & select.POLLERR:
                streams[descriptor].probed()


class _Dial:
    def __init__(
        self, loop: Loop, addresses: Sequence[Address], done: Callable[[socket.socket | OSError], None]
    ) -> None:
        self._loop, self._left, self._done = loop, list(addresses), done
        self._sock: socket.socket | None = None
        loop.at(monotonic() + DIAL_LIMIT, self._expired)
        self._next(OSError(errno.EADDRNOTAVAIL, os.strerror(errno.EADDRNOTAVAIL)))

    def cancel(self) -> None:
        self._left = []
        if self._sock:
            self._loop.watch(self._sock, 0, self._ready)
            self._sock.close()
            self._sock = None

    def _next(self, error: OSError) -> None:
        while self._left:
            address = self._left.pop(0)
            unix = address.transport == "unix"
            family = socket.AF_UNIX if unix else socket.AF_INET6 if ":" in address.host else socket.AF_INET
            try:
                sock = socket.socket(family)
            except OSError as failure:
                error = failure
                continue
            sock.setblocking(False)
            code = sock.connect_ex(address.host if unix else (address.host, address.port))
            if code in {0, errno.EINPROGRESS}:
                self._sock = sock
                self._loop.watch(sock, selectors.EVENT_WRITE, self._ready)
                return
            sock.close()
            error = OSError(code, os.strerror(code))
        self._done(error)

    def _ready(self, _mask: int) -> None:
        sock = self._sock
        if not sock:
            return
        code = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        self._loop.watch(sock, 0, self._ready)
        self._sock = None
        if code:
            sock.close()
            self._next(OSError(code, os.strerror(code)))
        else:
            self._done(sock)

    def _expired(self) -> None:
        if self._sock:
            self.cancel()
            self._done(OSError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)))


class Stream:
    """A connected stream socket, which it makes non-blocking and closes."""

    def __init__(self, loop: Loop, sock: socket.socket, owner: Owner, *, paused: bool = False) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.sock = sock
        self.told = False  # the peer's FIN was read
        self.closed = False
        self._loop, self._owner = loop, owner
        self._paused = paused
        self._out = bytearray()
        self._ending = False  # our FIN follows the last byte
        self._gone: OSError | None = None  # why a send failed
        self._watch()

    @property
    def pending(self) -> int:
        """Bytes that the kernel has not taken yet; an end that has not been sent counts as one."""
        return len(self._out) + self._ending

    @property
    def unheard(self) -> int:
        """Bytes that the peer's kernel does not have yet."""
        (queued,) = struct.unpack("i", fcntl.ioctl(self.sock, termios.TIOCOUTQ, bytes(4)))
        return self.pending + int(queued)

    def send(self, data: bytes) -> None:
        if self._gone or self.closed:
            return
        sent = 0
        if not self._out:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError as error:
                self._unwritable(error)
                return
        if sent < len(data):
            self._out += memoryview(data)[sent:]
            self._watch()

    def end(self) -> None:
        """FIN, after everything that was given to send."""
        if not self._gone and not self.closed:
            self._ending = True
            self._flush()

    def pause(self) -> None:
        self._paused = True
        if not self.closed:
            self._watch()

    def resume(self) -> None:
        self._paused = False
        if not self.closed:
            self._watch()

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._out.clear()
            self._ending = False
            self._watch()
            self.sock.close()

    def reset(self) -> None:
        if not self.closed:
            with contextlib.suppress(OSError):
                self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, LINGER_RESET)
            self.close()

    def probed(self) -> None:
        """An error waits at the socket."""
        if not self.closed:
            code = self.sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            self._lose(self._gone or OSError(code, os.strerror(code)))

    def _ready(self, mask: int) -> None:
        if mask & selectors.EVENT_WRITE and not self.closed:
            self._flush()
        if mask & selectors.EVENT_READ and not (self.closed or self.told or self._paused):
            self._receive()

    def _flush(self) -> None:
        try:
            while self._out:
                with memoryview(self._out) as view:
                    sent = self.sock.send(view[: 4 * CHUNK])
                del self._out[:sent]
            if self._ending:
                self.sock.shutdown(socket.SHUT_WR)
                self._ending = False
        except BlockingIOError:
            self._watch()
        except OSError as error:
            self._unwritable(error)
        else:
            self._watch()
            self._owner.drained(self)

    def _receive(self) -> None:
        try:
            data = self.sock.recv(CHUNK)
        except BlockingIOError:
            return
        except OSError as error:
            self._lose(error)
            return
        if data:
            self._owner.heard(self, data)
        elif self._gone and self._gone.errno != errno.EPIPE:
            self._lose(self._gone)
        else:
            self.told = True
            self._watch()
            self._owner.ended(self)
            if self._gone and not self.closed:
                self._lose(self._gone)

    def _unwritable(self, error: OSError) -> None:
        # EPIPE: the peer had sent FIN before its reset
        self._gone = error
        self._out.clear()
        self._ending = False
        if self.told:
            self._lose(error)
        else:
            self._watch()
            self._owner.drained(self)

    def _lose(self, error: OSError) -> None:
        self.close()
        self._owner.lost(self, error)

    def _watch(self) -> None:
        """Interest follows from state."""
        mask = 0
        if not self.closed:
            mask |= selectors.EVENT_READ if not (self.told or self._paused) else 0
            mask |= selectors.EVENT_WRITE if self.pending else 0
        self._loop.watch(self.sock, mask, self._ready)
        if self.closed or mask:
            self._loop.unwatched.discard(self)
        else:
            self._loop.unwatched.add(self)


def name_of(name: Any) -> str:
    """What `getsockname` or `getpeername` said, as `Address` writes it; empty for a UNIX socket without a name."""
    if isinstance(name, tuple):
        return str(Address("tcp", name[0], name[1]))
    path = name if isinstance(name, str) else "@" + os.fsdecode(name[1:])
    return str(Address("unix", path)) if path else ""
