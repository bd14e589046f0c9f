"""What is in a log: how many sessions, of whom, how they ended, how long everything took, when they were open.

Only a `session_closed` line is a session. Sessions that were opened and whose end is not in these
files, clients that were refused, lines that are not ours and lines that are missing are counted
beside them, so that the summary of a damaged log looks like one.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from operator import sub
from typing import NamedTuple

import ibis
import ibis.expr.types as ir
from msgspec import Struct

from comparisons.logs.quantiles import quantile_rows
from comparisons.logs.reader import Fault, Logs, open_logs
from services.vocabulary import SessionClosed

# what a summary can be by
GROUPS = ("engine", "service", "upstream", "state", "termination")
TIMERS = tuple(field for field in SessionClosed.__struct_fields__ if field.endswith("_us"))
AMOUNTS = ("bytes_c2s", "bytes_s2c", "datagrams_c2s", "datagrams_s2c")
# what an I/O model did to move the bytes
EFFORTS = ("reads", "writes", "partial_writes", "would_block", "pauses", "spliced_bytes")
COLUMNS = (*GROUPS, *TIMERS, *AMOUNTS, *EFFORTS, "pid", "worker", "seq", "session", "refused", "client_ip")

# so many lines that are not ours are quoted, enough to see what they are
QUOTED = 5
TALKERS = 5
# a terminal shows a mark for each
STEPS = 60
SECOND = 1_000_000
# the lengths of a step, in microseconds: what people count time in
LENGTHS = (
    *(digit * 10**power for power in range(6) for digit in (1, 2, 5)),
    *(seconds * SECOND for seconds in (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800)),
    *(hours * 3600 * SECOND for hours in (1, 2, 6, 12, 24, 48, 7 * 24, 30 * 24, 365 * 24, 100 * 365 * 24)),
)
# no session is open for longer than two years: what says so would make all others one step
LONGEST = 2 * 365 * 24 * 3600 * SECOND


class Timer(Struct, frozen=True):
    """Microseconds, of the `sessions` that reached this timer and whose model can see it; see
    `quantiles.py` for what they are.
    """

    sessions: int
    p50: int
    p90: int
    p99: int
    p999: int


class Ending(Struct, frozen=True):
    """So many sessions ended in this way; a peer may not tell."""

    state: str | None
    termination: str | None
    sessions: int


class Group(Struct, frozen=True, kw_only=True):
    """The sessions that have this `name` in the column that the summary is by; - where they have none.

    A timer that no session has is not in `timers`, and an amount that no session has is null (`datagrams_`
    without UDP, most of them of a peer). `refused` clients never became a session. `opened` is how many
    began in each step of the summary, `open` how many were open at its end.
    """

    name: str
    sessions: int
    refused: int
    bytes_c2s: int | None
    bytes_s2c: int | None
    datagrams_c2s: int | None
    datagrams_s2c: int | None
    reads: int | None
    writes: int | None
    partial_writes: int | None
    would_block: int | None
    pauses: int | None
    spliced_bytes: int | None
    endings: list[Ending]
    timers: dict[str, Timer]
    opened: list[int]
    open: list[int]


class Talker(Struct, frozen=True):
    """A client address; `bytes` both ways."""

    client_ip: str
    sessions: int
    bytes: int


class Process(Struct, frozen=True):
    """`lines` of one process were read; `missing` is how many its `seq` says were between them.

    A process that began again under the same pid (in a container it always does) counts as the
    same. What is lost before its first and after its last line leaves no gap.
    """

    engine: str
    pid: int
    worker: int
    lines: int
    missing: int


class Summary(Struct, frozen=True, kw_only=True):
    """`lines` were read, of which `foreign` are not ours: torn, or another program's; `unknown` are ours,
    by event, and of a version that this one does not know. `first` and `last` are the timestamps between
    which our lines lie; `unclosed` sessions have a line and no end. `since` and `step_us` are where the
    groups' steps begin and how long they are, `span_us` is from the first opening to the last end.
    """

    files: list[str]
    lines: int
    foreign: int
    faults: list[Fault]
    unknown: dict[str, int]
    first: str | None
    last: str | None
    sessions: int
    unclosed: int
    by: str
    since: str | None
    step_us: int | None
    span_us: int | None
    groups: list[Group]
    talkers: list[Talker]
    processes: list[Process]


class Timeline(NamedTuple):
    """When the sessions were open: where the steps begin, how long they are, how long all of it was, and by
    the names of the groups how many sessions were opened in each step and open at its end.
    """

    since: int | None
    step_us: int | None
    span_us: int | None
    opened: dict[str, list[int]]
    open: dict[str, list[int]]


def summarize(
    files: Sequence[str], by: str = "engine", backend: str = "duckdb", master: str | None = None
) -> Summary:
    """The summary of these logs, by one of GROUPS. See `reader.open_logs` for the names and the errors."""
    with open_logs(files, COLUMNS, backend, master) as logs:
        lines, sessions = logs.lines, logs.sessions
        ours = lines.kind != "foreign"
        [overall] = logs.rows(
            lines.aggregate(
                lines=lines.count(),
                foreign=lines.kind.count(where=~ours),
                first=lines.at_us.min(where=ours),
                last=lines.at_us.max(where=ours),
                begun=lines.kind.count(where=lines.event.isin(["session_opened", "session_progress"])),
            )
        )
        unknown = lines.filter(lines.kind == "unknown").group_by("event").aggregate(lines=lambda t: t.count())
        named = sessions.mutate(name=sessions[by].fill_null("-"))
        timeline = _timeline(logs, named)
        groups = _groups(logs, named, by, timeline)
        return Summary(
            files=list(files),
            lines=overall["lines"],
            foreign=overall["foreign"],
            faults=logs.faults(QUOTED) if overall["foreign"] else [],
            unknown={row["event"]: row["lines"] for row in logs.rows(unknown.order_by("event"))},
            first=timestamp(overall["first"]),
            last=timestamp(overall["last"]),
            sessions=sum(group.sessions for group in groups),
            # mostly there are none, and looking for them takes as long as all the rest
            unclosed=_unclosed(logs) if overall["begun"] else 0,
            by=by,
            since=timestamp(timeline.since),
            step_us=timeline.step_us,
            span_us=timeline.span_us,
            groups=groups,
            talkers=_talkers(logs),
            processes=_processes(logs),
        )


def timestamp(at_us: int | None) -> str | None:
    """As the log writes it."""
    if at_us is None:
        return None
    moment = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=at_us)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _unclosed(logs: Logs) -> int:
    known = logs.lines.filter(logs.lines.kind == "known")
    begun = (
        known.filter(known.event.isin(["session_opened", "session_progress"])).select("session").distinct()
    )
    [row] = logs.rows(begun.anti_join(logs.sessions, "session").aggregate(count=lambda t: t.count()))
    return int(row["count"])


def _groups(logs: Logs, named: ir.Table, by: str, timeline: Timeline) -> list[Group]:
    endings: dict[str, list[Ending]] = {}
    ended = named.group_by("name", "state", "termination").aggregate(sessions=lambda t: t.count())
    for row in sorted(
        logs.rows(ended), key=lambda row: (-row["sessions"], row["state"] or "", row["termination"] or "")
    ):
        endings.setdefault(row.pop("name"), []).append(Ending(**row))

    timers: dict[str, dict[str, Timer]] = {}
    for row in logs.rows(quantile_rows(named, ["name"], TIMERS)):
        name, timer = row.pop("name"), row.pop("timer")
        timers.setdefault(name, {})[timer] = Timer(**row)

    known = logs.lines.filter(logs.lines.kind == "known")
    is_session, is_refusal = known.event == "session_closed", known.event == "session_refused"
    sums = {amount: logs.total(known[amount], where=is_session) for amount in (*AMOUNTS, *EFFORTS)}
    totals = (
        known.filter(is_session | is_refusal)
        .group_by(name=known[by].fill_null("-"))
        .aggregate(
            sessions=known.kind.count(where=is_session),
            refused=logs.total(known.refused, where=is_refusal).fill_null(0),
            **sums,
        )
        .order_by("name")
    )
    return [
        Group(
            **row,
            endings=endings.get(row["name"], []),
            timers=timers.get(row["name"], {}),
            opened=timeline.opened.get(row["name"], []),
            open=timeline.open.get(row["name"], []),
        )
        for row in logs.rows(totals)
    ]


def _timeline(logs: Logs, named: ir.Table) -> Timeline:
    spans = named.filter(named.duration_us.notnull()).select(
        "name", closed="at_us", opened=named.at_us - ibis.least(named.duration_us, LONGEST)
    )
    [span] = logs.rows(spans.aggregate(first=spans.opened.min(), last=spans.closed.max()))
    first, last = span["first"], span["last"]
    if first is None:
        return Timeline(None, None, None, {}, {})
    step = next(length for length in LENGTHS if (last - first) // length < STEPS - 1)
    since = first - first % step
    changes = ibis.union(
        *(
            spans.group_by("name", at=spans[moment] - (spans[moment] - since) % step)
            .aggregate(sessions=lambda each: each.count())
            .mutate(moment=ibis.literal(moment))
            for moment in ("opened", "closed")
        )
    )
    counts: dict[str, dict[str, list[int]]] = {}
    for row in logs.rows(changes):
        nothing = {moment: [0] * ((last - since) // step + 1) for moment in ("opened", "closed")}
        counts.setdefault(row["name"], nothing)[row["moment"]][(row["at"] - since) // step] = row["sessions"]
    return Timeline(
        since,
        step,
        last - first,
        {name: moments["opened"] for name, moments in counts.items()},
        {
            name: list(accumulate(map(sub, moments["opened"], moments["closed"])))
            for name, moments in counts.items()
        },
    )


def _talkers(logs: Logs) -> list[Talker]:
    known = logs.sessions.filter(logs.sessions.client_ip.notnull())
    both_ways = logs.total(known.bytes_c2s.fill_null(0)) + logs.total(known.bytes_s2c.fill_null(0))
    busiest = (
        known.group_by("client_ip")
        .aggregate(sessions=known.count(), bytes=both_ways)
        .order_by(ibis.desc("bytes"), ibis.desc("sessions"), "client_ip")
        .limit(TALKERS)
    )
    return [Talker(**row) for row in logs.rows(busiest)]


def _processes(logs: Logs) -> list[Process]:
    process = ("engine", "pid", "worker")
    numbered = logs.lines.filter((logs.lines.kind != "foreign") & logs.lines.seq.notnull())

    def gaps(lines: ir.Table, *by: str) -> ir.Table:
        start = lines.at_us.min(where=lines.seq == 0)
        return lines.group_by(*by).aggregate(
            lines=lines.count(),
            missing=lines.seq.max().cast("decimal(38, 0)") - lines.seq.min() + 1 - lines.seq.nunique(),
            again=(lines.seq == 0).cast("int64").sum()
            - (start == lines.at_us.min()).cast("int64").fill_null(0),
        )

    found = logs.rows(gaps(numbered, *process).order_by(*process))
    # A process numbers from 0, so each 0 is another run under this pid. Runs follow each other in
    # time, whatever order rotated files are named in; within a run two threads may stamp their lines
    # in one order and number them in the other, so there the numbers count and not their order.
    if restarted := {row["pid"] for row in found if row["again"]}:
        again = numbered.filter(numbered.pid.isin(sorted(restarted)))
        run = (
            (again.seq == 0)
            .cast("int64")
            .sum()
            .over(ibis.range_window(group_by=process, order_by="at_us", preceding=None, following=0))
        )
        runs = gaps(again.mutate(run=run), *process, "run")
        totals = runs.group_by(*process).aggregate(lines=runs.lines.sum(), missing=runs.missing.sum())
        found = [row for row in found if row["pid"] not in restarted] + logs.rows(totals)
    return sorted(
        (Process(*(row[name] for name in Process.__struct_fields__)) for row in found),
        key=lambda each: (each.engine, each.pid, each.worker),
    )
