"""Logs as tables: the one way in for everything that asks a log a question.

`open_logs` gives the table `lines`, a row for every line, and `sessions`, the `session_closed` lines
among them, as ibis expressions for DuckDB or Spark. The columns and what they may hold are taken from
the vocabulary's structs, never guessed from the data: a log without one UDP session, or without any
session at all, has the same tables. Beside them stand `at_us` (the timestamp as integer microseconds
since 1970, UTC) and `kind`:

- `known`: a line that the vocabulary allows, or one of a peer's;
- `unknown`: a right envelope around an event that this version does not know, a newer daemon's or a
  comparison's own. It counts as a line of its process and says nothing else;
- `foreign`: torn by a crash, or another program's. It is counted, and `faults` quotes it.

A null field that should not be null makes a line foreign; a nullable field of the wrong kind reads as
null, and a field that this version does not know is ignored.

Lines are parsed once, by DuckDB, into a table of the columns that were asked for, which goes to disk
when memory ends; Parquet is read in place, by either backend. For Spark lines become Parquet first: the
judgement of a line is made in one place, so the backends cannot differ in it.
"""

import functools
import os
import re
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from decimal import Decimal
from pathlib import Path
from typing import Any, cast

import click
import duckdb
import ibis
import ibis.expr.types as ir
from msgspec import Struct, inspect
from rich.progress import Progress, SpinnerColumn, TimeElapsedColumn

from comparisons.logs import sources, spark
from comparisons.logs.show import console, printable
from comparisons.logs.sources import LINE_LIMIT, Source
from services.vocabulary import EVENTS, Envelope

# What DuckDB may hold before it spills. With Python, ibis and the buffers of its JSON reader, which it
# does not count, the process stays below 1 GiB.
MEMORY = "512MB"

# these are read whatever was asked for: without them one line cannot be told from another
ALWAYS = ("kind", "event", "engine", "at_us")

# how ibis calls the types of `schema`
IBIS = {"BIGINT": "int64", "BOOLEAN": "boolean", "VARCHAR": "string"}

QUOTED = 200  # bytes of a line that is not ours


class NotOurs(click.ClickException):
    """Parquet that `logs compact` did not write (sysexits.h: the data are wrong)."""

    exit_code = os.EX_DATAERR


class NoRoom(click.ClickException):
    """Neither memory nor the disk holds what was asked."""

    exit_code = os.EX_OSERR


class Fault(Struct, frozen=True):
    """A line that is not ours: where it is, and how it begins, safe to print."""

    file: str
    line: int
    text: str


