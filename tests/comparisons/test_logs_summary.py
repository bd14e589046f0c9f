"""`triptych logs summary`: its numbers against the same sums in plain Python, and what it makes of
logs that are torn, mixed, rotated, cut short or not there.
"""

import json
import math
import random
import re
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from datetime import datetime, timedelta
from itertools import accumulate
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from log_lines import ENGINES, NOT_OURS, Process, closed, drawn, written

from comparisons.logs.reader import open_logs
from comparisons.logs.show import duration, printable, size
from comparisons.logs.sources import LINE_LIMIT
from comparisons.logs.summary import AMOUNTS, EFFORTS, GROUPS, TIMERS, Summary, summarize
from services.vocabulary import (
    ListenerOpened,
    ServiceStopped,
    SessionClosed,
    SessionOpened,
    SessionProgress,
    SessionRefused,
)

# three significant figures, as the summary's quantiles have them
HISTOGRAM = HdrHistogram(1, 2**45, 3)
PERCENTS = {"p50": 50, "p90": 90, "p99": 99, "p999": 99.9}


def nearest_rank(values: list[int], percent: float) -> int:
    """As HdrHistogram has it: the highest value of the bucket of the value with this rank."""
    value = sorted(values)[math.ceil(len(values) * percent / 100) - 1]
    highest: int = HISTOGRAM.get_highest_equivalent_value(value)
    return highest


def check_against_plain_python(found: Summary, sessions: dict[str, list[SessionClosed]]) -> None:
    assert [engine.name for engine in found.groups] == sorted(sessions)
    assert found.sessions == sum(map(len, sessions.values()))
    for engine in found.groups:
        mine = sessions[engine.name]
        assert engine.sessions == len(mine)
        assert {(each.state, each.termination): each.sessions for each in engine.endings} == Counter(
            (each.state, each.termination) for each in mine
        )
        for amount in (*AMOUNTS, *EFFORTS):
            values = [value for each in mine if (value := getattr(each, amount)) is not None]
            assert getattr(engine, amount) == (sum(values) if values else None)
        expected = {}
        for timer in TIMERS:
            values = [value for each in mine if (value := getattr(each, timer)) is not None]
            if values:
                quantiles = {name: nearest_rank(values, percent) for name, percent in PERCENTS.items()}
                expected[timer] = {"sessions": len(values), **quantiles}
        assert msgspec.to_builtins(engine.timers) == expected


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=False), count=st.integers(0, 60))
def test_the_numbers_are_those_of_plain_python_whatever_stands_between_the_lines(
    tmp_path: Path, dice: random.Random, count: int
) -> None:
    processes = [Process(engine, pid=dice.randrange(1, 4)) for engine in ENGINES]
    sessions: dict[str, list[SessionClosed]] = defaultdict(list)
    seqs: dict[tuple[str, int], list[int]] = defaultdict(list)
    lines: list[bytes] = []
    foreign = 0
    for number in range(count):
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


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(dice=st.randoms(use_true_random=False), count=st.integers(1, 60), spread=st.integers(0, 9))
def test_open_sessions_are_rebuilt_from_their_openings_and_ends(
    tmp_path: Path, dice: random.Random, count: int, spread: int
) -> None:
    process = Process("twisted")
    lines, ends = [], []
    for number in range(count):
        session = drawn(number, dice)
        ends.append((process.millisecond * 1000, session.duration_us))
        lines.append(process.line(session))
        process.millisecond += dice.randrange(10**spread)
    found = summarize([written(tmp_path / "open.log", lines)])
    assert found.since
    assert found.step_us
    zero, since = (datetime.fromisoformat(text) for text in ("2026-11-22T10:00:00Z", found.since))
    start = (since - zero) // timedelta(microseconds=1)
    [group] = found.groups
    after = [start + (number + 1) * found.step_us for number in range(len(group.open))]
    assert group.open == [sum(end - took < moment <= end for end, took in ends) for moment in after]
    assert list(accumulate(group.opened)) == [
        sum(end - took < moment for end, took in ends) for moment in after
    ]
    assert (group.open[-1], sum(group.opened)) == (0, count)
    assert len(group.open) <= 60
    assert found.span_us == max(end for end, _ in ends) - min(end - took for end, took in ends)


