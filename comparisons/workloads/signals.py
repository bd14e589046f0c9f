"""One sentence a workload on what the logs say about why: derived from the figures, never written by hand.

A signal is a figure that a daemon's log (or, for threads and load, the kernel) gives for a
cell. Those on which the engines differ most are named, with their numbers; where nothing
differs, the sentence says so.
"""

import math
from collections.abc import Callable
from statistics import median

import msgspec

from comparisons.load.job import Kind
from comparisons.results import Cell, Facts, Results
from comparisons.units import count, headline, microseconds, percent, size
from comparisons.workloads.table import Workload

FLOOR = "direct"
LEVEL = 1.05  # engines closer than this are called level
DIFFERENT = 1.2  # a signal differs when its largest value is at least so many times its smallest
NAMED, ALIKE = 3, 2  # how many signals that differ, and that are the same, a sentence names


class Signal(msgspec.Struct, frozen=True):
    """`value` gives null where it cannot be said. Values below `least` count as `least` when two are compared:
    2 pauses in a run are not infinitely more than none.
    """

    name: str
    form: Callable[[float], str]
    least: float
    value: Callable[[Facts, Cell], float | None]


def _a_request(field: str) -> Signal:
    def value(facts: Facts, cell: Cell) -> float | None:
        return getattr(facts, field) / cell.exchanges if cell.exchanges else None

    return Signal(f"{field} a request", lambda value: f"{value:.2f}", 0.05, value)


def _a_megabyte(field: str) -> Signal:
    def value(facts: Facts, _: Cell) -> float | None:
        return getattr(facts, field) / facts.bytes_s2c * 1e6 if facts.bytes_s2c else None

    return Signal(f"{field} a MB", lambda value: f"{value:.1f}", 0.5, value)


def _of_log(field: str, form: Callable[[float], str], least: float) -> Signal:
    return Signal(field, form, least, lambda facts, _: getattr(facts, field))


THREADS = Signal("threads", count, 1, lambda _, cell: cell.threads)
BUSY = Signal("share of its core used", percent, 0.05, lambda _, cell: cell.daemon_busy)
CPU = Signal("CPU a request", microseconds, 1, lambda _, cell: cell.cpu_us_per_request)
CPU_A_GB = Signal("CPU a GB", lambda value: f"{value:.2f} s", 0.05, lambda _, cell: cell.cpu_s_per_gb)
ACCEPT_WAIT = _of_log("accept_wait_us", microseconds, 1000)  # the kernel tells it in milliseconds
CONNECT = _of_log("connect_us", microseconds, 20)
FIRST_BYTE = _of_log("first_byte_us", microseconds, 20)
DURATION = _of_log("duration_us", microseconds, 100)
LAG = _of_log("loop_lag_us", microseconds, 5000)
PAUSES = _of_log("pauses", count, 5)
PAUSED = _of_log("paused_us", microseconds, 10_000)
PEAK = _of_log("peak_buffer", size, 1024)
SPLICED = _of_log("spliced_bytes", size, 2**20)

SIGNALS: dict[Kind, tuple[Signal, ...]] = {
    "round_trips": (
        _a_request("reads"),
        _a_request("writes"),
        _a_request("would_block"),
        _a_request("partial_writes"),
        CPU,
        THREADS,
        BUSY,
        LAG,
        PAUSES,
        PAUSED,
        PEAK,
    ),
    "bulk": (
        _a_megabyte("reads"),
        _a_megabyte("writes"),
        _a_megabyte("partial_writes"),
        _a_megabyte("would_block"),
        CPU_A_GB,
        THREADS,
        BUSY,
        PAUSED,
        PEAK,
        SPLICED,
    ),
    "burst": (ACCEPT_WAIT, FIRST_BYTE, DURATION, LAG, BUSY, _of_log("most_open", count, 5)),
    "idle": (THREADS, ACCEPT_WAIT, CONNECT, FIRST_BYTE, LAG, PEAK),
    "replay": (
        _a_request("reads"),
        _a_request("writes"),
        _a_request("would_block"),
        CPU,
        CONNECT,
        FIRST_BYTE,
        BUSY,
        PAUSES,
        LAG,
    ),
}