class Logs:
    """Open logs. `lines` and `sessions` are ibis tables of the backend that was asked for; `sql` is the
    DuckDB connection, in which they are views.
    """

    def __init__(self, found: Sequence[Source], columns: Sequence[str], scratch: Path) -> None:
        self._found = found
        self._columns = {name: kind for name, kind in schema().items() if name in {*columns, *ALWAYS}}
        self._scratch = scratch
        self.sql = duckdb.connect(config={"temp_directory": str(scratch), "memory_limit": MEMORY})
        self._parsed = any(source.kind != "parquet" for source in found)
        self.packed = [source for source in found if source.kind == "parquet"]
        tables = []
        if self._parsed:
            self._parse()
            tables.append("parsed")
        if self.packed:
            self._open_parquet()
            tables.append("packed")
        chosen = ", ".join(f'"{column}"' for column in self._columns)
        union = " UNION ALL ".join(f"SELECT {chosen} FROM {table}" for table in tables)
        self.sql.execute(f"CREATE VIEW lines AS {union}")
        self.sql.execute(f"CREATE VIEW sessions AS SELECT * FROM lines WHERE {IS_SESSION}")
        self._backend = ibis.duckdb.from_connection(self.sql)
        # unbound: whatever backend is asked has views of these names, and need not be asked for their columns
        types = {name: IBIS[kind] for name, kind in self._columns.items()}
        self.lines: ir.Table = ibis.table(types, name="lines")
        self.sessions: ir.Table = ibis.table(types, name="sessions")

    def use_spark(self, session: Any) -> None:
        """From now on `lines` and `sessions` are Spark's, of this `SparkSession`."""
        # not the links: an executor elsewhere sees the storage and not our scratch folder
        paths = [os.path.realpath(source.path) for source in self.packed]
        if self._parsed:
            paths.append(str(self._scratch / "parsed.parquet"))
            self.watched(f"COPY parsed TO '{paths[-1]}' (FORMAT parquet)")
        # Spark takes a path for a pattern
        escaped = [re.sub(r"([\\\[\]{}*?])", r"\\\1", path) for path in paths]
        session.read.option("mergeSchema", "true").parquet(*escaped).createOrReplaceTempView("unpacked")
        self._backend = ibis.pyspark.connect(session)
        raw = self._backend.table("unpacked")
        whole = raw.select(
            **{
                name: raw[name] if name in raw.columns else ibis.null(IBIS[kind])
                for name, kind in self._columns.items()
            }
        )
        self._backend.create_view("lines", whole, overwrite=True)
        self._backend.raw_sql(
            f"CREATE OR REPLACE TEMPORARY VIEW sessions AS SELECT * FROM lines WHERE {IS_SESSION}"
        )

    def rows(self, expression: ir.Table) -> list[dict[str, Any]]:
        """What the expression gives, as plain Python values; a decimal is a whole number that may leave 64 bits."""
        result = self._backend.raw_sql(self._backend.compile(expression))
        rows = result.fetchall() if isinstance(result, duckdb.DuckDBPyConnection) else result.collect()
        return [
            {
                name: int(value) if isinstance(value, Decimal) else value
                for name, value in zip(expression.columns, row, strict=True)
            }
            for row in rows
        ]

    def total(self, column: ir.IntegerValue, where: ir.BooleanValue | None = None) -> ir.NumericScalar:
        """A sum that may leave 64 bits, which DuckDB's do by themselves and Spark's are an error for."""
        wide = column if self._backend.name == "duckdb" else column.cast("decimal(38, 0)")
        return wide.sum(where=where)

    def faults(self, most: int) -> list[Fault]:
        """The first `most` lines that are not ours, of each file in its order."""
        found: list[Fault] = []
        for source in self._found:
            if source.kind == "lines":
                found += self._torn(source, most - len(found))
        if self.packed and "text" in self._parquet_columns():
            kept = "SELECT file, line, text FROM unpacked WHERE text IS NOT NULL ORDER BY ALL LIMIT ?"
            found += [Fault(*row) for row in self.sql.execute(kept, [most - len(found)]).fetchall()]
        return found

    def watched(self, statement: str) -> None:
        """Executes a statement that may take long: on a terminal a clock runs meanwhile."""
        # no share of the whole: DuckDB knows none for statements like ours
        columns = (SpinnerColumn(), "reading", TimeElapsedColumn())
        with Progress(
            *columns, console=console(stderr=True), transient=True, disable=not sys.stderr.isatty()
        ) as clock:
            clock.add_task("")
            self.sql.execute(statement)

    def _parse(self) -> None:
        """Makes the table `parsed`; a file that DuckDB gives up is copied into one that it takes."""
        chosen = ", ".join(f'"{column}"' for column in self._columns)
        # rows may come in any order, which lets two threads write at once
        self.sql.execute("SET preserve_insertion_order = false")
        statement = (
            f"CREATE TABLE parsed AS SELECT {chosen}, if(kind = 'foreign', filename, NULL) AS filename FROM "
        )
        try:
            self.watched(f"{statement}({self._judged(whole=True)})")
        except duckdb.Error:
            # somewhere in these files is a line that is no JSON, or of other types
            try:
                self.watched(f"{statement}({self._judged()})")
            except (duckdb.InvalidInputException, duckdb.IOException):
                # a line that is too long, or an archive that is torn in its middle
                self._found = [
                    sources.mend(source) if source.kind == "lines" else source for source in self._found
                ]
                self.watched(f"{statement}({self._judged()})")
        self.sql.execute("SET preserve_insertion_order = true")

    def _judged(self, *, whole: bool = False) -> str:
        parts = []
        if ours := [source.path for source in self._found if source.kind == "lines"]:
            parts.append(f"SELECT *, {KIND} AS kind FROM ({transformed(ours, whole=whole)})")
        if peers := [source.path for source in self._found if source.kind == "peer"]:
            parts.append(f"SELECT *, 'known' AS kind FROM ({transformed(peers)})")
        return " UNION ALL BY NAME ".join(parts)

    def _torn(self, source: Source, most: int) -> list[Fault]:
        # for files that have none, which is nearly all, nothing is read again
        [(torn,)] = self.sql.execute(
            "SELECT count(*) FROM parsed WHERE filename = ?", [source.path]
        ).fetchall()
        wanted = (
            []
            if not torn or not most
            else self.sql.execute(
                "SELECT row FROM (SELECT row_number() OVER () AS row, kind FROM "
                f"(SELECT {KIND} AS kind FROM ({transformed([source.path])}))) "
                "WHERE kind = 'foreign' ORDER BY row LIMIT ?",
                [most],
            ).fetchall()
        )
        found: list[Fault] = []
        row = 0
        with Path(source.path).open("rb") as file:
            for number, line in enumerate(sources.lines(file), 1):
                if len(found) == len(wanted):
                    break
                # an editor numbers blank lines, DuckDB does not
                row += bool(line.strip(b" \t\r\n"))
                if wanted[len(found)] == (row,):
                    text = line[:QUOTED].rstrip(b"\r\n").decode(errors="backslashreplace")
                    found.append(Fault(printable(source.name), number, printable(text)))
        return found

    def _open_parquet(self) -> None:
        names = ", ".join(quoted(source.path) for source in self.packed)
        try:
            self.sql.execute(
                f"CREATE VIEW unpacked AS SELECT * FROM "
                f"read_parquet([{names}], union_by_name = true, hive_partitioning = false)"
            )
            there = self._parquet_columns()
        except duckdb.Error as error:
            raise NotOurs(f"{self._packed_names()}: {str(error).splitlines()[0]}") from error
        known = schema()
        if wrong := [name for name in ALWAYS if name not in there] or [
            name for name, kind in there.items() if name in known and kind != known[name]
        ]:
            raise NotOurs(
                f"{self._packed_names()}: no Parquet of `triptych logs compact`: column {wrong[0]}; name its folder"
            )
        columns = ", ".join(
            f'"{name}"' if name in there else f'NULL::{kind} AS "{name}"'
            for name, kind in self._columns.items()
        )
        self.sql.execute(f"CREATE VIEW packed AS SELECT {columns} FROM unpacked")

    def _parquet_columns(self) -> dict[str, str]:
        return {name: kind for name, kind, *_ in self.sql.execute("DESCRIBE unpacked").fetchall()}

    def _packed_names(self) -> str:
        first, *others = [printable(source.name) for source in self.packed]
        return f"{first} and {len(others)} more" if others else first


