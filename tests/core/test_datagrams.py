"""UDP sessions by client address."""

import pytest
from rehearsal import Stage

from services.core import datagrams
from services.core.addresses import Address
from services.core.datagrams import Datagrams
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
