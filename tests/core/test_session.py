"""The state machine of a session, rule by rule, without any I/O."""

import pytest
from rehearsal import Play, Stage, upstream

from services.core.record import CLIENT, UPSTREAM, Loss, Reason
from services.core.session import (
    PROBE_INTERVAL,
    RACE,
    SETTLE_INTERVAL,
    Abort,
    BeginRelay,
    Cancel,
    Close,
    Cut,
    Dial,
    DialFailed,
    Dialled,
    Discard,
    Finished,
    Lost,
    Probe,
    Probed,
    SendEnd,
)
from services.core.upstreams import Choice, Pool
from services.vocabulary import SessionProgress

RESET = Loss(Reason.RESET, "ECONNRESET")
BROKEN = Loss(Reason.BROKEN, "EPIPE")
TIMED_OUT = Loss(Reason.TIMED_OUT, "ETIMEDOUT")
REFUSED = Loss(Reason.REFUSED, "ECONNREFUSED")


def relaying(**options: float) -> Play:
    play = Play(Stage(**options))  # type: ignore[arg-type]
    play.connect()
    assert play.actions == [BeginRelay()]
    return play


def conversed(**options: float) -> Play:
    """A proxied session in which both sides have spoken."""
    play = relaying(**options)
    play.move(CLIENT, 3)
    play.move(UPSTREAM, 5)
    return play


# Normal ends


def test_an_echo_ends_when_the_client_has_ended_and_has_everything_back() -> None:
    play = Play(Stage(), "echo")
    assert play.actions == [BeginRelay()]
    play.move(CLIENT, 10)
    assert play.end(CLIENT) == [Close(CLIENT)]
    assert play.ended() == ("SF", "ShDdFf", "--", "client", None)


def test_each_direction_ends_on_its_own_and_the_client_that_ended_first_closed() -> None:
    play = conversed()
    assert play.end(CLIENT) == [SendEnd(UPSTREAM)]
    assert not play.session.over
    play.move(UPSTREAM, 7)
    assert play.end(UPSTREAM) == [Close(CLIENT), Close(UPSTREAM)]
    assert play.ended() == ("SF", "ShDdFf", "--", "client", None)


def test_the_upstream_that_ended_first_closed() -> None:
    play = conversed()
    assert play.end(UPSTREAM) == [SendEnd(CLIENT)]
    play.end(CLIENT)
    assert play.ended() == ("SF", "ShDdfF", "--", "upstream", None)


def test_a_fin_is_passed_on_only_after_the_last_byte() -> None:
    play = relaying()
    play.read(CLIENT, 10)
    relay = play.relay(CLIENT)
    relay.ended(play.stage.now)
    assert not relay.finished
    relay.sent(4, play.stage.now)
    assert not relay.finished
    relay.sent(6, play.stage.now)
    assert relay.finished
    assert play.tell(Finished(relay)) == [SendEnd(UPSTREAM)]
    assert play.tell(Finished(relay)) == [], "said twice, done once"


def test_the_line_tells_who_what_and_when() -> None:
    stage = Stage()
    play = Play(stage)
    stage.now += 0.010
    play.connect()
    play.move(CLIENT, 3, after=0.5)
    play.move(UPSTREAM, 5, after=0.25)
    play.end(CLIENT)
    play.end(UPSTREAM)
    line = play.line()
    assert (line.client_ip, line.client_port, line.local_ip, line.local_port) == (
        "192.0.2.1",
        40_000,
        "192.0.2.2",
        7,
    )
    assert (line.upstream, line.upstream_ip, line.upstream_port) == ("upstream-1", "198.51.100.1", 80)
    assert (line.bytes_c2s, line.bytes_s2c, line.reads, line.writes) == (3, 5, 2, 2)
    assert line.accept_wait_us == 4000
    assert line.connect_us == pytest.approx(11_000, abs=1)
    assert line.first_byte_us == pytest.approx(761_000, abs=1)
    assert line.max_gap_us == pytest.approx(500_000, abs=1)
    assert line.duration_us == pytest.approx(763_000, abs=2)
    assert line.datagrams_c2s is None


# Loss


def test_a_reset_by_the_client_resets_the_upstream() -> None:
    play = conversed()
    assert play.tell(Lost(CLIENT, RESET)) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTO", "ShDdR", "CD", "client", "ECONNRESET")


