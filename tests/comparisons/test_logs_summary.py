"""`triptych logs summary`: its numbers against the same sums in plain Python, and what it makes of
logs that are torn, mixed, rotated, cut short or not there.
"""

import json
import math
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from comparisons.logs.commands import duration
from comparisons.logs.reader import LINE_LIMIT, open_logs, printable
from comparisons.logs.summary import AMOUNTS, TIMERS, Summary, summarize
from services.vocabulary import (
    Event,
    ListenerOpened,
    ServiceStopped,
    SessionClosed,
    SessionOpened,
    SessionProgress,
    SessionRefused,
)

ENGINES = ("blocking", "nonblocking", "twisted")
ENDINGS = (("SF", "--"), ("RSTO", "CD"), ("RSTR", "SC"), ("RSTR", "cD"), ("S0", "--"))
NOT_OURS = {
    "the first half of a line": b'{"timestamp":"2026-11-22T10:00:00.000000Z","level":"in',
    "a line torn behind a colon": b'{"timestamp":',
    "a line torn in a list": b'{"timestamp":"2026-11-22T10:00:00.000000Z","addresses":[',
    "text": b"Nov 22 10:00:00 host other[7]: hello",
    "the JSON of another program": b'{"timestamp":"2026-11-22T10:00:00Z","level":"info","msg":"hello"}',
    "JSON that is no object": b'["session_closed"]',
    "two objects on a line": b'{"event":"session_closed"}{"event":"session_closed"}',
    "bytes that are no UTF-8": b'\xff\xfe{"event":"session_closed"}',
    "NUL bytes, as a crash leaves them": b"\0" * 4096,
}


class Process:
    """Writes lines as the log layer of one process does, a millisecond apart."""

    def __init__(self, engine: str, pid: int = 7, millisecond: int = 0) -> None:
        self.engine, self.pid, self.seq, self.millisecond = engine, pid, 0, millisecond

    def line(self, event: Event, /, **changed: Any) -> bytes:
        seconds, milliseconds = divmod(self.millisecond, 1000)
        envelope = {
            "timestamp": f"2026-11-22T{10 + seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02}.{milliseconds:03}000Z",
            "level": event.LEVEL,
            "event": event.NAME,
            "schema": 1,
            "engine": self.engine,
            "instance": "-",
            "pid": self.pid,
            "worker": 0,
            "seq": self.seq,
        }
        self.seq += 1
        self.millisecond += 1
        return msgspec.json.encode({**envelope, **msgspec.structs.asdict(event), **changed})


def closed(number: int = 0, **changed: Any) -> SessionClosed:
    fields: dict[str, Any] = dict.fromkeys(SessionClosed.__struct_fields__)
    counts = ("reads", "writes", "partial_writes", "would_block", "pauses", "peak_buffer", "spliced_bytes")
    fields |= dict.fromkeys((*counts, "sessions", "bytes_c2s", "bytes_s2c"), 0)
    fields |= dict.fromkeys(("duration_us", "max_gap_us", "paused_us", "loop_lag_us"), 0)
    fields |= {"session": f"{number:026}", "service": "proxy", "listener": "front", "transport": "tcp"}
    fields |= {"state": "SF", "history": "ShDdFf", "termination": "--", "closed_by": "client"}
    return SessionClosed(**{**fields, **changed})


def drawn(number: int, dice: random.Random) -> SessionClosed:
    """A session whose timers are spread over six powers of ten, a third of the nullable ones null."""
    nullable = ("accept_wait_us", "connect_us", "first_byte_us", "client_rtt_us", "upstream_rtt_us")
    state, termination = dice.choice(ENDINGS)
    values: dict[str, Any] = {timer: int(10 ** dice.uniform(0, 6)) for timer in TIMERS}
    values |= {timer: None for timer in nullable if dice.random() < 1 / 3}
    values |= {amount: dice.randrange(100_000) for amount in AMOUNTS[:2]}
    if dice.random() < 1 / 4:
        values |= {"transport": "udp"} | {amount: dice.randrange(100) for amount in AMOUNTS[2:]}
    return closed(number, state=state, termination=termination, **values)


