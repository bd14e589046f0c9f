"""The table "how it ended", row by row, on every engine."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import pytest
from stage import Stage

from comparisons.conformance.lines import Ended
from comparisons.scenarios import connecting, datagrams, draining, echoing, timeouts
from comparisons.scenarios.conversations import Step, conversation
from comparisons.scenarios.rules import IMPATIENT, SHORT_DRAIN, Transport
from comparisons.scenarios.wire import Observation, Subject, transfer

ASKED = (Step("client", "sends", 64), Step("upstream", "sends", 100))


class Row(NamedTuple):
    """What happened, how to make it happen, and what the line says."""

    what: str
    play: Callable[[Subject], object]
    ended: Ended
    service: str = "proxy"
    transport: Transport = "tcp4"
    settings: Mapping[str, str] = {}


def asked_and(*steps: Step) -> Callable[[Subject], Observation]:
    return partial(conversation, steps=(*ASKED, *steps))


ROWS = [
    Row(
        "client sends, reply, client FIN, upstream FIN",
        asked_and(Step("client", "ends"), Step("upstream", "ends")),
        Ended("SF", "ShDdFf", "--", "client", None, 64, 100),
    ),
    Row(
        "the same, upstream FIN first",
        asked_and(Step("upstream", "ends"), Step("client", "ends")),
        Ended("SF", "ShDdfF", "--", "upstream", None, 64, 100),
    ),
    Row(
        "echo: client sends, FIN, all echoed, FIN",
        echoing.echo_of_everything,
        Ended("SF", "ShDdFf", "--", "client", None, len(echoing.LARGE), len(echoing.LARGE)),
        "echo",
    ),
    Row(
        "client resets while relaying",
        asked_and(Step("client", "resets")),
        Ended("RSTO", "ShDdR", "CD", "client", "ECONNRESET", 64, 100),
    ),
    Row(
        "upstream resets while relaying",
        asked_and(Step("upstream", "resets")),
        Ended("RSTR", "ShDdr", "SD", "upstream", "ECONNRESET", 64, 100),
    ),
    Row(
        "client resets after its FIN, reply still coming",
        partial(
            conversation,
            steps=(
                Step("client", "sends", 64),
                Step("client", "ends"),
                Step("upstream", "sends", 100),
                Step("client", "resets"),
            ),
        ),
        Ended("RSTO", "ShDFdR", "CL", "client", "EPIPE", 64, 100),
    ),
    Row(
        "upstream refuses, client silent",
        connecting.all_refused_before_data,
        Ended("SF", "Shf", "SC", "service", "ECONNREFUSED", 0, 0),
    ),
    Row(
        "upstream refuses, client has sent",
        connecting.all_refused_after_data,
        Ended("RSTR", "ShDr", "SC", "service", "ECONNREFUSED"),
    ),
    Row(
        "upstream never answers",
        connecting.dial_never_answered,
        Ended("SF", "Shf", "sC", "service", "ETIMEDOUT", 0, 0),
        settings=IMPATIENT,
    ),
    Row(
        "client resets while we connect",
        connecting.client_resets_while_connecting,
        Ended("RSTO", "ShR", "CC", "client", "ECONNRESET", 0, 0),
    ),
    Row(
        "idle timeout while relaying, the client was waited for",
        timeouts.idle_after_the_upstream_spoke,
        Ended("RSTR", "ShDdr", "cD", "service"),
        settings=IMPATIENT,
    ),
    Row(
        "idle timeout while relaying, the upstream was waited for",
        timeouts.idle_after_the_client_spoke,
        Ended("RSTR", "ShdDr", "sD", "service"),
        settings=IMPATIENT,
    ),
    Row(
        "half-close timeout, the client ended first",
        timeouts.half_closed_by_the_client,
        Ended("RSTR", "ShDdFr", "sL", "service"),
        settings=IMPATIENT,
    ),
    Row(
        "half-close timeout, the upstream ended first",
        timeouts.half_closed_by_the_upstream,
        Ended("RSTR", "ShDdfr", "cL", "service"),
        settings=IMPATIENT,
    ),
    Row(
        "drain deadline",
        draining.session_past_the_deadline_is_cut,
        Ended("RSTR", "ShDdr", "KD", "service", None, 64, 64),
        "echo",
        settings=SHORT_DRAIN,
    ),
    Row(
        "drain deadline after the client ended",
        draining.half_closed_session_is_cut,
        Ended("RSTR", "ShDFr", "KL", "service", None, 64, 0),
        settings=SHORT_DRAIN,
    ),
    Row(
        "UDP: both ways",
        datagrams.datagrams_keep_their_boundaries,
        Ended("SF", "Dd", "--", "service", None, sum(range(20)), sum(range(20))),
        "echo",
        "udp4",
    ),
]


@pytest.fixture(scope="module")
def stages(engine: str) -> Iterator[Callable[[Mapping[str, str]], Stage]]:
    """A daemon for each set of settings; one that was told to stop is not used again."""
    with ExitStack() as stack:
        open_stages: dict[str, Stage] = {}

        def stage_with(settings: Mapping[str, str]) -> Stage:
            stage = open_stages.get(str(settings))
            if stage is None or stage.daemon.lines("service_draining"):
                stage = open_stages[str(settings)] = stack.enter_context(Stage(engine, settings))
            return stage

        yield stage_with


@pytest.mark.parametrize("row", [pytest.param(row, id=row.what) for row in ROWS])
def test_the_line_says_how_it_ended(row: Row, stages: Callable[[Mapping[str, str]], Stage]) -> None:
    stage = stages(row.settings)
    upstreams = 2 if row.play is connecting.all_refused_before_data else 1
    row.play(stage.subject(row.service, row.transport, upstreams))
    assert stage.endings() == [row.ended]


def test_a_session_still_open_says_so_far_what_it_is(engine: str) -> None:
    """S1: both may speak, S2: the client has ended, S3: the upstream has; nothing else is known."""
    with Stage(engine, {"log.progress": "200ms"}) as stage:
        with stage.subject("proxy").session() as (client, upstream):
            transfer((client, b"?", upstream))
            _assert_progress(stage, "S1", "ShD")
            client.finish()
            upstream.hear_out()
            _assert_progress(stage, "S2", "ShDF")
            upstream.finish()
            client.hear_out()
        assert stage.endings() == [Ended("SF", "ShDFf", "--", "client", None, 1, 0)]
        with stage.subject("proxy").session() as (client, upstream):
            upstream.finish()
            client.hear_out()
            _assert_progress(stage, "S3", "Shf")
            client.finish()
            upstream.hear_out()
        assert stage.endings() == [Ended("SF", "ShfF", "--", "upstream", None, 0, 0)]


def _assert_progress(stage: Stage, state: str, history: str) -> None:
    (line, *_) = stage.daemon.wait_for("session_progress", 1, lambda line: line["state"] == state)
    assert line["history"] == history
    assert (line["termination"], line["closed_by"], line["error"]) == (None, None, None)
