"""`triptych logs sql`: answers over the documented views, and nothing that a query could do beside."""

import csv
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import click
import duckdb
import pytest
from log_lines import NOT_OURS, Process, closed, written

from comparisons.logs.compact import compact
from comparisons.logs.reader import open_logs, schema
from comparisons.logs.sql import check, close_off
from services.cli import main
from services.vocabulary import EngineStalled


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


Sql = Callable[..., Done]


@pytest.fixture
def sql(capsys: pytest.CaptureFixture[str]) -> Sql:
    """The command with these arguments, in this process: starting one takes longer than any answer."""

    def run(*arguments: str) -> Done:
        code = main(["logs", "sql", *arguments])
        return Done(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="module")
def log(tmp_path_factory: pytest.TempPathFactory) -> str:
    process = Process("twisted")
    said = [process.line(closed(number, duration_us=number, upstream='a,"b"')) for number in range(10)]
    said += [process.line(EngineStalled(loop_lag_us=7, open_sessions=1)), NOT_OURS["text"]]
    return written(tmp_path_factory.mktemp("sql") / "log", said)


def test_the_views_answer_as_a_table_as_json_and_as_csv(sql: Sql, log: str) -> None:
    query = (
        "SELECT engine, upstream, count(*) AS sessions, sum(duration_us) AS us, "
        "(SELECT count(*) FROM lines) AS lines FROM sessions GROUP BY ALL"
    )
    table = sql(query, log)
    assert (table.returncode, table.stderr) == (0, "")
    assert table.stdout.split()[-5:] == ["twisted", 'a,"b"', "10", "45", "12"]
    row = {"engine": "twisted", "upstream": 'a,"b"', "sessions": 10, "us": 45, "lines": 12}
    assert json.loads(sql(query, log, "--json").stdout) == [row]
    assert list(csv.DictReader(io.StringIO(sql(query, log, "--csv").stdout))) == [
        {name: str(value) for name, value in row.items()}
    ]


def test_an_answer_without_rows_is_still_one(sql: Sql, log: str) -> None:
    query = "SELECT session FROM sessions WHERE false"
    assert json.loads(sql(query, log, "--json").stdout) == []
    assert sql(query, log, "--csv").stdout == "session\n"


def test_a_long_table_says_where_the_rest_is(sql: Sql, log: str) -> None:
    done = sql("SELECT a.session FROM sessions a, sessions b, sessions c, sessions d", log)
    assert done.stdout.count("0" * 18) == 1_000
    assert done.stderr == "the first 1,000 rows; --json or --csv gives all of them\n"


def test_the_columns_are_told_with_their_meaning(sql: Sql) -> None:
    done = sql("--views")
    assert (done.returncode, done.stderr) == (0, "")
    for name in schema():
        assert f" {name} " in done.stdout


WRITES = {
    "a file": "COPY lines TO '{there}'",
    "a file by way of a view": "COPY (SELECT 1) TO '{there}' (FORMAT csv)",
    "a folder": "EXPORT DATABASE '{there}'",
    "a database": "ATTACH '{there}'",
    "a table": "CREATE TABLE t AS SELECT 1",
    "a row": "INSERT INTO parsed SELECT * FROM parsed",
    "an extension": "INSTALL httpfs",
    "an extension loaded": "LOAD httpfs",
    "a setting": "SET memory_limit = '100GB'",
    "a variable": "SET VARIABLE x = 1",
    "two statements": "SELECT 1; COPY lines TO '{there}'",
    "none": "-- nothing",
}
READS = {
    "another file": "SELECT * FROM read_text('{secret}')",
    "another file by its name": "SELECT * FROM '{secret}'",
    "a file as lines": "SELECT * FROM read_csv('{secret}')",
    "a name of a file": "SELECT * FROM glob('{folder}/*')",
    "another Parquet": "SELECT * FROM read_parquet('{folder}/*.parquet')",
    "an address": "SELECT * FROM read_csv('http://127.0.0.1:9/x.csv')",
    "a query in a query": "SELECT * FROM query('COPY lines TO ''{there}''')",
    "a variable of ours": "SELECT * FROM WRITES",
}


@pytest.mark.parametrize("query", [*WRITES.values(), *READS.values()], ids=[*WRITES, *READS])
def test_a_query_can_neither_write_nor_read_anything_else(tmp_path: Path, query: str, log: str) -> None:
    secret = tmp_path / "secret.csv"
    secret.write_text("secret,word\n1,2\n")
    there = tmp_path / "there"
    asked = query.format(there=there, secret=secret, folder=tmp_path)
    # the first gate, and then the second without it
    if query in WRITES.values():
        with pytest.raises(click.UsageError):
            check(asked)
    with open_logs([log], ("session",)) as logs:
        close_off(logs)
        before = logs.sql.execute("SELECT count(*) FROM lines").fetchall()
        if query in READS.values():
            with pytest.raises(duckdb.Error):
                logs.sql.execute(asked).fetchall()
        assert logs.sql.execute("SELECT count(*) FROM lines").fetchall() == before
    assert not there.exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["secret.csv"]


def test_a_query_cannot_write_the_parquet_that_it_reads(sql: Sql, tmp_path: Path, log: str) -> None:
    compact([log], tmp_path / "packed")
    [part] = (tmp_path / "packed").rglob("date=*/*/*.parquet")
    before = part.read_bytes()
    assert json.loads(
        sql("SELECT count(*) AS n FROM sessions", str(tmp_path / "packed"), "--json").stdout
    ) == [{"n": 10}]
    done = sql(f"COPY (SELECT 1) TO '{part}' (FORMAT parquet)", str(tmp_path / "packed"))
    assert (done.returncode, done.stdout) == (64, "")
    assert part.read_bytes() == before


@pytest.mark.parametrize(
    ("query", "said"),
    [
        pytest.param("SELEC 1", "syntax error", id="syntax"),
        pytest.param("SELECT duration FROM sessions", 'Candidate bindings: "duration_us"', id="a column"),
        pytest.param("SELECT 'a'::INT", "Could not convert", id="a value"),
        pytest.param("DROP VIEW lines", "only reads", id="no SELECT"),
    ],
)
def test_a_query_that_cannot_run_is_one_line(sql: Sql, log: str, query: str, said: str) -> None:
    done = sql(query, log)
    assert (done.returncode, done.stdout) == (64, "")
    assert done.stderr.count("\n") == 1
    assert said in done.stderr


def test_what_a_log_says_does_nothing_to_a_terminal(sql: Sql, tmp_path: Path) -> None:
    path = written(tmp_path / "log", [Process("twisted").line(closed(upstream="\x1b[2J\n"))])
    assert "\x1b" not in sql('SELECT upstream, chr(27) AS "\x1b" FROM sessions', path).stdout