def written(path: Path, lines: Sequence[bytes], end: bytes = b"\n") -> str:
    path.write_bytes(b"\n".join(lines) + end)
    return str(path)


def nearest_rank(values: list[int], percent: int) -> int:
    return sorted(values)[math.ceil(len(values) * percent / 100) - 1]


def check_against_plain_python(found: Summary, sessions: dict[str, list[SessionClosed]]) -> None:
    assert [engine.engine for engine in found.engines] == sorted(sessions)
    assert found.sessions == sum(map(len, sessions.values()))
    for engine in found.engines:
        mine = sessions[engine.engine]
        assert engine.sessions == len(mine)
        assert {(each.state, each.termination): each.sessions for each in engine.endings} == Counter(
            (each.state, each.termination) for each in mine
        )
        for amount in AMOUNTS:
            values = [value for each in mine if (value := getattr(each, amount)) is not None]
            assert getattr(engine, amount) == (sum(values) if values else None)
        expected = {}
        for timer in TIMERS:
            values = [value for each in mine if (value := getattr(each, timer)) is not None]
            if values:
                quantiles = {f"p{percent}": nearest_rank(values, percent) for percent in (50, 90, 99)}
                expected[timer] = {"sessions": len(values), **quantiles}
        assert msgspec.to_builtins(engine.timers) == expected


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=False), size=st.integers(0, 60))
def test_the_numbers_are_those_of_plain_python_whatever_stands_between_the_lines(
    tmp_path: Path, dice: random.Random, size: int
) -> None:
    processes = [Process(engine, pid=dice.randrange(1, 4)) for engine in ENGINES]
    sessions: dict[str, list[SessionClosed]] = defaultdict(list)
    seqs: dict[tuple[str, int], list[int]] = defaultdict(list)
    lines: list[bytes] = []
    foreign = 0
    for number in range(size):
        process = dice.choice(processes)
        session, seq = drawn(number, dice), process.seq
        line = process.line(session)
        what = dice.random()
        if what < 0.1:
            continue  # lost: a gap, unless it is the first or the last
        if what < 0.2:
            line = dice.choice([*NOT_OURS.values(), line[: dice.randrange(1, len(line))]])
            foreign += 1
        else:
            sessions[process.engine].append(session)
            seqs[process.engine, process.pid].append(seq)
        lines.append(line)

    found = summarize([written(tmp_path / "mixed.log", lines, end=dice.choice([b"", b"\n"]))])

    check_against_plain_python(found, sessions)
    assert (found.lines, found.foreign) == (len(lines), foreign)
    assert {(each.engine, each.pid): (each.lines, each.missing) for each in found.processes} == {
        process: (len(read), read[-1] - read[0] + 1 - len(read)) for process, read in seqs.items()
    }


def test_a_quantile_is_the_nearest_rank_for_any_number_of_sessions(tmp_path: Path) -> None:
    for count in (*range(1, 12), 99, 100, 101, 250):
        process = Process("twisted")
        values = random.Random(count).sample(range(10_000), count)  # noqa: S311 -- data, not a secret
        lines = [process.line(closed(n, duration_us=value)) for n, value in enumerate(values)]
        [engine] = summarize([written(tmp_path / "quantiles.log", lines)]).engines
        took = engine.timers["duration_us"]
        expected = tuple(nearest_rank(values, percent) for percent in (50, 90, 99))
        assert (took.sessions, took.p50, took.p90, took.p99) == (count, *expected)


