"""What must hold in every log, and what is wrong where it does not: the checks of `triptych logs check`.

Each check looks for one fault and gives it a name. The thresholds are chosen so that a healthy service
under full load yields nothing, since a gate that cries wolf is switched off; what is a matter of taste
(how slow is too slow) is no check. Where a log cannot tell, a check says so and why, which is not the same
as that all is well.

Nothing is concluded from one figure that has an innocent explanation:

- A loop is stalled where the engine says so itself (`engine_stalled`), or where nobody was accepted while a
  client waited in the backlog for as long. Quiet alone is no stall.
- Sessions leak where open sessions grow from one `engine_stats` to the next, again and again, and never
  fall. A service that fills up and stays full does not.
- An upstream has slowed where its typical session takes longer than nine of ten took before, for a second or
  more, though clients come no faster and our own loop is not late. Its answer is timed from the moment it was connected and asked, so clients
  that begin to ask later are not its fault.
- A peer stopped reading where bytes waited for it for a second at a time. A stream that is paused ten
  thousand times for an instant is flow control.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import groupby, pairwise
from statistics import median
from typing import Any, NamedTuple

import ibis
import ibis.expr.types as ir
from msgspec import Struct

from comparisons.logs.quantiles import quantile_rows
from comparisons.logs.reader import Logs
from comparisons.logs.show import duration
from comparisons.logs.summary import timestamp
from services.core.service import STALL

SECOND = 1_000_000
PROCESS = ("engine", "instance", "pid", "worker")
RUN = (*PROCESS, "run")
COLUMNS = (
    *PROCESS,
    *("seq", "lines", "session", "pair", "listener", "upstream", "error", "termination"),
    *("accept_wait_us", "connect_us", "client_first_us", "first_byte_us", "duration_us", "loop_lag_us"),
    *("longest_pause_us", "paused_c2s_us", "paused_s2c_us", "peak_buffer", "bytes_c2s", "bytes_s2c"),
    *("accepted", "closed", "open_sessions"),
)

STALL_US = int(STALL * SECOND)
# nobody was accepted for so long while a client waited: five times what a busy machine of two cores shows
HOLE_US = 500_000
# accepts so soon behind a hole, of clients that waited as long, are its burst; a stall is told twice within it
BURST_US = 200_000
# an error burst: so many, so many times what the rest of the log lets expect, and one of five sessions
FEWEST_ERRORS, TIMES_EXPECTED, SHARE_OF_BURST = 10, 5, 5
# a second; of a short log less, so that there is a rest to compare with, and of a long one more
FEWEST_STEPS, MOST_STEPS = 20, 2000
# a leak: so many intervals of engine_stats in which open sessions never fell and nearly always grew
FEWEST_INTERVALS, GROWING = 10, 0.75
FEWEST_LEAKED = 10
# a slow upstream: medians of so many sessions each, against those before
UPSTREAM_STEPS, FEWEST_IN_STEP, FEWEST_BEFORE, FEWEST_SLOW = 64, 20, 3, 2
SLOW_FOR_US = SECOND
UPSTREAM = ("engine", "upstream")
# of more sessions so many are timed: a sample by chance tells a median as well
MOST_TIMED = 200_000
PRIME = 1_000_003
SLOWER_US, TIMES_SLOWER = 5000, 1.5
# one pause of a second is a peer that stopped, also among short ones
STOPPED_US = SECOND


class Finding(Struct, frozen=True, kw_only=True):
    """One fault: its `name`, when it began, and `where`: a process, session, listener or upstream."""

    name: str
    at: str | None
    engine: str
    where: str
    evidence: str


class Check(Struct, frozen=True, kw_only=True):
    """What a check came to: `untold` says why this log cannot tell, or is null."""

    name: str
    holds: str
    found: int
    untold: str | None


class Untold(Exception):  # noqa: N818  it is not an error
    """Why a log cannot tell."""


class Run(NamedTuple):
    """One process from its first to its last line here. `totals` are its last."""

    key: tuple[object, ...]
    engine: str
    name: str
    first_seq: int
    missing: int
    dropped: int
    first_us: int
    last_us: int
    opens: int
    reloads: int
    totals: Mapping[str, Any] | None

    @property
    def whole(self) -> bool:
        return self.first_seq == 0 and not self.missing

    @property
    def stopped(self) -> bool:
        return self.totals is not None and self.totals["event"] == "service_stopped"


class Log:
    """An open log as the checks see it: `lines` with the number of the process's run, and the runs."""

    def __init__(self, logs: Logs) -> None:
        self.rows = logs.rows
        self.sessions = logs.sessions
        self.lines = _numbered(logs)
        self.known = self.lines.filter(self.lines.kind == "known")
        self.runs = _runs(self)


