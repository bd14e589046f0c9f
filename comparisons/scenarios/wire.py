"""The two ends of a conversation, and what was seen at them.

An `End` is a non-blocking socket that remembers what it sent and heard (counts and SHA-256) and
how the conversation ended for it. `transfer` moves bytes and listens at the same time, so that a
script in one thread cannot deadlock on a full buffer. A proxy that does wrong makes no exception
here: a lost connection is something that was observed.
"""

import contextlib
import fcntl
import hashlib
import math
import random
import select
import signal
import socket
import struct
import termios
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Literal, Self

from services.core.addresses import Address

BACKLOG = 512
DEADLINE = 10.0  # seconds; the longest that any wait of a scenario takes

Ending = Literal["eof", "reset", "timeout"]


def payload(size: int, seed: int = 0) -> bytes:
    """`size` bytes that are the same in every run, and in which no shift or swap goes unseen."""
    return random.Random(seed).randbytes(size)  # noqa: S311 - test data, not a secret


# More than any chain of default buffers holds: four proxies absorb 7.4 to 9.4 MB.
# more than the kernel holds on both sides of a proxy (`rules.KERNEL`)
FLOOD = payload(96 << 20, seed=7)


class Inconclusive(Exception):  # noqa: N818  it is nobody's error
    """The script did not come about, through no fault of the service."""


@dataclass(frozen=True, slots=True)
class Heard:
    """What one end heard until reading told it how it ended (timeout: it never did)."""

    received: int
    sha256: str
    ended: Ending
    elapsed: float = field(compare=False)  # seconds since the end was opened

    @classmethod
    def of(cls, data: bytes, ended: Ending) -> Self:
        """What an end has heard that heard exactly `data`."""
        return cls(len(data), hashlib.sha256(data).hexdigest(), ended, 0)


@dataclass(frozen=True, slots=True)
class Observation:
    """The facts of one scenario. An end that the script itself cut off has heard nothing to judge:
    it is None. `figures` are counts and, where the name ends in `_s`, seconds.
    """

    client: Heard | None = None
    upstream: Heard | None = None
    figures: Mapping[str, float] = field(default_factory=dict)


