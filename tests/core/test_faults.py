"""Faults on purpose: what becomes of bytes, datagrams and sessions, and that it is the same every time."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import CLIENT_ADDRESS, LOCAL_ADDRESS, Play, Stage

from services import vocabulary
from services.core.datagrams import Datagrams
from services.core.faults import (
    MOST_LATE,
    NEVER,
    AnyFault,
    Bandwidth,
    Blackhole,
    Drop,
    Duplicate,
    Fates,
    Latency,
    Limit,
    Line,
    Reorder,
    Reset,
    Slicer,
    SlowClose,
    hitting,
)
from services.core.record import CLIENT, UPSTREAM
from services.core.service import Policy
from services.core.session import Abort, BeginRelay, Close, Deliver, Finished, SendEnd

DELAYING = st.lists(
    st.one_of(
        st.builds(Latency, delay=st.floats(0, 1), jitter=st.floats(0, 1), seed=st.integers(0, 9)),
        st.builds(Bandwidth, rate=st.integers(1, 10_000)),
        st.builds(Slicer, size=st.integers(1, 100), variation=st.integers(0, 200), delay=st.floats(0, 0.1)),
        st.builds(SlowClose, delay=st.floats(0, 1)),
    ),
    max_size=4,
)


def empty(line: Line, now: float) -> list[tuple[float, bytes]]:
    """All that comes out, and when, for someone who asks at every due time."""
    out = []
    while (due := line.due()) < NEVER:
        now = max(now, due)
        while piece := line.take(now):
            out.append((now, piece))
    return out


def session(stage: Stage, *faults: AnyFault, service: str = "proxy") -> Play:
    play = Play(stage, service, faults)
    if service == "proxy":
        play.connect()
    return play


def test_a_link_without_bandwidth_holds_everything_until_it_has_some() -> None:
    line = Line([Bandwidth(rate=0)], 1)
    line.feed(b"hello", 0.0)
    line.end(0.0)
    assert (line.take(1e9), line.due(), line.held, line.over) == (b"", NEVER, 5, False)
    line.change([])
    assert (line.take(2e9), line.take(2e9), line.over) == (b"hello", b"", True)


@given(DELAYING, st.lists(st.tuples(st.binary(min_size=1, max_size=300), st.floats(0, 0.5)), max_size=10))
def test_what_only_delays_and_cuts_loses_nothing_and_keeps_the_order(
    faults: Sequence[AnyFault], chunks: list[tuple[bytes, float]]
) -> None:
    line = Line(faults, 1)
    now, out = 0.0, []
    for chunk, after in chunks:
        now += after
        assert line.feed(chunk, now) == len(chunk)
        while piece := line.take(now):
            out.append((now, piece))
    line.end(now)
    line.end(now + 100)
    assert not line.over or not chunks
    out += empty(line, now)
    assert line.over
    assert line.held == 0
    assert b"".join(piece for _, piece in out) == b"".join(chunk for chunk, _ in chunks)
    assert [at for at, _ in out] == sorted(at for at, _ in out)


@given(st.binary(min_size=2, max_size=500), st.lists(st.integers(1, 499), max_size=5), st.integers(1, 50))
def test_slices_are_the_same_every_time_and_whole_however_the_bytes_came(
    data: bytes, cuts: list[int], size: int
) -> None:
    faults = [Slicer(size=size, variation=size // 2, delay=0.01, seed=3)]
    whole = Line(faults, 1)
    whole.feed(data, 0.0)
    again = Line(faults, 1)
    again.feed(data, 0.0)
    assert empty(whole, 0.0) == empty(again, 0.0)
    other = Line(faults, 2)
    edges = [0, *sorted(cut for cut in set(cuts) if cut < len(data)), len(data)]
    for start, end in pairwise(edges):
        other.feed(data[start:end], 0.0)
    assert b"".join(piece for _, piece in empty(other, 0.0)) == data


def test_latency_is_what_every_chunk_takes_and_the_end_too() -> None:
    line = Line([Latency(delay=0.05)], 1)
    line.feed(b"one", 1.0)
    line.feed(b"two", 1.01)
    line.end(1.02)
    assert line.take(1.049) == b""
    assert (line.due(), line.take(1.05), line.take(1.05)) == (1.05, b"one", b"")
    assert line.take(1.06) == b"two"
    assert (line.due(), line.over) == (1.07, False)
    assert line.take(1.07) == b""
    assert line.over
    assert line.due() == NEVER


def test_a_bandwidth_is_what_passes_in_the_time_it_takes() -> None:
    line = Line([Bandwidth(rate=100_000), Bandwidth(rate=10_000)], 1)
    line.feed(bytes(5_000), 0.0)
    out = empty(line, 0.0)
    assert out[-1][0] == pytest.approx(0.5)
    assert max(len(piece) for _, piece in out) == 200


def test_a_limit_lets_so_many_bytes_pass_and_ends_the_line() -> None:
    line = Line([Limit(bytes=5)], 1)
    assert line.feed(b"abc", 0.0) == 3
    assert not line.exhausted
    assert line.feed(b"defg", 0.0) == 2
    assert line.exhausted
    assert line.feed(b"h", 0.0) == 0
    assert (line.take(0.0), line.take(0.0), line.take(0.0)) == (b"abc", b"de", b"")
    assert line.over


def test_a_black_hole_takes_the_bytes_and_the_end() -> None:
    line = Line([Blackhole()], 1)
    assert line.feed(b"abc", 0.0) == 0
    line.end(0.0)
    assert (line.take(9.0), line.over, line.lossy, line.due()) == (b"", False, True, NEVER)


def test_when_the_faults_change_what_was_held_back_is_due_at_once() -> None:
    line = Line([Latency(delay=100.0), Slicer(size=2)], 1)
    line.feed(b"abcdef", 0.0)
    line.end(0.0)
    assert line.due() == 100.0
    line.change([])
    assert (line.take(1.0), line.take(1.0), line.take(1.0)) == (b"ab", b"cdef", b"")
    assert line.over
    line = Line([Latency(delay=100.0)], 1)
    line.feed(b"a", 0.0)
    line.change([Latency(delay=1.0)])
    line.feed(b"b", 5.0)
    assert (line.take(5.0), line.take(5.0), line.take(6.0)) == (b"a", b"", b"b")


def test_which_sessions_are_hit_depends_on_the_seed_and_their_number_only() -> None:
    fault = Latency(delay=1.0, probability=0.3, seed=5)
    hit = [bool(hitting([fault], number)) for number in range(2000)]
    assert hit == [bool(hitting([fault], number)) for number in range(2000)]
    assert 500 < sum(hit) < 700
    other = Latency(delay=1.0, probability=0.3, seed=6)
    assert hit != [bool(hitting([other], number)) for number in range(2000)]


def test_each_direction_meets_its_own_faults_and_the_line_names_them() -> None:
    stage = Stage()
    play = session(stage, Latency(delay=1.0, direction="upstream"), Reset(after=50.0, name="later"))
    assert play.actions == [BeginRelay()]
    up, down = play.session.relays
    up.received(10, stage.now)
    up.carry(b"x" * 10, stage.now)
    assert (up.waiting, up.pending, up.wants_write, up.due()) == (0, 10, False, stage.now + 1.0)
    stage.now += 1.0
    assert up.deliver(stage.now) == b"x" * 10
    assert (up.waiting, up.wants_write) == (10, True)
    up.sent(10, stage.now)
    down.received(5, stage.now)
    down.carry(b"reply", stage.now)
    assert down.deliver(stage.now) == b"reply"
    down.sent(5, stage.now)
    assert up.partial_writes == down.partial_writes == 0
    assert play.wait(50.0) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert play.ended() == ("RSTR", "ShDdr", "KD", "service", None)
    assert stage.logged(vocabulary.SessionClosed)[0].faults == "latency_upstream,later"


def test_an_echo_has_one_direction_which_is_both() -> None:
    play = session(
        Stage(), Latency(delay=1.0, direction="upstream"), Latency(delay=2.0, name="more"), service="echo"
    )
    [relay] = play.session.relays
    relay.received(1, play.stage.now)
    relay.carry(b"x", play.stage.now)
    assert relay.due() == play.stage.now + 3.0


def test_a_relay_whose_line_has_passed_its_limit_ends_the_session_in_order() -> None:
    play = session(Stage(), Limit(bytes=4))
    relay = play.relay(UPSTREAM)
    relay.received(6, play.stage.now)
    relay.carry(b"abcdef", play.stage.now)
    assert relay.pending == 4
    assert not relay.wants_read
    assert relay.deliver(play.stage.now) == b"abcd"
    relay.sent(4, play.stage.now)
    assert not relay.finished
    assert relay.deliver(play.stage.now) == b""
    assert relay.finished
    assert play.tell(Finished(relay)) == [Close(CLIENT), Close(UPSTREAM)]
    assert play.ended() == ("SF", "Shdf", "KD", "service", None)


def test_an_end_that_is_late_is_passed_on_when_it_comes_out() -> None:
    play = session(Stage(), SlowClose(delay=3.0))
    relay = play.relay(UPSTREAM)
    relay.ended(play.stage.now)
    assert not relay.finished
    play.stage.now += 3.0
    assert relay.deliver(play.stage.now) == b""
    assert relay.finished
    assert play.tell(Finished(relay)) == [SendEnd(CLIENT)]


def test_a_black_hole_ends_when_its_time_is_over() -> None:
    play = session(Stage(), Blackhole(after=5.0), Reset(after=60.0))
    relay = play.relay(UPSTREAM)
    relay.received(5, play.stage.now)
    relay.carry(b"gone!", play.stage.now)
    assert relay.room == relay.limit
    assert play.session.deadline() == pytest.approx(play.stage.now + 1.0, abs=5.0)
    assert play.wait(5.0) == [Close(CLIENT), Close(UPSTREAM)]
    assert play.line().termination == "KD"


def test_faults_that_change_act_on_open_sessions() -> None:
    stage = Stage()
    play = session(stage)
    relay = play.relay(UPSTREAM)
    assert relay.due() == NEVER
    assert relay.line is None
    policy = play.policy
    slow = Latency(delay=5.0)
    actions = stage.service.change_faults(policy, (slow,), stage.now)
    assert actions == [(play.session, Deliver(relay))]
    relay.received(1, stage.now)
    relay.carry(b"x", stage.now)
    assert relay.due() == stage.now + 5.0
    reset = Reset(after=7.0)
    stage.service.change_faults(policy, (slow, reset), stage.now)
    stage.now += 6.0
    stage.service.change_faults(policy, (reset,), stage.now)
    assert relay.deliver(stage.now) == b"x"
    # a fault that stays keeps its time
    assert play.wait(1.0) == [Abort(CLIENT), Abort(UPSTREAM)]
    assert stage.logged(vocabulary.FaultsChanged)[-1].faults == ["reset_downstream"]
    assert play.session.refault((), stage.now) == ()


def test_a_stream_with_a_hole_does_not_go_on_as_if_it_were_whole() -> None:
    stage = Stage()
    play = session(stage, Blackhole())
    relay = play.relay(UPSTREAM)
    relay.received(1, stage.now)
    relay.carry(b"x", stage.now)
    other = Policy("other", "echo", "tcp")
    assert stage.service.change_faults(other, (), stage.now) == []
    actions = stage.service.change_faults(play.policy, (), stage.now)
    assert [action for _, action in actions] == [Close(CLIENT), Close(UPSTREAM)]
    assert play.line().termination == "KD"


def test_a_relay_that_ended_before_the_fault_came_still_ends() -> None:
    stage = Stage()
    play = session(stage)
    relay = play.relay(UPSTREAM)
    play.read(UPSTREAM, 10)
    relay.ended(stage.now)
    stage.service.change_faults(play.policy, (Latency(delay=1.0),), stage.now)
    relay.sent(10, stage.now)
    assert relay.due() == stage.now + 1.0
    play.end(CLIENT)
    stage.service.change_faults(play.policy, (Latency(delay=2.0),), stage.now)
    assert play.relay(CLIENT).line is None, "what is finished suffers nothing"


def test_a_relay_that_discards_delivers_nothing_more() -> None:
    play = session(Stage(), Latency(delay=1.0))
    relay = play.relay(UPSTREAM)
    relay.received(3, play.stage.now)
    relay.carry(b"abc", play.stage.now)
    relay.discard()
    assert relay.deliver(play.stage.now + 1.0) == b""
    assert relay.due() == NEVER
    relay.ended(play.stage.now)
    assert relay.finished


def test_faults_wait_until_the_session_relays() -> None:
    stage = Stage()
    play = Play(stage)
    assert stage.service.change_faults(play.policy, (Reset(),), stage.now) == []
    play.connect()
    assert play.wait(0.0) == [Abort(CLIENT), Abort(UPSTREAM)]


def test_the_operator_cuts_the_sessions_of_one_listener() -> None:
    stage = Stage()
    play = session(stage)
    assert stage.service.cut(Policy("other", "echo", "tcp"), stage.now) == []
    assert stage.service.cut(play.policy, stage.now) == [
        (play.session, Abort(CLIENT)),
        (play.session, Abort(UPSTREAM)),
    ]


def test_the_nth_datagram_meets_the_same_fate_whenever_it_comes() -> None:
    faults = (
        Drop(probability=0.2, seed=1),
        Duplicate(probability=0.3),
        Reorder(probability=0.3, delay=0.5),
        Latency(delay=0.1, jitter=0.05),
    )

    def fates(clock: float) -> list[list[float]]:
        found = Fates(faults)
        return [[due - now for due in found.of_next(now)] for now in (clock * n for n in range(1000))]

    assert [[round(due, 6) for due in each] for each in fates(1.0)] == [
        [round(due, 6) for due in each] for each in fates(3.0)
    ]
    counts = [len(each) for each in fates(1.0)]
    assert 130 < counts.count(0) < 270
    assert 150 < counts.count(2) < 330


def test_more_late_datagrams_than_are_kept_are_lost() -> None:
    fates = Fates((Latency(delay=1.0),))
    assert sum(len(list(fates.of_next(0.0))) for _ in range(MOST_LATE + 5)) == MOST_LATE
    assert len(list(fates.of_next(1.0))) == 1


def test_a_datagram_is_answered_once_and_at_once_but_for_the_faults_of_its_listener() -> None:
    stage = Stage()
    policy = Policy("echo", "echo", "udp")
    datagrams = Datagrams(policy, LOCAL_ADDRESS, stage.service)
    first = datagrams.received("192.0.2.9", 5000, 3, stage.now)
    assert first is not None
    assert datagrams.replies(first, 5.0) == (5.0,)
    stage.service.change_faults(policy, (Drop(),), stage.now)
    session = datagrams.received(CLIENT_ADDRESS.host, CLIENT_ADDRESS.port, 3, stage.now)
    assert session is not None
    assert session.record.faults == "loss_downstream"
    assert datagrams.replies(session, stage.now) == ()
    assert datagrams.replies(session, stage.now) == ()
    assert stage.service.snapshot(stage.now).totals.datagrams_dropped == 2
    stage.service.change_faults(policy, (Duplicate(),), stage.now)
    assert datagrams.replies(session, stage.now) == (stage.now, stage.now)