def judge(logs: Logs) -> tuple[list[Check], list[Finding]]:
    """Every check in its order, and what they found."""
    log = Log(logs)
    checks, findings = [], []
    for name, (holds, look) in CHECKS.items():
        untold = None
        found: list[Finding] = []
        try:
            found += look(log)
        except Untold as reason:
            untold = str(reason)
        checks.append(Check(name=name, holds=holds, found=len(found), untold=untold))
        findings += found
    return checks, findings


def _numbered(logs: Logs) -> ir.Table:
    """A process numbers its lines from 0, so each 0 is another run under its pid."""
    ours = logs.lines.filter((logs.lines.kind != "foreign") & logs.lines.seq.notnull())
    starts = ours.filter(ours.seq == 0).group_by(*PROCESS).aggregate(starts=lambda each: each.count())
    if not logs.rows(starts.filter(starts.starts > 1).limit(1)):
        return ours.mutate(run=ibis.literal(0, "int64"))
    begun = ibis.range_window(group_by=PROCESS, order_by="at_us", preceding=None, following=0)
    return ours.mutate(run=(ours.seq == 0).cast("int64").sum().over(begun))


def _runs(log: Log) -> list[Run]:
    lines, known = log.lines, log.known
    # a log that is given twice has every number twice
    seen = lines.group_by(*RUN).aggregate(
        first_seq=lines.seq.min(),
        missing=lines.seq.max() - lines.seq.min() + 1 - lines.seq.nunique(),
        first_us=lines.at_us.min(),
        last_us=lines.at_us.max(),
        dropped=lines.lines.sum(where=lines.event == "log_dropped").fill_null(0),
        opens=lines.count(where=lines.event == "session_opened"),
        reloads=lines.count(where=lines.event == "config_reloaded"),
    )
    totals = known.filter(known.event.isin(["service_stopped", "engine_stats"]))
    last = totals.mutate(
        place=ibis.row_number().over(ibis.window(group_by=RUN, order_by=ibis.desc("seq")))
    ).filter(lambda each: each.place == 0)
    last = last.select(
        *RUN, "event", "seq", "at_us", "accepted", "closed", "open_sessions", "bytes_c2s", "bytes_s2c"
    )
    closed = known.filter(known.event == "session_closed").select(
        *RUN, "session", "seq", "bytes_c2s", "bytes_s2c"
    )
    until = closed.join(last.select(*RUN, last_seq="seq"), RUN).filter(lambda each: each.seq < each.last_seq)
    counted = (
        until.distinct()
        .group_by(*RUN)
        .aggregate(
            lines=lambda each: each.count(),
            c2s=lambda each: each.bytes_c2s.sum(),
            s2c=lambda each: each.bytes_s2c.sum(),
        )
    )
    known_totals = {_key(row): row | {"lines": 0, "c2s": 0, "s2c": 0} for row in log.rows(last)}
    for row in log.rows(counted):
        known_totals[_key(row)] |= row
    return [
        Run(
            key=_key(row),
            engine=row["engine"],
            name=_process(row),
            totals=known_totals.get(_key(row)),
            **{name: row[name] for name in Run._fields if name in row and name != "engine"},
        )
        for row in log.rows(seen.order_by(*RUN))
    ]


