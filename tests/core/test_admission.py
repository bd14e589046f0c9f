"""Who may become a session, and that a refusal is immediate, counted and told."""

from ipaddress import ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rehearsal import LOCAL_ADDRESS, Play, Stage

from services.core.addresses import Address
from services.core.admission import Admission, Limits, Lists
from services.core.datagrams import Datagrams
from services.core.service import REFUSAL_INTERVAL, Policy
from services.core.session import Cut
from services.vocabulary import SessionRefused

LISTS = Lists(
    allow=(ip_network("192.0.2.0/24"), ip_network("2001:db8::/32")), deny=(ip_network("192.0.2.128/25"),)
)


def refused(
    admission: Admission, host: str | None, sessions: int = 0, now: float = 0.0, lists: Lists | None = None
) -> str | None:
    return admission.refuse(host, lists, sessions, now)


@pytest.mark.parametrize(
    ("host", "reason"),
    [
        ("192.0.2.1", None),
        ("::ffff:192.0.2.1", None),
        ("2001:db8::1%eth0", None),
        ("192.0.2.129", "its address is on the listener's deny list"),
        ("198.51.100.1", "its address is not on the listener's allow list"),
        ("::1", "its address is not on the listener's allow list"),
        (None, None),
    ],
)
def test_lists_are_of_networks_and_the_deny_list_has_the_last_word(
    host: str | None, reason: str | None
) -> None:
    assert refused(Admission(Limits(), 0.0), host, lists=LISTS) == reason


def test_without_an_allow_list_everybody_who_is_not_denied_may_come() -> None:
    lists = Lists(deny=(ip_network("192.0.2.0/24"),))
    assert refused(Admission(Limits(), 0.0), "198.51.100.1", lists=lists) is None


def test_so_many_sessions_and_no_more() -> None:
    admission = Admission(Limits(sessions=2), 0.0)
    assert refused(admission, None, sessions=1) is None
    assert refused(admission, None, sessions=2) == "2 sessions are open"


@pytest.mark.parametrize(
    ("one", "same", "other", "name"),
    [
        ("192.0.2.1", "::ffff:192.0.2.1", "192.0.2.2", "192.0.2.1"),
        ("2001:db8::1", "2001:db8::2", "2001:db8:0:1::1", "2001:db8::/64"),
    ],
)
def test_a_client_is_its_ipv4_address_or_its_ipv6_network(one: str, same: str, other: str, name: str) -> None:
    admission = Admission(Limits(sessions_per_client=2), 0.0)
    keys = [admission.enter(one), admission.enter(same)]
    assert refused(admission, one) == refused(admission, same) == f"2 sessions of {name} are open"
    assert refused(admission, other) is None
    assert refused(admission, None) is None
    admission.leave(keys.pop())
    assert refused(admission, same) is None
    admission.leave(keys.pop())


def test_a_client_that_was_not_counted_leaves_as_one() -> None:
    admission = Admission(Limits(), 0.0)
    key = admission.enter("192.0.2.1")
    admission.change(Limits(sessions_per_client=1, ipv4_prefix=24), 0.0)
    admission.change(Limits(sessions_per_client=1, ipv4_prefix=24), 0.0)
    admission.leave(key)
    key = admission.enter("192.0.2.1")
    assert refused(admission, "192.0.2.99") == "1 sessions of 192.0.2.0/24 are open"
    admission.change(Limits(sessions_per_client=1), 0.0)
    admission.leave(key)
    assert refused(admission, "192.0.2.99") is None


@given(st.lists(st.floats(0, 3), min_size=1, max_size=60), st.integers(1, 20), st.integers(1, 20))
def test_no_more_are_accepted_in_any_time_than_the_burst_and_the_rate_allow(
    gaps: list[float], rate: int, burst: int
) -> None:
    admission = Admission(Limits(accept_rate=rate, accept_burst=burst), 0.0)
    now, accepted = 0.0, []
    for gap in gaps:
        now += gap
        if refused(admission, None, now=now) is None:
            accepted.append(now)
    for first, start in enumerate(accepted):
        for last, end in enumerate(accepted[first:], 1):
            assert last <= burst + (end - start) * rate + 1e-6
    assert accepted