def test_a_reset_by_the_upstream_resets_the_client() -> None:
    play = conversed()
    assert play.tell(Lost(UPSTREAM, RESET)) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTR", "ShDdr", "SD", "upstream", "ECONNRESET")


def test_a_dead_peer_counts_as_a_reset() -> None:
    play = conversed()
    play.tell(Lost(CLIENT, TIMED_OUT))
    assert play.ended() == ("RSTO", "ShDdR", "CD", "client", "ETIMEDOUT")


def test_an_echo_whose_client_resets_is_over() -> None:
    play = Play(Stage(), "echo")
    play.move(CLIENT, 1)
    assert play.tell(Lost(CLIENT, RESET)) == [Abort(CLIENT)]
    assert play.ended() == ("RSTO", "ShDdR", "CD", "client", "ECONNRESET")


def test_an_echo_whose_client_closed_without_reading_proves_its_fin() -> None:
    play = Play(Stage(), "echo")
    play.move(CLIENT, 1)
    play.read(CLIENT, 1)
    play.tell(Lost(CLIENT, BROKEN))
    assert play.ended() == ("RSTO", "ShDdFR", "CL", "client", "EPIPE")


def test_a_loss_is_delivered_once() -> None:
    play = conversed()
    play.end(UPSTREAM)
    assert play.tell(Lost(UPSTREAM, BROKEN)) != []
    assert play.tell(Lost(UPSTREAM, RESET)) == []


def test_what_an_upstream_sent_before_fin_and_reset_still_reaches_the_client() -> None:
    play = conversed()
    play.read(UPSTREAM, 60)
    # a send to the upstream fails before its FIN was read
    assert play.tell(Lost(UPSTREAM, BROKEN)) == [Discard(play.relay(CLIENT))]
    play.relay(UPSTREAM).sent(60, play.stage.now)
    play.move(UPSTREAM, 40)
    assert play.end(UPSTREAM) == [SendEnd(CLIENT), Probe(CLIENT)]
    assert play.tell(Probed(CLIENT, None, unread=0, unsent=12)) == []
    assert play.wait(SETTLE_INTERVAL) == [Probe(CLIENT)]
    assert play.tell(Probed(CLIENT, None, unread=0, unsent=0)) == [Abort(CLIENT), Abort(UPSTREAM)]
    line = play.line()
    assert line.bytes_s2c == 105
    assert (line.state, line.history) == ("RSTR", "ShDdfr")
    assert (line.termination, line.closed_by, line.error) == ("SL", "upstream", "EPIPE")


def test_an_upload_is_delivered_though_its_client_reset_after_its_fin() -> None:
    play = conversed()
    play.end(CLIENT)
    assert play.tell(Lost(CLIENT, BROKEN)) == [Discard(play.relay(UPSTREAM)), Probe(UPSTREAM)]
    play.read(UPSTREAM, 50)
    assert not play.relay(UPSTREAM).wants_write, "what still comes is dropped"
    play.tell(Probed(UPSTREAM, None, unread=0, unsent=0))
    assert play.ended() == ("RSTO", "ShDdFR", "CL", "client", "EPIPE")
    assert play.actions == [Abort(CLIENT), Abort(UPSTREAM)]


def test_where_both_sides_have_ended_nothing_is_left_to_reset() -> None:
    play = conversed()
    play.read(CLIENT, 10)
    relay = play.relay(CLIENT)
    relay.ended(play.stage.now)
    play.end(UPSTREAM)
    # the upstream is gone before it took the last ten bytes
    assert play.tell(Lost(UPSTREAM, BROKEN)) == [Close(CLIENT), Close(UPSTREAM)]
    line = play.line()
    assert (line.state, line.termination) == ("SF", "SL")


def test_a_client_that_ends_while_a_broken_upstream_is_delivered_closes_in_order() -> None:
    play = conversed()
    play.read(UPSTREAM, 10)
    play.tell(Lost(UPSTREAM, BROKEN))
    assert play.end(CLIENT) == [], "nobody is there to be told"
    play.relay(UPSTREAM).sent(10, play.stage.now)
    assert play.end(UPSTREAM) == [Close(CLIENT), Close(UPSTREAM)]
    assert play.ended() == ("SF", "ShDdFf", "SL", "upstream", "EPIPE")


