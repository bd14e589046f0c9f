"""The choice among a pool's upstreams, who waits for one, and who is passed over."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import CLIENT_ADDRESS, LOCAL_ADDRESS, Play, Stage, upstream

from services.core.record import CLIENT, Loss, Reason
from services.core.service import Policy
from services.core.session import Abort, BeginRelay, Close, Cut, Dial, DialFailed, Dialled, Probe, Probed
from services.core.upstreams import Balance, Check, Choice, Ejection, Pool, Queue, Upstream
from services.vocabulary import (
    Event,
    SessionClosed,
    UpstreamChanged,
    UpstreamDown,
    UpstreamResolved,
    UpstreamUp,
)

CLIENTS = [f"192.0.2.{number}" for number in range(1, 255)]
REFUSED = Loss(Reason.REFUSED, "ECONNREFUSED")


def pool(*upstreams: Upstream, told: list[Event] | None = None, **choice: object) -> Pool:
    emit = told.append if told is not None else lambda _: None
    return Pool("pool", upstreams, Choice(**choice), emit)  # type: ignore[arg-type]


def weighted(*weights: int) -> list[Upstream]:
    found = [upstream(number) for number, _ in enumerate(weights, 1)]
    for each, weight in zip(found, weights, strict=True):
        each.weight = weight
    return found


def names(chooser: Pool, times: int, client: str | None = None) -> list[str]:
    """Those chosen, where every session ends before the next one begins."""
    found = []
    for _ in range(times):
        chosen = chooser.choose(client, [], 0.0)
        assert chosen is not None
        chooser.release(chosen)
        found.append(chosen.name[-1])
    return found


def test_upstreams_take_turns() -> None:
    assert names(pool(*weighted(1, 1, 1)), 6) == list("123123")


def test_turns_are_dealt_by_weight_and_spread_evenly() -> None:
    assert names(pool(*weighted(3, 1)), 8) == list("11211121")


@given(st.lists(st.integers(1, 20), min_size=1, max_size=6))
def test_after_a_round_everybody_has_had_as_many_turns_as_its_weight(weights: list[int]) -> None:
    counts = Counter(names(pool(*weighted(*weights)), sum(weights)))
    assert [counts[str(number)] for number in range(1, len(weights) + 1)] == weights


def test_the_least_sessions_for_its_weight_is_chosen() -> None:
    chooser = pool(*weighted(1, 2), balance="least_sessions")
    chosen = [chooser.choose(None, [], 0.0) for _ in range(6)]
    assert Counter(each.name[-1] for each in chosen if each) == {"1": 2, "2": 4}
    assert chosen[0]
    chooser.release(chooser.upstreams[1])
    chooser.release(chooser.upstreams[1])
    again = chooser.choose(None, [], 0.0)
    assert again is chooser.upstreams[1]


def test_of_two_drawn_the_less_busy_is_chosen() -> None:
    busy, idle = weighted(1, 1)
    busy.sessions = 10_000
    chooser = pool(busy, idle, balance="random")
    for _ in range(400):
        chooser.choose(None, [], 0.0)
    # the busy one only where both draws fell on it: a quarter
    assert 50 < busy.sessions - 10_000 < 150


@given(st.sampled_from(CLIENTS), st.integers(1, 5))
def test_a_client_stays_with_its_upstream_whoever_else_goes(client: str, gone: int) -> None:
    upstreams = weighted(1, 1, 1, 1, 1)
    (before,) = names(pool(*upstreams, balance="source_hash"), 1, client)
    left = [each for each in upstreams if each.name != f"upstream-{gone}"]
    (after,) = names(pool(*left, balance="source_hash"), 1, client)
    assert after == before or before == str(gone)


def test_clients_are_spread_by_weight() -> None:
    chooser = pool(*weighted(1, 3), balance="source_hash")
    counts = Counter(names(chooser, 1, f"2001:db8::{number:x}")[0] for number in range(2000))
    assert 400 < counts["1"] < 600
    # without an address: in turn
    assert Counter(names(chooser, 4)) == {"1": 1, "2": 3}


def test_first_fills_them_in_their_order() -> None:
    first, second = weighted(1, 1)
    first.limit = 2
    chooser = pool(first, second, balance="first")
    assert [chooser.choose(None, [], 0.0) for _ in range(3)] == [first, first, second]


def test_backups_are_for_when_no_other_may_be_chosen() -> None:
    normal, backup = weighted(1, 1)
    backup.backup = True
    chooser = pool(normal, backup)
    assert set(names(chooser, 4)) == {"1"}
    normal.draining = True
    assert set(names(chooser, 4)) == {"2"}
    backup.up = False
    assert chooser.choose(None, [], 0.0) is None


def test_what_was_tried_is_not_chosen_again() -> None:
    one, two = weighted(1, 1)
    chooser = pool(one, two)
    assert chooser.choose(None, [one], 0.0) is two
    assert chooser.choose(None, [one, two], 0.0) is None
    assert chooser.further([one]) == 1


def test_dials_that_fail_in_a_row_eject_for_longer_each_time() -> None:
    told: list[Event] = []
    one, two = weighted(1, 1)
    chooser = pool(one, two, told=told, eject=Ejection(failures=2, time=10.0))
    chooser.failed(one, "ECONNREFUSED", 0.0)
    assert Counter(names(chooser, 4)) == {"1": 2, "2": 2}
    chooser.failed(one, "ECONNREFUSED", 0.0)
    chooser.failed(one, "ECONNREFUSED", 1.0)
    assert names(chooser, 3) == ["2", "2", "2"]
    assert chooser.choose(None, [], 10.0) is not None
    assert chooser.choose(None, [two], 10.0) is one
    chooser.failed(one, "ETIMEDOUT", 10.0)
    assert chooser.choose(None, [], 29.0) is two
    chooser.answered(one)
    chooser.answered(one)
    assert one.ejected_until == 0.0
    assert [(type(line), getattr(line, "reason", "")) for line in told] == [
        (UpstreamDown, "2 dials in a row failed, the last with ECONNREFUSED; passed over for 10 s"),
        (UpstreamDown, "4 dials in a row failed, the last with ETIMEDOUT; passed over for 20 s"),
        (UpstreamUp, "it takes connections again"),
    ]


def test_where_nothing_else_is_left_an_ejected_upstream_is_dialled_all_the_same() -> None:
    (only,) = weighted(1)
    chooser = pool(only, eject=Ejection(failures=1))
    chooser.failed(only, "ECONNREFUSED", 0.0)
    assert chooser.choose(None, [], 0.0) is only


def test_health_checks_in_a_row_take_an_upstream_out_and_in() -> None:
    told: list[Event] = []
    one, two = weighted(1, 1)
    chooser = pool(one, two, told=told, health=Check(fall=2, rise=2))
    for error in ("ETIMEDOUT", None, "ETIMEDOUT"):
        chooser.checked(one.name, error)
    assert one.up
    chooser.checked(one.name, "ECONNREFUSED")
    assert names(chooser, 2) == ["2", "2"]
    for error in (None, None, None):
        chooser.checked(one.name, error)
    assert one.up
    chooser.checked(upstream(9).name, "ETIMEDOUT")
    assert [getattr(line, "reason", "") for line in told] == [
        "2 checks in a row failed, the last with ECONNREFUSED",
        "2 checks in a row went well",
    ]
    pool(one).checked(one.name, "ETIMEDOUT")
    assert one.up


def test_a_reload_keeps_what_is_known_of_an_upstream() -> None:
    one, two = weighted(1, 1)
    former = pool(one, two)
    former.choose(None, [two], 0.0)
    one.up = False
    again, three = upstream(1, 81), upstream(3)
    again.weight = 5
    later = pool(again, three)
    later.succeed(former)
    assert later.upstreams == (one, three)
    assert (one.weight, one.sessions, one.up, one.addresses) == (5, 1, False, again.addresses)


# Sessions that wait -------------------------------------------------------------------------------


def crowded(connect: float = 5.0) -> tuple[Stage, Play]:
    """A pool whose only upstream may have one session, and the session that it has."""
    stage = Stage(connect=connect)
    (only,) = stage.pool.upstreams
    only.limit = 1
    stage.pool.choice = Choice(queue=Queue(sessions=2, timeout=3.0))
    play = Play(stage)
    play.connect()
    return stage, play


def test_a_session_that_finds_every_upstream_full_waits_for_another_to_end() -> None:
    stage, first = crowded()
    second, third = Play(stage), Play(stage)
    assert second.actions == third.actions == []
    stage.now += 0.5
    actions = first.session.handle(Cut("K"), stage.now)
    assert [action for session, action in actions if session is second.session] == [
        Dial(1, stage.pool.upstreams[0].addresses[0])
    ]
    assert all(session is not third.session for session, _ in actions)
    assert first.line().queue_us == 0
    second.tell(Dialled(1))
    assert second.actions == [BeginRelay()]
    second.session.handle(Cut("K"), stage.now)
    assert second.line().queue_us == pytest.approx(500_000, abs=2)


def test_a_queue_that_is_full_refuses_and_one_that_takes_too_long_gives_up() -> None:
    stage, _ = crowded()
    waiting = [Play(stage), Play(stage)]
    late = Play(stage)
    assert late.actions == [Probe(CLIENT)]
    late.tell(Probed(CLIENT, None, 0, 0))
    assert late.ended() == ("SF", "Shf", "sQ", "service", None)
    assert waiting[0].wait(3.1) == [Probe(CLIENT)]
    waiting[0].tell(Probed(CLIENT, None, 5, 0))
    assert waiting[0].ended() == ("RSTR", "ShDr", "sQ", "service", None)
    assert len(stage.pool.queue) == 1


def test_a_client_that_leaves_the_queue_is_no_longer_waited_for() -> None:
    stage, first = crowded()
    second = Play(stage)
    assert second.tell(Cut("K")) == [Abort(CLIENT)]
    assert second.line().termination == "KQ"
    assert not stage.pool.queue
    assert len(first.session.handle(Cut("K"), stage.now)) == 2


def test_an_upstream_that_comes_up_is_found_by_those_who_wait() -> None:
    stage, _ = crowded()
    second = Play(stage)
    assert second.wait(1.1) == [Probe(CLIENT)]
    stage.pool.upstreams[0].limit = None
    [dial, probe] = second.wait(1.1)
    assert isinstance(dial, Dial)
    assert probe == Probe(CLIENT)
    assert not stage.pool.queue


def test_a_session_that_ended_before_its_turn_takes_none() -> None:
    stage, first = crowded()
    second = Play(stage)
    second.tell(Cut("K"))
    assert second.session.resume(stage.now) == ()
    assert first.session.resume is not None


def test_a_dial_that_fails_makes_room_and_counts_against_its_upstream() -> None:
    stage = Stage(upstreams=2)
    one, two = stage.pool.upstreams
    play = Play(stage)
    play.tell(DialFailed(1, REFUSED))
    assert (one.sessions, one.failures, two.sessions) == (0, 1, 1)
    play.tell(Dialled(2))
    assert two.failures == 0
    play.tell(Cut("K"))
    assert two.sessions == 0


def test_one_that_waited_has_the_whole_time_to_connect() -> None:
    stage, first = crowded(connect=2.0)
    second = Play(stage)
    stage.now += 2.5
    first.session.handle(Cut("K"), stage.now)
    assert second.session.deadline() <= stage.now + 2.0
    assert second.session.awaits(1)
    assert second.wait(1.9)[:1] != [Close(CLIENT)]
    assert second.session.awaits(1)


@pytest.mark.parametrize("balance", ["round_robin", "least_sessions", "random", "source_hash", "first"])
def test_whatever_happens_to_sessions_every_upstream_is_left_with_none(balance: Balance) -> None:
    stage = Stage(upstreams=3)
    stage.pool.choice = Choice(balance=balance, queue=Queue(sessions=5))
    for each in stage.pool.upstreams:
        each.limit = 2
    policy = Policy("front", "proxy", "tcp", stage.pool)
    sessions = []
    for number in range(14):
        admitted = stage.service.accept(policy, CLIENT_ADDRESS, LOCAL_ADDRESS, None, stage.now)
        assert admitted is not None
        sessions.append(admitted[0])
        if number % 3 == 0:
            admitted[0].handle(DialFailed(1, REFUSED), stage.now)
        assert all(each.sessions <= 2 for each in stage.pool.upstreams)
    for session in sessions:
        session.handle(Cut("K"), stage.now)
        stage.service.retire(session, stage.now)
    assert [each.sessions for each in stage.pool.upstreams] == [0, 0, 0]
    assert not stage.pool.queue
    assert len(stage.logged(SessionClosed)) == 14


# The operator, and names ------------------------------------------------------------------------


def test_an_upstream_that_drains_is_not_chosen_until_it_is_enabled() -> None:
    told: list[Event] = []
    chooser = pool(*weighted(1, 1), told=told)
    name = chooser.upstreams[0].name
    assert chooser.change(name, draining=True)
    assert chooser.change(name, draining=True)
    assert names(chooser, 2) == list("22")
    assert chooser.change(name, draining=False)
    assert Counter(names(chooser, 4)) == {"1": 2, "2": 2}
    assert told == [
        UpstreamChanged(pool="pool", upstream=name, draining=draining, weight=1) for draining in (True, False)
    ]


def test_an_upstream_that_is_not_there_is_not_changed() -> None:
    assert not pool(*weighted(1)).change("nobody", draining=True)


def test_a_weight_of_the_operator_holds_until_the_file_has_another() -> None:
    former = pool(*weighted(1, 1))
    name = former.upstreams[0].name
    former.change(name, weight=5)
    same, other = pool(*weighted(1, 1)), pool(*weighted(2, 1))
    same.succeed(former)
    assert same.upstreams[0].weight == 5
    other.succeed(same)
    assert other.upstreams[0].weight == 2


def test_what_drains_still_does_after_a_reload() -> None:
    former, new = pool(*weighted(1)), pool(*weighted(1))
    former.change(former.upstreams[0].name, draining=True)
    new.succeed(former)
    assert new.upstreams[0].draining


def test_an_upstream_without_an_address_is_not_chosen_until_it_has_one() -> None:
    told: list[Event] = []
    nameless = upstream(1)
    addresses, nameless.addresses = nameless.addresses, ()
    chooser = pool(nameless, upstream(2), told=told)
    assert names(chooser, 2) == list("22")
    chooser.moved(nameless.name, addresses)
    assert Counter(names(chooser, 4)) == {"1": 2, "2": 2}
    assert told == [
        UpstreamResolved(pool="pool", upstream=nameless.name, addresses=[str(each) for each in addresses])
    ]


def test_other_addresses_are_not_blamed_for_the_failures_of_those_before() -> None:
    chooser = pool(*weighted(1, 1), eject=Ejection(failures=1))
    first = chooser.upstreams[0]
    chooser.failed(first, "ETIMEDOUT", 0.0)
    assert names(chooser, 2) == list("22")
    chooser.moved(first.name, upstream(3).addresses)
    assert "1" in names(chooser, 2)


def test_a_reload_that_cannot_resolve_a_name_keeps_its_addresses() -> None:
    former, new = pool(upstream(1)), pool(upstream(1))
    new.upstreams[0].addresses = ()
    new.succeed(former)
    assert new.upstreams[0].addresses == upstream(1).addresses


def test_an_upstream_s_life_is_counted() -> None:
    chooser = pool(upstream(1), eject=Ejection(failures=2), health=Check(fall=1, rise=1))
    (only,) = chooser.upstreams
    names(chooser, 3)
    for _ in range(2):
        chooser.failed(only, "ECONNREFUSED", 0.0)
    for error in (None, "ETIMEDOUT", "ETIMEDOUT"):
        chooser.checked(only.name, error)
    assert (only.chosen, only.failed_dials, only.times_ejected) == (3, 2, 1)
    assert (only.passed_checks, only.failed_checks) == (1, 2)