def _key(row: Mapping[str, Any]) -> tuple[object, ...]:
    return tuple(row[name] for name in RUN)


def _process(row: Mapping[str, Any]) -> str:
    instance = "" if row["instance"] == "-" else f" of {row['instance']}"
    worker = f" worker {row['worker']}" if row["worker"] else ""
    return f"pid {row['pid']}{worker}{instance}"


# The book-keeping ------------------------------------------------------------------------------


def lost_lines(log: Log) -> Iterator[Finding]:
    if not log.runs:
        raise Untold("no line of a daemon")
    gapped = {run.key: run for run in log.runs if run.missing}
    if not gapped:
        return
    lines = log.lines
    before = lines.seq.max().over(ibis.window(group_by=RUN, order_by="seq", preceding=(None, 1)))
    gaps = lines.mutate(before=before).filter(lambda each: each.seq > each.before + 1)
    first: dict[tuple[object, ...], Mapping[str, Any]] = {}
    for row in log.rows(gaps.select(*RUN, "at_us", "before", "seq").order_by("seq")):
        first.setdefault(_key(row), row)
    for key, run in gapped.items():
        gap = first[key]
        told = (
            f"; the daemon says that it dropped {run.dropped:,}, because its log's reader stalled"
            if run.dropped
            else ""
        )
        lost = "1 line is" if run.missing == 1 else f"{run.missing:,} lines are"
        ended = _unlogged(run)
        of_them = f"; {ended:,} of them ended a session, say the totals" if ended else ""
        yield Finding(
            name="lost_lines",
            at=timestamp(gap["at_us"]),
            engine=run.engine,
            where=run.name,
            evidence=f"{lost} missing, the first after seq {gap['before']:,}{told}{of_them}",
        )


def totals_disagree(log: Log) -> Iterator[Finding]:
    judged = [run for run in log.runs if run.totals is not None and run.first_seq == 0]
    if not judged:
        raise Untold("no process is here from its first line to a line with totals")
    for run in judged:
        totals = run.totals
        assert totals is not None
        wrong = []
        if totals["accepted"] != totals["closed"] + totals["open_sessions"]:
            wrong.append(
                f"{totals['accepted']:,} accepted, but {totals['closed']:,} closed and {totals['open_sessions']:,} open"
            )
        if not 0 <= _unlogged(run) <= run.missing:
            wrong.append(f"{totals['closed']:,} sessions closed, {totals['lines']:,} session_closed lines")
        elif not run.missing:
            for name, of_lines in (("bytes_c2s", totals["c2s"]), ("bytes_s2c", totals["s2c"])):
                # those of open sessions are in the totals and in no line yet
                if totals[name] < of_lines or (totals[name] > of_lines and not totals["open_sessions"]):
                    wrong.append(f"{name} {totals[name]:,} in all, {of_lines:,} in the lines")
        if wrong:
            yield Finding(
                name="totals_disagree",
                at=timestamp(totals["at_us"]),
                engine=run.engine,
                where=run.name,
                evidence=f"{totals['event']}: {'; '.join(wrong)}",
            )


def _unlogged(run: Run) -> int:
    """Sessions that the totals count and no line tells of."""
    if run.totals is None or run.first_seq:
        return 0
    return int(run.totals["closed"] - run.totals["lines"])