def test_when_both_are_lost_the_first_is_the_cause() -> None:
    play = conversed()
    play.end(UPSTREAM)
    play.tell(Lost(UPSTREAM, BROKEN))
    play.tell(Lost(CLIENT, RESET))
    assert play.ended() == ("RSTO", "ShDdfR", "SL", "upstream", "EPIPE")


# Connecting


def test_a_refused_upstream_is_retried_on_the_next() -> None:
    play = Play(Stage(upstreams=3))
    assert play.actions == [Dial(1, upstream(1).addresses[0])]
    assert play.tell(DialFailed(1, REFUSED)) == [Dial(2, upstream(2).addresses[0])]
    assert play.tell(DialFailed(2, REFUSED)) == [Probe(CLIENT)], "one retry"


def test_every_address_of_an_upstream_is_tried() -> None:
    stage = Stage()
    stage.pool = Pool("pool", [upstream(1, 80, 81)])
    play = Play(stage)
    assert play.tell(DialFailed(1, REFUSED)) == [Dial(2, upstream(1, 80, 81).addresses[1])]
    play.tell(Dialled(2))
    play.tell(Cut("K"))
    assert play.line().upstream_port == 81


def test_addresses_are_raced_and_who_answers_first_wins() -> None:
    stage = Stage()
    stage.pool = Pool("pool", [upstream(1, 80, 81, 82)])
    play = Play(stage)
    assert play.session.deadline() <= stage.now + RACE
    assert play.wait(RACE) == [Dial(2, stage.pool.upstreams[0].addresses[1])]
    assert play.wait(RACE) == [Dial(3, stage.pool.upstreams[0].addresses[2])]
    assert play.wait(RACE) == []
    assert play.tell(DialFailed(1, REFUSED)) == []
    assert play.tell(Dialled(2)) == [Cancel(3), BeginRelay()]
    assert play.tell(Dialled(3)) == []
    play.tell(Cut("K"))
    assert play.line().upstream_port == 81


def test_a_race_that_nobody_wins_is_over_when_the_last_has_failed() -> None:
    stage = Stage()
    stage.pool = Pool("pool", [upstream(1, 80, 81)])
    play = Play(stage)
    play.wait(RACE)
    assert play.tell(DialFailed(2, REFUSED)) == []
    assert play.tell(DialFailed(1, REFUSED)) == [Probe(CLIENT)]
    assert stage.pool.upstreams[0].failures == 1


def test_a_client_that_said_nothing_gets_fin_when_no_upstream_answers() -> None:
    play = Play(Stage())
    play.tell(DialFailed(1, REFUSED))
    assert play.tell(Probed(CLIENT, None, unread=0, unsent=0))[-1] == Close(CLIENT)
    assert play.ended() == ("SF", "Shf", "SC", "service", "ECONNREFUSED")


def test_a_client_that_sent_data_is_reset_when_no_upstream_answers() -> None:
    play = Play(Stage())
    play.tell(DialFailed(1, REFUSED))
    assert play.tell(Probed(CLIENT, None, unread=9, unsent=0))[-1] == Abort(CLIENT)
    assert play.ended() == ("RSTR", "ShDr", "SC", "service", "ECONNREFUSED")


def test_with_no_upstream_at_all_the_client_is_closed() -> None:
    stage = Stage()
    stage.pool = Pool("pool", [])
    play = Play(stage)
    assert play.actions == [Probe(CLIENT)]
    assert play.session.deadline() < float("inf")
    play.tell(Probed(CLIENT, None, unread=0, unsent=0))
    assert play.ended() == ("SF", "Shf", "sQ", "service", None)


def test_a_dial_nobody_answers_is_given_up_and_the_budget_is_shared() -> None:
    play = Play(Stage(upstreams=2, connect=5.0))
    assert play.wait(2.4) == [Probe(CLIENT)]
    assert play.wait(0.2) == [Cancel(1), Dial(2, upstream(2).addresses[0])]
    assert play.tell(Dialled(1)) == [], "too late"
    assert play.tell(DialFailed(1, REFUSED)) == [], "too late"
    assert play.wait(2.6) == [Cancel(2), Probe(CLIENT)]
    play.tell(Probed(CLIENT, None, unread=0, unsent=0))
    assert play.ended() == ("SF", "Shf", "sC", "service", "ETIMEDOUT")


