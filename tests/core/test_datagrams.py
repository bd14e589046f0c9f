"""UDP sessions by client address."""

import pytest
from rehearsal import Play, Stage

from services.core import datagrams
from services.core.addresses import Address
from services.core.admission import Limits
from services.core.datagrams import Datagrams, DatagramSession
from services.core.faults import Drop, Duplicate
from services.core.service import REFUSAL_INTERVAL, Policy
from services.vocabulary import ServiceStopped, SessionClosed, SessionRefused


def table(stage: Stage, *, answer_low_ports: bool = False) -> Datagrams:
    policy = Policy("echo", "echo", "udp", None, answer_low_ports)
    return Datagrams(policy, Address("udp", "192.0.2.2", 7), stage.service)


def test_a_client_is_a_session_until_it_has_been_silent_for_a_while() -> None:
    stage = Stage(udp_idle=30.0)
    clients = table(stage)
    for n in (5, 0, 3):
        stage.now += 1.0
        session = clients.received("192.0.2.1", 4000, n, stage.now)
        assert session is not None
        session.answered(n, stage.now)
    assert len(clients) == stage.service.open_sessions == 1
    assert clients.deadline() == stage.now + 30.0
    stage.service.expire(stage.now + 30.0)
    assert len(clients) == 0
    (line,) = stage.logged(SessionClosed)
    assert (line.state, line.history, line.termination, line.closed_by) == ("SF", "Dd", "--", "service")
    assert (line.bytes_c2s, line.bytes_s2c, line.datagrams_c2s, line.datagrams_s2c) == (8, 8, 3, 3)
    assert (line.peak_buffer, line.would_block, line.max_gap_us) == (5, 0, 1_000_000)


def test_a_client_whose_answer_was_dropped_has_spoken_alone() -> None:
    stage = Stage()
    clients = table(stage)
    clients.received("192.0.2.1", 4000, 9, stage.now)
    clients.dropped()
    clients.close(stage.now)
    (line,) = stage.logged(SessionClosed)
    assert (line.state, line.history, line.would_block) == ("S0", "D", 1)
    stage.service.stopped(stage.now)
    (stopped,) = stage.logged(ServiceStopped)
    assert (stopped.datagrams_dropped, stopped.datagrams_c2s, stopped.closed) == (1, 1, 1)


def test_sessions_expire_in_the_order_of_their_last_datagram() -> None:
    stage = Stage(udp_idle=10.0)
    clients = table(stage)
    for after, port in ((0, 4001), (1, 4002), (1, 4001)):
        stage.now += after
        clients.received("192.0.2.1", port, 1, stage.now)
    clients.expire(stage.now - 1 + 10.0)
    assert [line.client_port for line in stage.logged(SessionClosed)] == [4002]
    assert stage.service.open_sessions == 1
    stage.service.stopped(stage.now)
    assert stage.logged(ServiceStopped)[0].datagrams_c2s == 3, "open sessions count in the totals"


@pytest.mark.parametrize(
    ("host", "port", "reason"),
    [
        ("192.0.2.1", 7, "below 1024"),
        ("224.0.0.1", 4000, "not one host's"),
        ("ff02::1%eth0", 4000, "not one host's"),
        ("255.255.255.255", 4000, "not one host's"),
    ],
)
def test_what_could_loop_is_not_answered_and_the_line_says_why(host: str, port: int, reason: str) -> None:
    stage = Stage()
    clients = table(stage)
    assert clients.received(host, port, 1, stage.now) is None
    (line,) = stage.logged(SessionRefused)
    assert reason in line.reason
    assert (line.client_ip, line.client_port, line.termination, line.state) == (host, port, "PQ", "REJ")


def test_low_ports_are_answered_where_the_operator_says_so() -> None:
    stage = Stage()
    assert table(stage, answer_low_ports=True).received("192.0.2.1", 7, 1, stage.now) is not None


def test_a_flood_of_refusals_is_one_line_a_second() -> None:
    stage = Stage()
    clients = table(stage)
    for _ in range(100):
        clients.received("192.0.2.1", 7, 1, stage.now)
    stage.now += REFUSAL_INTERVAL
    stage.service.expire(stage.now)
    clients.received("192.0.2.1", 7, 1, stage.now)
    assert [line.refused for line in stage.logged(SessionRefused)] == [1, 99]
    stage.service.stopped(stage.now)
    assert [line.refused for line in stage.logged(SessionRefused)] == [1, 99, 1]
    assert stage.logged(ServiceStopped)[0].refused == 101


def test_a_full_table_refuses_new_clients_and_keeps_the_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "MOST_CLIENTS", 2)
    stage = Stage()
    clients = table(stage)
    assert clients.received("192.0.2.1", 4001, 1, stage.now) is not None
    assert clients.received("192.0.2.1", 4002, 1, stage.now) is not None
    assert clients.received("192.0.2.1", 4003, 1, stage.now) is None
    assert clients.received("192.0.2.1", 4001, 1, stage.now) is not None
    assert "2 clients are open" in stage.logged(SessionRefused)[0].reason


# Proxying -----------------------------------------------------------------------------------------


