"""`triptych logs`: the commands that read the daemons' logs."""

import json
import os
from itertools import groupby

import click
import msgspec
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from comparisons.logs.reader import printable
from comparisons.logs.summary import TIMERS, Summary, summarize

AMOUNT_NAMES = {
    "bytes_c2s": "bytes from clients",
    "bytes_s2c": "bytes to clients",
    "datagrams_c2s": "datagrams from clients",
    "datagrams_s2c": "datagrams to clients",
}


class Unreadable(click.ClickException):
    """An input that is not there or cannot be read (sysexits.h)."""

    exit_code = os.EX_NOINPUT


@click.group(name="logs")
def group() -> None:
    """Read the daemons' logs: what happened, by engine."""


@group.command()
@click.argument("files", metavar="FILE...", nargs=-1, required=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def summary(files: tuple[str, ...], as_json: bool) -> None:
    """How many sessions, how they ended, how long everything took.

    FILE is a log of JSON lines as the daemons write it, - is standard input.
    """
    try:
        found = summarize(files)
    except OSError as error:
        raise Unreadable(
            f"{printable(str(error.filename))}: {error.strerror}; name a log that can be read, or - for stdin"
        ) from error
    if as_json:
        # not msgspec's encoder: sums may go beyond 64 bits
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        _print(found)


def duration(microseconds: int) -> str:
    """Three digits and a unit: 950 µs, 1.23 ms, 45.6 s."""
    # halves of the last digit that is shown, so that nothing becomes 1000 µs by rounding
    if microseconds < 999.5:
        return f"{microseconds} µs"
    unit, amount = ("ms", microseconds / 1e3) if microseconds < 999_500 else ("s", microseconds / 1e6)
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:,.{digits}f} {unit}"


def _print(found: Summary) -> None:
    console = Console(markup=False, highlight=False, emoji=False)
    missing = [process for process in found.processes if process.missing]
    console.print(
        f"{found.lines:,} lines read, {found.foreign:,} of them not ours; "
        f"{sum(process.missing for process in missing):,} missing"
    )
    if found.first:
        console.print(f"from {found.first} to {found.last}")
    unclosed = f"; {found.unclosed:,} more began and did not end in these files" if found.unclosed else ""
    sessions = f"{found.sessions:,} sessions" if found.sessions else "no session"
    console.print(f"{sessions}{unclosed}")

    if found.engines:
        _print_engines(console, found)
    if missing:
        table = _table("Lines missing, by the gaps in seq", "engine", ">pid", ">worker", ">read", ">missing")
        for process in missing:
            numbers = (process.pid, process.worker, f"{process.lines:,}", f"{process.missing:,}")
            table.add_row(process.engine, *map(str, numbers))
        console.print("", table)
    if found.faults:
        console.print("\nNot ours: torn, or another program's")
        for file, faults in groupby(found.faults, key=lambda fault: fault.file):
            console.print(f"  {file}", soft_wrap=True)
            for fault in faults:
                console.print(f"    {fault.line}: {fault.text}", no_wrap=True, overflow="ellipsis")
        if found.foreign > len(found.faults):
            console.print(f"  and {found.foreign - len(found.faults):,} more")


def _print_engines(console: Console, found: Summary) -> None:
    engines = [f">{engine.engine}" for engine in found.engines]
    table = _table("Sessions", "", *engines)
    for what, name in (("sessions", "sessions"), ("refused", "refused clients"), *AMOUNT_NAMES.items()):
        values = [getattr(engine, what) for engine in found.engines]
        if any(value is not None for value in values):
            table.add_row(name, *("-" if value is None else f"{value:,}" for value in values))
    console.print("", table)

    table = _table("How they ended", "state", "termination", *engines)
    counts: dict[tuple[str, str], dict[str, int]] = {}
    for engine in found.engines:
        for ending in engine.endings:
            counts.setdefault((ending.state, ending.termination), {})[engine.engine] = ending.sessions
    for how, by_engine in sorted(counts.items(), key=lambda item: -sum(item[1].values())):
        table.add_row(*how, *(f"{by_engine.get(engine.engine, 0):,}" for engine in found.engines))
    console.print("", table)

    table = _table("How long it took", "timer", "engine", ">sessions", ">p50", ">p90", ">p99")
    unseen = []
    for timer in TIMERS:
        name = timer.removesuffix("_us")
        rows = [(engine.engine, engine.timers[timer]) for engine in found.engines if timer in engine.timers]
        for number, (engine_name, times) in enumerate(rows):
            table.add_row(
                "" if number else name,
                engine_name,
                f"{times.sessions:,}",
                *(duration(value) for value in (times.p50, times.p90, times.p99)),
                end_section=number == len(rows) - 1 > 0,
            )
        if not rows:
            unseen.append(name)
    console.print("", table)
    if unseen:
        console.print(f"in no session, or not to be seen: {', '.join(unseen)}")


def _table(title: str, *columns: str) -> Table:
    """A table; the columns whose title begins with > are numbers."""
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for column in columns:
        table.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return table
