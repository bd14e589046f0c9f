"""Conversations made of steps, so that a machine can write the script.

Steps do not overlap: each waits until its effect has arrived at the other end. What a correct proxy
does with such a script is therefore determined, byte for byte, and two proxies can be compared.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from comparisons.scenarios.wire import End, Observation, Subject, payload, transfer

Who = Literal["client", "upstream"]
Deed = Literal["sends", "ends", "resets", "closes"]


@dataclass(frozen=True, slots=True)
class Step:
    """`closes`: the whole socket at once, so that what is sent to it later is answered by a reset."""

    who: Who
    deed: Deed
    size: int = 0


def possible(steps: Sequence[Step]) -> list[tuple[Who, Deed]]:
    """What can follow `steps`. Nothing can follow once both have ended, or one was reset."""
    ended = {step.who for step in steps if step.deed in {"ends", "closes"}}
    closed = {step.who for step in steps if step.deed == "closes"}
    if len(ended) == 2 or any(
        step.deed == "resets" or (step.deed == "sends" and _other(step.who) in closed) for step in steps
    ):
        return []
    options: list[tuple[Who, Deed]] = []
    for who in ("client", "upstream"):
        if who not in ended:
            options += [(who, "sends"), (who, "ends"), (who, "closes")]
        if who not in closed:
            options.append((who, "resets"))
    return options


def conversation(subject: Subject, steps: Sequence[Step]) -> Observation:
    """Play `steps`, then end what is still open, the client first."""
    with subject.session() as (client, upstream):
        ends: dict[Who, End] = {"client": client, "upstream": upstream}
        closed = set[Who]()
        arrived = 0
        for number, step in enumerate(steps):
            actor, other = ends[step.who], ends[_other(step.who)]
            if step.deed == "sends" and _other(step.who) in closed:
                actor.push(payload(step.size, seed=number))
                arrived += actor.reset_seen() < float("inf")
                actor.hear_out()
            elif step.deed == "sends":
                arrived += transfer((actor, payload(step.size, seed=number), other))
            elif step.deed == "resets":
                actor.reset()
                closed.add(step.who)
                if _other(step.who) not in closed:
                    arrived += other.reset_seen() < float("inf")
                    other.hear_out()
            else:
                if step.deed == "closes":
                    actor.socket.close()
                    closed.add(step.who)
                else:
                    actor.finish()
                if _other(step.who) not in closed:
                    arrived += other.hear_out().ended == "eof"
        if possible(steps):
            finished = {step.who for step in steps if step.deed in {"ends", "closes"}}
            for who in ("client", "upstream"):
                if who not in finished:
                    ends[who].finish()
                    if _other(who) not in closed:
                        ends[_other(who)].hear_out()
        return Observation(client.heard(), upstream.heard(), {"arrived": arrived})


def _other(who: Who) -> Who:
    return "upstream" if who == "client" else "client"