@pytest.mark.parametrize("foreign", [pytest.param(line, id=name) for name, line in NOT_OURS.items()])
def test_a_line_that_is_not_ours_is_counted_and_quoted_and_is_no_session(
    tmp_path: Path, foreign: bytes
) -> None:
    process = Process("blocking")
    ours = [process.line(closed(n)) for n in range(2)]
    found = summarize([written(tmp_path / "mixed.log", [ours[0], b"", foreign, ours[1]])])
    assert (found.lines, found.foreign, found.sessions) == (3, 1, 2)
    # numbered as an editor does, with the blank line
    assert [fault.line for fault in found.faults] == [3]
    beginning = foreign[:200].decode(errors="backslashreplace")
    assert found.faults[0].text == printable(beginning)
    assert found.faults[0].text.isprintable()


@pytest.mark.parametrize(
    "changed",
    [
        pytest.param({"event": "session_shut"}, id="an event that is not in the vocabulary"),
        pytest.param({"engine": "\x1b[31mred"}, id="an engine that drives the terminal"),
        pytest.param({"state": "SF\x07"}, id="a state that is none"),
        pytest.param({"termination": "??"}, id="a termination that is none"),
        pytest.param({"duration_us": None}, id="null where a number belongs"),
        pytest.param({"bytes_c2s": -1}, id="a negative count"),
        pytest.param({"bytes_c2s": 2**64}, id="a count beyond 64 bits"),
        pytest.param({"reads": "many"}, id="text where a number belongs"),
        pytest.param({"seq": {}}, id="an object where a number belongs"),
        pytest.param({"schema": 2}, id="a schema of another version"),
        pytest.param({"timestamp": "yesterday"}, id="a time that is none"),
    ],
)
def test_a_session_that_breaks_the_vocabulary_is_not_ours_and_never_a_null_row(
    tmp_path: Path, changed: dict[str, Any]
) -> None:
    process = Process("blocking")
    lines = [process.line(closed(0)), process.line(closed(1), **changed)]
    path = written(tmp_path / "broken.log", lines)
    found = summarize([path])
    assert (found.lines, found.foreign, found.sessions) == (2, 1, 1)
    with open_logs([path]) as logs:
        rows = logs.sql.execute("SELECT session FROM sessions").fetchall()
    assert rows == [(f"{0:026}",)]


def test_the_columns_are_the_vocabulary_s_even_where_the_log_has_none_of_them(tmp_path: Path) -> None:
    path = written(tmp_path / "none.log", [])
    with open_logs([path]) as logs:
        columns = {name: kind for name, kind, *_ in logs.sql.execute("DESCRIBE sessions").fetchall()}
    assert columns.keys() >= set(SessionClosed.__struct_fields__)
    assert {columns[name] for name in (*TIMERS, *AMOUNTS)} == {"BIGINT"}


def test_a_line_of_many_megabytes_is_one_torn_line(tmp_path: Path) -> None:
    process = Process("nonblocking")
    ours = [process.line(closed(n)) for n in range(2)]
    long = b'{"event":"' + b"x" * (3 * LINE_LIMIT) + b'"}'
    found = summarize([written(tmp_path / "long.log", [ours[0], long, ours[1]])])
    assert (found.lines, found.foreign, found.sessions) == (3, 1, 2)
    assert [fault.line for fault in found.faults] == [2]


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_log_cut_and_overwritten_anywhere_is_still_summed_up(tmp_path: Path, data: st.DataObject) -> None:
    process = Process("blocking")
    lines = [process.line(closed(n)) for n in range(4)]
    log = bytearray(b"\n".join(lines))
    for _ in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(0, len(log)))
        log[start : start + data.draw(st.integers(0, 40))] = data.draw(st.binary(max_size=40))
    (tmp_path / "fuzzed.log").write_bytes(log)
    found = summarize([str(tmp_path / "fuzzed.log")])
    assert 0 <= found.sessions + found.foreign <= found.lines <= log.count(b"\n") + 1
    # a line that was left alone is a session, whatever became of those beside it
    assert found.sessions >= len(set(bytes(log).split(b"\n")) & set(lines))
    json.dumps(msgspec.to_builtins(found))