def test_a_client_that_resets_while_we_connect_ends_the_attempt() -> None:
    play = Play(Stage())
    assert play.wait(PROBE_INTERVAL) == [Probe(CLIENT)]
    assert play.tell(Probed(CLIENT, RESET, 0, 0)) == [Cancel(1), Abort(CLIENT)]
    assert play.ended() == ("RSTO", "ShR", "CC", "client", "ECONNRESET")


def test_a_live_client_is_left_alone_by_a_probe() -> None:
    play = Play(Stage())
    assert play.tell(Probed(CLIENT, None, unread=5, unsent=0)) == []
    assert play.session.awaits(1)


# Time


@pytest.mark.parametrize(
    ("last", "termination"), [(CLIENT, "sD"), (UPSTREAM, "cD")], ids=["client spoke last", "upstream did"]
)
def test_an_idle_session_ends_and_names_the_side_that_was_waited_for(last: object, termination: str) -> None:
    play = conversed(idle=10.0)
    if last is CLIENT:
        play.move(CLIENT, 1)
    assert play.wait(9.9) == []
    assert play.wait(0.2) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTR", "ShDdr", termination, "service", None)


def test_a_session_in_which_nobody_speaks_waits_for_the_client() -> None:
    play = relaying(idle=10.0)
    play.wait(10.1)
    assert play.line().termination == "cD"


def test_a_moved_byte_puts_the_idle_timeout_off() -> None:
    play = conversed(idle=10.0)
    play.move(CLIENT, 1, after=9.0)
    assert play.wait(9.9) == []
    assert not play.session.over


def test_a_client_that_does_not_take_its_data_is_the_one_waited_for() -> None:
    play = conversed(idle=10.0)
    play.read(UPSTREAM, 50)
    play.move(CLIENT, 1)
    play.wait(10.1)
    assert play.line().termination == "cD"


@pytest.mark.parametrize(
    ("ended", "expected"), [(CLIENT, "sL"), (UPSTREAM, "cL")], ids=["client", "upstream"]
)
def test_a_half_closed_session_has_its_own_timeout(ended: object, expected: str) -> None:
    play = conversed(idle=100.0, half_close=5.0)
    play.end(CLIENT if ended is CLIENT else UPSTREAM)
    play.wait(4.9)
    assert not play.session.over
    play.wait(0.2)
    assert play.line().termination == expected


def test_an_echo_that_is_not_read_is_half_closed_too() -> None:
    play = Play(Stage(half_close=5.0), "echo")
    play.read(CLIENT, 9)
    play.relay(CLIENT).ended(play.stage.now)
    play.wait(5.1)
    assert play.ended() == ("RSTR", "ShDFr", "cL", "service", None)


def test_a_silent_echo_waits_for_its_client() -> None:
    play = Play(Stage(idle=5.0), "echo")
    play.wait(5.1)
    assert play.ended() == ("RSTR", "Shr", "cD", "service", None)


def test_a_leg_that_is_not_read_is_probed_every_second() -> None:
    play = conversed()
    assert play.session.deadline() > play.stage.now + 10
    play.read(UPSTREAM, 100)
    assert play.session.deadline() <= play.stage.now + PROBE_INTERVAL
    assert play.wait(PROBE_INTERVAL) == [Probe(UPSTREAM)]
    assert play.session.deadline() == play.stage.now + PROBE_INTERVAL
    assert play.tell(Probed(UPSTREAM, RESET, 0, 0)) == [Abort(CLIENT), Abort(UPSTREAM)]


def test_a_long_session_gets_a_progress_line() -> None:
    play = conversed(progress=60.0)
    play.wait(60.0)
    play.wait(60.0)
    lines: list[SessionProgress] = play.stage.logged(SessionProgress)
    assert [line.state for line in lines] == ["S1", "S1"]
    assert lines[0].termination is None
    assert lines[0].closed_by is None
    play.end(CLIENT)
    play.wait(59.0)
    play.move(UPSTREAM, 1)
    play.wait(1.0)
    assert play.stage.logged(SessionProgress)[-1].state == "S2"


def test_the_upstreams_end_alone_is_state_s3() -> None:
    play = conversed()
    play.end(UPSTREAM)
    play.wait(59.99)
    assert play.session.story() == ("ShDdf", "S3")


