"""`triptych logs export`: our log in the formats that other tools read.

Parquet, CSV, Zeek's conn.log (JSON) and HAProxy's tcplog hold a row for every session: they have no
place for anything else. The Elastic Common Schema and OpenTelemetry (OTLP's JSON, a record a line, as the
collector's file receiver reads it) hold every line of ours. `fields.py` says which field becomes what.

A session that a format cannot express is left out and counted on stderr: Zeek knows no UNIX sockets,
and HAProxy's tcplog no datagrams.
"""

import shutil
import sys
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO, Any

import click
import msgspec
from rich.progress import Progress

from comparisons.logs.fields import FIELDS, LISTS, OTEL_RECORD, OTEL_RESOURCE, SESSION_FIELDS
from comparisons.logs.peers import to_haproxy
from comparisons.logs.reader import Logs, open_logs, quoted, schema
from comparisons.logs.show import console

Row = dict[str, Any]
# None: this format has no place for the row
Writer = Callable[[Row], bytes | None]

# rows in memory at a time
BATCH = 5_000

NANOSECONDS = 1_000
NO_INSTANCE = ("instance", "-")
# as OpenTelemetry numbers them
SEVERITY = {"debug": 5, "info": 9, "warning": 13, "error": 17}
# ECS: what a line of a session is, by the event's allowed values
CONNECTION = {
    "session_opened": ["connection", "start"],
    "session_progress": ["connection", "info"],
    "session_closed": ["connection", "end"],
    "session_refused": ["connection", "denied"],
}
ENCODE = msgspec.json.Encoder().encode


def zeek(row: Row) -> bytes | None:
    if row["client_ip"] is None:
        return None
    line = {
        field.zeek: row[name] for name, field in FIELDS.items() if field.zeek and row.get(name) is not None
    }
    line["ts"] = (row["at_us"] - row["duration_us"]) / 1e6
    line["duration"] = row["duration_us"] / 1e6
    return ENCODE(line)


def haproxy(row: Row) -> bytes | None:
    # the log of a Zeek does not tell how it ended
    if row["transport"] == "udp" or row["termination"] is None:
        return None
    # with syslog's header, without which halog reads nothing
    syslog = f"{datetime.fromtimestamp(row['at_us'] // 1_000_000, UTC):%b %d %H:%M:%S} localhost"
    return f"{syslog} haproxy[{row['pid']}]: {to_haproxy(row)}".encode()


def ecs(row: Row) -> bytes:
    line: Row = {
        "@timestamp": row["timestamp"],
        "ecs": {"version": "9.4.0"},
        "service": {"name": "triptych"},
        "event": {"module": "triptych", "dataset": "triptych.log", "kind": "event"},
    }
    for name, value in row.items():
        *parents, last = FIELDS[name].ecs.split(".") if name in FIELDS else [""]
        if value is None or not last or (name, value) == NO_INSTANCE:
            continue
        place = line
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = msgspec.Raw(value.encode()) if (row["event"], name) in LISTS else value
    event = line["event"]
    if kinds := CONNECTION.get(row["event"]):
        event |= {"category": ["network"], "type": kinds}
    if "duration" in event:
        event["duration"] *= NANOSECONDS
    if row["event"] == "session_closed":
        outcomes = {"--": "success", None: "unknown"}
        event["outcome"] = outcomes.get(row["termination"], "failure")
    return ENCODE(line)


def otel(row: Row) -> bytes:
    resource = [_attribute("service.name", "triptych")]
    attributes: list[Row] = []
    for name, value in row.items():
        called = FIELDS[name].otel if name in FIELDS else ""
        if value is None or not called or called in OTEL_RECORD or (name, value) == NO_INSTANCE:
            continue
        if (row["event"], name) in LISTS:
            value = msgspec.json.decode(value)  # noqa: PLW2901  the same value, as the list that it is
        (resource if called in OTEL_RESOURCE else attributes).append(_attribute(called, value))
    record = {
        "timeUnixNano": str(row["at_us"] * NANOSECONDS),
        "severityNumber": SEVERITY[row["level"]],
        "severityText": row["level"],
        "eventName": f"triptych.{row['event']}",
        "attributes": attributes,
    }
    return ENCODE(
        {
            "resourceLogs": [
                {
                    "resource": {"attributes": resource},
                    "scopeLogs": [{"scope": {"name": "triptych"}, "logRecords": [record]}],
                }
            ]
        }
    )