def unended_sessions(log: Log) -> Iterator[Finding]:
    """One close for every open, where a process has stopped: then none can still be open."""
    known = log.known
    is_open = known.event.isin(["session_opened", "session_progress"])
    if not log.rows(known.filter(is_open).limit(1)):
        raise Untold("no session_opened (a daemon logs them at level debug)")
    runs = {run.key: run for run in log.runs}
    begun = known.filter(is_open).group_by(*RUN, "session").aggregate(at_us=lambda each: each.at_us.min())
    ended = (
        known.filter(known.event == "session_closed")
        .group_by(*RUN, "session")
        .aggregate(closes=lambda each: each.seq.nunique(), at_us=lambda each: each.at_us.min())
    )
    never = _by_run(log, begun.anti_join(ended, (*RUN, "session")))
    twice = _by_run(log, ended.filter(ended.closes > 1))
    unopened = _by_run(log, ended.anti_join(begun, (*RUN, "session")))
    for key, run in runs.items():
        for rows, fault, applies in (
            (never.get(key), "began and have no session_closed", run.stopped),
            (twice.get(key), "have more than one session_closed", True),
            (
                unopened.get(key),
                "ended and have no session_opened",
                run.opens and run.whole and not run.reloads,
            ),
        ):
            # what a lost line told is no fault of the daemon
            if rows and applies and rows["sessions"] > run.missing:
                yield Finding(
                    name="unended_sessions",
                    at=timestamp(rows["at_us"]),
                    engine=run.engine,
                    where=run.name,
                    evidence=f"{rows['sessions']:,} sessions {fault}, the first {rows['session']}",
                )


def _by_run(log: Log, sessions: ir.Table) -> dict[tuple[object, ...], Mapping[str, Any]]:
    counted = sessions.group_by(*RUN).aggregate(
        sessions=lambda each: each.count(),
        at_us=lambda each: each.at_us.min(),
        session=lambda each: each.session.min(),
    )
    return {_key(row): row for row in log.rows(counted)}


def pair_differs(log: Log) -> Iterator[Finding]:
    paired = log.sessions.filter(log.sessions.pair.notnull() & (log.sessions.termination == "--"))
    if not log.rows(paired.limit(1)):
        raise Untold("no paired sessions (split, shadow and replay make them)")
    sums = paired.group_by("pair").aggregate(
        least_c2s=paired.bytes_c2s.min(),
        most_c2s=paired.bytes_c2s.max(),
        least_s2c=paired.bytes_s2c.min(),
        most_s2c=paired.bytes_s2c.max(),
    )
    differ = sums.filter((sums.least_c2s != sums.most_c2s) | (sums.least_s2c != sums.most_s2c))
    members = paired.join(differ.select("pair"), "pair").select(
        "pair", "engine", "at_us", "bytes_c2s", "bytes_s2c"
    )
    rows = log.rows(members.order_by("pair", "engine", "at_us"))
    for pair, group in groupby(rows, key=lambda row: str(row["pair"])):
        of_pair = list(group)
        yield Finding(
            name="pair_differs",
            at=timestamp(min(row["at_us"] for row in of_pair)),
            engine=", ".join(dict.fromkeys(row["engine"] for row in of_pair)),
            where=f"pair {pair}",
            evidence="; ".join(
                f"{row['engine']} {row['bytes_c2s']:,} bytes from the client, {row['bytes_s2c']:,} to it"
                for row in of_pair
            ),
        )


# The daemons themselves ------------------------------------------------------------------------


def engine_fault(log: Log) -> Iterator[Finding]:
    known = log.known
    faults = known.filter(known.event == "engine_fault").select(*PROCESS, "at_us", "session", "error", "seq")
    for row in log.rows(faults.distinct().order_by("at_us", "seq")):
        yield Finding(
            name="engine_fault",
            at=timestamp(row["at_us"]),
            engine=row["engine"],
            where=f"session {row['session']}" if row["session"] else _process(row),
            evidence=f"a bug of the daemon's: {row['error']}",
        )


def listener_paused(log: Log) -> Iterator[Finding]:
    known = log.known
    pauses = known.filter(known.event == "listener_paused").group_by(*RUN, "listener", "error")
    counted = pauses.aggregate(times=lambda each: each.seq.nunique(), at_us=lambda each: each.at_us.min())
    for row in log.rows(counted.order_by("at_us", *RUN, "listener", "error")):
        yield Finding(
            name="listener_paused",
            at=timestamp(row["at_us"]),
            engine=row["engine"],
            where=f"listener {row['listener']}",
            evidence=f"{_process(row)} could not accept and paused {row['times']:,} times: {row['error']}",
        )