class End:
    """One end of a connection, held by a scenario. It waits for nothing after `until` (monotonic)."""

    def __init__(self, sock: socket.socket, until: float = math.inf) -> None:
        sock.setblocking(False)
        if sock.family != socket.AF_UNIX:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket = sock
        self.until = until
        self.sent = self.received = 0
        self.ended: Ending | None = None
        self.may_send = True
        self.said, self.told = hashlib.sha256(), hashlib.sha256()
        self._reset = False
        self._opened = self._last = monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.socket.close()

    def put(self, data: memoryview) -> int:
        """Send once what the kernel takes now: how many bytes it took."""
        try:
            count = self.socket.send(data)
        except BlockingIOError:
            return 0
        except ConnectionResetError:
            # the kernel reports an error once: what is read after this looks like a clean end
            self._reset, self.may_send = True, False
            return 0
        except BrokenPipeError:
            self.may_send = False
            return 0
        self.said.update(data[:count])
        self.sent += count
        return count

    def take(self, limit: int = 1 << 16) -> None:
        """Read once what is there now."""
        try:
            data = self.socket.recv(limit)
        except BlockingIOError:
            return
        except ConnectionResetError:
            self.ended = "reset"
        else:
            if not data:
                self.ended = "reset" if self._reset else "eof"
            self.told.update(data)
            self.received += len(data)
        self._last = monotonic()

    def hear(self, size: int, *, within: float = DEADLINE) -> None:
        """Read until `size` more bytes are here, or it ended."""
        deadline, target = self._deadline(within), self.received + size
        while self.received < target and not self.ended and (left := deadline - monotonic()) > 0:
            self._wait(select.POLLIN, left)
            self.take(min(target - self.received, 1 << 16))

    def hear_out(self, *, within: float = DEADLINE) -> Heard:
        """Read to the end."""
        deadline = self._deadline(within)
        while not self.ended and (left := deadline - monotonic()) > 0:
            self._wait(select.POLLIN, left)
            self.take()
        return self.heard()

    def heard(self) -> Heard:
        """What was heard so far."""
        return Heard(self.received, self.told.hexdigest(), self.ended or "timeout", self._last - self._opened)

    def told_what(self, speaker: "End") -> bool:
        """Whether all that `speaker` sent, and nothing else, was heard here."""
        return self.told.digest() == speaker.said.digest()

    def push(self, data: bytes, *, within: float = DEADLINE) -> None:
        """Hand `data` to the kernel, whether or not anybody reads at the other end."""
        deadline, view = self._deadline(within), memoryview(data)
        while view and self.may_send and (left := deadline - monotonic()) > 0:
            view = view[self.put(view) :]
            if view:
                self._wait(select.POLLOUT, left)

    def fill(self, data: bytes, *, patience: float = 0.3) -> None:
        """Send of `data` what is taken, until nothing more is taken for `patience` seconds."""
        view = memoryview(data)
        while view and self.may_send and monotonic() < self.until:
            if count := self.put(view[: 1 << 16]):
                view = view[count:]
            elif not self._wait(select.POLLOUT, patience):
                return

    def unacknowledged(self) -> int:
        """Bytes (a FIN counts as one) that the peer's kernel has not acknowledged."""
        return int.from_bytes(fcntl.ioctl(self.socket, termios.TIOCOUTQ, bytes(4)), "little")

    def wait_acknowledged(self, *, within: float = DEADLINE) -> bool:
        """Whether the peer's kernel has everything, the FIN included. TCP has no event for it."""
        deadline, pause = self._deadline(within), select.poll()
        while self.unacknowledged():
            if monotonic() > deadline:
                return False
            pause.poll(2)
        return True

    def finish(self) -> None:
        """Send FIN."""
        self.may_send = False
        with contextlib.suppress(OSError):  # the other end has already cut it: seen when it is read
            self.socket.shutdown(socket.SHUT_WR)

    def reset(self) -> None:
        """Send RST. The end is gone."""
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.socket.close()

    def reset_seen(self, *, within: float = DEADLINE) -> float:
        """Seconds until the kernel knows of a reset, without reading; infinite if it never does."""
        began, poll = monotonic(), select.poll()
        poll.register(self.socket, 0)
        deadline = self._deadline(within)
        while (left := deadline - monotonic()) > 0:
            if any(mask & select.POLLERR for _, mask in poll.poll(left * 1000)):
                return monotonic() - began
            # both directions at their end report HUP for ever: no reason to spin
            select.poll().poll(10)
        return float("inf")

    def _deadline(self, within: float) -> float:
        return min(monotonic() + within, self.until)

    def _wait(self, mask: int, seconds: float) -> bool:
        poll = select.poll()
        poll.register(self.socket, mask)
        return bool(poll.poll(seconds * 1000))


def transfer(*flows: tuple[End, bytes, End], within: float = DEADLINE) -> bool:
    """Send every flow's bytes from its first end and hear them at its last, all at the same time.

    Returns whether everything arrived; stops early where every hearer that still waits was cut off.
    """
    deadline = min(
        monotonic() + within, *(end.until for speaker, _, hearer in flows for end in (speaker, hearer))
    )
    pending = [
        (speaker, memoryview(data), hearer, hearer.received + len(data)) for speaker, data, hearer in flows
    ]
    arrived = True
    while True:
        poll, wanted = select.poll(), dict[int, int]()
        waiting = []
        for speaker, view, hearer, target in pending:
            rest = view[speaker.put(view) :] if view and speaker.may_send else view
            if not hearer.ended and hearer.received < target:
                hearer.take(min(target - hearer.received, 1 << 16))
            if hearer.received >= target:
                continue
            if hearer.ended:
                arrived = False
                continue
            waiting.append((speaker, rest, hearer, target))
            wanted[hearer.socket.fileno()] = wanted.get(hearer.socket.fileno(), 0) | select.POLLIN
            if rest and speaker.may_send:
                wanted[speaker.socket.fileno()] = wanted.get(speaker.socket.fileno(), 0) | select.POLLOUT
        left = deadline - monotonic()
        if not waiting or left <= 0:
            return arrived and not waiting
        for descriptor, mask in wanted.items():
            poll.register(descriptor, mask)
        poll.poll(left * 1000)
        pending = waiting


