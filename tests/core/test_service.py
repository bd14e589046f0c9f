"""Admitting and retiring sessions, totals, timers, the drain."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import Play, Stage

from services.core.admission import Limits
from services.core.record import CLIENT, UPSTREAM, session_id
from services.core.service import LAG_INTERVAL, STALL
from services.core.session import Abort, Close, Timeouts
from services.vocabulary import (
    EngineFault,
    EngineStalled,
    EngineStats,
    ServiceDraining,
    ServiceStopped,
    SessionClosed,
    SessionOpened,
)


def finish(play: Play) -> None:
    play.end(CLIENT)
    play.end(UPSTREAM)
    play.line()


def proxied(stage: Stage) -> Play:
    play = Play(stage)
    play.connect()
    return play


def test_totals_add_up_to_the_lines() -> None:
    stage = Stage()
    for n in (1, 2, 3):
        play = proxied(stage)
        play.move(CLIENT, n)
        play.move(UPSTREAM, 10 * n)
        finish(play)
    still_open = proxied(stage)
    still_open.move(CLIENT, 5)
    assert len(stage.logged(SessionOpened)) == 4
    stage.service.stopped(stage.now)
    (line,) = stage.logged(ServiceStopped)
    assert (line.accepted, line.closed, line.open_sessions, line.cut) == (4, 3, 1, 0)
    assert (line.bytes_c2s, line.bytes_s2c) == (11, 60)
    assert line.threads == 1


def test_a_drain_lets_open_sessions_finish() -> None:
    stage = Stage(drain=10.0)
    play = proxied(stage)
    stage.service.drain("SIGTERM", stage.now)
    assert not stage.service.drained
    assert not stage.service.expire(stage.now + 9.0)
    finish(play)
    assert stage.service.drained
    (line,) = stage.logged(ServiceDraining)
    assert (line.reason, line.open_sessions, line.deadline_us) == ("SIGTERM", 1, 10_000_000)
    assert stage.service.stopped(stage.now) == 0


def test_the_drain_deadline_cuts_what_is_open_and_counts_it() -> None:
    stage = Stage(drain=10.0)
    plays = [proxied(stage), proxied(stage)]
    plays[0].end(CLIENT)
    plays[0].end(UPSTREAM)  # over, but its legs are still being closed
    stage.service.drain("SIGTERM", stage.now)
    assert stage.service.deadline() <= stage.now + 10.0
    actions = stage.service.expire(stage.now + 10.0)
    assert [action for _, action in actions] == [Abort(CLIENT), Abort(UPSTREAM)]
    assert {session for session, _ in actions} == {plays[1].session}
    assert [play.line().termination for play in plays] == ["--", "KD"]
    assert stage.service.stopped(stage.now) == 1


def test_a_second_sigint_cuts_at_once_and_a_second_sigterm_does_not() -> None:
    stage = Stage(drain=1000.0)
    proxied(stage)
    stage.service.drain("SIGTERM", stage.now)
    stage.service.drain("SIGTERM", stage.now)
    assert stage.service.deadline() > stage.now
    stage.service.drain("SIGINT", stage.now)
    assert stage.service.deadline() <= stage.now
    assert len(stage.service.expire(stage.now)) == 2
    assert len(stage.logged(ServiceDraining)) == 1


def test_statistics_come_at_every_interval() -> None:
    stage = Stage()
    assert stage.service.deadline() == stage.now + 60.0
    for _ in range(3):
        stage.now = stage.service.deadline()
        stage.service.expire(stage.now)
    assert [line.accepted for line in stage.logged(EngineStats)] == [0, 0, 0]


def test_a_late_timer_is_the_lag_of_the_sessions_it_happened_in() -> None:
    stage = Stage()
    early = proxied(stage)
    stage.now = stage.service.deadline() + 0.050
    stage.service.expire(stage.now)
    stage.now += 0.001
    late = proxied(stage)
    stage.now = stage.service.deadline() + 0.020
    stage.service.expire(stage.now)
    finish(early)
    finish(late)
    lags = [line.loop_lag_us for line in stage.logged(SessionClosed)]
    assert [round(lag, -3) for lag in lags] == [50_000, 20_000]
    assert not stage.logged(EngineStalled)


def test_a_stall_has_a_line_of_its_own() -> None:
    stage = Stage()
    proxied(stage)
    stage.service.expire(stage.service.deadline() + STALL)
    (line,) = stage.logged(EngineStalled)
    assert line.open_sessions == 1
    assert round(line.loop_lag_us, -4) == 1_000_000


def test_an_idle_service_wakes_up_for_statistics_only() -> None:
    stage = Stage()
    finish(proxied(stage))
    assert stage.service.deadline() <= stage.now + LAG_INTERVAL
    stage.service.expire(stage.service.deadline())
    assert stage.service.deadline() > stage.now + 50


@given(st.lists(st.floats(0.0, 10.0), min_size=1, max_size=40), st.data())
def test_the_lag_since_any_moment_is_the_largest_since_then(lags: list[float], data: st.DataObject) -> None:
    stage = Stage(stats=1e9)
    proxied(stage)
    seen = []
    for lag in lags:
        stage.now = stage.service.deadline() + lag
        seen.append((stage.now, lag))
        stage.service.expire(stage.now)
    moment = data.draw(st.sampled_from([when for when, _ in seen]))
    expected = max(lag for when, lag in seen if when >= moment)
    assert stage.service.lag_since(moment) == pytest.approx(expected, abs=1e-6)
    assert stage.service.lag_since(stage.now + 1.0) == 0.0


def test_a_fault_names_its_session_or_none() -> None:
    stage = Stage()
    play = proxied(stage)
    stage.service.fault(play.session, "ValueError()", "trace")
    stage.service.fault(None, "KeyError()", "trace")
    assert [line.session for line in stage.logged(EngineFault)] == [play.session.record.id, None]


def test_an_orderly_end_closes_both_legs() -> None:
    play = proxied(Stage())
    play.end(CLIENT)
    assert play.end(UPSTREAM) == [Close(CLIENT), Close(UPSTREAM)]


@given(st.lists(st.floats(0, 4e9, allow_nan=False), min_size=2, max_size=10))
def test_session_ids_sort_by_time(moments: list[float]) -> None:
    for earlier, later in itertools.pairwise(sorted(moments)):
        if int(later * 1e6) > int(earlier * 1e6) and later < 2**50 / 1e6:
            assert session_id(earlier) < session_id(later)
    assert all(len(session_id(moment)) == 26 for moment in moments)


def test_a_reload_holds_for_new_sessions_and_for_the_next_statistics() -> None:
    stage = Stage(idle=10.0)
    old = proxied(stage)
    stage.service.reconfigure(Timeouts(idle=2.0), Limits(buffer=7), 5.0, stage.now)
    assert stage.service.deadline() <= stage.now + 5.0
    new = proxied(stage)
    assert (old.relay(CLIENT).limit, new.relay(CLIENT).limit) == (100, 7)
    assert new.wait(2.1) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert old.wait(0.1) == []


def test_a_dead_peer_is_given_up_no_sooner_than_an_idle_one_unless_told() -> None:
    assert Stage(idle=10.0).service.dead_peer == 10.0
    assert Stage(idle=10.0, dead_peer=3.0).service.dead_peer == 3.0


def test_a_snapshot_changes_no_more() -> None:
    stage = Stage()
    finish(proxied(stage))
    before = stage.service.snapshot(stage.now)
    finish(proxied(stage))
    after = stage.service.snapshot(stage.now)
    assert [(each.totals.closed, each.draining) for each in (before, after)] == [(1, False), (2, False)]
    assert [tally.closed for each in (before, after) for tally in each.tallies.values()] == [
        {"--": 1},
        {"--": 2},
    ]
    (tally,) = after.tallies.values()
    assert (tally.accepted, sum(tally.duration.counts), sum(tally.connect.counts)) == (2, 2, 2)