@pytest.mark.parametrize("by", GROUPS)
def test_a_summary_is_by_any_of_the_groups(tmp_path: Path, by: str) -> None:
    dice = random.Random(2)  # noqa: S311  data, not a secret
    process = Process("twisted")
    upstreams = [None, "10.0.0.1:6379", "unix:/run/redis.sock"]
    sessions = [drawn(number, dice) for number in range(60)]
    sessions = [msgspec.structs.replace(each, upstream=dice.choice(upstreams)) for each in sessions]
    found = summarize([written(tmp_path / "by.log", [process.line(each) for each in sessions])], by)
    names = Counter("twisted" if by == "engine" else getattr(each, by) or "-" for each in sessions)
    assert {group.name: group.sessions for group in found.groups} == names
    assert sum(group.bytes_c2s or 0 for group in found.groups) == sum(each.bytes_c2s for each in sessions)


def test_the_clients_that_moved_most_come_first(tmp_path: Path) -> None:
    process = Process("twisted")
    moved = {f"192.0.2.{n}": n * 10 for n in range(8)} | {"2001:db8::1": 75}
    lines = [
        process.line(closed(n, client_ip=ip, bytes_c2s=amount // 2, bytes_s2c=amount - amount // 2))
        for n, (ip, amount) in enumerate(moved.items())
    ]
    lines += [process.line(closed(99, client_ip=None, bytes_c2s=10**6))]
    found = summarize([written(tmp_path / "talkers.log", lines)])
    first = sorted(moved.items(), key=lambda each: -each[1])[:5]
    assert [(each.client_ip, each.sessions, each.bytes) for each in found.talkers] == [
        (ip, 1, amount) for ip, amount in first
    ]


def test_a_quantile_is_the_nearest_rank_for_any_number_of_sessions(tmp_path: Path) -> None:
    for count in (1, 2, 9, 10, 11, 250, 1001):
        process = Process("twisted")
        values = random.Random(count).sample(range(10_000_000), count)  # noqa: S311 -- data, not a secret
        lines = [process.line(closed(n, duration_us=value)) for n, value in enumerate(values)]
        [engine] = summarize([written(tmp_path / "quantiles.log", lines)]).groups
        took = engine.timers["duration_us"]
        expected = tuple(nearest_rank(values, percent) for percent in PERCENTS.values())
        assert (took.sessions, took.p50, took.p90, took.p99, took.p999) == (count, *expected)


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
        pytest.param({"event": "Session\x07"}, id="an event that is no name"),
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


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
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
    [engine] = found.groups
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
    assert [engine.name for engine in found.groups] == ["blocking"]
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
    # but for the one that names the file
    assert all(len(line) <= 80 for line in text.splitlines() if three_engines not in line)
    assert all(char.isprintable() or char == "\n" for char in text)
    assert f"\n  {three_engines}\n    118: \\x1b]0;owned\\x07 [bold]not ours[/bold] xx" in text
    assert "118 lines read, 1 of them not ours; 3 missing" in text
    for row in (
        r"^ *blocking +39 +[\d,.]+ +0 ",
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
    assert found["groups"] == expected["groups"]
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


@pytest.mark.parametrize(
    ("amount", "text"),
    [
        (0, "0 B"),
        (999, "999 B"),
        (1000, "1.00 kB"),
        (999_499, "999 kB"),
        (999_500, "1.00 MB"),
        (10**20, "100 EB"),
    ],
)
def test_sizes_are_written_in_units_a_person_reads(amount: int, text: str) -> None:
    assert size(amount) == text


def test_an_interrupt_ends_the_reading_without_a_traceback(three_engines: str, tmp_path: Path) -> None:
    lines = Path(three_engines).read_bytes().splitlines(keepends=True)[:-1]
    (tmp_path / "long.log").write_bytes(b"".join(lines) * 200)
    command = [sys.executable, "-m", "services.cli", "logs", "summary", str(tmp_path / "long.log")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as reading:
        # once the log is open it is being read
        process = psutil.Process(reading.pid)
        while not any(file.path.endswith("long.log") for file in process.open_files()):
            assert reading.poll() is None
        reading.send_signal(signal.SIGINT)
        stdout, stderr = reading.communicate(timeout=60)
    assert (reading.returncode, stdout, stderr.strip()) == (130, b"", b"")


def test_a_master_without_spark_is_a_mistake_in_the_call(three_engines: str) -> None:
    done = logs_summary("--master", "local[2]", three_engines)
    assert (done.returncode, done.stdout) == (64, b"")
    assert b"--backend spark" in done.stderr


@pytest.mark.parametrize("make", [None, Path.mkdir], ids=["not there", "a directory"])
def test_what_cannot_be_read_is_one_line_and_exit_66(tmp_path: Path, make: Any) -> None:
    path = tmp_path / "log\x1b[31m"
    if make:
        make(path)
    done = logs_summary(str(path))
    assert (done.returncode, done.stdout) == (66, b"")
    [line] = done.stderr.decode().splitlines()
    assert line.startswith(f"triptych: {tmp_path}/log\\x1b[31m: ")
