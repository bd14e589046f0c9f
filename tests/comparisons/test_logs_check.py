"""`triptych logs check`: each fault is found by its name in the log of a real daemon that it happened to,
and nothing is found in the logs of daemons that are well.
"""

import json
import socket
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from daemons import Daemon, Line, configuration
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_troubles import RESETS, SLOW, WORD, Scene, answered, edited, lines_of, scene

from comparisons.logs.synthetic import lines as synthetic
from services.cli import main
from services.core.addresses import Address

Capture = pytest.CaptureFixture[str]
ENGINES = ("blocking", "nonblocking", "twisted")


def checked(capsys: Capture, *logs: Path) -> dict[str, Any]:
    """What the command says of these logs; its exit code is the gate's."""
    code = main(["logs", "check", "--json", *map(str, logs)])
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert code == (99 if said["findings"] else 0)
    return said


def found(capsys: Capture, *logs: Path) -> list[dict[str, str]]:
    findings: list[dict[str, str]] = checked(capsys, *logs)["findings"]
    return findings


def names(findings: Sequence[dict[str, str]]) -> list[str]:
    return [finding["name"] for finding in findings]


@pytest.fixture(scope="module")
def well(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The log of a proxy that 30 clients used, and nothing happened."""
    with scene(tmp_path_factory.mktemp("well")) as stage:
        stage.talk(30)
        stage.proxy.wait_for("session_closed", 30)
    return stage.log


def test_nothing_is_found_in_the_logs_of_busy_daemons_of_all_engines(tmp_path: Path, capsys: Capture) -> None:
    with ExitStack() as stack, ThreadPoolExecutor(12) as clients:
        scenes = []
        for engine in ENGINES:
            directory = tmp_path / engine
            directory.mkdir()
            scenes.append(stack.enter_context(scene(directory, engine, log__stats="100ms")))
        for _ in range(4):
            for each in scenes:
                clients.submit(each.talk, 40)
        clients.shutdown()
    logs = [each.log for each in scenes]
    said = checked(capsys, *logs, *(each.log.parents[1] / "upstream" / "log.jsonl" for each in scenes))
    assert said["findings"] == []
    assert said["sessions"] == 2 * 3 * 4 * 40
    assert not next(check for check in said["checks"] if check["name"] == "unended_sessions")["untold"]


def test_a_stalled_loop_is_found(engine: str, tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path, engine) as stage, stage.connect() as first:
        first.sendall(WORD)
        answered(first)
        with stage.stalled():
            # the kernel accepts for it
            waiting = [stage.connect() for _ in range(5)]
            stage.wait(1.3)
        for client in waiting:
            with client:
                client.sendall(WORD)
                answered(client)
    [finding] = found(capsys, stage.log)
    assert finding["name"] == "stalled_loop"
    assert finding["engine"] == engine
    assert "nobody was accepted while clients waited" in finding["evidence"]
    # one of the five may have been accepted just before
    assert "then 5 at once" in finding["evidence"] or "then 4 at once" in finding["evidence"]
    assert finding["where"] == f"pid {stage.proxy.pid}"


def test_a_lost_line_is_found_and_what_it_told(well: Path, tmp_path: Path, capsys: Capture) -> None:
    def lose(lines: Sequence[Line]) -> list[Line]:
        lost = next(line for line in lines if line["event"] == "session_closed")
        return [line for line in lines if line["seq"] != lost["seq"]]

    [finding] = found(capsys, edited(well, tmp_path / "log", lose))
    assert finding["name"] == "lost_lines"
    assert finding["evidence"].startswith("1 line is missing, the first after seq ")
    assert "1 of them ended a session" in finding["evidence"]


def test_a_session_that_was_never_logged_to_end_is_found(well: Path, tmp_path: Path, capsys: Capture) -> None:
    forgotten = next(line["session"] for line in lines_of(well) if line["event"] == "session_closed")

    def forget(lines: Sequence[Line]) -> list[dict[str, Any]]:
        kept = [
            line for line in lines if not (line["event"] == "session_closed" and line["session"] == forgotten)
        ]
        return [{**line, "seq": number} for number, line in enumerate(kept)]

    disagree, unended = found(capsys, edited(well, tmp_path / "log", forget))
    assert disagree["name"] == "totals_disagree"
    assert "30 sessions closed, 29 session_closed lines" in disagree["evidence"]
    assert unended["name"] == "unended_sessions"
    assert forgotten in unended["evidence"]


def test_bytes_that_the_lines_do_not_have_are_found(well: Path, tmp_path: Path, capsys: Capture) -> None:
    def more(lines: Sequence[Line]) -> list[dict[str, Any]]:
        *rest, last = lines
        return [*rest, {**last, "bytes_s2c": last["bytes_s2c"] + 1}]

    [finding] = found(capsys, edited(well, tmp_path / "log", more))
    assert finding["name"] == "totals_disagree"
    assert finding["evidence"] == "service_stopped: bytes_s2c 1,921 in all, 1,920 in the lines"


def test_a_log_that_is_given_twice_is_no_fault(well: Path, tmp_path: Path, capsys: Capture) -> None:
    copy = tmp_path / "copy"
    copy.write_bytes(well.read_bytes())
    assert found(capsys, well, copy) == []


def has_open(sessions: int, line: Line) -> bool:
    return bool(line["open_sessions"] >= sessions)


def test_sessions_that_only_grow_are_found(tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path, log__stats="100ms") as stage, ExitStack() as leaked:
        for opened in range(1, 15):
            leaked.enter_context(stage.connect())
            stage.proxy.wait_for("engine_stats", predicate=partial(has_open, opened))
    assert "leaking_sessions" in names(found(capsys, stage.log))


def test_a_service_that_fills_up_and_stays_full_does_not_leak(tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path, log__stats="50ms") as stage, ExitStack() as used:
        for _ in range(20):
            used.enter_context(stage.connect())
        stage.proxy.wait_for("engine_stats", 13, lambda line: line["open_sessions"] == 20)
        used.close()
        stage.proxy.wait_for("engine_stats", 1, lambda line: line["open_sessions"] == 0 and line["closed"])
    assert "leaking_sessions" not in names(found(capsys, stage.log))


def test_a_burst_of_errors_is_found_with_its_upstream(tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path) as stage:
        stage.talk(60)
        stage.fault(SLOW, RESETS)
        stage.talk(25)
        stage.fault()
        stage.talk(60)
    [finding] = found(capsys, stage.log)
    assert finding["name"] == "error_burst"
    assert finding["where"] == f"upstream {stage.upstream.addresses[0]}"
    assert "25 of " in finding["evidence"]
    assert "sessions ended by the upstream" in finding["evidence"]


def test_an_upstream_that_became_20_ms_slower_is_found(tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path) as stage:
        stage.talk(100, every=0.012)
        stage.fault(SLOW)
        stage.talk(60)
        stage.fault()
        stage.talk(40)
    [finding] = found(capsys, stage.log)
    assert finding["name"] == "slow_upstream"
    assert finding["where"] == f"upstream {stage.upstream.addresses[0]}"
    assert finding["evidence"].startswith("its first answer took 2")


def test_clients_that_begin_to_ask_later_are_not_the_upstreams_fault(tmp_path: Path, capsys: Capture) -> None:
    def hesitate(stage: Scene) -> None:
        with stage.connect() as client:
            stage.wait(0.02)
            client.sendall(WORD)
            answered(client)

    with scene(tmp_path) as stage:
        stage.talk(100, every=0.012)
        for _ in range(60):
            hesitate(stage)
    assert found(capsys, stage.log) == []


def test_a_client_that_stops_reading_is_found(engine: str, tmp_path: Path, capsys: Capture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor(1) as upstream:
        listener = {"name": "front", "address": "127.0.0.1:0", "service": "proxy", "pool": "server"}
        pools = {"server": [Address("tcp", *server.getsockname())]}
        daemon = Daemon(tmp_path, configuration(engine, [listener], pools))
        try:
            with socket.socket() as client:
                # the kernel takes little for it, so that the daemon meets the stall early on
                client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16_384)
                client.settimeout(10)
                client.connect((daemon.addresses[0].host, daemon.addresses[0].port))
                served = upstream.submit(speak, server)
                Scene.wait(2.2)
                while client.recv(1 << 20):
                    pass
                served.result()
        finally:
            daemon.stop()
    [finding] = found(capsys, tmp_path / "log.jsonl")
    assert finding["name"] == "client_stopped_reading"
    assert finding["where"] == f"listener front, session {daemon.closed()[0]['session']}"
    assert finding["evidence"].startswith("the client took nothing for ")


def speak(server: socket.socket) -> None:
    sock, _ = server.accept()
    with sock:
        # more than the kernel's buffers hold
        sock.sendall(bytes(12 << 20))


@pytest.mark.parametrize("differ", [False, True])
def test_paired_sessions_have_moved_the_same_bytes(
    well: Path, tmp_path: Path, capsys: Capture, *, differ: bool
) -> None:
    def pair(lines: Sequence[Line]) -> list[dict[str, Any]]:
        closed = [line["session"] for line in lines if line["event"] == "session_closed"]
        made = []
        for line in lines:
            if line.get("session") not in closed[:2]:
                made.append(line)
                continue
            extra = differ and line["event"] == "session_closed" and line["session"] == closed[0]
            made.append({**line, "pair": "P", **({"bytes_s2c": 65} if extra else {})})
        return made

    findings = found(capsys, edited(well, tmp_path / "log", pair))
    assert ("pair_differs" in names(findings)) == differ
    if differ:
        evidence = findings[names(findings).index("pair_differs")]["evidence"]
        assert "nonblocking 64 bytes from the client, 65 to it" in evidence


def test_what_a_log_cannot_tell_is_said(tmp_path: Path, capsys: Capture) -> None:
    log = tmp_path / "log"
    log.write_bytes(b"".join(line for line, _ in synthetic(300)))
    said = checked(capsys, log)
    assert said["findings"] == []
    untold = {check["name"] for check in said["checks"] if check["untold"]}
    assert untold == {"totals_disagree", "unended_sessions", "pair_differs", "leaking_sessions"}


def test_the_findings_are_shown_with_their_evidence(well: Path, tmp_path: Path, capsys: Capture) -> None:
    log = edited(well, tmp_path / "log", lambda lines: [line for line in lines if line["seq"] not in {9, 10}])
    assert main(["logs", "check", str(log)]) == 99
    said = capsys.readouterr().out
    assert "LOST_LINES" in said
    assert "2 lines are missing, the first after seq 8" in said
    assert "no loop stalled" in said


@given(damage=st.data())
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_damaged_log_never_raises(
    well: Path, tmp_path: Path, capsys: Capture, damage: st.DataObject
) -> None:
    text = bytearray(well.read_bytes())
    for _ in range(damage.draw(st.integers(1, 5))):
        at = damage.draw(st.integers(0, len(text) - 1))
        text[at : at + damage.draw(st.integers(0, 400))] = damage.draw(st.binary(max_size=40))
    log = tmp_path / "damaged"
    log.write_bytes(text)
    checked(capsys, log)