def test_a_process_that_begins_again_with_the_same_pid_leaves_no_gap(tmp_path: Path) -> None:
    first, second = Process("twisted", pid=1), Process("twisted", pid=1, millisecond=1000)
    before = [first.line(closed(n)) for n in range(50)]
    after = [second.line(closed(n)) for n in range(50, 70)]
    found = summarize([written(tmp_path / "restarted.log", before + after)])
    assert [(each.lines, each.missing) for each in found.processes] == [(70, 0)]
    # rotation took the beginning away, and a stalled reader two lines of each
    found = summarize(
        [written(tmp_path / "restarted.log", before[30:40] + before[42:] + after[:5] + after[7:])]
    )
    assert [(each.lines, each.missing) for each in found.processes] == [(36, 4)]


def test_rotated_files_may_be_named_in_any_order(tmp_path: Path) -> None:
    process = Process("twisted")
    lines = [process.line(closed(n)) for n in range(30)]
    old = written(tmp_path / "app.log.1", lines[:20])
    new = written(tmp_path / "app.log", lines[20:])
    for order in ([new, old], [old, new], [new, old, new]):
        found = summarize(order)
        assert (found.sessions, found.processes[0].missing) == (30, 0)
    assert found.first == "2026-11-22T10:00:00.000000Z"
    assert found.last == "2026-11-22T10:00:00.029000Z"


def test_only_closed_sessions_count_and_the_others_are_told(tmp_path: Path) -> None:
    process = Process("nonblocking")
    fields = msgspec.structs.asdict(closed(0))
    opened = {name: fields[name] for name in SessionOpened.__struct_fields__}
    refused = SessionRefused(
        service="proxy",
        listener="front",
        transport="tcp",
        client_ip=None,
        client_port=None,
        termination="PQ",
        reason="limit",
        refused=12,
    )
    totals = dict.fromkeys(ServiceStopped.__struct_fields__, 1000)
    lines = [
        process.line(
            ListenerOpened(
                listener="front", service="proxy", transport="tcp", address="[::1]:7", inherited=False
            )
        ),
        process.line(SessionOpened(**opened)),
        process.line(SessionOpened(**opened | {"session": "a" * 26})),
        process.line(SessionProgress(**fields | {"session": "a" * 26, "bytes_c2s": 99})),
        process.line(SessionProgress(**fields | {"session": "b" * 26, "bytes_c2s": 99})),
        process.line(closed(0, bytes_c2s=5)),
        process.line(refused),
        process.line(ServiceStopped(**totals)),
    ]
    found = summarize([written(tmp_path / "open.log", lines)])
    assert (found.lines, found.foreign, found.sessions, found.unclosed) == (8, 0, 1, 2)
    [engine] = found.engines
    assert (engine.sessions, engine.refused, engine.bytes_c2s, engine.datagrams_c2s) == (1, 12, 5, None)
    assert [(each.lines, each.missing) for each in found.processes] == [(8, 0)]


@pytest.mark.parametrize(
    "name", ["*.log", "[a].log", "a?.log", "o'clock.log", "logs of today.gz", "file:a.log"]
)
def test_a_file_s_name_is_a_name_and_not_a_pattern(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written(tmp_path / "ab.log", [Process("twisted").line(closed(1))])
    written(tmp_path / name, [Process("blocking").line(closed(0)), b"torn"])
    found = summarize([name])
    assert [engine.engine for engine in found.engines] == ["blocking"]
    assert (found.lines, found.faults[0].file) == (2, name)


@pytest.mark.parametrize(
    ("microseconds", "text"),
    [
        (0, "0 µs"),
        (999, "999 µs"),
        (1000, "1.00 ms"),
        (1234, "1.23 ms"),
        (9_996, "10.0 ms"),
        (99_960, "100 ms"),
        (999_499, "999 ms"),
        (999_500, "1.00 s"),
        (45_600_000, "45.6 s"),
        (3_600_000_000, "3,600 s"),
    ],
)
def test_times_are_written_in_units_a_person_reads(microseconds: int, text: str) -> None:
    assert duration(microseconds) == text


def logs_summary(*arguments: str, stdin: bytes = b"") -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "services.cli", "logs", "summary", *arguments]
    return subprocess.run(command, input=stdin, capture_output=True, timeout=60, check=False)