def passed_on(stage: Stage, released: list[DatagramSession], **policy: object) -> Datagrams:
    front = Policy("dns", "proxy", "udp", stage.pool, **policy)  # type: ignore[arg-type]
    return Datagrams(front, Address("udp", "192.0.2.2", 53), stage.service, released.append)


def test_a_proxied_client_has_an_upstream_until_it_or_the_upstream_has_been_silent_for_a_while() -> None:
    stage, released = Stage(upstreams=2, udp_idle=10.0), list[DatagramSession]()
    clients = passed_on(stage, released)
    one = clients.received("192.0.2.1", 53, 4, stage.now)
    two = clients.received("192.0.2.1", 54, 4, stage.now)
    assert one is not None
    assert two is not None
    assert [each.upstream for each in (one, two)] == list(stage.pool.upstreams)
    assert one.address == stage.pool.upstreams[0].addresses[0]
    assert clients.forwards(stage.now) == (stage.now,)
    stage.now += 8.0
    # what the upstream sends keeps it open
    assert clients.replies(one, stage.now) == (stage.now,)
    one.answered(9, stage.now)
    stage.now += 3.0
    stage.service.expire(stage.now)
    assert released == [two]
    assert not clients.holds(two)
    assert clients.holds(one)
    stage.now += 7.0
    stage.service.expire(stage.now)
    assert [each.sessions for each in stage.pool.upstreams] == [0, 0]
    [second, first] = stage.logged(SessionClosed)
    assert (first.upstream, first.termination, first.bytes_s2c, first.state) == ("upstream-1", "--", 9, "SF")
    assert second.state == "S0"


def test_an_upstream_that_is_not_there_ends_the_session_and_counts_against_it() -> None:
    stage, released = Stage(upstreams=2), list[DatagramSession]()
    clients = passed_on(stage, released)
    session = clients.received("192.0.2.1", 5000, 4, stage.now)
    assert session is not None
    assert clients.lost(session, "ECONNREFUSED", stage.now) == ()
    assert clients.lost(session, "ECONNREFUSED", stage.now) == ()
    assert clients.replies(session, stage.now) == (stage.now,)
    assert stage.pool.upstreams[0].failures == 1
    [line] = stage.logged(SessionClosed)
    assert (line.termination, line.closed_by, line.error) == ("SD", "upstream", "ECONNREFUSED")
    again = clients.received("192.0.2.1", 5000, 4, stage.now)
    assert again is not None
    assert again.upstream is stage.pool.upstreams[1]


def test_without_an_upstream_a_client_is_refused() -> None:
    stage = Stage()
    stage.pool.upstreams[0].up = False
    assert passed_on(stage, []).received("192.0.2.1", 5000, 4, stage.now) is None
    assert stage.logged(SessionRefused)[0].reason == "no upstream takes a further session"


def test_a_stream_that_waits_for_the_same_upstream_gets_it_from_a_client_of_datagrams() -> None:
    stage = Stage(udp_idle=1.0)
    stage.pool.upstreams[0].limit = 1
    clients = passed_on(stage, [])
    assert clients.received("192.0.2.1", 5000, 4, stage.now) is not None
    waiting = Play(stage)
    stage.now += 2.0
    assert [session for session, _ in stage.service.expire(stage.now)] == [waiting.session]


def test_each_direction_of_a_proxy_suffers_its_own_faults() -> None:
    stage = Stage()
    faults = (Drop(direction="upstream"), Duplicate(direction="downstream"))
    clients = passed_on(stage, [], faults=faults)
    session = clients.received("192.0.2.1", 5000, 4, stage.now)
    assert session is not None
    assert clients.forwards(stage.now) == ()
    assert len(clients.replies(session, stage.now)) == 2


def test_one_source_is_answered_so_often_and_no_more() -> None:
    stage = Stage(limits=Limits(datagram_rate=2))
    clients = table(stage)
    session = clients.received("192.0.2.1", 5000, 4, stage.now)
    other = clients.received("192.0.2.2", 5000, 4, stage.now)
    assert session is not None
    assert other is not None
    assert [len(clients.replies(session, stage.now)) for _ in range(3)] == [1, 1, 0]
    assert len(clients.replies(other, stage.now)) == 1
    stage.now += 0.5
    assert [len(clients.replies(session, stage.now)) for _ in range(2)] == [1, 0]


def test_only_so_many_sources_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datagrams, "MOST_CLIENTS", 2)
    rates = datagrams.Rates()
    assert [rates.allow(host, 1, 0.0) for host in "aabbcca"] == [True, False, True, False, True, False, True]


def test_a_proxied_client_takes_a_descriptor_and_gives_it_back() -> None:
    stage = Stage(udp_idle=1.0, descriptors=1)
    clients = passed_on(stage, [])
    assert clients.received("192.0.2.1", 5000, 4, stage.now) is not None
    assert clients.received("192.0.2.2", 5000, 4, stage.now) is None
    assert "no descriptor" in stage.logged(SessionRefused)[0].reason
    stage.now += 2.0
    stage.service.expire(stage.now)
    assert clients.received("192.0.2.2", 5000, 4, stage.now) is not None
    # an echo needs none
    stage = Stage(descriptors=0)
    assert table(stage).received("192.0.2.1", 5000, 4, stage.now) is not None
