"""What happens before a session relays: rules 8, 9 and 11.

A dial that hangs is made of a listening socket whose backlog is full: the kernel drops further
SYNs, so whoever dials stays in SYN_SENT and tries again after a second. A dial that is refused is
made of the same socket, shut down: it keeps its port and listens again afterwards.
"""

import contextlib
import select
import socket
from collections.abc import Iterator
from pathlib import Path
from time import monotonic
from typing import Self

from comparisons.scenarios.wire import (
    BACKLOG,
    DEADLINE,
    Observation,
    Subject,
    bound,
    family,
    payload,
    target,
    transfer,
)

GREETING = payload(100, seed=31)
REQUEST = payload(64, seed=32)
REPLY = payload(5_000, seed=33)
SYN_SENT = 0x02  # as /proc/net/tcp writes it, include/net/tcp_states.h


def server_speaks_first(subject: Subject) -> Observation:
    """The client says nothing before it has heard the upstream's greeting."""
    with subject.session() as (client, upstream):
        transfer((upstream, GREETING, client))
        transfer((client, REQUEST, upstream))
        client.finish()
        upstream.hear_out()
        upstream.finish()
        return Observation(client.hear_out(), upstream.heard())


def others_while_a_dial_hangs(subject: Subject, *, clients: int = 4) -> Observation:
    """Two upstreams, the first of which never answers a SYN: clients that are sent to the second
    are served at once, though some client before or between them still waits.
    """
    served = 0
    with Hanging(subject.upstreams[0]) as hanging, contextlib.ExitStack() as stack:
        began = monotonic()
        waiting = [stack.enter_context(subject.connect()) for _ in range(clients)]
        with contextlib.suppress(TimeoutError):
            while served < clients:
                upstream = stack.enter_context(subject.accept(1, within=1))
                upstream.push(GREETING)
                upstream.finish()
                served += 1
                elapsed = monotonic() - began
        heard = sum(client.hear_out(within=0.3).received == len(GREETING) for client in waiting)
        for client in waiting:
            client.reset()  # a dial left behind would come through when the backlog is free again
        hanging.wait_dials(0)
        return Observation(
            figures={"served": served, "heard": heard, "elapsed_s": elapsed if served else DEADLINE}
        )


def client_resets_while_connecting(subject: Subject) -> Observation:
    """The client resets while its upstream is dialled: the attempt ends, without a word upstream."""
    with Hanging(subject.upstreams[0]) as hanging:
        client = subject.connect()
        hanging.wait_dials(1)
        client.reset()
        return Observation(figures={"attempt_ended_s": hanging.wait_dials(0, within=5)})


def client_ends_while_connecting(subject: Subject) -> Observation:
    """The client asks and sends FIN while its upstream is dialled: both are delivered later."""
    with contextlib.ExitStack() as stack:
        with Hanging(subject.upstreams[0]) as hanging:
            client = stack.enter_context(subject.connect())
            hanging.wait_dials(1)
            client.push(REQUEST)
            client.finish()
        with subject.accept() as upstream:
            upstream.hear_out()
            transfer((upstream, REPLY, client))
            upstream.finish()
            return Observation(client.hear_out(), upstream.heard())


def dial_never_answered(subject: Subject) -> Observation:
    """The upstream never answers: the client is told when the connect timeout is over."""
    with Hanging(subject.upstreams[0]), subject.connect() as client:
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, figures={"ended_s": monotonic() - began})


def refused_upstream_is_retried(subject: Subject, *, clients: int = 4) -> Observation:
    """One of two upstreams refuses: every client is served by the other one."""
    served = 0
    with refusing(subject.upstreams[0]):
        for _ in range(clients):
            with subject.connect() as client, subject.accept(1) as upstream:
                transfer((client, REQUEST, upstream))
                transfer((upstream, REPLY, client))
                client.finish()
                upstream.hear_out()
                upstream.finish()
                served += client.hear_out().received == len(REPLY)
    return Observation(figures={"served": served})


def all_refused_before_data(subject: Subject) -> Observation:
    """No upstream takes the connection of a client that has said nothing."""
    with contextlib.ExitStack() as stack:
        for upstream in subject.upstreams:
            stack.enter_context(refusing(upstream))
        client = stack.enter_context(subject.connect())
        return Observation(client.hear_out())


def all_refused_after_data(subject: Subject) -> Observation:
    """No upstream takes the connection, and the client has already sent: its bytes are lost, so
    it must not see a clean end. The dial hangs first, so that the data is surely there.
    """
    with contextlib.ExitStack() as stack:
        hanging = stack.enter_context(Hanging(subject.upstreams[0]))
        client = stack.enter_context(subject.connect())
        hanging.wait_dials(1)
        client.push(REQUEST)
        client.wait_acknowledged()
        for upstream in subject.upstreams:
            stack.enter_context(refusing(upstream))
        return Observation(client.hear_out())


class Hanging:
    """`listener` (TCP over IPv4) made to ignore SYNs: its backlog is full until this ends."""

    def __init__(self, listener: socket.socket) -> None:
        self._listener, self._address = listener, bound(listener)
        self._fillers: list[socket.socket] = []

    def __enter__(self) -> Self:
        self._listener.listen(0)
        while True:
            filler = socket.socket(family(self._address))
            self._fillers.append(filler)
            filler.settimeout(0.1)  # loopback answers in microseconds; a SYN is sent again after 1 s
            try:
                filler.connect(target(self._address))
            except TimeoutError:
                break
        self._fillers.pop().close()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self._listener.listen(BACKLOG)
        for _ in self._fillers:
            with contextlib.suppress(TimeoutError, OSError):  # a listener that was made to refuse has none
                self._listener.settimeout(0.1)
                self._listener.accept()[0].close()
        for filler in self._fillers:
            filler.close()

    def wait_dials(self, count: int, *, within: float = DEADLINE) -> float:
        """Seconds until `count` dials to the listener hang; infinite if that never comes."""
        began, port = monotonic(), f":{self._address.port:04X}"
        while monotonic() - began < within:
            rows = [
                line.split() for line in Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()[1:]
            ]
            if sum(row[2].endswith(port) and int(row[3], 16) == SYN_SENT for row in rows) == count:
                return monotonic() - began
            select.poll().poll(5)
        return float("inf")


@contextlib.contextmanager
def refusing(listener: socket.socket) -> Iterator[None]:
    """`listener` made to refuse connections on its port."""
    listener.shutdown(socket.SHUT_RDWR)
    try:
        yield
    finally:
        listener.listen(BACKLOG)
