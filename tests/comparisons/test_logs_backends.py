"""The same expressions elsewhere: Spark must agree with DuckDB to the last digit, and halog, which knows
nothing of us, with both.
"""

import random
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from log_lines import ENGINES, NOT_OURS, Process, closed, drawn, written

from comparisons.logs import bench, spark, synthetic
from comparisons.logs.compact import compact
from comparisons.logs.reader import open_logs
from comparisons.logs.summary import summarize


@pytest.fixture(scope="module")
def spark_session(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with spark.session("local[2]", tmp_path_factory.mktemp("spark")):
        yield


@pytest.fixture
def mixed(tmp_path: Path) -> str:
    """Three engines, a restart, a lost line, a peer, what is not ours, and sums beyond 64 bits."""
    dice = random.Random(5)  # noqa: S311  data, not a secret
    lines: list[bytes] = []
    for pid, engine in enumerate(ENGINES):
        for millisecond in (0, 5000):
            process = Process(engine, pid=pid, millisecond=millisecond)
            lines += [process.line(drawn(number, dice)) for number in range(60)]
            del lines[-9]
    lines += NOT_OURS.values()
    large = Process("twisted", pid=9)
    lines += [
        large.line(closed(n, bytes_c2s=2**63 - 1, duration_us=2**63 - 1, upstream="one")) for n in range(2)
    ]
    lines += [b"192.0.2.7:51234 [22/Nov/2026:09:59:58.250] front redis/two 3/12/1750 4096 -- 5/4/3/2/0 0/0"]
    # the peer's line is the first, so that the file is known to hold such
    return written(tmp_path / "mixed.log", lines[::-1])


@pytest.mark.usefixtures("spark_session")
def test_spark_gives_exactly_what_duckdb_gives_of_lines_and_of_parquet(mixed: str, tmp_path: Path) -> None:
    compact([mixed], tmp_path / "packed [1]")
    # and a file of an older version, which had a timer less
    with open_logs([mixed]) as logs:
        older = logs.sql.sql("SELECT * EXCLUDE loop_lag_us FROM lines")
        older.write_parquet(str(tmp_path / "older.parquet"))
    names = [mixed, str(tmp_path / "packed [1]"), str(tmp_path / "older.parquet")]
    expected = summarize(names)
    assert expected.foreign == 3 * len(NOT_OURS)
    assert max(group.bytes_c2s or 0 for group in expected.groups) > 2**64
    assert summarize(names, backend="spark") == expected


def test_spark_that_is_not_installed_is_one_line_and_exit_69(
    mixed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyspark.sql", None)
    with pytest.raises(spark.Unavailable, match=r"triptych\[spark\]") as caught:
        summarize([mixed], backend="spark")
    assert caught.value.exit_code == 69


@pytest.fixture(scope="module")
def sessions() -> list[dict[str, Any]]:
    return [session for _, session in synthetic.lines(4000, seed=11)]


def halog(what: str, sessions: list[dict[str, Any]]) -> list[list[str]]:
    lines = "".join(f"{bench.httplog(session)}\n" for session in sessions)
    done = subprocess.run(["halog", "-q", what], input=lines, capture_output=True, text=True, check=True)
    return [line.split() for line in done.stdout.splitlines() if not line.startswith("#")]


def ours(path: Path, sessions: list[dict[str, Any]]) -> str:
    by_id = {session["session"] for session in sessions}
    return written(
        path, [line for line, session in synthetic.lines(4000, seed=11) if session["session"] in by_id]
    )


def test_halog_counts_the_same_sessions_by_termination(
    tmp_path: Path, sessions: list[dict[str, Any]]
) -> None:
    found = summarize([ours(tmp_path / "ours.log", sessions)], by="termination")
    counted = {how: int(count) for how, count in halog("-tc", sessions)}
    assert {group.name: group.sessions for group in found.groups} == counted
    assert len(counted) == 5


def test_halog_s_percentiles_are_ours_to_its_millisecond(
    tmp_path: Path, sessions: list[dict[str, Any]]
) -> None:
    """The precision of halog: whole milliseconds, cut off, and a rank that is cut off where ours is rounded up.
    So a quantile of ours lies between its percentile and the next in its table, but for the millisecond that it
    cut and for our bucket, 0.1 %. It leaves out what was never connected.
    """
    reached = [session for session in sessions if session["connect_us"] is not None]
    found = summarize([ours(tmp_path / "ours.log", reached)], by="service")
    [group] = found.groups
    rows = halog("-pct", reached)
    for column, timer in ((3, "connect_us"), (5, "duration_us")):
        for name, percent in (("p50", "50.0"), ("p90", "90.0"), ("p99", "99.0"), ("p999", "99.9")):
            [place] = [number for number, row in enumerate(rows) if row[0] == percent]
            low, high = int(rows[place][column]) * 1000, (int(rows[place + 1][column]) + 1) * 1000
            value = getattr(group.timers[timer], name)
            assert low <= value <= high * 1.001, (timer, name)


def test_the_bench_measures_what_is_there_and_compares_what_it_tells(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "comparisons.logs.bench", "--lines", "300", "--folder", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert re.search(r"^ logs summary, lines +\d", done.stdout, re.MULTILINE)
    assert "the counts by termination are the same: logs summary, lines" in done.stdout
