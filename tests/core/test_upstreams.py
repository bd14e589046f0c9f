"""The choice among a pool's upstreams."""

from rehearsal import upstream

from services.core.upstreams import Pool


def test_upstreams_take_turns() -> None:
    pool = Pool("pool", [upstream(1), upstream(2), upstream(3)])
    chosen = [pool.choose([]) for _ in range(6)]
    assert chosen == [upstream(1), upstream(2), upstream(3)] * 2


def test_what_was_tried_is_not_chosen_again() -> None:
    pool = Pool("pool", [upstream(1), upstream(2)])
    assert pool.choose([upstream(1)]) == upstream(2)
    assert pool.choose([upstream(1), upstream(2)]) is None