def figures(results: Results, workload: Workload) -> dict[str, dict[str, str]]:
    """Every signal of the workload, as text, for every subject that has it: medians over the rounds."""
    told = {
        signal.name: {name: signal.form(value) for name, value in _medians(signal, results, workload).items()}
        for signal in SIGNALS[workload.kind]
    }
    return {name: texts for name, texts in told.items() if texts}


def sentence(results: Results, workload: Workload) -> str:
    """Who led, by how much, and in what the logs differ most."""
    headlines = {
        name: figure.median
        for name in results.subjects
        if name != FLOOR and (figure := results.spread(workload.name, name, workload.headline))
    }
    if not headlines:
        return "No engine has an unbroken cell here, so the logs explain nothing."
    seen = [
        (signal, values)
        for signal in SIGNALS[workload.kind]
        if (values := _medians(signal, results, workload)).keys() == headlines.keys()
    ]
    ranked = sorted(seen, key=lambda pair: -_difference(*pair))
    told = [pair for pair in ranked if _difference(*pair) >= math.log(DIFFERENT)][:NAMED]
    lead = _lead(results, workload, headlines)
    if len(headlines) == 1:
        return f"{lead}; its log tells {_listing([_compare(*pair) for pair in seen[:NAMED]])}."
    if not told:
        return f"{lead}; they do not differ by more than a fifth in {_listing([s.name for s, _ in seen])}."
    same = [
        f"{signal.name} ({signal.form(max(values.values()))})"
        for signal, values in seen
        if max(values.values()) > signal.least and len(set(map(signal.form, values.values()))) == 1
    ]
    alike = f", but not in {_listing(same[:ALIKE])}" if same else ""
    return f"{lead}; they differ most in {_listing([_compare(*pair) for pair in told], '; ')}{alike}."


def _lead(results: Results, workload: Workload, figures: dict[str, float]) -> str:
    smaller = workload.headline != "throughput"
    ordered = sorted(figures, key=lambda name: figures[name] if smaller else -figures[name])
    best, worst = ordered[0], ordered[-1]
    floor = results.spread(workload.name, FLOOR, workload.headline)
    told = headline(workload.headline, workload.unit, figures[best])
    of_floor = f" ({figures[best] / floor.median:.0%} of direct)" if floor and floor.median else ""
    if len(figures) == 1:
        return f"{best} alone: {told}{of_floor}"
    times = max(figures[best], figures[worst]) / max(min(figures[best], figures[worst]), 1e-9)
    if times < LEVEL:
        return f"The engines are level, {best} at {told}{of_floor}"
    if smaller:
        return f"{best} needs least, {told}; {worst} needs {times:.1f} times that"
    return f"{best} led with {told}{of_floor}, {times:.1f} times {worst}'s"


def _medians(signal: Signal, results: Results, workload: Workload) -> dict[str, float]:
    """The signal of every engine that has it, in the order of the subjects."""
    found: dict[str, list[float]] = {name: [] for name in results.subjects}
    for cell in results.cells:
        if cell.workload == workload.name and cell.log and not cell.broken:
            value = signal.value(cell.log, cell)
            found[cell.subject] += [] if value is None else [value]
    return {name: median(values) for name, values in found.items() if values}


def _difference(signal: Signal, values: dict[str, float]) -> float:
    """How far apart the engines are, as the logarithm of the ratio."""
    return math.log(max(signal.least, *values.values()) / max(signal.least, min(values.values())))


def _compare(signal: Signal, values: dict[str, float]) -> str:
    """The signal with every engine's value, engines of one value together."""
    groups: dict[str, list[str]] = {}
    for name, value in values.items():
        groups.setdefault(signal.form(value), []).append(name)
    return f"{signal.name} ({', '.join(f'{_listing(names)} {text}' for text, names in groups.items())})"


def _listing(parts: list[str], separator: str = ", ") -> str:
    return separator.join(parts[:-1]) + (" and " if len(parts) > 1 else "") + parts[-1]
