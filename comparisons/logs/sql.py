"""`triptych logs sql`: any question, in DuckDB's SQL, over the views `lines` and `sessions`.

It reads and does nothing else, whatever the query says. Only one statement runs, and only one that selects;
when it does, DuckDB's file system, network and extensions are closed to it (all but the Parquet that was
named), and its configuration is locked.
"""

import csv
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import click
import duckdb

from comparisons.logs.fields import FIELDS, SESSION_FIELDS
from comparisons.logs.reader import Logs, open_logs, schema
from comparisons.logs.show import console, printable, table

# rows in memory at a time, and rows that a table has room for
BATCH = 5_000
SHOWN = 1_000
# types that stand on the right of a column
NUMBERS = {"TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UBIGINT", "FLOAT", "DOUBLE", "DECIMAL"}
READ_ONLY = (
    "SET enable_external_access = false",
    "SET autoinstall_known_extensions = false",
    "SET autoload_known_extensions = false",
    # a name in a query shall never be a variable of ours
    "SET python_enable_replacements = false",
    "SET lock_configuration = true",
)
OWN = {
    "kind": "known: a line of ours; unknown: ours, of a newer version; foreign: torn, or another program's",
    "at_us": "timestamp as microseconds since 1970; a session was opened at at_us - duration_us",
}


def _print_views(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    if not wanted:
        return
    types = schema()
    for view, names, about in (
        ("lines", types, "every line, also those that are not ours"),
        (
            "sessions",
            [*OWN, *SESSION_FIELDS],
            "the lines whose event is session_closed, with all columns of lines",
        ),
    ):
        found = table(f"{view}: {about}", "column", "type", "meaning")
        for name in names:
            found.add_row(name, types[name], OWN[name] if name in OWN else FIELDS[name].meaning)
        console().print(found, "")
    context.exit()


@click.command(name="sql")
@click.argument("query", metavar="QUERY")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--json", "form", flag_value="json", help="The rows as a JSON array of objects.")
@click.option("--csv", "form", flag_value="csv", help="The rows as CSV.")
@click.option(
    "--views",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_print_views,
    help="The columns and exit.",
)
def command(query: str, files: tuple[str, ...], form: str | None) -> None:
    """Ask in SQL: one SELECT in DuckDB's dialect. Nothing is written, no other file is read.

    The views are lines (every line) and sessions (those of session_closed), as in

    triptych logs sql 'SELECT engine, count(*), max(duration_us) FROM sessions GROUP BY ALL' *.log
    """
    check(query)
    with open_logs(files) as logs:
        close_off(logs)
        try:
            answer = logs.sql.execute(query)
            columns = [(name, str(kind)) for name, kind, *_ in answer.description or ()]
            rows = _rows(answer)
            if form == "json":
                _print_json([name for name, _ in columns], rows)
            elif form == "csv":
                out = csv.writer(sys.stdout, lineterminator="\n")
                out.writerow([name for name, _ in columns])
                out.writerows(rows)
            else:
                _print_table(columns, rows)
        except duckdb.Error as error:
            raise click.UsageError(_one_line(error)) from error


def check(query: str) -> None:
    """click.UsageError, unless the query is one statement that only selects."""
    try:
        statements = duckdb.extract_statements(query)
    except duckdb.Error as error:
        raise click.UsageError(_one_line(error)) from error
    if [statement.type for statement in statements] != [duckdb.StatementType.SELECT]:
        raise click.UsageError("QUERY must be one SELECT: this command only reads")


def close_off(logs: Logs) -> None:
    """From now on the connection reads these logs and nothing else."""
    paths = [source.path for source in logs.packed]
    logs.sql.execute("SET allowed_paths = ?", [paths])
    for setting in READ_ONLY:
        logs.sql.execute(setting)


def _one_line(error: duckdb.Error) -> str:
    """DuckDB's message, without the query and an arrow below it."""
    return printable(" ".join(str(error).partition("\nLINE ")[0].split()))


def _rows(answer: duckdb.DuckDBPyConnection) -> Iterator[tuple[Any, ...]]:
    while batch := answer.fetchmany(BATCH):
        yield from batch


def _print_json(names: Sequence[str], rows: Iterator[tuple[Any, ...]]) -> None:
    separator = "["
    for row in rows:
        # what JSON has no word for (a date, a decimal) is text
        click.echo(separator + json.dumps(dict(zip(names, row, strict=True)), default=str), nl=False)
        separator = ",\n "
    click.echo("[]" if separator == "[" else "]")


def _print_table(columns: Sequence[tuple[str, str]], rows: Iterator[tuple[Any, ...]]) -> None:
    names = [f">{name}" if kind.partition("(")[0] in NUMBERS else name for name, kind in columns]
    found = table("", *map(printable, names))
    more = False
    for number, row in enumerate(rows):
        more = number == SHOWN
        if more:
            break
        found.add_row(*("" if value is None else printable(str(value)) for value in row))
    console().print(found)
    if more:
        click.echo(f"the first {SHOWN:,} rows; --json or --csv gives all of them", err=True)
