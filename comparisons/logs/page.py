"""`triptych logs page`: one offline page of a log, the engines (and peers) side by side.

How long everything took, by percentile; when sessions were open, began and ended badly; how they ended, in
words; and a timeline of sessions to zoom into. Everything but the timeline is counted over every session,
in steps and buckets, so the page is no larger for a million of them. The timeline holds a sample that says
what it is: of each engine sessions picked evenly, the longest, and some of those that did not end in order.
"""

import math
from collections.abc import Sequence
from html import escape
from itertools import accumulate
from operator import sub
from pathlib import Path
from typing import Any

import click
import ibis
import ibis.expr.types as ir

from comparisons.logs.options import log_files
from comparisons.logs.quantiles import bucket
from comparisons.logs.reader import Logs, open_logs
from comparisons.logs.show import duration, printable, size
from comparisons.logs.summary import LENGTHS, LONGEST, SECOND, timestamp
from comparisons.report.document import Figure, caption, facts, glance, legend, render

HERE = Path(__file__).parent

# title, and a note
TIMERS = {
    "duration_us": ("Duration", "accept to close"),
    "first_byte_us": ("First byte to the client", "since accept"),
    "connect_us": ("Connect", "the dial to the upstream"),
    "max_gap_us": ("Longest silence", "while relaying"),
    "accept_wait_us": ("Wait for accept", "in the backlog, in the kernel's milliseconds"),
    "loop_lag_us": ("Lag", "how late the engine was with its timers"),
}
DETAILS = (
    "session",
    "client_ip",
    "client_port",
    "listener",
    "upstream",
    "bytes_c2s",
    "bytes_s2c",
    "history",
    "error",
    "faults",
)
ENDING = ("state", "termination", "closed_by")
COLUMNS = (*TIMERS, *DETAILS, *ENDING, "connect_us", "refused")

# points of a curve for each power of ten of sessions, up to 99.999 %
POINTS, POWERS = 24, 5
# steps of the charts over time
STEPS = 180
# sessions of an engine in the timeline: picked evenly, the longest, not in order
EVEN, LONG, BAD = 400, 100, 100

CAUSES = {
    "C": "the client ended it",
    "S": "the upstream ended it",
    "P": "refused by a limit or a list",
    "R": "out of a resource",
    "I": "a fault of ours",
    "D": "the upstream went down",
    "K": "the operator or the drain deadline",
    "c": "the client was silent too long",
    "s": "the upstream was silent too long",
    "-": "in order",
}
PHASES = {
    "Q": "while it chose an upstream",
    "C": "while it connected",
    "D": "while data moved",
    "L": "during the last data after one side's end",
}


@click.command(name="page")
@log_files
@click.option("-o", "--output", metavar="PAGE", default="triptych-logs.html", show_default=True)
def command(files: tuple[str, ...], backend: str, master: str | None, output: str) -> None:
    """Write one offline page that shows the engines side by side.

    FILE is what `triptych logs summary` takes.
    """
    with open_logs(files, COLUMNS, backend, master) as logs:
        page = document(logs, files)
    with click.open_file(output, "w", encoding="utf-8", atomic=True) as out:
        out.write(page)
    if output != "-":
        click.echo(printable(output))


