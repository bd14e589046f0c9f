"""The server behind a proxy: one epoll loop that echoes on one port and sends bulk on another.

It inherits both listeners and ends when its standard input does, so it never outlives the
run that started it. A session that does not read is not read from either.
"""

import contextlib
import select
import socket
import sys

from comparisons.load.bulk import REQUEST_BYTES
from comparisons.load.pattern import PERIOD, pattern

CHUNK = 64 * 2**10
PERIODS = 16  # held at a time, so that a send takes as much as the socket does


class Echo:
    """What was read is sent back; while some of it waits, nothing more is read."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.pending = b""
        self.ended = False
        self.mask = select.EPOLLIN

    def wants(self) -> int:
        return select.EPOLLOUT if self.pending else select.EPOLLIN

    def receive(self) -> None:
        data = self.sock.recv(CHUNK)
        self.ended = not data
        self.pending = data
        self.send()

    def send(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self.pending = self.pending[self.sock.send(self.pending) :]


class Source:
    """Eight bytes ask for so many bytes of the pattern; what was asked meanwhile follows without a break."""

    def __init__(self, sock: socket.socket, periods: memoryview) -> None:
        self.sock = sock
        self.ended = False
        self.mask = select.EPOLLIN
        self._periods = periods
        self._request = b""
        self._position = 0
        self._wanted = 0

    @property
    def pending(self) -> int:
        return self._wanted - self._position

    def wants(self) -> int:
        return (select.EPOLLOUT if self.pending else 0) | (0 if self.ended else select.EPOLLIN)

    def receive(self) -> None:
        data = self.sock.recv(CHUNK)
        self.ended = not data
        self._request += data
        while len(self._request) >= REQUEST_BYTES:
            self._wanted += int.from_bytes(self._request[:REQUEST_BYTES], "big")
            self._request = self._request[REQUEST_BYTES:]
        self.send()

    def send(self) -> None:
        # bounded, so that a fast reader does not keep the loop from the next request
        for _ in range(8):
            if not self.pending:
                return
            offset = self._position % PERIOD
            try:
                self._position += self.sock.send(self._periods[offset : offset + self.pending])
            except BlockingIOError:
                return


def main(seed: int, echo_descriptor: int, source_descriptor: int) -> None:
    periods = memoryview(pattern(seed) * PERIODS)
    echo, source = socket.socket(fileno=echo_descriptor), socket.socket(fileno=source_descriptor)
    echo.setblocking(False)
    source.setblocking(False)
    poll = select.epoll()
    for readable in (echo, source, sys.stdin):
        poll.register(readable, select.EPOLLIN)
    sessions: dict[int, Echo | Source] = {}
    while True:
        for descriptor, events in poll.poll():
            if descriptor == sys.stdin.fileno():
                return
            if descriptor in {echo.fileno(), source.fileno()}:
                listener = echo if descriptor == echo.fileno() else source
                try:
                    sock, _ = listener.accept()
                except OSError:  # the client was gone again, or descriptors ran out: the others go on
                    continue
                sock.setblocking(False)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sessions[sock.fileno()] = Echo(sock) if listener is echo else Source(sock, periods)
                poll.register(sock, select.EPOLLIN)
                continue
            session = sessions[descriptor]
            if not serve(session, events):
                poll.unregister(descriptor)
                sessions.pop(descriptor).sock.close()
            elif session.mask != session.wants():
                session.mask = session.wants()
                poll.modify(descriptor, session.mask)


def serve(session: Echo | Source, events: int) -> bool:
    """Move what can be moved; False when the session is over."""
    try:
        if events & select.EPOLLIN:
            session.receive()
        else:
            session.send()
        if session.ended and not session.pending:
            session.sock.shutdown(socket.SHUT_WR)
            return False
    except OSError:  # a reset: the client at the other end knows what it means
        return False
    return True


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