class _Stall(NamedTuple):
    begin_us: int
    end_us: int
    evidence: str


def stalled_loop(log: Log) -> Iterator[Finding]:
    names = {run.key: run for run in log.runs}
    stalls: dict[tuple[object, ...], list[_Stall]] = defaultdict(list)
    known = log.known
    late = known.filter((known.event == "engine_stalled") & (known.loop_lag_us >= STALL_US))
    for row in log.rows(late.select(*RUN, "at_us", "loop_lag_us")):
        text = f"a timer ran {duration(row['loop_lag_us'])} late"
        stalls[_key(row)].append(_Stall(row["at_us"] - row["loop_lag_us"], row["at_us"], text))
    for key, stall in _holes(log):
        stalls[key].append(stall)
    for key, of_run in sorted(stalls.items(), key=lambda item: min(item[1])):
        for stall in _merged(of_run):
            yield Finding(
                name="stalled_loop",
                at=timestamp(stall.begin_us),
                engine=names[key].engine,
                where=names[key].name,
                evidence=f"for {duration(stall.end_us - stall.begin_us)} nothing ran: {stall.evidence}",
            )


def _holes(log: Log) -> Iterator[tuple[tuple[object, ...], _Stall]]:
    """When nobody was accepted though clients waited, and not because descriptors had run out."""
    known = log.known
    waited = known.filter((known.event == "session_closed") & known.accept_wait_us.notnull())
    accepts = waited.mutate(opened=waited.at_us - waited.duration_us)
    if not log.rows(accepts.filter(accepts.accept_wait_us >= HOLE_US).limit(1)):
        return
    before = accepts.opened.max().over(
        ibis.window(group_by=RUN, order_by=("opened", "seq"), preceding=(None, 1))
    )
    quiet = accepts.mutate(quiet_us=accepts.opened - before)
    holes = quiet.filter((quiet.quiet_us >= HOLE_US) & (quiet.accept_wait_us >= HOLE_US))
    paused = known.filter(known.event == "listener_paused").select(*RUN, "at_us")
    pauses = [(_key(row), row["at_us"]) for row in log.rows(paused)]
    for row in log.rows(holes.select(*RUN, "opened", "quiet_us", "accept_wait_us").order_by("opened")):
        key, end = _key(row), row["opened"]
        begin = end - min(row["quiet_us"], row["accept_wait_us"])
        if any(key == of and begin <= at <= end for of, at in pauses):
            continue
        same = accepts.filter([accepts[name] == value for name, value in zip(RUN, key, strict=True)])
        burst = same.filter(
            (same.opened >= end) & (same.opened < end + BURST_US) & (same.accept_wait_us >= BURST_US)
        )
        [counted] = log.rows(burst.aggregate(sessions=burst.count()))
        text = f"nobody was accepted while clients waited for {duration(end - begin)}, then {counted['sessions']:,} at once"
        yield key, _Stall(begin, end, text)


def _merged(stalls: Iterable[_Stall]) -> list[_Stall]:
    """Stalls that overlap are one."""
    merged: list[_Stall] = []
    for stall in sorted(stalls):
        if merged and stall.begin_us <= merged[-1].end_us + BURST_US:
            last = merged[-1]
            merged[-1] = _Stall(
                last.begin_us, max(last.end_us, stall.end_us), f"{last.evidence}; {stall.evidence}"
            )
        else:
            merged.append(stall)
    return merged


