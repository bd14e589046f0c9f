r"""The control socket: how an operator asks a running daemon what it does, and has it change a little.

The protocol
============

A UNIX stream socket. A client sends one line, which is one JSON object, and gets one line back::

    {"version": 1, "ask": "status", "sessions": 50}
    {"version": 1, "ask": "drain", "pool": "backend", "upstream": "127.0.0.1:6379"}
    {"version": 1, "ask": "enable", "pool": "backend", "upstream": "127.0.0.1:6379"}
    {"version": 1, "ask": "weight", "pool": "backend", "upstream": "127.0.0.1:6379", "weight": 3}
    {"version": 1, "ask": "close", "session": "01M3D0ZQ4S9X2V0E6C8N7K5T1B"}

    {"version": 1, "status": {...}}                      what `status.py` describes
    {"version": 1, "pool": {...}}                        as it is now, after a change
    {"version": 1, "closed": "01M3D0ZQ4S9X2V0E6C8N7K5T1B"}
    {"version": 1, "fault": "unknown", "error": "there is no pool \"backnd\""}

`fault` is `invalid` (this was no request), `unknown` (it names what is not here) or `unavailable` (the
engine gave no answer; ask again). Then the daemon closes the connection. Unknown keys of an answer are to
be ignored; a request with one is invalid. An upstream goes by its address as configured.

What is changed holds for new sessions, in this process: drained upstreams keep their open sessions. It
outlives a reload (`Pool.succeed`) and ends with the process. A session that is closed is reset on both
sides and logged with termination K.

Who may ask
===========

Whoever can open the socket: it has mode 0600, so its owner and root. By default it is `PID.sock` in the
runtime directory, where `triptych status` finds every daemon of the machine or the user. Clients, their
requests and their time are bounded by `web.Server`: one that sends garbage or stalls costs a place among a
few. The engine is only asked by `post`.
"""

import json
import os
import socket
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Annotated, Literal, NoReturn, TypeVar

import msgspec
from msgspec import Meta, Struct

from services.core.addresses import Address
from services.core.service import Service
from services.core.session import Actions, Cut
from services.core.upstreams import Pool
from services.endpoints import EndpointError, open_interface
from services.engines.base import Engine
from services.listeners import PATIENCE, Held
from services.status import PoolStatus, Status, of_admission, of_listeners, of_pool, of_sessions
from services.vocabulary import Event
from services.web import Server

T = TypeVar("T")

# A request is as long as the names in it.
LONGEST_REQUEST = 4096
# Sessions in one answer: a few milliseconds of the engine's time, and some 100 KiB.
MOST_SESSIONS = 200
# HAProxy's largest is 256; more tells nothing that the ratio does not
HEAVIEST = 1_000_000


class Request(Struct, frozen=True, kw_only=True, tag_field="ask", forbid_unknown_fields=True):
    version: Literal[1]


class AskStatus(Request, frozen=True, kw_only=True, tag="status"):
    sessions: Annotated[int, Meta(ge=0, le=MOST_SESSIONS)] = MOST_SESSIONS


class Drain(Request, frozen=True, kw_only=True, tag="drain"):
    pool: str
    upstream: str


class Enable(Request, frozen=True, kw_only=True, tag="enable"):
    pool: str
    upstream: str


class Weight(Request, frozen=True, kw_only=True, tag="weight"):
    pool: str
    upstream: str
    weight: Annotated[int, Meta(ge=1, le=HEAVIEST)]


class CloseSession(Request, frozen=True, kw_only=True, tag="close"):
    session: str


AnyRequest = AskStatus | Drain | Enable | Weight | CloseSession
Fault = Literal["invalid", "unknown", "unavailable"]


class Answer(Struct, frozen=True, kw_only=True, omit_defaults=True):
    version: int = msgspec.field(default_factory=lambda: 1)  # by a factory, so that it is always written
    status: Status | None = None
    pool: PoolStatus | None = None
    closed: str | None = None
    fault: Fault | None = None
    error: str | None = None


# The socket -------------------------------------------------------------------------------------


def folders(environment: Mapping[str, str]) -> list[Path]:
    """Where a daemon of this environment puts its socket, the first of them."""
    found = []
    if given := environment.get("RUNTIME_DIRECTORY"):
        found.append(Path(given.partition(":")[0]))
    if given := environment.get("XDG_RUNTIME_DIR"):
        found.append(Path(given, "triptych"))
    return found


def open_socket(configured: Address | None, environment: Mapping[str, str]) -> list[socket.socket]:
    """The listening socket, if there is a place for one. Called before there is a second thread: the mode
    of a new file is the process's.

    Raises:
        EndpointError: it cannot be had there.

    """
    address = configured
    if address is None:
        for folder in folders(environment)[:1]:
            try:
                folder.mkdir(mode=0o700, exist_ok=True)
                address = Address.parse(f"unix:{folder / f'{os.getpid()}.sock'}")
            except OSError as error:
                raise EndpointError(f"{folder}: {error.strerror}", 71) from error
            except ValueError as error:  # too long a path
                raise EndpointError(str(error), 78) from error
    if address is None:
        return []
    before = os.umask(0o177)
    try:
        return open_interface(address, {})
    finally:
        os.umask(before)


# The server -------------------------------------------------------------------------------------


