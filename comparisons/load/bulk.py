"""One stream through the proxy, as fast as it goes: the upstream sends the pattern, we read and compare all of it."""

import socket
import time

from comparisons.load.job import Broken, Job, Outcome
from comparisons.load.meter import Meter
from comparisons.load.pattern import PERIOD, pattern
from comparisons.load.sockets import SILENCE, connect, end
from services.core.addresses import Address

PIECE = 64 * PERIOD  # 16 MiB: what one request asks for; the next is asked before the last one is in
REQUEST_BYTES = 8  # one unsigned integer: how many bytes to send


def run(job: Job, meter: Meter) -> Outcome:
    expected = pattern(job.seed)
    sock = connect(Address.parse(job.address))
    sock.settimeout(SILENCE)
    outcome = Outcome(sessions=1)
    # warm up: slow start, and buffers that grow
    _ask(sock, outcome)
    _read(sock, expected, outcome)
    begun = meter.open_window()
    _ask(sock, outcome)
    while True:
        more = time.perf_counter_ns() - begun < job.seconds * 1e9
        if more:
            _ask(sock, outcome)  # one piece ahead, so that the stream never runs dry
        _read(sock, expected, outcome)
        outcome.payload_bytes += PIECE
        if not more:
            break
    meter.close_window(outcome)
    outcome.threads = meter.threads()
    sock.shutdown(socket.SHUT_WR)
    end(sock)
    return outcome


def _ask(sock: socket.socket, outcome: Outcome) -> None:
    sock.sendall(PIECE.to_bytes(REQUEST_BYTES, "big"))
    outcome.bytes_sent += REQUEST_BYTES


def _read(sock: socket.socket, expected: bytes, outcome: Outcome) -> None:
    """One piece, compared period by period; a bytearray compares with bytes by memcmp."""
    block = bytearray(PERIOD)
    view = memoryview(block)
    for _ in range(PIECE // PERIOD):
        filled = 0
        while filled < PERIOD:
            count = sock.recv_into(view[filled:])
            if not count:
                raise Broken(f"the stream ended after {outcome.bytes_received + filled} bytes")
            filled += count
        if block != expected:
            raise Broken(f"wrong bytes between byte {outcome.bytes_received} and the {PERIOD} that follow")
        outcome.bytes_received += PERIOD