@contextmanager
def open_logs(
    names: Sequence[str],
    columns: Sequence[str] | None = None,
    backend: str = "duckdb",
    master: str | None = None,
) -> Iterator[Logs]:
    """The logs of these names (`sources.py` says what a name may be), with these columns, or all of them.

    `backend` is duckdb or spark, `master` Spark's. A click exception, in one line, for what cannot be read.
    """
    if master is not None and backend != "spark":
        raise click.UsageError("--master is Spark's; add --backend spark")
    with ExitStack() as stack:
        scratch = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-logs-")))
        found = sources.find(names, scratch)
        try:
            logs = Logs(found, tuple(schema()) if columns is None else columns, scratch)
            stack.enter_context(logs.sql)
            if backend == "spark":
                logs.use_spark(stack.enter_context(spark.session(master, scratch)))
            yield logs
        except RuntimeError as error:
            # what DuckDB makes of Ctrl-C
            if str(error) == "Query interrupted":
                raise click.Abort from error
            raise
        except (duckdb.OutOfMemoryException, duckdb.IOException) as error:
            raise NoRoom(f"{str(error).splitlines()[0]}; set TMPDIR to a folder with more room") from error


@functools.cache
def schema() -> dict[str, str]:
    """The columns of `lines` and their types in SQL."""
    types = {"kind": "VARCHAR", "at_us": "BIGINT", "event": "VARCHAR"}
    structs: tuple[type[Struct], ...] = (Envelope, *EVENTS)
    for struct in structs:
        types |= {field.encode_name: _type(field.type) for field in _fields(struct)}
    return types


