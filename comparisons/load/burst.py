"""New connections: connect, send, read the answer; then close it (burst) or keep it open (idle)."""

import select
import socket
import time
from array import array
from collections.abc import Callable

from comparisons.load.job import Broken, Job, Outcome
from comparisons.load.meter import Meter, latency
from comparisons.load.pattern import messages
from comparisons.load.sockets import SILENCE, connect, end
from services.core.addresses import Address

AT_ONCE = 64  # connections being opened at a time; stays below every listener's backlog
MOST = 8_000  # connections a burst makes at most: a closed one keeps its port for a minute (TIME_WAIT), of 28,000


def run(job: Job, meter: Meter) -> Outcome:
    """A burst: as many connections as fit into the window, each of them used once and closed."""
    opener = Opener(job)
    latencies = array("q", [0]) * MOST
    outcome = Outcome()
    until = meter.open_window() + int(job.seconds * 1e9)
    outcome.requests = outcome.exchanges = outcome.sessions = opener.open_while(
        lambda opened: opened < MOST and time.perf_counter_ns() < until, latencies, close=True
    )
    meter.close_window(outcome)
    outcome.latency = latency(latencies, outcome.requests)
    outcome.bytes_sent = outcome.bytes_received = outcome.payload_bytes = outcome.requests * job.size
    return outcome


def run_idle(job: Job, meter: Meter) -> Outcome:
    """Many connections that stay open: what opening them takes, and what memory they hold once they rest."""
    opener = Opener(job)
    latencies = array("q", [0]) * job.connections
    outcome = Outcome(pss_before=meter.pss())
    meter.open_window()
    outcome.requests = outcome.exchanges = outcome.sessions = opener.open_while(
        lambda opened: opened < job.connections, latencies, close=False
    )
    meter.close_window(outcome)
    outcome.threads = meter.threads()
    outcome.latency = latency(latencies, outcome.requests)
    outcome.bytes_sent = outcome.bytes_received = outcome.payload_bytes = outcome.requests * job.size
    for some in range(0, len(opener.kept), AT_ONCE):
        for sock in opener.kept[some : some + AT_ONCE]:
            sock.shutdown(socket.SHUT_WR)
        for sock in opener.kept[some : some + AT_ONCE]:
            end(sock)
    return outcome


class Opener:
    """Opens connections, AT_ONCE at a time. A latency runs from connect to the whole first answer."""

    def __init__(self, job: Job) -> None:
        self._address = Address.parse(job.address)
        self._texts = messages(job.seed, job.size)
        self.kept: list[socket.socket] = []

    def open_while(self, more: Callable[[int], bool], latencies: "array[int]", *, close: bool) -> int:
        """Open connections while `more(how many were opened)`; returns how many there were."""
        poll = select.epoll()
        opening: dict[int, Opening] = {}
        closing: dict[int, socket.socket] = {}
        opened = answered = 0
        while True:
            while len(opening) + len(closing) < AT_ONCE and more(opened):
                begun = time.perf_counter_ns()
                sock = connect(self._address)
                text = self._texts[opened % len(self._texts)]
                sock.send(text)
                poll.register(sock, select.EPOLLIN)
                opening[sock.fileno()] = Opening(sock, text, begun)
                opened += 1
            if not opening and not closing:
                return opened
            ready = poll.poll(SILENCE)
            if not ready:
                raise Broken(f"no answer for {SILENCE:g} s: {answered} of {opened} connections were served")
            for descriptor, _ in ready:
                if descriptor in closing:
                    poll.unregister(descriptor)
                    end(closing.pop(descriptor))
                    continue
                client = opening[descriptor]
                got = client.sock.recv(len(client.expected))
                if not got or not client.expected.startswith(got):
                    raise Broken(f"after {answered} connections one got {len(got)} other bytes than it sent")
                client.expected = client.expected[len(got) :]
                if client.expected:
                    continue
                latencies[answered] = time.perf_counter_ns() - client.begun
                answered += 1
                del opening[descriptor]
                if close:
                    client.sock.shutdown(socket.SHUT_WR)
                    closing[descriptor] = client.sock
                else:
                    poll.unregister(descriptor)
                    self.kept.append(client.sock)


class Opening:
    """A connection that waits for its first answer; `expected` is what of it is still to come."""

    __slots__ = ("begun", "expected", "sock")

    def __init__(self, sock: socket.socket, expected: bytes, begun: int) -> None:
        self.sock = sock
        self.expected = expected
        self.begun = begun
