"""Log files as tables: the one way in for everything that asks a log a question.

`open_logs` gives a DuckDB connection with two views. `lines` has a row for every line of the
files, `ours` telling whether it is one that the vocabulary allows; `sessions` has the
`session_closed` lines among them. The columns and what they may hold are taken from the
vocabulary's structs, never guessed from the data: a log without one UDP session, or without
any session at all, has the same tables.

A line that is not ours (torn by a crash, or another program's in the same file) is a row with
`ours` false and nowhere else. It is counted, and `Logs.faults` quotes it. A null field that
should not be null makes a line not ours; a nullable field of the wrong kind reads as null.
The views read the files anew for every query: nothing is kept that was not asked for.

What `journalctl -o json` writes is read as well, mixed with files or not.
"""

import os
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, cast

import click
import duckdb
from msgspec import Struct, inspect

from services.vocabulary import EVENTS, Envelope

# Our longest line is an engine_fault with its traceback, a few KiB. DuckDB gives up a whole file
# for one line much longer than this, so such a line is cut, which makes it a torn one.
LINE_LIMIT = 1 << 20


# What `journalctl -o json` writes is a line of journald's with ours inside, as text; what others told the
# journal is no JSON, and stays what it is: not ours.
FROM_JOURNAL = (
    "TRY_CAST(CASE WHEN json ->> '__REALTIME_TIMESTAMP' IS NOT NULL THEN json ->> 'MESSAGE' END AS JSON)"
)


class Fault(Struct, frozen=True):
    """A line that is not ours: where it is, and how it begins, safe to print."""

    file: str
    line: int
    text: str


class Logs:
    """The connection with the views, `sql`, and what no view can tell.

    `files` maps the paths that DuckDB reads to the names that the caller gave.
    """

    def __init__(self, files: dict[str, str], scratch: str) -> None:
        self._files = files
        self.sql = duckdb.connect(config={"temp_directory": scratch})
        names = ", ".join("'" + path.replace("'", "''") + "'" for path in files)
        # not read_ndjson with columns: where a line is torn behind a colon, that takes the next line
        # with it, unseen (DuckDB 1.5)
        self.sql.execute(
            f"CREATE VIEW raw AS SELECT filename, coalesce({FROM_JOURNAL}, json) AS json "  # noqa: S608 -- our own names
            f"FROM read_ndjson_objects([{names}], "
            f"filename = true, ignore_errors = true, maximum_object_size = {LINE_LIMIT})"
        )
        self.sql.execute(f"CREATE VIEW lines AS {_lines()}")
        self.sql.execute(
            "CREATE VIEW sessions AS SELECT * EXCLUDE (filename, ours) FROM lines "
            "WHERE ours AND event = 'session_closed'"
        )

    def faults(self, most: int) -> list[Fault]:
        """The first `most` lines that are not ours."""
        found: list[Fault] = []
        for path, name in self._files.items():
            wanted = self.sql.execute(
                "SELECT row FROM (SELECT row_number() OVER () AS row, ours FROM lines WHERE filename = ?) "
                "WHERE NOT ours ORDER BY row LIMIT ?",
                [path, most - len(found)],
            ).fetchall()
            row = 0
            with Path(path).open("rb") as file:
                for number, line in enumerate(file, 1):
                    if not wanted:
                        break
                    # an editor numbers blank lines, DuckDB does not
                    row += bool(line.strip(b" \t\r\n"))
                    if wanted[0] == (row,):
                        del wanted[0]
                        text = line[:200].rstrip(b"\r\n").decode(errors="backslashreplace")
                        found.append(Fault(printable(name), number, printable(text)))
        return found


@contextmanager
def open_logs(names: Sequence[str]) -> Iterator[Logs]:
    """The logs in these files; `-` is standard input. OSError if one cannot be read."""
    with tempfile.TemporaryDirectory(prefix="triptych-logs-") as scratch:
        # names of our own, because DuckDB takes some file names for patterns or URLs
        files = {str(Path(scratch, f"{n}.log")): name for n, name in enumerate(dict.fromkeys(names))}
        for path, name in files.items():
            with click.open_file(name, "rb") as file:
                if name != "-" and stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    Path(path).symlink_to(Path(name).absolute())
                else:
                    # a pipe can be read once, the views read their files for every query
                    _copy(file, path)
        logs = Logs(files, scratch)
        with logs.sql:
            try:
                logs.sql.execute("SELECT count(*) FROM raw").fetchone()
            except duckdb.InvalidInputException:  # a line that is too long
                for path in files:
                    with Path(path).open("rb") as file:
                        Path(path).unlink()
                        _copy(file, path)
            yield logs


def printable(text: str) -> str:
    """`text` with everything that could act on a terminal written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)


def _copy(file: IO[bytes], path: str) -> None:
    with Path(path).open("wb") as copy:
        at_start = True
        while part := file.readline(LINE_LIMIT):
            ends = part.endswith(b"\n")
            if at_start:
                copy.write(part if ends else part + b"\n")
            at_start = ends


def _lines() -> str:
    types = {"event": "VARCHAR"}
    cases = ""
    for event in EVENTS:
        fields = (*_fields(Envelope), *_fields(event))
        types |= {field.encode_name: _type(field.type) for field in fields}
        allowed = " AND ".join(_condition(field.encode_name, field.type) for field in fields)
        cases += f"WHEN '{event.NAME}' THEN {allowed} "
    structure = ", ".join(f'"{name}": "{kind}"' for name, kind in types.items())
    return (
        f"SELECT *, coalesce(CASE event {cases} END, false) AS ours "  # noqa: S608 -- our own words
        f"FROM (SELECT filename, unnest(json_transform(json, '{{{structure}}}')) FROM raw)"
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