def test_a_rate_without_a_burst_allows_a_second_s_worth_at_once() -> None:
    admission = Admission(Limits(accept_rate=3), 0.0)
    answers = [refused(admission, None) for _ in range(4)]
    assert answers == [None, None, None, "more than 3 new sessions a second"]
    assert refused(admission, None, now=0.34) is None


def test_a_refused_client_is_no_session_and_is_told_at_once_and_then_once_a_second() -> None:
    stage = Stage(limits=Limits(sessions=1))
    play = Play(stage)
    client = Address("tcp", "192.0.2.7", 5000)
    for _ in range(3):
        assert stage.service.accept(play.policy, client, LOCAL_ADDRESS, None, stage.now) is None
    [line] = stage.logged(SessionRefused)
    assert (line.reason, line.refused, line.client_ip, line.termination) == (
        "1 sessions are open",
        1,
        "192.0.2.7",
        "PQ",
    )
    stage.service.expire(stage.now)
    assert stage.service.deadline() <= stage.now + REFUSAL_INTERVAL
    stage.now += REFUSAL_INTERVAL
    stage.service.expire(stage.now)
    assert [line.refused for line in stage.logged(SessionRefused)] == [1, 2]
    stage.now += REFUSAL_INTERVAL
    stage.service.expire(stage.now)
    stage.service.expire(stage.now)
    assert stage.service.snapshot(stage.now).totals.refused == 3
    play.tell(Cut("K"))
    play.line()
    assert stage.service.accept(play.policy, client, LOCAL_ADDRESS, None, stage.now) is not None


def test_a_client_of_a_unix_socket_is_refused_without_a_name() -> None:
    stage = Stage(limits=Limits(sessions=1))
    play = Play(stage)
    assert stage.service.accept(play.policy, None, LOCAL_ADDRESS, None, stage.now) is None
    assert stage.logged(SessionRefused)[0].client_ip is None


def test_a_datagram_s_client_is_admitted_like_any_other() -> None:
    stage = Stage(limits=Limits(sessions=1))
    policy = Policy("echo", "echo", "udp", lists=LISTS)
    clients = Datagrams(policy, LOCAL_ADDRESS, stage.service)
    assert clients.received("198.51.100.1", 2000, 1, stage.now) is None
    assert clients.received("192.0.2.1", 2000, 1, stage.now) is not None
    assert clients.received("192.0.2.2", 2000, 1, stage.now) is None
    assert clients.received("192.0.2.1", 2000, 1, stage.now) is not None


def test_where_descriptors_run_short_the_listener_is_told_before_the_kernel_says_so() -> None:
    stage = Stage(descriptors=3)
    echo = Policy("echo", "echo", "tcp")
    play = Play(stage)
    assert not stage.service.has_room(play.policy)
    assert stage.service.has_room(echo)
    play.connect()
    play.tell(Cut("K"))
    play.line()
    assert stage.service.has_room(play.policy)


def test_how_full_it_is_and_whom_it_refused_can_be_asked() -> None:
    limits = Limits(sessions=5, sessions_per_client=2, accept_rate=2, accept_burst=3)
    admission = Admission(limits, 0.0)
    for host in ("192.0.2.1", "192.0.2.1", "192.0.2.2"):
        assert refused(admission, host) is None
        admission.enter(host)
    assert refused(admission, "192.0.2.1") is not None
    assert refused(admission, "192.0.2.3") is not None
    assert refused(admission, "192.0.2.3", sessions=5) is not None
    assert refused(admission, "192.0.2.200", lists=LISTS) is not None
    fullness = admission.fullness(0.25)
    assert fullness.limits == limits
    assert (fullness.clients, fullness.most_of_one, fullness.tokens) == (2, 2, 0.5)
    assert fullness.refused == {"list": 1, "sessions": 1, "client": 1, "rate": 1}