def leaking_sessions(log: Log) -> Iterator[Finding]:
    known = log.known
    stats = (
        known.filter(known.event == "engine_stats").select(*RUN, "seq", "at_us", "open_sessions").distinct()
    )
    by_run = groupby(log.rows(stats.order_by(*RUN, "seq")), key=_key)
    series = {key: list(rows) for key, rows in by_run}
    longest = max(map(len, series.values()), default=0) - 1
    if longest < FEWEST_INTERVALS:
        raise Untold(f"no process with {FEWEST_INTERVALS + 1} engine_stats lines")
    runs = {run.key: run for run in log.runs}
    for key, rows in series.items():
        # the longest end of the series in which it never falls
        begin = next(
            (
                at
                for at in range(len(rows) - 1, 0, -1)
                if rows[at]["open_sessions"] < rows[at - 1]["open_sessions"]
            ),
            0,
        )
        rising = [row["open_sessions"] for row in rows[begin:]]
        intervals = len(rising) - 1
        grew = sum(after > before for before, after in pairwise(rising))
        leaked = rising[-1] - rising[0]
        if intervals >= FEWEST_INTERVALS and grew >= GROWING * intervals and leaked >= FEWEST_LEAKED:
            yield Finding(
                name="leaking_sessions",
                at=timestamp(rows[begin]["at_us"]),
                engine=runs[key].engine,
                where=runs[key].name,
                evidence=f"open sessions went from {rising[0]:,} to {rising[-1]:,} in {intervals} intervals of "
                f"engine_stats, grew in {grew} of them and never fell",
            )


# The peers -------------------------------------------------------------------------------------

# not `c`: clients that were idle for too long expire together, as they came
CAUSES = {
    "C": "clients",
    "S": "the upstream",
    "s": "the upstream",
    "R": "our resources",
    "I": "a bug of ours",
}


