"""`triptych logs diff`: are two sides of a log different, by how much, and does it matter.

The sides are groups of sessions in the same logs (engine against engine), or the same group in two sets of
logs (before against after). The statistics are those of `triptych split` (`comparisons/effects.py`): the
typical difference and that of three percentiles for every metric of the log, with 95 % intervals, and a
verdict that holds for all of them together.

What this cannot do is say why. `split` deals the sessions of one port at random, so there nothing differs
but the engine; in any other log the sides may also have had other clients, another hour or another
machine, and a difference is one of all that. There is no control either: the tolerance of a metric alone
decides what is too small to matter.

Sessions that the operator or a drain cut say nothing of their engine and are left out. Of more than `MOST`
sessions a side, so many are compared that their ids choose: 80 bits of an id are random, so that is a
sample by chance, and the same one each time.
"""

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import groupby, pairwise
from typing import Any, NamedTuple

import click
import ibis
import msgspec
import numpy as np

from comparisons.effects import THROUGHPUT, TIMERS, Finding, Sample, compare
from comparisons.logs.options import log_files
from comparisons.logs.reader import Logs, open_logs
from comparisons.logs.show import console, printable
from comparisons.sidebyside import tables

SIDES = ("engine", "instance", "upstream")
# p99 has 300 of them beyond it, and two such sides are compared in a second
MOST = 30_000
# so many characters of a session's id are chance alone (services/core/record.py)
CHANCE = 10
WIDTH = 110
MEASURED = tuple(metric.name for metric in TIMERS)
SUMS = ("bytes_c2s", "bytes_s2c")
PROCESS = ("engine", "instance", "pid", "worker")
COLUMNS = (*SIDES, *PROCESS, *MEASURED, *SUMS, "session", "state", "termination", "seq", "closed", "cpu_us")


class Side(msgspec.Struct, frozen=True, kw_only=True):
    """So many `sessions` are in its logs, and `compared` of them are in the sample."""

    name: str
    sessions: int
    compared: int


class Comparison(msgspec.Struct, frozen=True, kw_only=True):
    """Sides against a `base`. Amounts of the findings are in microseconds, bytes a second, or shares of 1."""

    base: Side
    others: list[Side]
    findings: list[Finding]


