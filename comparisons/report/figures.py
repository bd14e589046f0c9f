"""Which figures a workload's table shows, in which order and how they are written."""

from collections.abc import Callable

import msgspec

from comparisons.results import Cell, Facts, Results, Run, Spread, WorkloadFacts
from comparisons.units import count, microseconds, number, size


class Row(msgspec.Struct, frozen=True):
    """A line of the table: a field of `Cell`, and for which workloads it is shown."""

    label: str
    field: str
    form: Callable[[float], str]
    shown: Callable[[WorkloadFacts], bool] = lambda _: True


def mebibytes(value: float) -> str:
    return number(value / 2**20)


ROWS = (
    Row("throughput, {unit}", "throughput", number),
    Row("ratio to {reference}", "ratio", lambda value: f"{value:.2f}"),
    Row("p50, µs", "p50_us", number),
    Row("p90, µs", "p90_us", number),
    Row("p99, µs", "p99_us", number),
    Row("CPU a request, µs", "cpu_us_per_request", number, lambda workload: workload.unit == "req/s"),
    Row("CPU a connection, µs", "cpu_us_per_request", number, lambda workload: workload.unit == "conn/s"),
    Row("CPU a GB, s", "cpu_s_per_gb", number, lambda workload: workload.size >= 4096),
    Row("PSS, MiB", "pss_bytes", mebibytes),
    Row("PSS a session, KiB", "pss_bytes_per_session", lambda value: number(value / 2**10)),
    Row("threads", "threads", count),
    Row("taken in unread, MiB", "absorbed_bytes", mebibytes),
)


def lines(results: Results, workload: WorkloadFacts, *, ranges: bool) -> list[tuple[str, list[str]]]:
    """The table of one workload: labels, and a text for every subject in their order; "" where there is no figure.

    With `ranges` a figure that has several rounds shows the smallest and the largest too.
    """
    form = _with_range if ranges else _middle
    table = []
    for row in ROWS:
        spreads = [results.spread(workload.name, subject, row.field) for subject in results.subjects]
        if row.shown(workload) and any(spreads):
            label = row.label.format(unit=workload.unit, reference=workload.reference)
            table.append((label, [form(spread, row.form) if spread else "" for spread in spreads]))
    return table


def faults(results: Results, workload: str) -> list[tuple[str, int, str]]:
    """The broken cells of a workload: subject, round, reason."""
    return [
        (cell.subject, cell.round, cell.broken)
        for cell in results.cells
        if cell.workload == workload and cell.broken
    ]


def name(entry: Cell | Run) -> str:
    return f"{entry.workload}, {entry.subject}" if isinstance(entry, Cell) else entry.subject


def run_lines(results: Results, *, ranges: bool) -> list[tuple[str, list[str]]]:
    """The table of the user's own traffic, like `lines`."""
    write = _with_range if ranges else _middle

    def line(label: str, tell: Callable[[Run], str]) -> tuple[str, list[str]]:
        """What every run of a subject says, what is the same said once."""
        told = [
            dict.fromkeys(tell(run) for run in results.runs if run.subject == subject)
            for subject in results.subjects
        ]
        return label, [", ".join(filter(None, texts)) for texts in told]

    def middle(
        label: str, figure: Callable[[Run], float | None], form: Callable[[float], str]
    ) -> tuple[str, list[str]]:
        found = [results.run_spread(subject, figure) for subject in results.subjects]
        return label, [write(spread, form) if spread else "" for spread in found]

    return [
        middle("wall time, s", lambda run: run.wall_s, lambda value: f"{value:.3f}"),
        middle("ratio to direct", lambda run: run.ratio, lambda value: f"{value:.2f}"),
        line("exit status", lambda run: "time limit" if run.status is None else str(run.status)),
        *(line(label, _of_log(tell)) for label, tell in LOGGED),
        middle("p50 of a session", lambda run: run.log.duration_us if run.log else None, microseconds),
    ]


LOGGED: tuple[tuple[str, Callable[[Facts], str]], ...] = (
    ("sessions", lambda facts: f"{facts.closed:,}"),
    ("from clients", lambda facts: size(facts.total_bytes_c2s)),
    ("to clients", lambda facts: size(facts.total_bytes_s2c)),
    ("terminations", lambda facts: ", ".join(f"{end} {n:,}" for end, n in facts.terminations.items())),
)


def _of_log(tell: Callable[[Facts], str]) -> Callable[[Run], str]:
    return lambda run: tell(run.log) if run.log else ""


def _middle(found: Spread, form: Callable[[float], str]) -> str:
    return form(found.median)


def _with_range(found: Spread, form: Callable[[float], str]) -> str:
    low, high = form(found.min), form(found.max)
    return f"{form(found.median)} ({low} .. {high})" if low != high else form(found.median)
