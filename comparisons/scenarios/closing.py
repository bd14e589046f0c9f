"""How conversations end: half-close, resets, and the last bytes before them (rules 1 and 3 to 6).

`close_behaviour` puts four of these scenarios together into one row: what a proxy does with a
half-close and a reset in either direction.
"""

import time
from typing import NamedTuple

from comparisons.scenarios.wire import FLOOD, Heard, Inconclusive, Observation, Subject, payload, transfer

REQUEST = payload(64, seed=1)
ANSWER = payload(1_000, seed=2)
REPLY = payload(300_000, seed=3)
UPLOAD = payload(200_000, seed=4)
RESPONSE = payload(200_000, seed=5)
BURST = payload(70_001, seed=6)  # not a multiple of any buffer, and within what two kernels hold

# a proxy that gives a half-closed session a moment is not one that keeps it: socat's moment is 0.5 s
LATE = 0.7


def reply_after_client_end(subject: Subject, *, pause: float = LATE) -> Observation:
    """The client asks and sends FIN; the upstream thinks for `pause` seconds, then replies."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        client.finish()
        upstream.hear_out()
        time.sleep(pause)
        transfer((upstream, REPLY, client))
        upstream.finish()
        return Observation(client.hear_out(), upstream.heard())


def upload_after_upstream_end(subject: Subject, *, pause: float = LATE) -> Observation:
    """The upstream answers and sends FIN; the client, `pause` seconds later, uploads."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        upstream.finish()
        client.hear_out()
        time.sleep(pause)
        transfer((client, REPLY, upstream))
        client.finish()
        return Observation(client.heard(), upstream.hear_out())


def every_byte_before_the_end(subject: Subject, *, rounds: int = 20) -> Observation:
    """Both ends send and at once send FIN, before anybody reads: the last bytes must not be lost."""
    intact = 0
    for _ in range(rounds):
        with subject.session() as (client, upstream):
            client.push(BURST)
            client.finish()
            upstream.push(BURST)
            upstream.finish()
            ends = client.hear_out(), upstream.hear_out()
            intact += client.told_what(upstream) and upstream.told_what(client)
    return Observation(*ends, figures={"intact": intact})


def upstream_resets(subject: Subject) -> Observation:
    """The upstream resets an idle, open session."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        upstream.reset()
        return Observation(client=client.hear_out())


def client_resets(subject: Subject) -> Observation:
    """The client resets an idle, open session."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        client.reset()
        return Observation(upstream=upstream.hear_out())


def client_resets_after_its_end(subject: Subject) -> Observation:
    """The client asks, sends FIN, hears the beginning of the reply and resets."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        client.finish()
        heard = upstream.hear_out()
        transfer((upstream, ANSWER, client))
        client.reset()
        return Observation(upstream=heard, figures={"reset_seen_s": upstream.reset_seen(within=5)})


def reset_after_a_complete_response(subject: Subject) -> Observation:
    """The upstream responds, sends FIN and then RST, all before the client reads."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        upstream.push(RESPONSE)
        upstream.finish()
        upstream.wait_acknowledged()
        upstream.reset()
        heard = client.hear_out()
        return Observation(client=heard, figures={"reset_seen_s": client.reset_seen(within=5)})


def reset_after_a_complete_upload(subject: Subject) -> Observation:
    """The client uploads, sends FIN and then RST, all before the upstream reads."""
    with subject.session() as (client, upstream):
        client.push(UPLOAD)
        client.finish()
        client.wait_acknowledged()
        client.reset()
        heard = upstream.hear_out()
        return Observation(upstream=heard, figures={"reset_seen_s": upstream.reset_seen(within=5)})


def write_after_a_complete_response(subject: Subject, *, pause: float = 0.3) -> Observation:
    """The same while the proxy has stopped reading in the middle of the response, because its client
    does not read; the client then says one more thing, which can no longer be delivered.

    A first session finds out how much the proxy and its kernel take from an upstream whose client
    does not read. The response in the next is smaller than that, but not by all that the proxy's
    kernel holds unread (64 KiB at least). The kernel tunes its buffers: where they take less than
    before, that session was a rehearsal too, and ends in order.
    """
    chunk = FLOOD[:4_096]
    room, rehearsals = len(FLOOD) // len(chunk), 0
    while rehearsals < 6:
        with subject.session(narrow=True) as (client, upstream):
            taken = 0
            while taken < room:
                upstream.push(chunk)
                if not upstream.wait_acknowledged(within=0.3):
                    break
                taken += 1
            if rehearsals and taken == room:
                upstream.finish()
                upstream.wait_acknowledged()
                upstream.reset()
                client.push(REQUEST)
                time.sleep(pause)  # the proxy writes what it was given, into a leg that is gone
                heard = client.hear_out()
                return Observation(
                    client=heard,
                    figures={
                        "intact": client.told_what(upstream),
                        "reset_seen_s": client.reset_seen(within=5),
                        "rehearsals": rehearsals,
                    },
                )
            upstream.finish()
            client.hear_out()
            client.finish()
            upstream.hear_out()
        rehearsals += 1
        room = taken - 12
    raise Inconclusive("the kernel took less every time")


def client_resets_while_paused(subject: Subject) -> Observation:
    """The upstream does not read, so the proxy has stopped reading the client, which then resets."""
    with subject.session() as (client, upstream):
        client.fill(FLOOD)
        client.reset()
        seen = upstream.reset_seen(within=5)
        return Observation(upstream=upstream.hear_out(), figures={"reset_seen_s": seen})


def upstream_resets_while_paused(subject: Subject) -> Observation:
    """The client does not read, so the proxy has stopped reading the upstream, which then resets."""
    with subject.session() as (client, upstream):
        upstream.fill(FLOOD)
        upstream.reset()
        seen = client.reset_seen(within=5)
        return Observation(client=client.hear_out(), figures={"reset_seen_s": seen})


class CloseBehaviour(NamedTuple):
    """One row of the table "what others do today". Amounts: all, truncated, nothing."""

    reply_after_client_end: str
    upload_after_upstream_end: str
    client_sees_upstream_reset: str
    upstream_sees_client_reset: str


def close_behaviour(subject: Subject, *, pause: float = LATE) -> CloseBehaviour:
    """What `subject` does with a half-close and a reset, either way. The table was measured with
    a reply 1.5 s after the FIN; the default tells the same proxies apart.
    """

    def amount(heard: Heard | None, before: int) -> str:
        late = heard.received - before if heard else 0
        return "all" if late == len(REPLY) else "truncated" if late > 0 else "nothing"

    def ended(heard: Heard | None) -> str:
        return {"eof": "EOF", "reset": "RST", "timeout": "no end"}[heard.ended] if heard else "no end"

    return CloseBehaviour(
        amount(reply_after_client_end(subject, pause=pause).client, 0),
        amount(upload_after_upstream_end(subject, pause=pause).upstream, len(REQUEST)),
        ended(upstream_resets(subject).client),
        ended(client_resets(subject).upstream),
    )