class Difference(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints: version 1 of that format."""

    version: int = 1
    by: str
    files: list[str]
    against: list[str]
    comparisons: list[Comparison]


class Sampled(NamedTuple):
    sessions: int
    compared: int
    sample: Sample


@click.command(name="diff")
@log_files
@click.option("--by", type=click.Choice(SIDES), default="engine", show_default=True, help="What a side is.")
@click.option("--base", metavar="NAME", help="The side that the others are set against; the first by name.")
@click.option(
    "--against",
    metavar="FILE",
    multiple=True,
    help="Logs from before: each side is set against itself there. Repeatable.",
)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(
    files: tuple[str, ...],
    backend: str,
    master: str | None,
    by: str,
    base: str | None,
    against: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compare the engines in these logs, or these logs with those from before.

    \b
    triptych logs diff access.log*                         engine against engine
    triptych logs diff after.log --against before.log      each engine, before against after
    """  # noqa: D301  \b keeps click from joining the lines
    if against and base:
        raise click.UsageError("--base and --against are two ways to say what the base is; give one of them")
    sides = _sides(files, by, backend, master)
    if against:
        before = _sides(against, by, backend, master)
        comparisons = [
            _compare({f"{name} before": before[name], name: sides[name]})
            for name in sorted(sides.keys() & before.keys())
        ]
        if not comparisons:
            raise click.UsageError(
                f"no {by} has sessions in both: {_names(sides)} here, {_names(before)} in --against"
            )
    else:
        if len(sides) < 2:
            raise click.UsageError(
                f"two sides are needed, and {_names(sides)} is all that has sessions here by {by}; "
                "name other logs with --against, or another --by"
            )
        first = base or min(sides)
        if first not in sides:
            raise click.UsageError(f"--base: {first!r} is none of {_names(sides)}")
        comparisons = [_compare({first: sides.pop(first), **dict(sorted(sides.items()))})]
    found = Difference(by=by, files=list(files), against=list(against), comparisons=comparisons)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        _show(found)


def _names(sides: Mapping[str, Sampled]) -> str:
    return ", ".join(map(printable, sorted(sides))) or "nothing"


def _compare(sides: Mapping[str, Sampled]) -> Comparison:
    base, *others = [
        Side(name=name, sessions=sampled.sessions, compared=sampled.compared)
        for name, sampled in sides.items()
    ]
    samples = {name: sampled.sample for name, sampled in sides.items()}
    return Comparison(base=base, others=others, findings=compare(samples.pop(base.name), samples))


def _sides(files: Sequence[str], by: str, backend: str, master: str | None) -> dict[str, Sampled]:
    """The sides that have sessions in these logs, by their names."""
    with open_logs(files, COLUMNS, backend, master) as logs:
        named = logs.sessions.mutate(side=logs.sessions[by].fill_null("-"))
        named = named.filter(~named.termination.fill_null("--").startswith("K"))
        # a peer's ids are not ours; the last digits of a time are chance as well
        order = (named.session.right(CHANCE), named.at_us % 1_000_003, named.duration_us)
        side = ibis.window(group_by="side")
        ranked = named.mutate(
            sessions=named.count().over(side),
            place=ibis.row_number().over(ibis.window(group_by="side", order_by=order)),
        )
        chosen = ranked.filter(ranked.place < MOST).order_by("side", "at_us", "session")
        spent = _spent(logs, by)
        return {
            name: _sampled(list(rows), spent.get(name, []))
            for name, rows in groupby(
                logs.rows(chosen.select("side", "sessions", "state", *MEASURED, *SUMS)),
                key=lambda row: str(row["side"]),
            )
        }


def _sampled(rows: Sequence[dict[str, Any]], spent: Sequence[tuple[int, int]]) -> Sampled:
    """`rows` are sessions in the order in which they ended."""
    values = {name: [row[name] for row in rows if row[name] is not None] for name in MEASURED}
    values[THROUGHPUT.name] = [
        moved * 1_000_000 // max(row["duration_us"], 1)
        for row in rows
        # HAProxy does not tell what came from the client
        if None not in (row["bytes_c2s"], row["bytes_s2c"]) and (moved := row["bytes_c2s"] + row["bytes_s2c"])
    ]
    return Sampled(
        rows[0]["sessions"],
        len(rows),
        Sample(
            values={name: np.array(each, np.int64) for name, each in values.items()},
            resets=np.array([row["state"].startswith("RST") for row in rows if row["state"]], np.int64),
            cpu=np.array(spent, np.int64).reshape(-1, 2),
        ),
    )


def _spent(logs: Logs, by: str) -> dict[str, list[tuple[int, int]]]:
    """CPU time and sessions from one `engine_stats` line of a process to its next one, by side: what
    starting cost is not in it, and of an upstream it is not known.
    """
    if by not in PROCESS:
        return {}
    lines = logs.lines
    told = lines.filter((lines.kind == "known") & (lines.event == "engine_stats") & lines.cpu_us.notnull())
    spent = defaultdict(list)
    rows = logs.rows(
        told.select(*PROCESS, "at_us", "seq", "closed", "cpu_us").order_by(*PROCESS, "at_us", "seq")
    )
    for _, of_process in groupby(rows, key=lambda row: [row[name] for name in PROCESS]):
        for before, row in pairwise(of_process):
            # another run under the same pid begins again
            if row["seq"] > before["seq"]:
                amount = row["cpu_us"] - before["cpu_us"], row["closed"] - before["closed"]
                spent[row[by]].append(amount)
    return spent


def _show(found: Difference) -> None:
    out = console()
    # narrower, and the verdicts would be cut off
    out.width = max(out.width, WIDTH)
    for comparison in found.comparisons:
        for side in (comparison.base, *comparison.others):
            some = f", {side.compared:,} of them compared" if side.compared < side.sessions else ""
            out.print(f"{printable(side.name)}: {side.sessions:,} sessions{some}")
        out.print("", tables.findings(printable(comparison.base.name), comparison.findings), "")