@pytest.fixture
def three_engines(tmp_path: Path) -> str:
    dice = random.Random(3)  # noqa: S311 -- data, not a secret
    lines = []
    for pid, engine in enumerate(ENGINES, 4_000_000):
        process = Process(engine, pid=pid)
        lines += [process.line(drawn(n, dice)) for n in range(40)]
        del lines[-9]
    return written(tmp_path / "three.log", [*lines, b"\x1b]0;owned\x07 [bold]not ours[/bold] " + b"x" * 100])


def test_the_tables_fit_a_terminal_and_let_nothing_reach_it(three_engines: str) -> None:
    done = logs_summary(three_engines)
    assert (done.returncode, done.stderr) == (0, b"")
    text = done.stdout.decode()
    assert all(len(line) <= 80 for line in text.splitlines())
    assert all(char.isprintable() or char == "\n" for char in text)
    assert f"\n  {three_engines}\n    118: \\x1b]0;owned\\x07 [bold]not ours[/bold] xx" in text
    assert "118 lines read, 1 of them not ours; 3 missing" in text
    for row in (
        r"^ *sessions +39 +39 +39",
        r"^ *duration +blocking +39 +[\d.]+ (µs|ms|s) ",
        r"^ *twisted +4000002 ",
    ):
        assert re.search(row, text, re.MULTILINE), row


def test_json_is_the_same_summary(three_engines: str) -> None:
    done = logs_summary(three_engines, "--json")
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout) == msgspec.to_builtins(summarize([three_engines]))


def test_the_journal_s_json_is_read_like_the_file_it_outlines(three_engines: str) -> None:
    """The form of `journalctl -o json`: a line of others, one too long to be shown, and ours."""
    ours = Path(three_engines).read_text(encoding="latin-1").splitlines()
    messages = ["Started Triptych.", None, *ours]
    journal = "".join(
        json.dumps({"__CURSOR": "s", "__REALTIME_TIMESTAMP": "1700000000000000", "MESSAGE": message}) + "\n"
        for message in messages
    )
    found = json.loads(logs_summary("--json", "-", stdin=journal.encode()).stdout)
    expected = json.loads(logs_summary("--json", three_engines).stdout)
    assert found["sessions"] == expected["sessions"]
    assert found["engines"] == expected["engines"]
    assert found["lines"] == expected["lines"] + 2
    assert found["foreign"] == expected["foreign"] + 2


def test_standard_input_is_a_file_like_any_other(three_engines: str) -> None:
    log = Path(three_engines).read_bytes()
    done = logs_summary("-", "--json", stdin=log)
    found = json.loads(done.stdout)
    expected = msgspec.to_builtins(summarize([three_engines]))
    for summary in (found, expected):
        del summary["files"]
        for fault in summary["faults"]:
            del fault["file"]
    assert found == expected


def test_a_log_without_sessions_says_so(tmp_path: Path) -> None:
    path = written(tmp_path / "empty.log", [])
    done = logs_summary(path)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout.decode().splitlines() == ["0 lines read, 0 of them not ours; 0 missing", "no session"]


@pytest.mark.parametrize("make", [None, Path.mkdir], ids=["not there", "a directory"])
def test_what_cannot_be_read_is_one_line_and_exit_66(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "log\x1b[31m"
    if make:
        make(path)
    done = logs_summary(str(path))
    assert (done.returncode, done.stdout) == (66, b"")
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"triptych: {tmp_path}/log\\x1b[31m: ")