def transformed(paths: Sequence[str], *, whole: bool = False) -> str:
    """SQL that reads the fields of these files' lines; of a line that is no JSON object all are null.

    `whole` is for files of nothing but JSON objects with the right types, as nearly all are, and takes two
    thirds of the time; for others it is an error.
    """
    fields = {name: kind for name, kind in schema().items() if name not in {"kind", "at_us"}}
    structure = ", ".join(f"\"{name}\": '{kind}'" for name, kind in fields.items())
    options = f"[{', '.join(map(quoted, paths))}], filename = true, maximum_object_size = {LINE_LIMIT}"
    if whole:
        read = f"SELECT * FROM read_ndjson({options}, columns = {{{structure}}})"
    else:
        # not read_ndjson that ignores errors: where a line is torn behind a colon, that takes the next line
        # with it, unseen (DuckDB 1.5)
        structure = structure.replace("'", '"')
        read = (
            f"SELECT filename, unnest(json_transform(json, '{{{structure}}}')) "
            f"FROM read_ndjson_objects({options}, ignore_errors = true)"
        )
    return f"SELECT *, epoch_us(TRY_CAST(timestamp AS TIMESTAMP)) AS at_us FROM ({read})"


def quoted(path: str) -> str:
    return "'" + path.replace("'", "''") + "'"


def _kind() -> str:
    envelope = " AND ".join(_condition(field.encode_name, field.type) for field in _fields(Envelope))
    cases = ""
    for event in EVENTS:
        allowed = [_condition(field.encode_name, field.type) for field in _fields(event)]
        cases += f"WHEN '{event.NAME}' THEN if({' AND '.join(allowed) or 'true'}, 'known', 'foreign') "
    # the name of an event that we do not know is shown
    unknown = f"if(regexp_full_match(event, '{EVENT}'), 'unknown', 'foreign')"
    return (
        f"if(coalesce(at_us IS NOT NULL AND {envelope}, false), "
        f"coalesce(CASE event {cases} ELSE {unknown} END, 'foreign'), 'foreign')"
    )


def _fields(struct: type[Struct]) -> tuple[inspect.Field, ...]:
    return cast("inspect.StructType", inspect.type_info(struct)).fields


def _type(kind: inspect.Type) -> str:
    match kind:
        case inspect.UnionType(types=(some, *_)):
            return _type(some)
        case inspect.IntType() | inspect.LiteralType(values=(int(), *_)):
            return "BIGINT"
        case inspect.BoolType():
            return "BOOLEAN"
    return "VARCHAR"


def _condition(column: str, kind: inspect.Type) -> str:
    """SQL for "the column holds what the vocabulary allows"; null instead of false for a null."""
    match kind:
        case inspect.UnionType(types=(some, inspect.NoneType())):
            return f"({column} IS NULL OR {_condition(column, some)})"
        case inspect.LiteralType(values=values):
            return f"{column} IN ({', '.join(repr(value) for value in values)})"
        case inspect.StrType(pattern=str(pattern)):
            return f"regexp_full_match({column}, '{pattern}')"
        case inspect.IntType(ge=int(least)):
            return f"{column} >= {least}"
    return f"{column} IS NOT NULL"


IS_SESSION = "kind = 'known' AND event = 'session_closed'"
EVENT = "[a-z][a-z0-9_]{0,60}"
KIND = _kind()
