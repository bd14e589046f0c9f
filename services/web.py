"""A small server for a daemon's own interfaces, over TCP or a UNIX socket, in a thread of its own.

`Server` is handed bound sockets. One thread serves them all; a client that is slow, or talks something
else, costs a place among a few until its time is up, or until a newer client needs the place. Requests are
bounded, and a connection carries one: that leaves nothing to smuggle. It never touches an engine itself.

`WebServer` speaks HTTP/1.1, and has a function that answers requests; `control.py` speaks in lines. It is no server for a web: no TLS, no keep-alive, no bodies of unknown length.
"""

import math
import re
import select
import socket
import threading
import time
import traceback
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from services.engines.sockets import EXHAUSTED_PAUSE, Wakeup
from services.vocabulary import EngineFault, Event

# Prometheus and test suites hold one connection each; these are for a few of them and some strays.
MOST_CLIENTS = 16
# Seconds for a request to come, and again for its answer to be taken. Prometheus gives up after 10.
PATIENCE = 5.0
# What follows the answer is read for so long, so that a reset does not overtake it (RFC 9112, 9.6).
LINGER = 1.0
# Bytes; Prometheus' own request head has about 400.
LONGEST_HEAD = 8192
# Bytes; a list of some hundred proxies.
LONGEST_BODY = 65_536

PLAIN = "text/plain; charset=utf-8"
JSON = "application/json"
REASONS = {
    200: "OK",
    201: "Created",
    204: "No Content",
    400: "Bad Request",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    411: "Length Required",
    413: "Content Too Large",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
}

# A head is printable ASCII but for its line ends and tabs: nothing else can be smuggled into an answer.
_HEAD = re.compile(rb"([A-Z]+) (/[!-~]*) HTTP/1\.[01]\r\n((?:[\t -~]+\r\n)*)\r\n")


class Request(NamedTuple):
    """`path` is the target without its query, as it came. `fields` are the head's, by their names in
    lower case; repeated ones are joined by commas (RFC 9110, 5.3).
    """

    method: str
    path: str
    fields: Mapping[str, str]
    body: bytes


class Response(NamedTuple):
    """`allow` lists the methods where the one that was used is not (405)."""

    status: int
    body: str | bytes = b""
    kind: str = PLAIN
    allow: str = ""


class _Client:
    """One connection: its request is read, its answer is written, its end is awaited."""

    __slots__ = ("answer", "deadline", "request", "sock")

    def __init__(self, sock: socket.socket, now: float) -> None:
        self.sock = sock
        self.request = b""
        # None while the request is read; what is left to write; empty when all was written
        self.answer: memoryview | None = None
        self.deadline = now + PATIENCE