def document(logs: Logs, files: Sequence[str]) -> str:
    sessions = logs.sessions.filter(logs.sessions.duration_us.notnull())
    engines = logs.rows(
        sessions.group_by("engine")
        .aggregate(
            sessions=lambda t: t.count(),
            bad=lambda t: t.kind.count(where=t.termination != "--"),
            c2s=lambda t: t.bytes_c2s.cast("decimal(38, 0)").sum(),
            s2c=lambda t: t.bytes_s2c.cast("decimal(38, 0)").sum(),
            opened=lambda t: (t.at_us - ibis.least(t.duration_us, LONGEST)).min(),
            closed=lambda t: t.at_us.max(),
        )
        .order_by("engine")
    )
    names = [row["engine"] for row in engines]
    head = "<h1>Triptych logs</h1>"
    if not engines:
        return render("Triptych logs", head, "<p class=lead>No session ended in these logs.</p>", {}, "")
    curves = {timer: _curves(logs, sessions, timer) for timer in TIMERS}
    since, until = min(row["opened"] for row in engines), max(row["closed"] for row in engines)
    over_time = _over_time(logs, sessions, since, until)
    sample = {
        row["engine"]: _sample(logs, sessions, row["engine"], row["sessions"], row["bad"]) for row in engines
    }
    total = sum(row["sessions"] for row in engines)
    lead = f"{total:,} sessions of {', '.join(names)}, from {_moment(since)} to {_moment(until)} UTC"
    head += f"<p class=lead>{escape(lead)}</p>{legend(names)}{_glance(engines, curves)}"
    head += facts("What was read", _facts(logs, files))
    body = (
        _section("How long it took", LATENCY, _timers(curves))
        + _section("When", WHEN.format(step=duration(over_time["step_us"])), CHARTS)
        + _section("How they ended", ENDED, _endings(logs, sessions, names))
        + _section("Sessions", _about(sample, total), TIMELINE)
    )
    charts = {
        "engines": names,
        "curves": {timer: found for timer, found in curves.items() if found},
        "time": over_time,
        "sessions": sample,
        "details": [*DETAILS, *ENDING],
    }
    return render("Triptych logs", head, body, charts, (HERE / "page.js").read_text(encoding="utf-8"))


LATENCY = (
    "The share of sessions that took at most so long: both axes are logarithmic, so the slowest thousandth has as "
    "much room as the fast half. Where a line ends, the engine has no more sessions to tell of."
)
WHEN = "Counted over all sessions in steps of {step}. Drag to zoom, double-click to see all."
ENDED = "The letters are HAProxy's: who ended it, and in which phase. The bar is the share of the engine's sessions."
CHARTS = (
    "<div class=plots>"
    + "".join(
        f'<figure class=wide>{caption(title, note)}<div id="{name}" class=plot></div></figure>'
        for name, title, note in (
            ("open", "Open sessions", "at the end of each step"),
            ("opened", "New sessions a second", ""),
            ("bad", "Not in order a second", "ended, other than --"),
        )
    )
    + "</div>"
)
TIMELINE = (
    "<div id=timeline class=timeline></div><p class=about id=hint>Drag or scroll to zoom, double-click to see "
    "all, click a session to read it.</p><dl id=session hidden></dl>"
)


