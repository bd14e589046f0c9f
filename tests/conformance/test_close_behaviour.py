"""The table "what others do today", measured: our scenarios see in HAProxy, nginx, socat and Twisted's
portforward what it says of them, and in our own engines what it promises.
"""

import pytest
from stage import Stage

from comparisons.peers.known import KNOWN
from comparisons.peers.standing import Standing
from comparisons.scenarios.closing import CloseBehaviour, close_behaviour
from comparisons.scenarios.flow import small_writes
from comparisons.scenarios.rules import RULES

ROWS = {
    "haproxy": CloseBehaviour("all", "all", "EOF", "RST"),
    "nginx": CloseBehaviour("nothing", "nothing", "EOF", "EOF"),
    "nginx-tuned": CloseBehaviour("all", "all", "EOF", "EOF"),
    "socat": CloseBehaviour("nothing", "nothing", "EOF", "EOF"),
    "portforward": CloseBehaviour("nothing", "nothing", "EOF", "EOF"),
}


@pytest.mark.parametrize("name", ROWS)
def test_other_proxies_close_as_the_table_says(name: str) -> None:
    with Standing(KNOWN[name]) as standing:
        assert close_behaviour(standing.subject()) == ROWS[name]


def test_a_proxy_that_closes_at_the_first_end_is_told_which_rules_it_breaks() -> None:
    """The verdicts can fail: nginx as it comes cuts half-closed sessions and hides resets."""
    judged = ("reply_after_client_end", "upload_after_upstream_end", "upstream_resets", "server_speaks_first")
    with Standing(KNOWN["nginx"]) as standing:
        faults = {
            rule.name: rule.faults(rule.scenario(standing.subject())) for rule in RULES if rule.name in judged
        }
    assert faults == {
        "reply_after_client_end": ["the client heard 0 bytes, not 300000"],
        "upload_after_upstream_end": ["the upstream heard 64 bytes, not 300064"],
        "upstream_resets": ["the client saw eof, not reset"],
        "server_speaks_first": [],
    }


def test_every_engine_keeps_all_data_and_passes_on_resets(engine: str) -> None:
    with Stage(engine, {}) as stage:
        # the reply 1.5 s after the FIN, as the table was measured
        assert close_behaviour(stage.subject("proxy"), pause=1.5) == CloseBehaviour(
            "all", "all", "RST", "RST"
        )


def test_a_proxy_without_nodelay_is_found_out() -> None:
    """Socat leaves Nagle's algorithm on: the scenario that shows rule 14 must see it."""
    with Standing(KNOWN["socat"]) as standing:
        assert small_writes(standing.subject(), rounds=5).figures["median_round_s"] > 0.03
