"""Flow control and fairness (rules 12 to 15): bounded buffers, small writes, many at once."""

import threading
from contextlib import ExitStack
from statistics import median
from time import monotonic

from comparisons.scenarios.wire import DEADLINE, FLOOD, End, Observation, Subject, payload, transfer

BULK = payload(3_000_000, seed=22)
TRICKLE = payload(20_000, seed=23)
BLOCK = payload(65_536, seed=24)
PING = b"?"
PONG = b"!"


def stalled_upstream(subject: Subject) -> Observation:
    """The upstream does not read until the client can send no more; then it reads everything."""
    with subject.session() as (client, upstream):
        return _stall(client, upstream)


def stalled_client(subject: Subject) -> Observation:
    """The client does not read until the upstream can send no more; then it reads everything."""
    with subject.session() as (client, upstream):
        return _stall(upstream, client)


def _stall(speaker: End, hearer: End) -> Observation:
    speaker.fill(FLOOD)
    absorbed = speaker.sent
    speaker.finish()
    hearer.hear_out()
    hearer.finish()
    speaker.hear_out()
    return Observation(figures={"absorbed_bytes": absorbed, "intact": hearer.told_what(speaker)})


def bulk_both_ways(subject: Subject) -> Observation:
    """Megabytes in both directions at the same time."""
    with subject.session() as (client, upstream):
        return _both_ways(client, upstream, BULK)


def trickle_both_ways(subject: Subject) -> Observation:
    """The same in small, for a service that was given a buffer of one byte."""
    with subject.session() as (client, upstream):
        return _both_ways(client, upstream, TRICKLE)


def _both_ways(client: End, upstream: End, data: bytes) -> Observation:
    transfer((client, data, upstream), (upstream, data, client))
    client.finish()
    upstream.hear_out()
    upstream.finish()
    return Observation(client.hear_out(), upstream.heard())


def small_writes(subject: Subject, *, rounds: int = 20) -> Observation:
    """Both ends write twice and then wait for the other. Where a leg has no TCP_NODELAY, its
    second write waits for the acknowledgement of the first, which the peer delays by 40 ms.
    """
    times = []
    with subject.session() as (client, upstream):
        for _ in range(rounds):
            began = monotonic()
            for speaker, hearer in (
                (client, upstream),
                (client, upstream),
                (upstream, client),
                (upstream, client),
            ):
                transfer((speaker, PING, hearer))
            times.append(monotonic() - began)
        client.finish()
        upstream.hear_out()
        upstream.finish()
        return Observation(client.hear_out(), upstream.heard(), {"median_round_s": median(times)})


def burst_beside_a_session(subject: Subject, *, burst: int = 200) -> Observation:
    """Echo: while many clients connect and say one thing each, an open session goes on."""
    slowest, served = 0.0, 0
    with ExitStack() as stack:
        steady = stack.enter_context(subject.connect())
        transfer((steady, PING, steady))
        newcomers = [stack.enter_context(subject.connect()) for _ in range(burst)]
        for newcomer in newcomers:
            newcomer.push(PONG)
        for newcomer in newcomers:
            began = monotonic()
            transfer((steady, PING, steady))
            slowest = max(slowest, monotonic() - began)
            newcomer.hear(len(PONG))
            served += newcomer.received
        for end in (*newcomers, steady):
            end.finish()
            end.hear_out()
        return Observation(steady.heard(), figures={"served": served, "slowest_round_s": slowest})


def newcomers_beside_busy_sessions(
    subject: Subject, *, busy: int = 4, newcomers: int = 20, rounds: int = 200
) -> Observation:
    """Echo: while some sessions keep the service busy, new clients are accepted and answered."""
    slowest, served, stop = 0.0, 0, threading.Event()

    def work(end: End) -> None:
        for _ in range(rounds):
            if stop.is_set() or not transfer((end, BLOCK, end)):
                return

    with ExitStack() as stack:
        workers = [
            threading.Thread(target=work, args=(stack.enter_context(subject.connect()),)) for _ in range(busy)
        ]
        for worker in workers:
            worker.start()
        for _ in range(newcomers):
            began = monotonic()
            with subject.connect() as newcomer:
                served += transfer((newcomer, PING, newcomer))
            slowest = max(slowest, monotonic() - began)
        stop.set()
        for worker in workers:
            worker.join(DEADLINE)
        return Observation(figures={"served": served, "slowest_s": slowest})