def error_burst(log: Log) -> Iterator[Finding]:
    """Sessions that ended badly, by upstream (of an echo: by listener) and cause, in steps of time."""
    sessions = log.sessions.filter(log.sessions.termination.notnull())
    [span] = log.rows(sessions.aggregate(first=sessions.at_us.min(), last=sessions.at_us.max()))
    if span["first"] is None:
        raise Untold("no session")
    length = span["last"] - span["first"]
    step = max(1, min(SECOND, length // FEWEST_STEPS), length // MOST_STEPS)
    counted = sessions.mutate(
        step=sessions.at_us - sessions.at_us % step,
        where=ibis.coalesce(
            "upstream " + sessions.upstream, "listener " + sessions.listener, ibis.literal("-")
        ),
    ).group_by("engine", "where", "step", "termination", "error")
    rows = log.rows(counted.aggregate(sessions=lambda each: each.count()).order_by("engine", "where", "step"))
    for (engine, where), group in groupby(rows, key=lambda row: (row["engine"], row["where"])):
        of_place = list(group)
        for cause in dict.fromkeys(CAUSES.values()):
            for at, evidence in _bursts(of_place, cause, step):
                yield Finding(
                    name="error_burst", at=timestamp(at), engine=engine, where=where, evidence=evidence
                )


def _bursts(rows: Sequence[Mapping[str, Any]], cause: str, step: int) -> Iterator[tuple[int, str]]:
    """When a burst began, and what was seen."""
    totals: dict[int, int] = defaultdict(int)
    errors: dict[int, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for row in rows:
        totals[row["step"]] += row["sessions"]
        if CAUSES.get(row["termination"][0]) == cause:
            errors[row["step"]][" ".join(filter(None, (row["termination"], row["error"])))] += row["sessions"]
    every, every_bad = sum(totals.values()), sum(sum(each.values()) for each in errors.values())

    bursts: list[list[int]] = []
    for at in sorted(errors):
        # a share that nobody calls usual; steps in a row are one burst
        if SHARE_OF_BURST * sum(errors[at].values()) >= totals[at]:
            if bursts and at - bursts[-1][-1] <= step:
                bursts[-1].append(at)
            else:
                bursts.append([at])
    for burst in bursts:
        kinds: dict[str, int] = defaultdict(int)
        for at in burst:
            for kind, count in errors[at].items():
                kinds[kind] += count
        bad, of = sum(kinds.values()), sum(totals[at] for at in burst)
        # so many times what the rest lets expect; that most sessions fail by the upstream or by us is never
        # usual, while clients that go away may be
        burst_of_them = every > of and bad * (every - of) >= TIMES_EXPECTED * (every_bad - bad) * of
        if bad < FEWEST_ERRORS or not (burst_of_them or (cause != "clients" and 2 * bad >= of)):
            continue
        told = ", ".join(
            f"{count:,} {kind}" for kind, count in sorted(kinds.items(), key=lambda item: -item[1])
        )
        rest = f", {every_bad - bad:,} of {every - of:,} at other times" if every > of else ""
        length = duration(burst[-1] - burst[0] + step)
        evidence = f"{bad:,} of {of:,} sessions ended by {cause} within {length} ({told}){rest}"
        yield burst[0], evidence


SLOW_TIMERS = {
    "answer_us": "its first answer",
    "connect_us": "connecting to it",
}


def slow_upstream(log: Log) -> Iterator[Finding]:
    """An upstream against its own past, as each engine saw it, in steps of as many sessions each."""
    sessions = log.sessions
    proxied = sessions.filter(sessions.upstream.notnull() & sessions.duration_us.notnull())
    [counted] = log.rows(proxied.aggregate(sessions=proxied.count()))
    if counted["sessions"] > MOST_TIMED:
        # the last digits of a time are chance
        proxied = proxied.filter(proxied.at_us % PRIME < PRIME * MOST_TIMED // counted["sessions"])
    # a client that has not spoken yet, or an older daemon's log: from connected
    asked = (proxied.client_first_us <= proxied.first_byte_us).ifelse(
        proxied.client_first_us, proxied.connect_us
    )
    timed = proxied.select(
        *UPSTREAM,
        *("connect_us", "loop_lag_us"),
        opened=proxied.at_us - proxied.duration_us,
        answer_us=proxied.first_byte_us - ibis.greatest(proxied.connect_us, asked),
    )
    in_order = ibis.window(group_by=UPSTREAM, order_by=("opened", "answer_us", "connect_us"))
    placed = timed.mutate(
        place=ibis.row_number().over(in_order), of=timed.count().over(ibis.window(group_by=UPSTREAM))
    )
    length = ibis.greatest(FEWEST_IN_STEP, (placed["of"] / UPSTREAM_STEPS).ceil().cast("int64"))
    stepped = placed.mutate(step=placed.place - placed.place % length)
    begins = stepped.group_by(*UPSTREAM, "step").aggregate(at_us=stepped.opened.min())
    began = {(row["engine"], row["upstream"], row["step"]): row["at_us"] for row in log.rows(begins)}
    if not began:
        raise Untold("no session with an upstream")
    quantiles = quantile_rows(stepped, (*UPSTREAM, "step"), (*SLOW_TIMERS, "loop_lag_us"))
    rows = [
        row | {"at_us": began[row["engine"], row["upstream"], row["step"]]}
        for row in log.rows(quantiles.order_by(*UPSTREAM, "timer", "step"))
    ]
    lags = {
        (row["engine"], row["upstream"], row["step"]): row["p50"]
        for row in rows
        if row["timer"] == "loop_lag_us"
    }
    for (engine, upstream, timer), group in groupby(
        rows, key=lambda row: (row["engine"], row["upstream"], row["timer"])
    ):
        if timer in SLOW_TIMERS:
            steps = [row | {"lag": lags.get((engine, upstream, row["step"]), 0)} for row in group]
            for at, evidence in _slower(steps, SLOW_TIMERS[timer]):
                yield Finding(
                    name="slow_upstream",
                    at=timestamp(at),
                    engine=engine,
                    where=f"upstream {upstream}",
                    evidence=evidence,
                )


def _slower(rows: Sequence[Mapping[str, Any]], timer: str) -> Iterator[tuple[int, str]]:
    """When it became slow, and the evidence."""
    past: list[Mapping[str, Any]] = []
    slow: list[Mapping[str, Any]] = []
    # one more, which is never slow, to end with
    for row in (*(row for row in rows if 2 * row["sessions"] >= FEWEST_IN_STEP), None):
        if row is not None and len(past) >= FEWEST_BEFORE:
            usual, seldom = (median(each[name] for each in past) for name in ("p50", "p90"))
            more = row["p50"] - usual
            if (
                row["p50"] > seldom
                and more >= max(SLOWER_US, (TIMES_SLOWER - 1) * usual)
                and row["lag"] < more / 2
            ):
                slow.append(row)
                continue
        if len(slow) >= FEWEST_SLOW:
            begin, end = slow[0]["at_us"], (row or slow[-1])["at_us"]
            rate_before = _sessions(past) / max(begin - past[0]["at_us"], 1)
            rate = _sessions(slow[:-1]) / max(slow[-1]["at_us"] - begin, 1)
            lasted = min(end - begin, begin - past[0]["at_us"])
            # a rush of clients makes everybody slow, and a hiccup is none of becoming slow
            if lasted >= SLOW_FOR_US and rate <= TIMES_SLOWER * rate_before:
                usual, now = (median(each["p50"] for each in group) for group in (past, slow))
                last = "to the end of the log" if row is None else f"until {timestamp(end)}"
                took = f"{timer} took {duration(int(now))} instead of {duration(int(usual))}"
                yield begin, f"{took} (medians; {_sessions(slow):,} sessions, {last})"
        slow = []
        if row is not None:
            past.append(row)


def _sessions(steps: Iterable[Mapping[str, Any]]) -> int:
    return sum(step["sessions"] for step in steps)


def stopped_reading(log: Log) -> Iterator[Finding]:
    sessions = log.sessions
    stopped = sessions.filter(
        (sessions.longest_pause_us >= STOPPED_US)
        # not where we did not run ourselves
        & (2 * sessions.loop_lag_us < sessions.longest_pause_us)
    )
    of_client, of_upstream = stopped.paused_s2c_us >= STOPPED_US, stopped.paused_c2s_us >= STOPPED_US
    # where both did not take, one of them waited for the other, and the log does not say which
    who = ibis.cases((of_client & of_upstream, "both"), (of_upstream, "upstream"), else_="client")
    grouped = stopped.group_by("engine", "listener", who=who).aggregate(
        sessions=stopped.count(),
        at_us=(stopped.at_us - stopped.duration_us).min(),
        longest=stopped.longest_pause_us.max(),
        session=stopped.session.argmax(stopped.longest_pause_us),
        peak_buffer=stopped.peak_buffer.max(),
    )
    for row in log.rows(grouped.order_by("engine", "listener", "who")):
        others = f", the longest of {row['sessions']:,} such sessions" if row["sessions"] > 1 else ""
        peers = "client and upstream" if row["who"] == "both" else row["who"]
        yield Finding(
            name=f"{row['who']}_stopped_reading",
            at=timestamp(row["at_us"]),
            engine=row["engine"],
            where=f"listener {row['listener']}, session {row['session']}",
            evidence=f"the {peers} took nothing for {duration(row['longest'])}{others}; "
            f"up to {row['peak_buffer']:,} bytes waited in us",
        )


CHECKS: dict[str, tuple[str, Callable[[Log], Iterator[Finding]]]] = {
    "lost_lines": ("every line is here: seq has no gap", lost_lines),
    "totals_disagree": ("the totals agree with the lines: sessions and bytes", totals_disagree),
    "unended_sessions": ("one close for every open", unended_sessions),
    "pair_differs": ("paired sessions moved the same bytes", pair_differs),
    "engine_fault": ("no bug of the daemon's", engine_fault),
    "listener_paused": ("descriptors never ran out", listener_paused),
    "stalled_loop": ("no loop stalled", stalled_loop),
    "leaking_sessions": ("open sessions do not only grow", leaking_sessions),
    "error_burst": ("errors do not come in bursts", error_burst),
    "slow_upstream": ("no upstream became slow", slow_upstream),
    "stopped_reading": ("every peer takes what it is sent", stopped_reading),
}
