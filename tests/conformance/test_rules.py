"""Every rule of the behaviour table, on every engine: what was seen, and what the log says of it."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack

import pytest
from stage import Stage

from comparisons.conformance.findings import FINDINGS
from comparisons.conformance.lines import LINES, Ended, expected
from comparisons.scenarios.network import Namespace
from comparisons.scenarios.rules import RULES, Rule, Transport
from comparisons.scenarios.wire import Observation

CASES = [
    pytest.param(rule, transport, id=f"{rule.number}-{rule.name}-{transport}")
    for rule in RULES
    for transport in rule.transports
]


class Stages:
    """The daemons of one engine, one for each set of settings, started when first asked for."""

    def __init__(self, engine: str, stack: ExitStack) -> None:
        self._engine, self._stack = engine, stack
        self._open: dict[frozenset[tuple[str, str]], Stage] = {}

    def __call__(self, settings: Mapping[str, str]) -> Stage:
        key = frozenset(settings.items())
        if key not in self._open:
            self._open[key] = self._stack.enter_context(Stage(self._engine, settings))
        return self._open[key]


@pytest.fixture(scope="module")
def stages(engine: str) -> Iterator[Stages]:
    with ExitStack() as stack:
        yield Stages(engine, stack)


@pytest.mark.parametrize(("rule", "transport"), CASES)
def test_the_rule_holds_and_the_log_says_how_it_ended(
    rule: Rule, transport: Transport, engine: str, stages: Stages, request: pytest.FixtureRequest
) -> None:
    def expect_finding(shows_in: str) -> None:
        found = FINDINGS.get((engine, rule.name))
        if found and found.shows_in == shows_in:
            request.applymarker(pytest.mark.xfail(strict=True, reason=found.reason))

    def judge(observation: Observation) -> None:
        expect_finding("observation")
        assert rule.faults(observation) == [], observation
        expect_finding("line")

    if rule.place == "shared":
        stage = stages(rule.settings)
        observation = rule.scenario(stage.subject_of(rule, transport))
        judge(observation)
        lines = expected(rule.name, observation)
        assert stage.endings(len(lines)) == lines
    elif rule.place == "process":
        with Stage(engine, rule.settings) as stage:
            judge(rule.scenario(stage.subject_of(rule, transport)))
            _judge_drain(stage, LINES[rule.name])
    else:
        with (
            Namespace() as namespace,
            namespace.call(Stage, engine, rule.settings, namespace.command) as stage,
        ):
            subject = stage.subject_of(rule, transport)
            judge(namespace.call(rule.scenario, subject, namespace.silence))
            assert stage.endings(len(LINES[rule.name])) == LINES[rule.name]


def test_every_scenario_has_its_lines() -> None:
    assert {rule.name for rule in RULES} == set(LINES)


def _judge_drain(stage: Stage, lines: list[Ended]) -> None:
    """The daemon was told to stop; late clients, let in before its listener closed, come beside."""
    stopped = stage.daemon.ended()
    endings = [Ended.of(line) for line in stage.daemon.closed()]
    assert [ended for ended in endings if ended == lines[0]] == lines
    assert stopped["cut"] == sum(ended.termination in {"KD", "KL"} for ended in endings)
    (draining,) = stage.daemon.lines("service_draining")
    assert draining["reason"] == "SIGTERM"
