"""What the loads share about their sockets."""

import socket

from comparisons.load.job import Broken
from services.core.addresses import Address

SILENCE = 5.0  # seconds without a byte after which a subject counts as stalled


def connect(address: Address) -> socket.socket:
    """A connected, non-blocking TCP socket without Nagle's delay. `address` holds an IP literal."""
    family = socket.AF_INET6 if ":" in address.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.settimeout(SILENCE)
    sock.connect((address.host, address.port))
    sock.setblocking(False)
    return sock


def end(sock: socket.socket) -> None:
    """After our FIN: expect the other one and nothing before it, close. Then both ends counted the same bytes."""
    sock.settimeout(SILENCE)
    if extra := sock.recv(4096):
        raise Broken(f"{len(extra)} bytes or more came after the last answer")
    sock.close()
