"""What a comparison found, as it is written to results.json: version 1 of that format.

A cell is one subject under one workload in one round. A broken cell keeps its reason and
never enters a median. Nothing in here names the host or a path of it.
"""

import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path
from statistics import median

import msgspec

VERSION = 1
PACKAGES = (
    "triptych",
    "click",
    "hdrhistogram",
    "msgspec",
    "plotly",
    "psutil",
    "rich",
    "structlog",
    "twisted",
)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """One daemon's log, added up. Totals are those of `service_stopped`; the rest comes from the
    `session_closed` lines: sums, the largest `peak_buffer` and `loop_lag_us`, and medians of the durations.
    """

    sessions: int
    closed: int
    bytes_c2s: int
    bytes_s2c: int
    total_bytes_c2s: int
    total_bytes_s2c: int
    lines_dropped: int
    engine_faults: int
    reads: int
    writes: int
    partial_writes: int
    would_block: int
    pauses: int
    paused_us: int
    peak_buffer: int
    spliced_bytes: int
    loop_lag_us: int
    most_open: int
    terminations: dict[str, int]
    accept_wait_us: float | None
    connect_us: float | None
    first_byte_us: float | None
    duration_us: float | None


class Cell(msgspec.Struct, kw_only=True):
    """`place` is the subject's turn in the shuffled round. `ratio` compares the workload's headline with
    the floor (proxied workloads) or the best engine of the same round; busy shares are of one core.
    """

    workload: str
    subject: str
    round: int
    place: int
    broken: str | None = None
    sessions: int | None = None
    exchanges: int | None = None
    bytes_sent: int | None = None
    bytes_received: int | None = None
    requests: int | None = None
    seconds: float | None = None
    throughput: float | None = None
    p50_us: float | None = None
    p90_us: float | None = None
    p99_us: float | None = None
    max_us: float | None = None
    cpu_us_per_request: float | None = None
    cpu_s_per_gb: float | None = None
    pss_bytes: int | None = None
    pss_bytes_per_session: float | None = None
    threads: int | None = None
    absorbed_bytes: int | None = None
    daemon_busy: float | None = None
    load_busy: float | None = None
    ratio: float | None = None
    log: Facts | None = None


class Run(msgspec.Struct, kw_only=True):
    """One run of the user's own client through one subject; `status` is null when it was ended at its time limit."""

    subject: str
    round: int
    place: int
    broken: str | None = None
    status: int | None = None
    wall_s: float | None = None
    ratio: float | None = None
    last_lines: list[str] = []
    log: Facts | None = None


class Spread(msgspec.Struct, frozen=True):
    """The median over the rounds that were not broken, and how far they lie apart."""

    median: float
    min: float
    max: float


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    kernel: str
    processor: str
    cores: int
    python: str
    pinning: str
    pinned: bool
    packages: dict[str, str]


class WorkloadFacts(msgspec.Struct, frozen=True, kw_only=True):
    """A workload as it was run, and what the logs say about it: in a sentence, and by signal and subject."""

    name: str
    title: str
    about: str
    unit: str
    size: int
    headline: str
    reference: str
    sentence: str
    signals: dict[str, dict[str, str]]


class Results(msgspec.Struct, kw_only=True):
    version: int = VERSION
    created: str
    command: list[str]
    seed: int
    quick: bool
    rounds: int
    complete: bool = False
    seconds: float = 0.0
    machine: Machine
    subjects: list[str]
    workloads: list[WorkloadFacts] = []
    cells: list[Cell] = []
    client: list[str] = []
    runs: list[Run] = []

    def broken(self) -> list[Cell | Run]:
        entries: list[Cell | Run] = [*self.cells, *self.runs]
        return [entry for entry in entries if entry.broken]

    def spread(self, workload: str, subject: str, field: str) -> Spread | None:
        """One figure of one subject over the rounds; null when no round has it."""
        return spread(
            [
                getattr(cell, field)
                for cell in self.cells
                if cell.workload == workload and cell.subject == subject and not cell.broken
            ]
        )

    def run_spread(self, subject: str, figure: Callable[[Run], float | None]) -> Spread | None:
        """The same for the user's own client."""
        return spread([figure(run) for run in self.runs if run.subject == subject and not run.broken])


def spread(values: list[float | None]) -> Spread | None:
    known = [value for value in values if value is not None]
    return Spread(median(known), min(known), max(known)) if known else None


def machine(pinned: bool, pinning: str) -> Machine:
    """What of this machine a reader of the numbers needs, without its name."""
    processor = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    return Machine(
        kernel=f"{platform.system()} {platform.release()}",
        processor=processor,
        cores=os.cpu_count() or 1,
        python=platform.python_version(),
        pinning=pinning,
        pinned=pinned,
        packages={name: importlib.metadata.version(name) for name in PACKAGES if _installed(name)},
    )


def _installed(name: str) -> bool:
    try:
        importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:  # triptych itself, when it runs from a checkout
        return False
    return True
