"""Round trips on open connections: the echo workloads, and the fast clients beside one that does not read."""

import select
import socket
import time
from array import array

from comparisons.load.job import Broken, Job, Outcome
from comparisons.load.meter import Meter, latency
from comparisons.load.pattern import PERIOD, messages, pattern
from comparisons.load.sockets import SILENCE, connect, end
from services.core.addresses import Address

SAMPLES = 1_000_000  # latencies there is room for; a window that fills them ends early
STALLED_LIMIT = 32 * 2**20  # what the client that does not read sends at most
CHUNK = 64 * 2**10


def run(job: Job, meter: Meter) -> Outcome:
    address = Address.parse(job.address)
    fleet = Fleet(address, job)
    # a tenth of the window warms caches and lets buffers grow to their size
    fleet.exchange(job.seconds / 10, array("q", [0]) * SAMPLES)
    stalled = Stalled(connect(address), job.seed) if job.stalled else None
    latencies = array("q", [0]) * SAMPLES
    outcome = Outcome(sessions=job.connections)
    meter.open_window()
    outcome.requests = fleet.exchange(job.seconds, latencies, stalled)
    meter.close_window(outcome)
    outcome.threads = meter.threads()
    outcome.payload_bytes = outcome.requests * job.size
    outcome.latency = latency(latencies, outcome.requests)
    outcome.exchanges = fleet.finish()
    outcome.bytes_sent = outcome.bytes_received = outcome.exchanges * job.size
    if stalled is not None:
        outcome.sessions += 1
        outcome.absorbed_bytes = stalled.sent
        outcome.bytes_sent += stalled.sent
        outcome.bytes_received += stalled.drain()
    return outcome


class Client:
    """One connection with one request under way, always."""

    __slots__ = ("answered", "got", "number", "request", "sent_at", "sock", "unsent")

    def __init__(self, sock: socket.socket, number: int) -> None:
        self.sock = sock
        self.number = number  # which message comes next
        self.answered = 0
        self.request = self.unsent = self.got = b""
        self.sent_at = 0


class Stalled:
    """A client that sends whenever it can and reads nothing until `drain`."""

    def __init__(self, sock: socket.socket, seed: int) -> None:
        self.sock = sock
        self.sent = 0
        self._pattern = pattern(seed) * 2

    def fill(self) -> bool:
        """Send one chunk; False when the limit is reached."""
        offset = self.sent % PERIOD
        chunk = min(CHUNK, STALLED_LIMIT - self.sent)
        self.sent += self.sock.send(self._pattern[offset : offset + chunk])
        return self.sent < STALLED_LIMIT

    def drain(self) -> int:
        """Read on at last: everything that was sent must come back. Returns how much did."""
        received = 0
        self.sock.settimeout(SILENCE)
        while received < self.sent:
            data = self.sock.recv(CHUNK)
            offset = received % PERIOD
            if not data:
                raise Broken(f"the client that does not read sent {self.sent} bytes and got {received} back")
            if data != self._pattern[offset : offset + len(data)]:
                raise Broken(f"the client that does not read got wrong bytes after byte {received}")
            received += len(data)
        self.sock.shutdown(socket.SHUT_WR)
        end(self.sock)
        return received


class Fleet:
    """Connections in a closed loop: each sends its next message when the last one is answered."""

    def __init__(self, address: Address, job: Job) -> None:
        self._texts = messages(job.seed, job.size)
        self._poll = select.epoll()
        self._clients: dict[int, Client] = {}
        for index in range(job.connections):
            # far apart in the list, so that no two connections have one message under way
            client = Client(connect(address), index * len(self._texts) // job.connections)
            self._clients[client.sock.fileno()] = client
            self._poll.register(client.sock, select.EPOLLIN)
            self._ask(client, time.perf_counter_ns())

    def exchange(self, seconds: float, latencies: "array[int]", stalled: Stalled | None = None) -> int:
        """Exchange messages for so long; returns how many were answered, with their nanoseconds in `latencies`."""
        poll, clients, ask, now = self._poll.poll, self._clients, self._ask, time.perf_counter_ns
        stalled_fd = -1
        if stalled is not None:
            stalled_fd = stalled.sock.fileno()
            self._poll.register(stalled_fd, select.EPOLLOUT)
        count, room = 0, len(latencies) - len(clients)
        until = now() + int(seconds * 1e9)
        time_now = 0
        while time_now < until and count < room:
            ready = poll(SILENCE)
            if not ready:
                raise Broken(f"no answer for {SILENCE:g} s")
            for descriptor, events in ready:
                if descriptor == stalled_fd and stalled is not None:
                    if not stalled.fill():
                        self._poll.modify(stalled_fd, 0)
                    continue
                client = clients[descriptor]
                if events & select.EPOLLOUT:
                    self._send_rest(client)
                    continue
                request = client.request
                got = client.sock.recv(len(request) - len(client.got))
                if got != request:
                    if not got:
                        raise Broken(f"a session was ended after {client.answered} answers")
                    client.got += got
                    if len(client.got) < len(request):
                        continue
                    if client.got != request:
                        raise Broken(f"an answer has other bytes than were sent (answer {client.answered})")
                    client.got = b""
                client.answered += 1
                time_now = now()
                latencies[count] = time_now - client.sent_at
                count += 1
                ask(client, time_now)
        if stalled is not None:
            self._poll.unregister(stalled_fd)
        return count

    def finish(self) -> int:
        """Take the answers under way, end every session; returns how many answers there were in all."""
        for client in self._clients.values():
            client.sock.settimeout(SILENCE)
            client.sock.sendall(client.unsent)
            while len(client.got) < len(client.request):
                got = client.sock.recv(len(client.request) - len(client.got))
                if not got:
                    raise Broken(f"a session was ended after {client.answered} answers")
                client.got += got
            if client.got != client.request:
                raise Broken(f"an answer has other bytes than were sent (answer {client.answered})")
            client.answered += 1
            client.sock.shutdown(socket.SHUT_WR)
            end(client.sock)
        return sum(client.answered for client in self._clients.values())

    def _ask(self, client: Client, at: int) -> None:
        texts = self._texts
        request = client.request = texts[client.number]
        client.number = (client.number + 1) % len(texts)
        client.sent_at = at
        sent = client.sock.send(request)
        if sent < len(request):
            client.unsent = request[sent:]
            self._poll.modify(client.sock, select.EPOLLIN | select.EPOLLOUT)

    def _send_rest(self, client: Client) -> None:
        client.unsent = client.unsent[client.sock.send(client.unsent) :]
        if not client.unsent:
            self._poll.modify(client.sock, select.EPOLLIN)
