"""Clients of the services in a booted machine: one session, many at once, one that lasts.

What they send is pseudo-random, and what comes back is compared with it byte by byte.
"""

import socket
import threading
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from comparisons.load.pattern import messages, pattern

HOST = "127.0.0.1"
PATIENCE = 60.0  # above the time that a drain may keep a new client waiting


def call(port: int, data: bytes = b"hello") -> bytes:
    """One session to its end: everything that came back."""
    with socket.create_connection((HOST, port), PATIENCE) as client:
        client.sendall(data)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def call_udp(port: int, data: bytes = b"hello") -> bytes:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as client:
        client.settimeout(PATIENCE)
        client.sendto(data, (HOST, port))
        return client.recv(65536)


@dataclass
class Crowd:
    """Clients that come as fast as they are served, from `with` to its end, a session each."""

    port: int
    size: int = 4096
    clients: int = 4
    offered: int = 0
    served: int = 0
    refused: int = 0
    cut: list[str] = field(default_factory=list)
    slowest: float = 0.0

    def __enter__(self) -> Self:
        self._leave = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._come, args=(each,)) for each in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._leave.set()
        for thread in self._threads:
            thread.join()

    def _come(self, number: int) -> None:
        texts = messages(number, self.size)
        while not self._leave.is_set():
            begun = time.monotonic()
            text = texts[self.offered % len(texts)]
            refused = cut = None
            try:
                answer = call(self.port, text)
                if answer != text:
                    cut = f"{len(answer)} bytes of {len(text)}"
            except ConnectionRefusedError as error:
                refused = error
            except OSError as error:
                cut = str(error)
            with self._lock:
                self.offered += 1
                self.served += not refused and not cut
                self.refused += bool(refused)
                self.cut += [cut] if cut else []
                self.slowest = max(self.slowest, time.monotonic() - begun)

    def __str__(self) -> str:
        return (
            f"{self.offered} connections offered, {self.refused} refused, {len(self.cut)} cut, "
            f"slowest {self.slowest * 1000:.0f} ms"
        )


class Transfer:
    """One session that echoes, in both directions at once, until `finish`."""

    def __init__(self, port: int) -> None:
        self._socket = socket.create_connection((HOST, port), PATIENCE)
        self._pattern = pattern(port)
        self._finish = threading.Event()
        self.sent = 0
        self.received = 0
        self.fault = ""
        self._threads = [threading.Thread(target=each) for each in (self._send, self._receive)]
        for thread in self._threads:
            thread.start()

    def finish(self) -> int:
        """Ends it and returns how many bytes came back, all of them checked."""
        self._finish.set()
        for thread in self._threads:
            thread.join(2 * PATIENCE)
        self._socket.close()
        assert not self.fault, self.fault
        assert self.received == self.sent
        return self.received

    def _send(self) -> None:
        try:
            while not self._finish.is_set():
                self._socket.sendall(self._pattern)
                self.sent += len(self._pattern)
                # long, not fast: the crowd beside it needs the processor too
                time.sleep(0.01)
            self._socket.shutdown(socket.SHUT_WR)
        except OSError as error:
            self.fault = f"sending: {error}"

    def _receive(self) -> None:
        try:
            while data := self._socket.recv(65536):
                at = self.received % len(self._pattern)
                expected = (self._pattern[at:] + self._pattern)[: len(data)]
                if data != expected:
                    self.fault = f"other bytes than were sent, {self.received} bytes into the transfer"
                self.received += len(data)
        except OSError as error:
            self.fault = f"receiving: {error}"
