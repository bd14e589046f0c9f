"""Clients that mean ill or have bad luck: they cost their own session and nothing else.

Every scenario keeps one honest echo session beside the trouble, and counts the service's open
descriptors before and after it.
"""

import select
from collections.abc import Callable
from contextlib import ExitStack
from time import monotonic

from comparisons.scenarios.wire import Observation, Subject, payload, transfer

GARBAGE = b"\x00\xff" * 8_192 + b"PROXY \r\n\r\nGET / HTTP/1.1\r\n\r\n" + payload(32_768, seed=71)
WORD = payload(64, seed=72)


def garbage(subject: Subject, *, clients: int = 20) -> Observation:
    """Clients send what is no protocol at all, and some of them never read."""

    def trouble() -> None:
        for index in range(clients):
            with subject.connect() as client:
                client.push(GARBAGE)
                if index % 2:
                    client.hear(len(GARBAGE))

    return _beside(subject, trouble)


def resets(subject: Subject, *, clients: int = 300) -> Observation:
    """A flood of clients that reset at once, half of them after they sent something."""

    def trouble() -> None:
        for index in range(clients):
            client = subject.connect()
            if index % 2:
                client.push(WORD)
            client.reset()

    return _beside(subject, trouble)


def vanishing_clients(subject: Subject, *, clients: int = 100) -> Observation:
    """Clients close without FIN of their own choosing: at once, or with their echo unread."""

    def trouble() -> None:
        for index in range(clients):
            with subject.connect() as client:
                if index % 2:
                    client.push(GARBAGE)

    return _beside(subject, trouble)


def one_byte_at_a_time(subject: Subject, *, clients: int = 10, length: int = 30) -> Observation:
    """Many clients that send and read single bytes, all open at the same time."""

    def trouble() -> None:
        with ExitStack() as stack:
            slow = [stack.enter_context(subject.connect()) for _ in range(clients)]
            for _ in range(length):
                for client in slow:
                    transfer((client, b".", client))

    return _beside(subject, trouble)


def _beside(subject: Subject, trouble: Callable[[], None]) -> Observation:
    with subject.connect() as honest:
        transfer((honest, WORD, honest))
        before = subject.descriptors()
        trouble()
        with subject.connect() as last:  # once it is served, everybody before it was accepted
            transfer((last, WORD, last))
        deadline = monotonic() + subject.patience()
        while (left_over := subject.descriptors() - before) > 0 and monotonic() < deadline:
            select.poll().poll(10)
        transfer((honest, WORD, honest))
        honest.finish()
        return Observation(honest.hear_out(), figures={"descriptors_left_over": left_over})