def _section(title: str, about: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2><p class=about>{escape(about)}</p>{content}</section>"


def _moment(at_us: int) -> str:
    return (timestamp(at_us) or "").replace("T", " ")[:-5]


def _facts(logs: Logs, files: Sequence[str]) -> list[tuple[str, str]]:
    lines = logs.lines
    [row] = logs.rows(
        lines.aggregate(
            lines=lines.count(),
            foreign=lines.kind.count(where=lines.kind == "foreign"),
            refused=lines.refused.sum(where=(lines.kind == "known") & (lines.event == "session_refused")),
        )
    )
    return [
        ("files", ", ".join(files)),
        ("lines", f"{row['lines']:,}"),
        ("not ours", f"{row['foreign']:,}"),
        ("refused clients", f"{row['refused'] or 0:,}"),
    ]


def _curves(logs: Logs, sessions: ir.Table, timer: str) -> dict[str, dict[str, Any]]:
    """Of each engine that has this timer its quantiles: `x` is how many nines, 1 for 90 %, `y` microseconds."""
    reached = sessions.filter(sessions[timer].notnull())
    counted = reached.group_by("engine", us=bucket(reached[timer])).aggregate(sessions=lambda t: t.count())
    buckets: dict[str, list[tuple[int, int]]] = {}
    for row in logs.rows(counted.order_by("engine", "us")):
        buckets.setdefault(row["engine"], []).append((row["us"], row["sessions"]))
    return {engine: _curve(found) for engine, found in buckets.items()}


def _curve(buckets: Sequence[tuple[int, int]]) -> dict[str, Any]:
    total = sum(sessions for _, sessions in buckets)
    x, y = [], []
    upto, places = 0, iter(buckets)
    us = 0
    for point in range(POINTS * POWERS + 1):
        nines = round(point / POINTS, 4)
        # the nearest rank; the last one is the largest value
        rank = max(1, math.ceil(total * (1 - 10**-nines) - 1e-6))
        while upto < rank:
            us, sessions = next(places)
            upto += sessions
        x.append(nines)
        y.append(us)
        if total * 10**-nines < 1:
            break
    return {"sessions": total, "x": x, "y": y}


def _quantile(curve: dict[str, Any], nines: float) -> int | None:
    return next((y for x, y in zip(curve["x"], curve["y"], strict=True) if x >= nines), None)


def _over_time(logs: Logs, sessions: ir.Table, since: int, until: int) -> dict[str, Any]:
    step = next(length for length in LENGTHS if (until - since) // length < STEPS)
    start = since - since % step
    steps = (until - start) // step + 1
    moments = sessions.mutate(opened=sessions.at_us - ibis.least(sessions.duration_us, LONGEST))
    bad = moments.filter(moments.termination != "--")
    found: dict[str, dict[str, list[int]]] = {}
    for what, table, moment in (
        ("opened", moments, "opened"),
        ("closed", moments, "at_us"),
        ("bad", bad, "at_us"),
    ):
        at = table[moment] - (table[moment] - start) % step
        for row in logs.rows(table.group_by("engine", at=at).aggregate(sessions=lambda t: t.count())):
            counts = found.setdefault(
                row["engine"], {name: [0] * steps for name in ("opened", "closed", "bad")}
            )
            counts[what][(row["at"] - start) // step] = row["sessions"]
    series = {
        engine: {
            "open": list(accumulate(map(sub, counts["opened"], counts["closed"]))),
            "opened": [count * SECOND / step for count in counts["opened"]],
            "bad": [count * SECOND / step for count in counts["bad"]],
        }
        for engine, counts in found.items()
    }
    return {"start_ms": start / 1000, "step_ms": step / 1000, "step_us": step, "series": series}


def _evenly(sessions: ir.Table, count: int, wanted: int) -> ir.Table:
    """Some `wanted` of these `count` sessions, all of them if there are no more, twice as many at most."""
    # by the last digits of the end, which have nothing to do with what it was; no divisor of milliseconds
    every = -(-count // wanted)
    while every > 1 and (every % 2 == 0 or every % 5 == 0):
        every += 1
    return sessions.filter(sessions.at_us % max(every, 1) == 0).order_by("at_us", "session").limit(2 * wanted)


def _sample(logs: Logs, sessions: ir.Table, engine: str, count: int, bad_count: int) -> list[list[Any]]:
    """Rows of when a session was opened and how long it took, in milliseconds, and the rest of it."""
    mine = sessions.filter(sessions.engine == engine)
    bad = mine.filter(mine.termination != "--")
    picks = (
        _evenly(mine, count, EVEN),
        mine.order_by(ibis.desc("duration_us"), "at_us", "session").limit(LONG),
        _evenly(bad, bad_count, BAD),
    )
    names = ("at_us", "duration_us", *DETAILS, *ENDING)
    found = {tuple(row.values()): row for pick in picks for row in logs.rows(pick.select(*names))}
    rows = sorted(found.values(), key=lambda row: (row["at_us"] - row["duration_us"], row["at_us"]))
    return [
        [
            (row["at_us"] - row["duration_us"]) / 1000,
            row["duration_us"] / 1000,
            *(row[name] for name in names[2:]),
        ]
        for row in rows
    ]


def _about(sample: dict[str, list[list[Any]]], total: int) -> str:
    shown = sum(map(len, sample.values()))
    if shown == total:
        return f"All {total:,} of them, from accept to close. Those without colour did not end in order."
    return (
        f"A sample, {shown:,} of {total:,}, from accept to close: of each engine some {EVEN} picked evenly, the "
        f"{LONG} longest, and some {BAD} that did not end in order, which have no colour. So the picture is fuller "
        "of long and of bad ones than the log."
    )


def _glance(engines: Sequence[dict[str, Any]], curves: dict[str, dict[str, dict[str, Any]]]) -> str:
    def row(title: str, note: str, told: list[Figure]) -> tuple[str, list[Figure]]:
        return f"{escape(title)}<small>{escape(note)}</small>", told

    def quantile(timer: str, nines: float) -> list[Figure]:
        found = [curves[timer].get(each["engine"]) for each in engines]
        values = [_quantile(curve, nines) if curve else None for curve in found]
        return [None if value is None else (duration(value), value) for value in values]

    def amount(name: str) -> list[Figure]:
        return [None if each[name] is None else (size(each[name]), each[name]) for each in engines]

    rows = [
        row("Sessions", "", [(f"{each['sessions']:,}", each["sessions"]) for each in engines]),
        row(
            "Not in order",
            "less is better",
            [(f"{each['bad']:,} ({each['bad'] / each['sessions']:.1%})", each["bad"]) for each in engines],
        ),
        row("Duration, p50", "", quantile("duration_us", -math.log10(0.5))),
        row("Duration, p99", "", quantile("duration_us", 2)),
        row("First byte, p50", "less is better", quantile("first_byte_us", -math.log10(0.5))),
        row("First byte, p99", "less is better", quantile("first_byte_us", 2)),
        row("From clients", "", amount("c2s")),
        row("To clients", "", amount("s2c")),
    ]
    return glance(
        "At a glance", [each["engine"] for each in engines], [each for each in rows if any(each[1])]
    )


def _timers(curves: dict[str, dict[str, dict[str, Any]]]) -> str:
    figures = (
        f'<figure>{caption(title, note)}<div id="{timer}" class=plot></div></figure>'
        for timer, (title, note) in TIMERS.items()
        if curves[timer]
    )
    unseen = [title for timer, (title, _) in TIMERS.items() if not curves[timer]]
    said = f"<p class=about>In no session: {escape(', '.join(unseen))}.</p>" if unseen else ""
    return f'<div class="plots large">{"".join(figures)}</div>{said}'


def _endings(logs: Logs, sessions: ir.Table, names: Sequence[str]) -> str:
    counted = sessions.group_by("engine", *ENDING[:2]).aggregate(sessions=lambda t: t.count())
    counts: dict[tuple[str | None, str | None], dict[str, int]] = {}
    totals = dict.fromkeys(names, 0)
    for row in logs.rows(counted):
        counts.setdefault((row["state"], row["termination"]), {})[row["engine"]] = row["sessions"]
        totals[row["engine"]] += row["sessions"]
    rows = []
    for (state, termination), by_engine in sorted(
        counts.items(), key=lambda item: (-sum(item[1].values()), item[0][1] or "", item[0][0] or "")
    ):
        told = [
            (f"{by_engine[name]:,} ({by_engine[name] / totals[name]:.1%})", by_engine[name] / totals[name])
            if name in by_engine
            else None
            for name in names
        ]
        how = " ".join(filter(None, (termination, state)))
        rows.append((f"{escape(how or 'not told')}<small>{escape(in_words(termination))}</small>", told))
    return glance("", list(names), rows, whole=1)


def in_words(termination: str | None) -> str:
    if termination is None:
        return "the log does not tell how"
    cause, phase = (termination[:1], termination[1:2])
    return ", ".join(filter(None, (CAUSES.get(cause), PHASES.get(phase))))
