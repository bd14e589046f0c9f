"""`triptych logs compact`: lines into Parquet, by day and engine, which every command reads in their place.

A folder holds what one call was given: `date=2026-11-22/engine=twisted/*.parquet` with every column of
`reader.py`, which other tools read as a Hive-partitioned table, and `foreign.parquet` with the beginnings
of the lines that were not ours, so that a summary of the folder counts and shows what a summary of the
lines did. The folder appears when it is whole; one that exists is left alone, because a line that is
written twice is counted twice. A fleet has a folder of each host and day, and names them by a pattern.
"""

import shutil
from collections.abc import Sequence
from pathlib import Path

import click

from comparisons.logs.reader import Logs, open_logs, quoted
from comparisons.logs.show import printable, size

# rows of a partition that wait in memory until they are written, all columns of them
WAITING = 50_000
# foreign lines that are kept to be shown; of the others only that they were there
KEPT = 1000


@click.command(name="compact")
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option(
    "--to", "folder", type=click.Path(path_type=Path), required=True, metavar="DIR", help="It must not exist."
)
def command(files: tuple[str, ...], folder: Path) -> None:
    """Write logs as Parquet, by day and engine, which is read many times faster.

    FILE is what `triptych logs summary` takes. DIR is then named where files are: triptych logs summary DIR.
    """
    if folder.exists():
        raise click.UsageError(f"--to {printable(str(folder))} exists; name a new folder")
    lines, foreign = compact(files, folder)
    before = f"{lines:,} lines"
    written = sum(part.stat().st_size for part in folder.rglob("*.parquet"))
    click.echo(f"{before}, {foreign:,} of them not ours, in {size(written)}: {printable(str(folder))}")


def compact(files: Sequence[str], folder: Path) -> tuple[int, int]:
    """Writes these logs into a folder that does not exist; how many lines they have, and how many foreign ones."""
    unfinished = folder.with_name(f"{folder.name}.unfinished")
    unfinished.mkdir(parents=True)
    try:
        with open_logs(files) as logs:
            [(lines, foreign)] = logs.sql.execute(
                "SELECT count(*), count(*) FILTER (kind = 'foreign') FROM lines"
            ).fetchall()
            logs.sql.execute(f"SET partitioned_write_flush_threshold = {WAITING}")
            logs.watched(
                "COPY (SELECT *, timestamp[1:10] AS date FROM lines WHERE kind <> 'foreign') "
                f"TO {quoted(str(unfinished))} (FORMAT parquet, COMPRESSION zstd, "
                "PARTITION_BY (date, engine), WRITE_PARTITION_COLUMNS true, OVERWRITE_OR_IGNORE true)"
            )
            _keep_foreign(logs, foreign, unfinished / "foreign.parquet")
        unfinished.rename(folder)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return lines, foreign


def _keep_foreign(logs: Logs, foreign: int, path: Path) -> None:
    faults = [(fault.file, fault.line, fault.text) for fault in logs.faults(min(foreign, KEPT))]
    logs.sql.execute(
        "CREATE TABLE torn (kind VARCHAR DEFAULT 'foreign', event VARCHAR, engine VARCHAR, at_us BIGINT, "
        "file VARCHAR, line BIGINT, text VARCHAR)"
    )
    if faults:
        logs.sql.executemany("INSERT INTO torn (file, line, text) VALUES (?, ?, ?)", faults)
    logs.sql.execute("INSERT INTO torn (file) SELECT NULL FROM range(?)", [foreign - len(faults)])
    logs.sql.execute(f"COPY torn TO {quoted(str(path))} (FORMAT parquet)")