@dataclass(frozen=True, slots=True)
class Subject:
    """A service under test: where its clients reach it, and the listening sockets that it dials.

    `pid` is the process that signals go to and whose descriptors, and those of the processes that it
    started, are counted: only the scenarios that need it ask for it. `drain` is the signal that asks it
    to finish its sessions and end. After `until` (monotonic) nothing of a scenario waits any more: what
    is connected or accepted then is a TimeoutError.
    """

    address: Address
    upstreams: tuple[socket.socket, ...] = ()
    pid: int = 0
    drain: signal.Signals = signal.SIGTERM
    until: float = math.inf

    def connect(self, *, narrow: bool = False) -> End:
        """A client, connected. A `narrow` one (TCP) has a small buffer and, since the peer's kernel
        sizes its own by the segments, makes the service's send buffer small as well.
        """
        sock = socket.socket(family(self.address))
        try:
            if narrow:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 1_000)
            sock.settimeout(self.patience())
            sock.connect(target(self.address))
        except BaseException:
            sock.close()
            raise
        return End(sock, self.until)

    def accept(self, upstream: int = 0, *, within: float = DEADLINE) -> End:
        """The upstream's end of the next connection that the service dials there."""
        listener = self.upstreams[upstream]
        listener.settimeout(self.patience(within))
        return End(listener.accept()[0], self.until)

    @contextlib.contextmanager
    def session(self, *, narrow: bool = False) -> Iterator[tuple[End, End]]:
        """A client and the upstream that the proxy dialled for it."""
        with self.connect(narrow=narrow) as client, self.accept() as upstream:
            yield client, upstream

    def patience(self, within: float = DEADLINE) -> float:
        """How many of `within` seconds are left. TimeoutError if none is."""
        if (left := self.until - monotonic()) <= 0:
            raise TimeoutError("the scenario's time is over")
        return min(within, left)

    def processes(self) -> list[int]:
        """The service's process and those that it has started."""
        found = [self.pid]
        for pid in found:
            for task in _listed(f"/proc/{pid}/task"):
                with contextlib.suppress(OSError):  # it ends while it is looked at
                    found += map(int, (task / "children").read_text(encoding="ascii").split())
        return found

    def descriptors(self) -> int:
        """How many descriptors the service's processes have open."""
        return sum(len(_listed(f"/proc/{pid}/fd")) for pid in self.processes())


def _listed(folder: str) -> list[Path]:
    """What is in a folder of /proc; nothing, if its process is gone."""
    with contextlib.suppress(OSError):
        return list(Path(folder).iterdir())
    return []


def family(address: Address) -> socket.AddressFamily:
    if address.transport == "unix":
        return socket.AF_UNIX
    return socket.AF_INET6 if ":" in address.host else socket.AF_INET


def target(address: Address) -> str | tuple[str, int]:
    """`address` as `connect` and `bind` take it."""
    return address.host if address.transport == "unix" else (address.host, address.port)


def listen(address: Address) -> socket.socket:
    """A listening socket for an upstream that a scenario plays. Port 0 is any free one.

    A port that the kernel chose is lost when the socket is shut down, one that was asked for by its
    number is not: so the chosen one is asked for.
    """
    with socket.socket(family(address)) as chooser:
        sock = socket.socket(family(address))
        try:
            if address.transport == "tcp":
                for each in (chooser, sock):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                chooser.bind(target(address))
                address = bound(chooser)
            sock.bind(target(address))
            sock.listen(BACKLOG)
        except BaseException:
            sock.close()
            raise
        return sock


def clear(listener: socket.socket) -> None:
    """Forget what an earlier scenario left in the backlog."""
    listener.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            listener.accept()[0].close()


def bound(sock: socket.socket) -> Address:
    """The address that `sock` is bound to."""
    name = sock.getsockname()
    return Address("unix", name) if sock.family == socket.AF_UNIX else Address("tcp", name[0], name[1])
