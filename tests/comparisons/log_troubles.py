"""Logs of real daemons that something happened to, for the commands that explain logs.

A `Scene` is a proxy and the echo daemon behind it, each with its log. The troubles are real: an upstream
with faults (it is a daemon, too, and reloads), a daemon that is stopped and goes on (SIGSTOP), a client
that does not read. What cannot happen to a daemon that works (a lost line) is done to its log.
"""

import os
import secrets
import select
import signal
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
from daemons import PATIENCE, Daemon, Line, configuration

from services.core.addresses import Address

WORD = b"x" * 64
PORT = 7007
# the faults of an upstream
SLOW = {"type": "latency", "delay": "20ms"}
RESETS = {"type": "reset", "after": "1ms"}


class Scene:
    """`log` is the proxy's; `address` is where clients connect."""

    def __init__(self, directory: Path, engine: str, settings: Mapping[str, str]) -> None:
        self._behind = directory / "upstream"
        self._behind.mkdir()
        # nobody else has it: loopback has 16 million addresses, and clients come from one of them
        self._host = "127." + ".".join(str(secrets.randbelow(253) + 1) for _ in range(3))
        self.upstream = Daemon(self._behind, self._upstream_config())
        front = directory / "proxy"
        front.mkdir()
        listeners = [{"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "echo"}]
        pools = {"echo": [Address("tcp", self._host, PORT)]}
        self.proxy = Daemon(
            front, configuration(engine, listeners, pools, {"log.level": "debug", **settings})
        )
        self.log = front / "log.jsonl"
        self.address = (self.proxy.addresses[0].host, self.proxy.addresses[0].port)

    def stop(self) -> None:
        self.proxy.stop()
        self.upstream.stop()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.address, PATIENCE)

    def talk(self, sessions: int, every: float = 0.0) -> None:
        """So many clients, one after the other, at most one in `every` seconds; each says a word."""
        for _ in range(sessions):
            with self.connect() as client:
                client.sendall(WORD)
                try:
                    answered(client)
                except ConnectionError:
                    continue
            self.wait(every)

    @staticmethod
    def wait(seconds: float) -> None:
        """Nothing happens for as long: that is the trouble, or the pace of the clients."""
        if seconds:
            select.select([], [], [], seconds)

    def fault(self, *faults: Mapping[str, object]) -> None:
        """From now on the upstream has these faults, and no others."""
        before = len(self.upstream.lines("config_reloaded"))
        (self._behind / "triptych.toml").write_text(self._upstream_config(faults))
        os.kill(self.upstream.pid, signal.SIGHUP)
        self.upstream.wait_for("config_reloaded", before + 1)

    @contextmanager
    def stalled(self) -> Iterator[None]:
        """The proxy's process does not run meanwhile."""
        os.kill(self.proxy.pid, signal.SIGSTOP)
        try:
            yield
        finally:
            os.kill(self.proxy.pid, signal.SIGCONT)

    def _upstream_config(self, faults: Sequence[Mapping[str, object]] = ()) -> str:
        listener: dict[str, object] = {
            "name": "echo",
            "address": f"{self._host}:{PORT}",
            "service": "echo",
            "faults": faults,
        }
        return configuration("nonblocking", [listener])


@contextmanager
def scene(directory: Path, engine: str = "nonblocking", **settings: str) -> Iterator[Scene]:
    """The settings are those of the proxy, with __ for a dot."""
    started = Scene(directory, engine, {name.replace("__", "."): value for name, value in settings.items()})
    try:
        yield started
    finally:
        started.stop()


def answered(client: socket.socket) -> None:
    """Waits for the echo of WORD. ConnectionError if it does not come."""
    got = b""
    while len(got) < len(WORD):
        part = client.recv(4096)
        if not part:
            raise ConnectionError("the end came first")
        got += part


def lines_of(log: Path) -> list[Line]:
    return [msgspec.json.decode(line) for line in log.read_bytes().splitlines()]


def edited(log: Path, copy: Path, edit: Callable[[Sequence[Line]], Sequence[Mapping[str, Any]]]) -> Path:
    """A copy of `log` whose lines are what `edit` makes of them."""
    copy.write_bytes(b"".join(msgspec.json.encode(line) + b"\n" for line in edit(lines_of(log))))
    return copy