class Server(ABC):
    """Args:
    name: of the thread.
    sockets: bound, listening, non-blocking; closed at the end of the thread.
    emit: where a fault of this server is told.

    """

    def __init__(self, name: str, sockets: Sequence[socket.socket], emit: Callable[[Event], None]) -> None:
        self._listeners = {sock.fileno(): sock for sock in sockets}
        self._emit = emit
        self._closing = Wakeup()
        # oldest first, by descriptor
        self._clients: dict[int, _Client] = {}
        self._accept_at = 0.0
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """Ends the thread, which closes the sockets. An `answer` that still waits is left behind."""
        self._closing.wake()
        self._thread.join(LINGER)

    @abstractmethod
    def answer(self, received: bytes) -> bytes | None:
        """What to send for all that a client sent so far; None while that is a part of a request."""

    def _run(self) -> None:
        closing = self._closing.fileno()
        while True:
            ready = self._ready()
            if closing in ready:
                break
            now = time.monotonic()
            for descriptor in ready:
                if descriptor in self._listeners:
                    self._accept(self._listeners[descriptor], now)
                elif descriptor in self._clients:  # it may have made room for a newer one just now
                    self._serve(self._clients[descriptor], now)
            for client in [each for each in self._clients.values() if each.deadline <= now]:
                self._drop(client)
        for sock in (*self._listeners.values(), *(client.sock for client in self._clients.values())):
            sock.close()
        self._closing.close()

    def _ready(self) -> list[int]:
        """The descriptors that something can be done with; waits for one, or for a deadline."""
        poll = select.poll()
        poll.register(self._closing, select.POLLIN)
        now = time.monotonic()
        deadlines = [client.deadline for client in self._clients.values()]
        if self._accept_at <= now:
            for descriptor in self._listeners:
                poll.register(descriptor, select.POLLIN)
        else:
            deadlines.append(self._accept_at)
        for descriptor, client in self._clients.items():
            poll.register(descriptor, select.POLLOUT if client.answer else select.POLLIN)
        wait = max(0, math.ceil((min(deadlines) - now) * 1000)) if deadlines else None
        return [descriptor for descriptor, _ in poll.poll(wait)]

    def _accept(self, listener: socket.socket, now: float) -> None:
        try:
            sock, _ = listener.accept()
        except BlockingIOError:  # another process with the same socket was faster
            return
        except OSError:  # no descriptor to be had, or the client is gone: a pause is right for both
            self._accept_at = now + EXHAUSTED_PAUSE
            return
        sock.setblocking(False)
        if len(self._clients) == MOST_CLIENTS:
            self._drop(next(iter(self._clients.values())))
        self._clients[sock.fileno()] = _Client(sock, now)

    def _drop(self, client: _Client) -> None:
        del self._clients[client.sock.fileno()]
        client.sock.close()

    def _serve(self, client: _Client, now: float) -> None:
        """The one step that can be done without waiting."""
        try:
            if client.answer:
                client.answer = client.answer[client.sock.send(client.answer) :]
                if not client.answer:
                    client.sock.shutdown(socket.SHUT_WR)
                    client.deadline = now + LINGER
                return
            data = client.sock.recv(LONGEST_HEAD)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._drop(client)
        elif client.answer is None:
            client.request += data
            answer = self.answer(client.request)
            if answer is not None:
                client.answer = memoryview(answer)
                client.deadline = time.monotonic() + PATIENCE  # to answer may have taken a while

    def _tell(self, error: Exception) -> None:
        """A bug of ours costs one answer, not the thread."""
        self._emit(EngineFault(session=None, error=repr(error), traceback=traceback.format_exc()))


class WebServer(Server):
    """Args:
    respond: called in this server's thread. TimeoutError means that the engine gave no answer.

    """

    def __init__(
        self,
        name: str,
        sockets: Sequence[socket.socket],
        respond: Callable[[Request], Response],
        emit: Callable[[Event], None],
    ) -> None:
        super().__init__(name, sockets, emit)
        self._respond = respond

    def answer(self, received: bytes) -> bytes | None:
        """The whole HTTP response to what was received, which may be anything."""
        head, end, body = received.partition(b"\r\n\r\n")
        if len(head + end) > LONGEST_HEAD:
            return _encode(Response(431, f"a request's head may have {LONGEST_HEAD} bytes\n"))
        if not end:
            return None
        read = _HEAD.fullmatch(head + end)
        if read is None:
            return _encode(Response(400, "this is no HTTP/1 request\n"))
        method, target, lines = (part.decode("ascii") for part in read.groups())
        fields: dict[str, str] = {}
        for line in lines.splitlines():
            name, _, value = line.partition(":")
            key = name.rstrip().lower()
            fields[key] = ",".join(filter(None, [fields.get(key), value.strip()]))
        length = fields.get("content-length", "0")
        if "transfer-encoding" in fields:
            return _encode(Response(411, "a request's body needs a Content-Length\n"))
        if not length.isdecimal():
            return _encode(Response(400, "this is no Content-Length\n"))
        if len(length) > len(str(LONGEST_BODY)) or int(length) > LONGEST_BODY:
            return _encode(Response(413, f"a request's body may have {LONGEST_BODY} bytes\n"))
        if len(body) < int(length):
            return None
        try:
            request = Request(method, target.partition("?")[0], fields, body[: int(length)])
            response = self._respond(request)
        except TimeoutError:
            response = Response(503, "the engine gave no answer in time\n")
        except Exception as error:  # noqa: BLE001  a bug of ours
            self._tell(error)
            response = Response(500, "this is a fault of the daemon; its log has more\n")
        return _encode(response, method)


def _encode(response: Response, method: str = "GET") -> bytes:
    status, body, kind, allow = response
    content = body.encode() if isinstance(body, str) else body
    lines = [f"HTTP/1.1 {status} {REASONS[status]}"]
    if status != 204:  # which says that there is neither (RFC 9110, 8.6)
        lines += [f"Content-Type: {kind}", f"Content-Length: {len(content)}"]
    if allow:
        lines.append(f"Allow: {allow}")
    head = "\r\n".join([*lines, "Connection: close", "", ""])
    return head.encode("ascii") + (b"" if method == "HEAD" else content)