def _attribute(name: str, value: Any) -> Row:
    return {"key": name, "value": _any_value(value)}


def _any_value(value: Any) -> Row:
    match value:
        case bool():
            return {"boolValue": value}
        case int():
            # JSON of protocol buffers: 64 bits are text
            return {"intValue": str(value)}
        case list():
            return {"arrayValue": {"values": [_any_value(each) for each in value]}}
    return {"stringValue": value}


# format: how a row is written, and the view that its rows are in
LINES: dict[str, tuple[Writer, str]] = {
    "zeek": (zeek, "sessions"),
    "haproxy": (haproxy, "sessions"),
    "ecs": (ecs, "lines"),
    "otel": (otel, "lines"),
}
SESSIONS = ", ".join(f'"{name}"' for name in SESSION_FIELDS)
# how DuckDB writes it, and its columns: Parquet has those that our own commands need to read it
TABLES = {
    "parquet": ("FORMAT parquet, COMPRESSION zstd", f"kind, at_us, {SESSIONS}"),
    "csv": ("FORMAT csv, HEADER true", SESSIONS),
}
# the lines of several processes come out in one order
ORDER = "ORDER BY at_us, engine, pid, worker, seq, session"


@click.command(name="export")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--to", "form", type=click.Choice([*TABLES, *LINES]), required=True)
@click.option("-o", "--output", metavar="OUT", default="-", help="A file instead of stdout.")
def command(files: tuple[str, ...], form: str, output: str) -> None:
    """Write the log as another tool's.

    parquet, csv, zeek (conn.log as JSON) and haproxy (tcplog) get a row for every session; ecs (Elastic
    Common Schema) and otel (OpenTelemetry, OTLP as JSON) every line.
    """
    if form == "parquet" and output == "-" and sys.stdout.isatty():
        raise click.UsageError("Parquet is not for a terminal; name a file with -o")
    with (
        open_logs(files, None if form in {"ecs", "otel"} else SESSION_FIELDS) as logs,
        click.open_file(output, "wb", atomic=True) as out,
    ):
        if form in TABLES:
            _write_table(logs, form, out)
        else:
            left_out = _write_lines(logs, form, out)
            if left_out:
                click.echo(f"left out: {left_out:,} sessions that {form} cannot express", err=True)


def _write_table(logs: Logs, form: str, out: IO[bytes]) -> None:
    how, columns = TABLES[form]
    with TemporaryDirectory(prefix="triptych-export-") as scratch:
        # where stdout may be written as well
        path = Path(scratch) / "table"
        logs.watched(f"COPY (SELECT {columns} FROM sessions {ORDER}) TO {quoted(str(path))} ({how})")
        with path.open("rb") as made:
            shutil.copyfileobj(made, out)


def _write_lines(logs: Logs, form: str, out: IO[bytes]) -> int:
    """Writes the rows as lines; how many were left out."""
    write, view = LINES[form]
    names: Sequence[str] = (
        SESSION_FIELDS if view == "sessions" else [name for name in schema() if name in FIELDS]
    )
    names = ["at_us", *names]
    columns = ", ".join(f'"{name}"' for name in names)
    [(rows,)] = logs.sql.execute(f"SELECT count(*) FROM {view} WHERE kind = 'known'").fetchall()
    found = logs.sql.execute(f"SELECT {columns} FROM {view} WHERE kind = 'known' {ORDER}")
    left_out = 0
    with Progress(console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("writing", total=rows)
        while batch := found.fetchmany(BATCH):
            lines = [write(dict(zip(names, row, strict=True))) for row in batch]
            left_out += lines.count(None)
            out.writelines(line + b"\n" for line in lines if line is not None)
            bar.advance(task, len(batch))
    return left_out
