"""Differential: any conversation gives the same facts and the same line in all three engines."""

from collections.abc import Iterator
from contextlib import ExitStack

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from stage import Stage

from comparisons.scenarios.conversations import Step, conversation, possible

ENGINES = ("blocking", "nonblocking", "twisted")
# below, about and above the buffers of a relay (64 KiB here) and of a segment on loopback
SIZES = (1, 100, 65_536, 200_000)
LONGEST = 8


@st.composite
def scripts(draw: st.DrawFn) -> tuple[Step, ...]:
    """Steps of which each one is possible after those before it."""
    steps: list[Step] = []
    for _ in range(draw(st.integers(1, LONGEST))):
        options = possible(steps)
        if not options:
            break
        who, deed = draw(st.sampled_from(options))
        other_is_gone = any(step.who != who and step.deed == "closes" for step in steps)
        # what is sent to a closed end is lost in part: only a single segment is lost in one way
        size = draw(st.sampled_from(SIZES[:2] if other_is_gone else SIZES)) if deed == "sends" else 0
        steps.append(Step(who, deed, size))
    return tuple(steps)


# Every byte is late, in pieces that straddle every buffer, and ends are later still: what a
# conversation comes to must not change.
SLOWED = [
    {"type": kind, "direction": direction, **more}
    for direction in ("upstream", "downstream")
    for kind, more in (
        ("latency", {"delay": "2ms", "jitter": "1ms"}),
        ("slicer", {"size": "10KiB", "variation": "9KiB"}),
        ("bandwidth", {"rate": "64MiB"}),
        ("slow_close", {"delay": "3ms"}),
    )
]


@pytest.fixture(scope="module")
def all_stages() -> Iterator[dict[str, Stage]]:
    with ExitStack() as stack:
        yield {engine: stack.enter_context(Stage(engine, {})) for engine in ENGINES}


@pytest.fixture(scope="module")
def slowed_stages() -> Iterator[dict[str, Stage]]:
    with ExitStack() as stack:
        yield {engine: stack.enter_context(Stage(engine, {}, faults=SLOWED)) for engine in ENGINES}


# two tests and not one with parameters: pytest-twisted wraps a test of hypothesis for its first run only
few = settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


@few
@given(steps=scripts())
def test_a_conversation_ends_alike_in_all_engines(
    all_stages: dict[str, Stage], steps: tuple[Step, ...]
) -> None:
    hold(all_stages, steps)


@few
@given(steps=scripts())
def test_a_conversation_that_is_slowed_on_purpose_ends_alike_in_all_engines(
    slowed_stages: dict[str, Stage], steps: tuple[Step, ...]
) -> None:
    hold(slowed_stages, steps)


def hold(stages: dict[str, Stage], steps: tuple[Step, ...]) -> None:
    """The conversation in each of them; all that is seen and told of it is the same."""
    seen = {}
    for engine, stage in stages.items():
        observation = conversation(stage.subject("proxy"), steps)
        seen[engine] = (observation, stage.endings())
        note(f"{engine}: {seen[engine]}")
    for engine, told in seen.items():
        assert told == seen["nonblocking"], engine
