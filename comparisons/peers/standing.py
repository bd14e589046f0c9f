"""A peer that is up, between the clients and the upstreams that a scenario plays.

Whatever it does, it is ended when the scenarios are done with it, with every process that it started and
that stayed in its process group. A peer that is already up is only given its upstreams.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

from comparisons.peers.peer import Peer, Service, Task
from comparisons.scenarios.rules import Transport
from comparisons.scenarios.wire import Subject, bound, clear, listen
from services.core.addresses import Address

PATIENCE = 15.0  # seconds until a peer listens: some start a virtual machine first
STOP = 3.0  # seconds from SIGTERM to SIGKILL
LOOK = 0.01  # seconds between two looks
LISTEN, UNCONNECTED = 0x0A, 0x07  # as /proc/net/tcp and udp write them, include/net/tcp_states.h
HOSTS: Mapping[Transport, str] = {"tcp4": "127.0.0.1", "tcp6": "::1", "udp4": "127.0.0.1", "udp6": "::1"}


class NotUp(Exception):  # noqa: N818  it is not this program's error
    """The peer did not come up; one line says how."""


class Standing:
    """`peer` as a `service`, ready when this returns. NotUp if it is not.

    Where an echo service is asked for and the peer only proxies, it gets an echo service to dial.
    """

    def __init__(
        self,
        peer: Peer,
        service: Service = "proxy",
        transport: Transport = "tcp4",
        *,
        upstreams: int = 1,
        settings: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> None:
        self._peer, self._prefix = peer, prefix
        self._process: Process | None = None
        self._listeners: tuple[socket.socket, ...] = ()
        with ExitStack() as stack:
            self.directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-")))
            places = list(peer.upstream_addresses) or [Address("tcp", "127.0.0.1")] * upstreams
            if service in peer.services:
                dialled = places if service == "proxy" else []
                self._listeners = tuple(stack.enter_context(listen(place)) for place in dialled[:upstreams])
                dials = [bound(listener) for listener in self._listeners]
            else:
                dials = [self._echo(stack, place) for place in places[:1]]
            # one for each that was asked for; those beyond, of a peer that is up, are told by nobody
            known = {key: value for key, value in (settings or {}).items() if key in peer.settings}
            self._address = peer.address or _free(transport)
            if peer.command is not None:
                own: Service = service if service in peer.services else "proxy"
                task = Task(own, self._address, dials, known, self.directory)
                self._process = self._start(stack, peer.command(task), self._address, peer.name)
            self._stack = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        self._stack.close()

    def subject(self, *, limit: float = float("inf")) -> Subject:
        """What a scenario gets, which must be over in `limit` seconds."""
        for listener in self._listeners:
            clear(listener)
        return Subject(
            self._address,
            self._listeners,
            self._process.pid if self._process else 0,
            self._peer.drain,
            time.monotonic() + limit,
        )

    def died(self) -> str | None:
        """How it ended, or None while it runs."""
        return self._process.died() if self._process else None

    def wait_died(self, within: float) -> None:
        """Until it has ended, or for so many seconds."""
        deadline = time.monotonic() + within
        while self.died() is None and time.monotonic() < deadline:
            time.sleep(LOOK)

    def lines(self, event: str) -> list[dict[str, Any]]:
        """What its log holds of `event`, if it writes our log."""
        if self._peer.log is None:
            return []
        path = self.directory / self._peer.log
        *whole, _torn = path.read_bytes().split(b"\n") if path.exists() else [b""]
        return [line for line in map(json.loads, whole) if line["event"] == event]

    def _echo(self, stack: ExitStack, place: Address) -> Address:
        if place.transport == "tcp" and not place.port:
            place = _free("tcp4")
        command = [sys.executable, "-m", "services.cli", "echo", "--engine", "nonblocking"]
        self._start(stack, [*command, "--listen", str(place)], place, "the echo service behind it")
        return place

    def _start(self, stack: ExitStack, command: Sequence[str], address: Address, name: str) -> "Process":
        process = Process([*self._prefix, *command], self.directory / f"{name}.output")
        stack.callback(process.stop)
        deadline = time.monotonic() + PATIENCE
        while not (process.listens(address) and self._says_ready()):
            if how := process.died():
                raise NotUp(f"{name} did not come up: {how}")
            if time.monotonic() > deadline:
                raise NotUp(f"{name} does not listen on {address} after {PATIENCE:g} s")
            time.sleep(LOOK)
        return process

    def _says_ready(self) -> bool:
        """Whether it has said so, where it would: a socket listens before the service is there."""
        return self._peer.log is None or bool(self.lines("service_ready"))


class Process:
    """A program in a process group of its own: Ctrl-C reaches only us, and we end what we started."""

    def __init__(self, command: Sequence[str], output: Path) -> None:
        self._output = output
        try:
            with output.open("wb") as file:
                self._process = subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
                )
        except OSError as error:
            raise NotUp(f"{command[0]} cannot be started: {error.strerror}") from error
        self.pid = self._process.pid

    def listens(self, address: Address) -> bool:
        """Whether somebody listens there, in the network where the process is. Nothing is connected for it."""
        if address.transport == "unix":
            return Path(address.host).exists()
        state, tables = (UNCONNECTED, "udp") if address.transport == "udp" else (LISTEN, "tcp")
        rows: list[list[str]] = []
        for table in (tables, f"{tables}6"):
            with contextlib.suppress(OSError):  # a process that has just ended has none
                text = Path(f"/proc/{self.pid}/net/{table}").read_text(encoding="ascii")
                rows += [line.split() for line in text.splitlines()[1:]]
        return any(row[1].endswith(f":{address.port:04X}") and int(row[3], 16) == state for row in rows)

    def died(self) -> str | None:
        if self._process.poll() is None:
            return None
        status = self._process.returncode
        how = f"signal {signal.Signals(-status).name}" if status < 0 else f"status {status}"
        said = self._output.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(said) if line.strip()), "")
        return f"it ended with {how}" + (f", saying {last[:200]!r}" if last else "")

    def stop(self) -> None:
        self._signal(signal.SIGTERM)
        try:
            self._process.wait(STOP)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self._signal(signal.SIGKILL)
            self._process.wait()

    def _signal(self, number: signal.Signals) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.pid, number)


def _free(transport: Transport) -> Address:
    """A port that is free now."""
    kind = socket.SOCK_DGRAM if transport.startswith("udp") else socket.SOCK_STREAM
    family = socket.AF_INET6 if transport.endswith("6") else socket.AF_INET
    with socket.socket(family, kind) as chooser:
        chooser.bind((HOSTS[transport], 0))
        port = chooser.getsockname()[1]
    return Address("udp" if kind == socket.SOCK_DGRAM else "tcp", HOSTS[transport], port)