def test_an_operator_cuts_a_session() -> None:
    play = conversed()
    assert play.tell(Cut("K")) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTR", "ShDdr", "KD", "service", None)


def test_a_session_cut_while_connecting_gives_its_dial_up() -> None:
    play = Play(Stage())
    assert play.tell(Cut("I", "ValueError")) == [Cancel(1), Abort(CLIENT)]
    assert play.ended() == ("RSTR", "Shr", "IC", "service", "ValueError")


def test_after_the_end_nothing_is_done_any_more() -> None:
    play = conversed()
    play.tell(Cut("K"))
    assert play.tell(Lost(CLIENT, RESET)) == []
    assert play.wait(10_000) == []
    assert not play.session.awaits(1)


def test_a_closed_session_that_left_unread_bytes_of_a_broken_leg_waits_for_them() -> None:
    """While the broken leg's own direction is still being read, only the other leg is probed."""
    play = conversed()
    play.read(UPSTREAM, 10)
    play.tell(Lost(UPSTREAM, BROKEN))
    assert play.wait(SETTLE_INTERVAL) == []
    assert play.wait(PROBE_INTERVAL) == [Probe(CLIENT)]
    assert play.tell(Probed(CLIENT, None, 0, 0)) == [], "not before all of it is sent"


def test_the_line_tells_who_was_waited_for_and_when_each_side_began_and_ended() -> None:
    stage = Stage()
    play = Play(stage)
    play.connect()
    up, down = play.session.relays
    opened = play.session.record.opened_at
    play.read(CLIENT, 10, after=0.5)
    first_at = stage.now
    up.pause(stage.now)
    stage.now += 2.0
    up.sent(10, stage.now)
    play.read(UPSTREAM, 10)
    down.pause(stage.now)
    stage.now += 3.0
    down.sent(10, stage.now)
    play.end(CLIENT)
    play.read(UPSTREAM, 10)
    down.pause(stage.now)
    stage.now += 1.0
    counts = play.session.counts(stage.now)
    assert counts.client_first_us == pytest.approx((first_at - opened) * 1e6, abs=2)
    assert counts.client_end_us is not None
    assert counts.upstream_end_us is None
    assert counts.paused_c2s_us == pytest.approx(2e6, abs=2)
    assert counts.paused_s2c_us == pytest.approx(4e6, abs=2)
    assert counts.paused_us == pytest.approx(6e6, abs=2)
    assert counts.longest_pause_us == pytest.approx(3e6, abs=2)
    # one that lasts counts too
    assert play.session.counts(stage.now + 9.0).longest_pause_us == pytest.approx(10e6, abs=2)
    down.sent(10, stage.now)
    play.end(UPSTREAM)
    assert play.line().upstream_end_us is not None


def test_an_echo_waits_for_its_client_only() -> None:
    stage = Stage()
    play = Play(stage, "echo")
    [relay] = play.session.relays
    play.read(CLIENT, 10)
    relay.pause(stage.now)
    stage.now += 2.0
    relay.sent(10, stage.now)
    counts = play.session.counts(stage.now)
    assert (counts.paused_c2s_us, counts.upstream_end_us) == (None, None)
    assert counts.paused_s2c_us == counts.paused_us == counts.longest_pause_us


def test_a_lifetime_ends_a_session_however_busy_it_is() -> None:
    stage = Stage(lifetime=10.0)
    play = Play(stage)
    play.connect()
    while stage.now < play.session.record.opened_at + 9.0:
        play.move(CLIENT, 1, after=0.5)
        play.wait(0.0)
    assert not play.session.over
    assert play.wait(1.0) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTR", "ShDr", "KD", "service", "ETIME")


def test_dials_come_from_the_pool_s_source() -> None:
    stage = Stage()
    stage.pool.choice = Choice(source="192.0.2.7")
    play = Play(stage)
    assert play.actions == [Dial(1, stage.pool.upstreams[0].addresses[0], "192.0.2.7")]


def test_an_address_of_another_family_than_the_source_is_none() -> None:
    stage = Stage()
    stage.pool.choice = Choice(source="2001:db8::1")
    play = Play(stage)
    assert play.actions == [Probe(CLIENT)]
    play.tell(Probed(CLIENT, None, unread=0, unsent=0))
    assert play.ended() == ("SF", "Shf", "SC", "service", "EAFNOSUPPORT")
