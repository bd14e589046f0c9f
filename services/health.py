"""Active health checks: a thread for each upstream that is checked, outside of the engine.

Each connects in its interval, and may say something and wait for an answer. What it finds is posted to
the engine, where the pool counts it: whether an upstream is down is the core's decision. The intervals
vary by a tenth, so that checks that began together do not stay together.
"""

import errno
import random
import socket
import threading
from collections.abc import Callable, Iterable

from services.core.addresses import Address
from services.core.upstreams import Check, Pool, Upstream
from services.engines import sockets

# An answer that has not come within so many bytes will not come: nothing that a check waits for is longer.
LONGEST_ANSWER = 65_536

Report = Callable[[Pool, str, str | None], object]


class Checker:
    """The threads of one configuration.

    Args:
        report: called in their threads with what was found; None is well.

    """

    def __init__(self, pools: Iterable[Pool], report: Report) -> None:
        self._report = report
        self._stopping = threading.Event()
        for pool in pools:
            for upstream in pool.upstreams if pool.choice.health else ():
                arguments = (pool, upstream, pool.choice.health)
                threading.Thread(target=self._watch, args=arguments, name="health", daemon=True).start()

    def stop(self) -> None:
        """No check begins any more."""
        self._stopping.set()

    def _watch(self, pool: Pool, upstream: Upstream, check: Check) -> None:
        # the first ones at once but not together
        pause = random.uniform(0, check.interval / 10)  # noqa: S311  nothing secret about it
        while not self._stopping.wait(pause):
            error = examine(upstream.addresses, check)
            if not self._stopping.is_set():
                self._report(pool, upstream.name, error)
            pause = check.interval * random.uniform(0.9, 1.1)  # noqa: S311  as above


def examine(addresses: Iterable[Address], check: Check) -> str | None:
    """Whether a server answers as it should, at any of its addresses. If not: why, at the last of them."""
    error: str | None = "it has no address"
    for address in addresses:
        error = _examine(address, check)
        if error is None:
            return None
    return error


def _examine(address: Address, check: Check) -> str | None:
    try:
        with _socket(address, check) as sock:
            sock.settimeout(check.timeout)
            sock.connect(sockets.sockaddr(address))
            if check.send is not None:
                sock.sendall(check.send.encode())
            return _await(sock, check.expect.encode()) if check.expect is not None else None
    except TimeoutError:
        return f"no answer in {check.timeout:g} s"
    except OSError as error:
        return errno.errorcode.get(error.errno or 0, str(error))


def _socket(address: Address, check: Check) -> socket.socket:
    if address.transport == "udp":
        return sockets.datagram_socket(address)
    return sockets.dial_socket(address, check.timeout)


def _await(sock: socket.socket, expected: bytes) -> str | None:
    answer = b""
    while expected not in answer:
        data = sock.recv(4096)
        answer += data
        if not data or len(answer) > LONGEST_ANSWER:
            return f"another answer: {answer[:40]!r}"
    return None