class Control(Server):
    """Args:
    held, pools: the listeners that there are, and the pools of the configuration that holds now.
    identity: of the status: triptych, engine, instance.
    uptime_us: since the process began.

    """

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        *,
        engine: Engine,
        service: Service,
        held: Callable[[], Sequence[Held]],
        pools: Callable[[], Mapping[str, Pool]],
        identity: Mapping[str, str],
        uptime_us: Callable[[], int],
        clock: Callable[[], float],
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__("control", sockets, emit)
        self._engine = engine
        self._service = service
        self._held = held
        self._pools = pools
        self._identity = identity
        self._uptime_us = uptime_us
        self._clock = clock
        self._read = msgspec.json.Decoder(AnyRequest)

    def answer(self, received: bytes) -> bytes | None:
        """The line for a request, which may be anything."""
        text, end, _ = received.partition(b"\n")
        if len(text) > LONGEST_REQUEST:
            return _line(Answer(fault="invalid", error=f"a request may have {LONGEST_REQUEST} bytes"))
        if not end:
            return None
        try:
            request = self._read.decode(text)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            return _line(Answer(fault="invalid", error=str(error)))
        try:
            return _line(self._ask(request))
        except TimeoutError:
            return _line(Answer(fault="unavailable", error="the engine gave no answer in time"))
        except Exception as error:  # noqa: BLE001  a bug of ours
            self._tell(error)
            return _line(Answer(fault="unavailable", error="this is a fault of the daemon; its log has more"))

    def _ask(self, request: AnyRequest) -> Answer:
        match request:
            case AskStatus():
                return self._do(lambda: (Answer(status=self._status(request.sessions)), ()))
            case Drain():
                return self._do(lambda: (self._change(request, draining=True), ()))
            case Enable():
                return self._do(lambda: (self._change(request, draining=False), ()))
            case Weight():
                return self._do(lambda: (self._change(request, weight=request.weight), ()))
            case CloseSession():
                return self._do(lambda: self._close(request.session))

    def _do(self, function: Callable[[], tuple[T, Actions]]) -> T:
        """Have the engine do what `function` says, where its state may be touched. TimeoutError where it
        does not come to it; what `function` raises is raised here, and is no fault of the engine.
        """
        answers: SimpleQueue[Callable[[], T]] = SimpleQueue()

        def run() -> Actions:
            try:
                answer, actions = function()
            except Exception as error:  # noqa: BLE001  a bug of ours
                answers.put(partial(_raise, error))
                return ()
            answers.put(lambda: answer)
            return actions

        self._engine.post(run)
        try:
            answer = answers.get(timeout=PATIENCE)
        except Empty:
            raise TimeoutError from None
        return answer()

    # Where the engine's state may be touched ----------------------------------------------------

    def _status(self, most: int) -> Status:
        now, service, held = self._clock(), self._service, self._held()
        # those that the faults' interface made are known by their listeners only
        pools = {id(each): each for each in (*self._pools().values(), *(each.pool for each in held)) if each}
        sessions = of_sessions(service.sessions, most, now)
        return Status(
            **self._identity,
            pid=os.getpid(),
            uptime_us=self._uptime_us(),
            draining=service.draining,
            totals=service.snapshot(now).totals,
            listeners=of_listeners(service, held),
            pools=[of_pool(pool, now) for pool in pools.values()],
            admission=of_admission(service.admission, service.open_sessions, now),
            sessions=list(sessions),
            more_sessions=len(service.sessions) - len(sessions),
        )

    def _change(
        self, request: Drain | Enable | Weight, *, draining: bool | None = None, weight: int | None = None
    ) -> Answer:
        pool = self._pools().get(request.pool)
        if pool is None:
            return _unknown("pool", request.pool, self._pools())
        if not pool.change(request.upstream, draining=draining, weight=weight):
            names = [each.name for each in pool.upstreams]
            return _unknown(f"upstream in pool {json.dumps(pool.name)} called", request.upstream, names)
        return Answer(pool=of_pool(pool, self._clock()))

    def _close(self, wanted: str) -> tuple[Answer, Actions]:
        for session in self._service.sessions:
            if session.record.id == wanted and not session.over:
                return Answer(closed=wanted), session.handle(Cut("K"), self._clock())
        return Answer(fault="unknown", error=f"no session {json.dumps(wanted)} is open"), ()


def _raise(error: Exception) -> NoReturn:
    raise error


def _unknown(kind: str, name: str, known: Iterable[str]) -> Answer:
    there = ", ".join(sorted(known)) or "none"
    return Answer(fault="unknown", error=f"there is no {kind} {json.dumps(name)} (there are: {there})")


def _line(answer: Answer) -> bytes:
    return msgspec.json.encode(answer) + b"\n"


# The client -------------------------------------------------------------------------------------


def find(environment: Mapping[str, str]) -> list[Path]:
    """The sockets of the daemons that this user may ask: their own, and a system's."""
    places = [*folders(environment), Path("/run/triptych")]
    found = {path for place in places for glob in ("*.sock", "*/*.sock") for path in place.glob(glob)}
    return sorted(found)


def ask(path: Path, request: AnyRequest) -> Answer:
    """What the daemon at `path` answers.

    Raises:
        OSError: nobody is there, or not for us, or it does not answer in time.
        ValueError: this is no answer of a daemon.

    """
    with socket.socket(socket.AF_UNIX) as client:
        # the engine's patience, and some for the way
        client.settimeout(2 * PATIENCE)
        client.connect(str(path))
        client.sendall(msgspec.json.encode(request) + b"\n")
        received = b"".join(iter(lambda: client.recv(65_536), b""))
    try:
        return msgspec.json.decode(received, type=Answer)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path}: no control socket of Triptych") from error
