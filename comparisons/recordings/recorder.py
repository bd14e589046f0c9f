"""A small recording proxy: it listens, dials, relays both ways with half-close and resets, and keeps what
was said and when.

    python -m comparisons.recordings.recorder --listen 127.0.0.1:7000 --upstream 127.0.0.1:6379 --out FILE

It runs until Ctrl-C, SIGTERM, or a bound on time or size, then cuts what is still open, keeps it as far as
it went, and writes the file. Two threads a connection, blocking calls: a recorder has to be right, and
then quick enough not to be noticed by the software it listens to. It changes nothing in what it relays
and keeps everything, passwords included: record only what may be seen.

A step is written down before it is passed on, so an answer always follows its question, and gets the
time at which it was read here, in microseconds.
"""

import contextlib
import select
import signal
import socket
import struct
import threading
import time
from typing import BinaryIO

import click

from comparisons.recordings.format import VERSION, Conversation, Header, Recording, Side, Step, encode
from services.core.addresses import Address

DIAL_LIMIT = 5.0  # seconds
_CHUNK = 1 << 16


class Recorder:
    """Records what passes from `listener`, a listening stream socket, to `upstream` (an IP literal or a
    UNIX path). `serve` returns after `stop` was called, or `seconds`, or `size` bytes of content.
    """

    def __init__(
        self, listener: socket.socket, upstream: Address, *, seconds: float = 3600.0, size: int = 64 << 20
    ) -> None:
        listener.setblocking(False)
        self._listener, self._upstream = listener, upstream
        self._seconds, self._room = seconds, size
        self._lock = threading.Lock()
        self._stopping = threading.Event()
        self._open: set[_Conversation] = set()
        self._kept: list[_Conversation] = []
        self.unreachable = 0  # clients that were turned away because the upstream could not be dialled

    def stop(self) -> None:
        self._stopping.set()

    def serve(self) -> None:
        deadline = time.monotonic() + self._seconds
        threads: list[threading.Thread] = []
        poll = select.poll()
        poll.register(self._listener, select.POLLIN)
        while not self._stopping.is_set() and time.monotonic() < deadline:
            if not poll.poll(50):
                continue
            try:
                client, _ = self._listener.accept()
            except OSError:
                continue  # it was reset while it waited, or somebody else took it
            threads = [each for each in threads if each.is_alive()]
            threads.append(threading.Thread(target=self._record, args=(client,)))
            threads[-1].start()
        with self._lock:
            self._stopping.set()
            for each in self._open:
                each.cut()
        for thread in threads:
            thread.join()

    def recording(self, title: str, client: str, server: str) -> Recording:
        """What was recorded so far; conversations that have begun since their start at 0."""
        with self._lock:
            kept = sorted(self._kept, key=lambda each: each.start)
        first = kept[0].start if kept else 0
        return Recording(
            Header(VERSION, title, client, server),
            [Conversation((each.start - first) // 1000, list(each.steps)) for each in kept],
        )

    def took(self, count: int) -> None:
        """`count` more bytes are kept. Without a lock: two at once may let a chunk more in."""
        self._room -= count
        if self._room < 0:
            self._stopping.set()

    def _record(self, client: socket.socket) -> None:
        start = time.monotonic_ns()
        try:
            server = _dial(self._upstream)
        except OSError:
            self.unreachable += 1
            client.close()
            return
        for sock in (client, server):
            sock.setblocking(True)
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        conversation = _Conversation(self, start, client, server)
        with self._lock:
            self._kept.append(conversation)
            self._open.add(conversation)
            if self._stopping.is_set():
                conversation.cut()
        conversation.run()
        with self._lock:
            self._open.discard(conversation)
        conversation.close()


class _Conversation:
    """One connection and its two directions. A direction belongs to the thread that reads it."""

    def __init__(self, recorder: Recorder, start: int, client: socket.socket, server: socket.socket) -> None:
        self.recorder, self.start = recorder, start
        self.steps: list[Step] = []
        self.sockets: dict[Side, socket.socket] = {"client": client, "server": server}
        self.lock = threading.Lock()
        self.ended: set[Side] = set()  # sides whose end was read
        self.gone: set[Side] = set()  # sides that could not be written to any more
        self.over = False  # reset or cut: nothing more is written down
        self.reset = False

    def run(self) -> None:
        other = threading.Thread(target=self._relay, args=("server", "client"))
        other.start()
        self._relay("client", "server")
        other.join()

    def cut(self) -> None:
        """Stop in the middle. Wakes both threads, also from a blocked send."""
        with self.lock:
            self.over = True
        self._wake(socket.SHUT_RDWR)

    def close(self) -> None:
        for sock in self.sockets.values():
            if self.reset:
                with contextlib.suppress(OSError):
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            sock.close()

    def _relay(self, source: Side, target: Side) -> None:
        while True:
            try:
                data = self.sockets[source].recv(_CHUNK)
            except OSError:
                self._was_reset(source)
                return
            if not data:
                # the kernel tells of a reset once: if a send heard of it, reading ends like this
                if not self._note(source, data):
                    self._was_reset(source)
                    return
                with contextlib.suppress(OSError):
                    self.sockets[target].shutdown(socket.SHUT_WR)
                return
            if not self._note(source, data):
                return
            try:
                self.sockets[target].sendall(data)
            except OSError:
                # what the target said before it went is still to be read, by the other thread
                with self.lock:
                    self.gone.add(target)
                    read_out = target in self.ended
                if read_out:
                    self._was_reset(target)
                return

    def _note(self, who: Side, data: bytes) -> bool:
        """Write down what was read. False if there is nothing to pass on."""
        with self.lock:
            if self.over or (not data and who in self.gone):
                return False
            self.steps.append(Step(self._when(), who, "data" if data else "end", data))
            if not data:
                self.ended.add(who)
        self.recorder.took(len(data))
        return True

    def _was_reset(self, who: Side) -> None:
        with self.lock:
            if not self.over:
                self.steps.append(Step(self._when(), who, "reset"))
                self.over = self.reset = True
        # the other direction may be waiting for bytes that no longer matter; SHUT_WR would say FIN first
        self._wake(socket.SHUT_RD)

    def _when(self) -> int:
        return (time.monotonic_ns() - self.start) // 1000

    def _wake(self, how: int) -> None:
        for sock in self.sockets.values():
            with contextlib.suppress(OSError):
                sock.shutdown(how)


def _dial(upstream: Address) -> socket.socket:
    if upstream.transport == "unix":
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(DIAL_LIMIT)
            sock.connect(upstream.host)
        except OSError:
            sock.close()
            raise
        return sock
    return socket.create_connection((upstream.host, upstream.port), DIAL_LIMIT)


@click.command()
@click.option("--listen", "listen", required=True, metavar="HOST:PORT", help="Where clients connect.")
@click.option("--upstream", "upstream", required=True, metavar="HOST:PORT", help="The real server.")
@click.option("--out", "out", required=True, type=click.File("wb", lazy=False), help="The file to write.")
@click.option("--title", default="", help="What is recorded, in a few words.")
@click.option("--client", default="", help="The client's software and version.")
@click.option("--server", default="", help="The server's software and version.")
@click.option("--seconds", default=3600.0, show_default=True, help="Stop after this long.")
@click.option("--size", default=64 << 20, show_default=True, help="Stop after this many bytes.")
def main(
    *,
    listen: str,
    upstream: str,
    out: BinaryIO,
    title: str,
    client: str,
    server: str,
    seconds: float,
    size: int,
) -> None:
    """Record what passes from --listen to --upstream until Ctrl-C."""
    try:
        where, target = Address.parse(listen), Address.parse(upstream)
        family = socket.AF_INET6 if ":" in where.host else socket.AF_INET
        listener = socket.create_server((where.host, where.port), family=family, backlog=1024)
    except (ValueError, OSError) as error:
        raise click.ClickException(str(error)) from error
    with listener:
        recorder = Recorder(listener, target, seconds=seconds, size=size)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: recorder.stop())
        recorder.serve()
    recording = recorder.recording(title, client, server)
    out.write(encode(recording.header, recording.conversations))
    click.echo(
        f"{len(recording.conversations)} conversations, {recording.bytes_c2s} bytes from clients, "
        f"{recording.bytes_s2c} from servers, {recorder.unreachable} clients turned away"
    )


if __name__ == "__main__":
    main()
