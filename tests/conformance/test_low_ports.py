"""Rule 19 can be switched off, for those who know who is there."""

from collections.abc import Callable

import pytest
from daemons import Daemon

from comparisons.scenarios.datagrams import low_ports_get_no_answer
from comparisons.scenarios.wire import Subject


@pytest.mark.parametrize(("answer", "answers"), [(False, 0), (True, 1)])
def test_a_low_port_is_answered_only_where_the_listener_says_so(
    engine: str, daemon: Callable[..., Daemon], answer: bool, answers: int
) -> None:
    listener = {
        "name": "echo",
        "address": "udp:127.0.0.1:0",
        "service": "echo",
        "answer_low_ports": answer,
    }
    running = daemon(engine, [listener])
    observation = low_ports_get_no_answer(Subject(running.addresses[0]))
    assert observation.figures == {"answered": 2, "low_port_answers": answers}
    refused = running.lines("session_refused")
    assert [line["client_port"] < 1024 for line in refused] == [True] * (1 - answers)
