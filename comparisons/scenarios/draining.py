"""SIGTERM (rule 18), or what else asks a proxy to finish: what waits is accepted, what is open goes on,
what stays too long is cut.

Each of these ends the service under test.
"""

import os
import signal
from contextlib import ExitStack, suppress
from time import monotonic

from comparisons.scenarios.wire import DEADLINE, Observation, Subject, payload, transfer

WORD = payload(64, seed=61)


def open_session_finishes(subject: Subject) -> Observation:
    """A session that is open at SIGTERM works on until its client is done; nobody new is let in."""
    with subject.connect() as client:
        transfer((client, WORD, client))
        os.kill(subject.pid, subject.drain)
        refused = _wait_refused(subject)
        transfer((client, WORD, client))
        client.finish()
        return Observation(client.hear_out(), figures={"refused": refused})


def backlog_is_served(subject: Subject, *, clients: int = 5) -> Observation:
    """Clients that the kernel has accepted and the service has not, when SIGTERM comes. Its
    processes are stopped meanwhile, so that they surely have not.
    """
    with ExitStack() as stack:
        processes = subject.processes()
        for pid in processes:
            os.kill(pid, signal.SIGSTOP)
        try:
            waiting = [stack.enter_context(subject.connect()) for _ in range(clients)]
            for client in waiting:
                client.push(WORD)
                client.finish()
            os.kill(subject.pid, subject.drain)
        finally:
            for pid in processes:
                os.kill(pid, signal.SIGCONT)
        served = sum(client.hear_out().ended == "eof" and client.told_what(client) for client in waiting)
        return Observation(figures={"served": served})


def session_past_the_deadline_is_cut(subject: Subject) -> Observation:
    """A client that never ends is cut when the time to drain is over."""
    with subject.connect() as client:
        transfer((client, WORD, client))
        os.kill(subject.pid, subject.drain)
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, figures={"ended_s": monotonic() - began})


def half_closed_session_is_cut(subject: Subject) -> Observation:
    """Proxy: the client has ended, the upstream never does, and the time to drain is over."""
    with subject.session() as (client, upstream):
        transfer((client, WORD, upstream))
        client.finish()
        upstream.hear_out()
        os.kill(subject.pid, subject.drain)
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, upstream.heard(), {"ended_s": monotonic() - began})


def _wait_refused(subject: Subject) -> bool:
    """Whether new connections come to be refused."""
    deadline = monotonic() + DEADLINE
    while monotonic() < deadline:
        try:
            with subject.connect() as late, suppress(OSError):
                late.hear_out(within=0.05)  # let in just before the listener closed
        except (ConnectionRefusedError, ConnectionResetError, FileNotFoundError):
            return True
    return False
