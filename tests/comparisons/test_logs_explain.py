"""`triptych logs explain`: the story of a session is that of the session, and where slow sessions' time went
is where it was made to go.
"""

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_troubles import SLOW, WORD, answered, edited, lines_of, scene

from comparisons.logs.blame import SHARES
from comparisons.logs.story import CAUSES, LETTERS, PHASES, ending
from comparisons.logs.synthetic import lines as synthetic
from services.cli import main

Capture = pytest.CaptureFixture[str]
MICROSECONDS = st.one_of(st.none(), st.integers(0, 5_000_000))
COUNT = st.integers(0, 10_000)


def explained(capsys: Capture, *arguments: str | Path) -> dict[str, Any]:
    assert main(["logs", "explain", "--json", *map(str, arguments)]) == 0
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


@pytest.fixture(scope="module")
def troubled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 sessions, and then 6 whose upstream takes 20 ms longer."""
    with scene(tmp_path_factory.mktemp("troubled")) as stage:
        stage.talk(60)
        stage.fault(SLOW)
        stage.talk(6)
        stage.proxy.wait_for("session_closed", 66)
    return stage.log


def last_session(log: Path) -> str:
    return str([line for line in lines_of(log) if line["event"] == "session_closed"][-1]["session"])


def test_a_session_is_told_from_accept_to_close(troubled: Path, capsys: Capture) -> None:
    story = explained(capsys, last_session(troubled), troubled)
    told = " ".join(story["told"])
    assert "came to listener front at 127.0.0.1:" in told
    assert "and was connected after" in told
    assert "The client spoke first" in told
    assert "the upstream took 2" in told.split("The first byte went to the client 2")[1]
    assert "64 bytes came from the client and 64 went to it" in told
    assert told.endswith("It ended in order; the client's end came first.")
    whats = [moment["what"] for moment in story["timeline"]]
    accepted = next(at for at, what in enumerate(whats) if what.startswith("accepted"))
    assert whats[accepted + 1 :] == [
        "connected to the upstream",
        "first byte from the client",
        "first byte to the client",
        "the client's end was read",
        "the upstream's end was read",
        "closed (--)",
    ]
    assert [letter for letter, _ in story["history"]] == list("ShDdFf")


def test_the_story_is_shown_as_text(troubled: Path, capsys: Capture) -> None:
    session = last_session(troubled)
    assert main(["logs", "explain", session, str(troubled)]) == 0
    said = capsys.readouterr().out
    assert session in said.splitlines()[0]
    assert "Timeline, from accept" in said
    assert "Not in the log" in said


def test_a_stalled_loop_stands_on_the_timeline_of_a_session(tmp_path: Path, capsys: Capture) -> None:
    with scene(tmp_path) as stage, stage.connect() as client:
        client.sendall(WORD)
        answered(client)
        stage.wait(0.25)
        with stage.stalled():
            stage.wait(1.3)
        client.sendall(WORD)
        answered(client)
        stage.proxy.wait_for("engine_stalled")
    story = explained(capsys, last_session(stage.log), stage.log)
    assert any("engine_stalled, a timer ran 1." in moment["what"] for moment in story["timeline"])
    assert any(
        sentence.startswith("While it was open our engine was late by as much as 1.")
        for sentence in story["told"]
    )
    [group] = explained(capsys, "--slow", "p50", stage.log)["groups"]
    assert group["shares_us"]["lag"] > 1_000_000


def test_a_session_that_is_still_open_is_told_as_far_as_it_is_known(
    troubled: Path, tmp_path: Path, capsys: Capture
) -> None:
    session = last_session(troubled)
    log = edited(
        troubled,
        tmp_path / "log",
        lambda lines: [
            line for line in lines if line.get("session") != session or line["event"] == "session_opened"
        ],
    )
    story = explained(capsys, session, log)
    assert "It has not ended in this log." in story["told"]
    assert story["unknown"] == ["everything after accept: there is no later line of this session"]


def test_a_session_that_is_not_there_is_exit_code_65(troubled: Path, capsys: Capture) -> None:
    assert main(["logs", "explain", "\x1bNOBODY", str(troubled)]) == 65
    assert capsys.readouterr().err == (
        "triptych: no session \\x1bNOBODY in these logs; its id is the field `session` of its lines\n"
    )


@pytest.mark.parametrize("arguments", [["ID"], ["--by", "upstream", "ID", "FILE"]])
def test_wrong_usage_is_exit_code_64(arguments: list[str], capsys: Capture) -> None:
    assert main(["logs", "explain", *arguments]) == 64
    assert capsys.readouterr().err.count("\n") == 1


def test_slow_sessions_are_explained_by_the_upstream_that_was_slow(troubled: Path, capsys: Capture) -> None:
    [group] = explained(capsys, "--slow", "p99", troubled)["groups"]
    assert group["name"] == "nonblocking"
    assert group["of"] == 66
    # latency delays the end of a stream as it does its bytes
    of_upstream = group["shares_us"]["answering"] + group["shares_us"]["upstream_end"]
    assert of_upstream > 0.6 * sum(group["shares_us"].values())
    assert min(group["shares_us"]["answering"], group["shares_us"]["upstream_end"]) >= 15_000
    assert main(["logs", "explain", "--slow", "p99", str(troubled)]) == 0
    said = capsys.readouterr().out
    assert f"nonblocking: {group['sessions']} of 66 sessions took" in said
    assert "until its first" in said


session_fields = st.fixed_dictionaries(
    {
        "engine": st.sampled_from(("blocking", "twisted")),
        "service": st.sampled_from(("echo", "proxy")),
        "upstream": st.one_of(st.none(), st.just("u")),
        "duration_us": st.integers(0, 5_000_000),
        "bytes_c2s": COUNT,
        "bytes_s2c": COUNT,
        "paused_us": st.integers(0, 9_000_000),
        "max_gap_us": st.integers(0, 9_000_000),
        "loop_lag_us": st.integers(0, 9_000_000),
        **dict.fromkeys(
            (
                "accept_wait_us",
                "connect_us",
                "client_first_us",
                "first_byte_us",
                "client_end_us",
                "upstream_end_us",
                "paused_c2s_us",
                "paused_s2c_us",
            ),
            MICROSECONDS,
        ),
    }
)


@given(sessions=st.lists(session_fields, min_size=1, max_size=40))
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_microsecond_goes_to_one_share(
    tmp_path: Path, capsys: Capture, sessions: list[dict[str, Any]]
) -> None:
    """Also where the fields contradict each other, as no daemon's do."""
    made = [
        msgspec.json.encode(msgspec.json.decode(line) | session)
        for (line, _), session in zip(synthetic(len(sessions)), sessions, strict=True)
    ]
    log = tmp_path / "log"
    log.write_bytes(b"\n".join(made) + b"\n")
    for group in explained(capsys, "--slow", "p50", log)["groups"]:
        of_engine = [session for session in sessions if session["engine"] == group["name"]]
        whole = sum(session["duration_us"] + (session["accept_wait_us"] or 0) for session in of_engine)
        assert sum(group["usual_us"].values()) == whole
        assert min(group["usual_us"].values()) >= 0
        assert min(group["shares_us"].values()) >= 0
        assert sum(group["shares_us"].values()) <= whole
        assert set(group["shares_us"]) == set(SHARES)


@given(sessions=st.lists(session_fields, min_size=1, max_size=10))
@settings(max_examples=3, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_session_has_a_story(tmp_path: Path, capsys: Capture, sessions: list[dict[str, Any]]) -> None:
    made = [
        msgspec.json.encode(msgspec.json.decode(line) | session)
        for (line, _), session in zip(synthetic(len(sessions)), sessions, strict=True)
    ]
    log = tmp_path / "log"
    log.write_bytes(b"\n".join(made) + b"\n")
    assert explained(capsys, f"{0:026}", log)["told"]


def test_every_termination_that_there_is_has_its_words() -> None:
    for cause in CAUSES:
        for phase in PHASES:
            line = {
                "termination": cause + phase,
                "transport": "tcp",
                "closed_by": "service",
                "error": "ECONNRESET",
            }
            said = ending(line)
            assert said.endswith(".")
            assert "unknown" not in said
    assert set(LETTERS) == set("ShDdFfRr")
