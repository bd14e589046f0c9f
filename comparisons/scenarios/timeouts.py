"""How long a session may be silent, half closed or dead (rules 2 and 7).

The scenarios do not know the service's timeouts: they report when it ended. Those about a dead
peer are given a way to make the network lose everything of one TCP port (`network.Namespace`).
"""

from collections.abc import Callable
from time import monotonic

from comparisons.scenarios.wire import FLOOD, End, Heard, Observation, Subject, payload, transfer

REQUEST = payload(64, seed=41)
ANSWER = payload(1_000, seed=42)

Silence = Callable[[int], None]


def half_closed_by_the_client(subject: Subject) -> Observation:
    """The client sends FIN and the upstream never answers it."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        client.finish()
        return _until_cut(client, upstream)


def half_closed_by_the_upstream(subject: Subject) -> Observation:
    """The upstream sends FIN and the client never answers it."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        upstream.finish()
        return _until_cut(client, upstream)


def idle_after_the_client_spoke(subject: Subject) -> Observation:
    """The upstream owes an answer and says nothing."""
    with subject.session() as (client, upstream):
        transfer((upstream, ANSWER, client))
        transfer((client, REQUEST, upstream))
        return _until_cut(client, upstream)


def idle_after_the_upstream_spoke(subject: Subject) -> Observation:
    """The client has its answer and says nothing."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        return _until_cut(client, upstream)


def idle_from_the_start(subject: Subject) -> Observation:
    """Nobody ever says anything."""
    with subject.session() as (client, upstream):
        return _until_cut(client, upstream)


def idle_with_a_stuck_client(subject: Subject) -> Observation:
    """The upstream sends as much as it can and the client never reads."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        began = monotonic()
        upstream.fill(FLOOD)
        # what the upstream sent and nobody read: closing its leg resets it, whoever closes it
        elapsed = monotonic() - began + upstream.reset_seen()
        return Observation(client.hear_out(), figures={"ended_s": elapsed})


def echo_idle(subject: Subject) -> Observation:
    """An echo client says one thing and then nothing."""
    with subject.connect() as client:
        transfer((client, REQUEST, client))
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, figures={"ended_s": monotonic() - began})


def _until_cut(client: End, upstream: End) -> Observation:
    """A leg that was half closed by its peer reads its end at once and learns of the cut later."""
    began = monotonic()
    ends = client.hear_out(within=5), upstream.hear_out(within=5)
    return Observation(*ends, {"ended_s": _elapsed(began, *ends)})


def _elapsed(began: float, *ends: Heard) -> float:
    """Seconds until all of them had ended; infinite if one has not."""
    return float("inf") if any(end.ended == "timeout" for end in ends) else monotonic() - began


def client_dies_with_data_on_the_way(subject: Subject, silence: Silence) -> Observation:
    """The client is gone without a word, and the upstream's answer can never be acknowledged."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        silence(client.socket.getsockname()[1])
        upstream.push(ANSWER)
        began = monotonic()
        heard = upstream.hear_out()
        return Observation(upstream=heard, figures={"ended_s": _elapsed(began, heard)})


def client_dies_idle(subject: Subject, silence: Silence) -> Observation:
    """The client is gone without a word and nothing is on the way to it."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        silence(client.socket.getsockname()[1])
        began = monotonic()
        heard = upstream.hear_out()
        return Observation(upstream=heard, figures={"ended_s": _elapsed(began, heard)})


def upstream_dies_with_data_on_the_way(subject: Subject, silence: Silence) -> Observation:
    """The upstream is gone without a word, and the client's request can never be acknowledged."""
    with subject.session() as (client, upstream):
        transfer((upstream, ANSWER, client))
        silence(upstream.socket.getpeername()[1])
        client.push(REQUEST)
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, figures={"ended_s": _elapsed(began, heard)})


def upstream_dies_idle(subject: Subject, silence: Silence) -> Observation:
    """The upstream is gone without a word and nothing is on the way to it."""
    with subject.session() as (client, upstream):
        transfer((client, REQUEST, upstream))
        transfer((upstream, ANSWER, client))
        silence(upstream.socket.getpeername()[1])
        began = monotonic()
        heard = client.hear_out()
        return Observation(heard, figures={"ended_s": _elapsed(began, heard)})
