"""Runs the cells: processes, cores, rounds.

For every workload of a round the daemons are started together, each fresh, and each with a
load process of its own that already waits; then they are measured one after the other in
shuffled order, while the others sleep. Whatever happens to a subject costs its own cell.
"""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Self

import msgspec

from comparisons import daemon_log
from comparisons.descriptors import allow_descriptors
from comparisons.load.job import Job, Outcome
from comparisons.results import Cell
from comparisons.subjects import Running, Subject, SubjectFailed
from comparisons.workloads.table import Workload

LOAD_LIMIT = 20.0  # seconds beyond its window after which a load is ended: it gives up by itself before that


class Cores(msgspec.Struct, frozen=True):
    """Which core each process gets; null leaves it to the kernel."""

    daemon: int | None
    load: int | None
    upstream: int | None
    note: str

    @classmethod
    def choose(cls) -> Self:
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < 2:
            note = "one core only: the daemon and its load share it, unpinned, and slow each other down"
            return cls(None, None, None, note)
        # first and last: neighbours are often two threads of one core
        if len(cores) == 2:
            return cls(cores[1], cores[0], cores[0], "the daemon on one core, load and upstream on the other")
        return cls(cores[-1], cores[0], cores[1], "daemon, load and upstream on a core each")


class Bench:
    """What all cells of a comparison share: the cores, the upstream process, and a folder that is removed.

    Leaving it ends every process that is still there.
    """

    def __init__(self, cores: Cores, seed: int, seconds: float) -> None:
        self.cores = cores
        self.seed = seed
        self.seconds = seconds
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        self._folder = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="triptych-")))
        self._folders = 0
        echo, source = self._stack.enter_context(listen()), self._stack.enter_context(listen())
        self.upstreams = {"echo": address(echo), "source": address(source)}
        descriptors = [echo.fileno(), source.fileno()]
        arguments = ["-m", "comparisons.load.upstream", str(self.seed), *map(str, descriptors)]
        self.process(arguments, self.cores.upstream, descriptors)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()

    def folder(self) -> Path:
        self._folders += 1
        folder = self._folder / str(self._folders)
        folder.mkdir()
        return folder

    def process(
        self, arguments: list[str], core: int | None, descriptors: Sequence[int] = ()
    ) -> "subprocess.Popen[bytes]":
        """A Python process on `core`, with pipes; it is ended with the bench at the latest."""
        process = subprocess.Popen(
            [sys.executable, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            pass_fds=descriptors,
            start_new_session=True,
        )
        self._stack.callback(end, process)
        if core is not None:
            os.sched_setaffinity(process.pid, {core})
        return process

    def client(self, arguments: list[str], output: IO[bytes]) -> "subprocess.Popen[bytes]":
        """A program of the user's on the load's core, the leader of a group: it may start others."""
        process: subprocess.Popen[bytes] = subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
        self._stack.callback(end_group, process)
        if self.cores.load is not None:
            # ended already: so short a client needs no core of its own
            with contextlib.suppress(ProcessLookupError):
                os.sched_setaffinity(process.pid, {self.cores.load})
        return process

    def start(self, subject: Subject, service: str, upstream: str | None) -> Running:
        running = subject.start(service, upstream, self.folder(), self.cores.daemon)
        self._stack.callback(running.kill)
        return running


def listen() -> socket.socket:
    """A listener that the process which serves it inherits; it can be connected to from now on."""
    return socket.create_server(("127.0.0.1", 0), backlog=4096)


def address(listener: socket.socket) -> str:
    return f"127.0.0.1:{listener.getsockname()[1]}"


def end(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


def end_group(process: "subprocess.Popen[bytes]") -> None:
    """Ends a client that still runs, with everything it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_round(
    bench: Bench,
    number: int,
    workloads: Sequence[Workload],
    engines: Sequence[Subject],
    floor: Subject,
    *,
    quick: bool,
    order: random.Random,
) -> Iterator[Cell]:
    """The cells of one round as they are done; ratios come last, once the whole workload is there."""
    for workload in workloads:
        subjects = [*engines, floor] if workload.upstream else list(engines)
        order.shuffle(subjects)
        with contextlib.ExitStack() as stack:
            prepared = [Prepared(bench, workload, subject, stack) for subject in subjects]
            cells = [
                prepared_cell.measure(number, place, quick=quick)
                for place, prepared_cell in enumerate(prepared, 1)
            ]
        _compare(cells, workload, floor.name)
        yield from cells


class Prepared:
    """A subject and its load, both started, neither running yet."""

    def __init__(
        self, bench: Bench, workload: Workload, subject: Subject, stack: contextlib.ExitStack
    ) -> None:
        self._bench = bench
        self._workload = workload
        self._subject = subject
        upstream = None
        self._listener: socket.socket | None = None
        if workload.upstream == "load":
            # bound here, so that the daemon can be told where its upstream is, and played by the load
            self._listener = stack.enter_context(listen())
            upstream = address(self._listener)
        elif workload.upstream is not None:
            upstream = bench.upstreams[workload.upstream]
        descriptors = [] if self._listener is None else [self._listener.fileno()]
        self._running = bench.start(subject, workload.service, upstream)
        self._load = bench.process(["-m", "comparisons.load"], bench.cores.load, descriptors)

    def measure(self, number: int, place: int, *, quick: bool) -> Cell:
        cell = Cell(workload=self._workload.name, subject=self._subject.name, round=number, place=place)
        try:
            outcome = self._run_load(self._running.address(), quick=quick)
            if outcome.fault:
                # a daemon that died says more than what the load saw of it
                raise SubjectFailed(self._running.died() or outcome.fault)  # noqa: TRY301  one way out of a cell
            cell.log = self._running.finish()
        except SubjectFailed as failure:
            cell.broken = str(failure)
            return cell
        finally:
            self._running.kill()
            end(self._load)
        _fill(cell, outcome, self._workload)
        if cell.log is not None:
            cell.broken = daemon_log.disagreement(
                cell.log, outcome.sessions, outcome.bytes_sent, outcome.bytes_received
            )
        return cell

    def _run_load(self, address: str, *, quick: bool) -> Outcome:
        workload = self._workload
        connections = (
            workload.quick_connections if quick and workload.quick_connections else workload.connections
        )
        job = Job(
            kind=workload.kind,
            address=address,
            # a proxied session takes two descriptors of a daemon; leave some for everything else
            connections=min(connections, (allow_descriptors() - 200) // 2),
            size=workload.size,
            seconds=self._bench.seconds,
            stalled=workload.stalled,
            seed=self._bench.seed,
            recording=workload.recording,
            listener=None if self._listener is None else self._listener.fileno(),
            daemon=self._running.pid,
        )
        try:
            said, complaint = self._load.communicate(
                msgspec.json.encode(job) + b"\n", job.seconds + LOAD_LIMIT
            )
        except subprocess.TimeoutExpired:
            return Outcome(fault=f"the load did not end within {job.seconds + LOAD_LIMIT:g} s")
        if not said:
            last = complaint.decode(errors="replace").strip().rpartition("\n")[2]
            return Outcome(fault=f"the load process died with status {self._load.returncode}: {last}")
        return msgspec.json.decode(said, type=Outcome)


def _fill(cell: Cell, outcome: Outcome, workload: Workload) -> None:
    """The figures of a cell out of what the load measured."""
    for name in ("sessions", "exchanges", "bytes_sent", "bytes_received", "requests", "seconds"):
        setattr(cell, name, getattr(outcome, name))
    for name in ("pss_bytes", "threads", "absorbed_bytes"):
        setattr(cell, name, getattr(outcome, name))
    if outcome.latency is not None:
        cell.p50_us, cell.p90_us = outcome.latency.p50, outcome.latency.p90
        cell.p99_us, cell.max_us = outcome.latency.p99, outcome.latency.max
    if not outcome.seconds:
        return
    cell.throughput = outcome.requests / outcome.seconds
    if workload.unit == "Gbit/s":
        cell.throughput = outcome.payload_bytes * 8 / 1e9 / outcome.seconds
    cell.load_busy = outcome.load_cpu_us / 1e6 / outcome.seconds
    if outcome.daemon_cpu_us is not None:
        cell.daemon_busy = outcome.daemon_cpu_us / 1e6 / outcome.seconds
        if outcome.requests:
            cell.cpu_us_per_request = outcome.daemon_cpu_us / outcome.requests
        if outcome.payload_bytes:
            cell.cpu_s_per_gb = outcome.daemon_cpu_us * 1e3 / outcome.payload_bytes
    if workload.kind == "idle" and outcome.pss_bytes is not None and outcome.pss_before is not None:
        cell.pss_bytes_per_session = (outcome.pss_bytes - outcome.pss_before) / outcome.sessions


def _compare(cells: list[Cell], workload: Workload, floor: str) -> None:
    """Each unbroken cell's headline against the floor of this round, or its best engine where there is no floor."""
    figures = {
        cell.subject: figure
        for cell in cells
        if not cell.broken and (figure := getattr(cell, workload.headline)) is not None
    }
    best: Callable[[Sequence[float]], float] = max if workload.headline == "throughput" else min
    engines = [figure for name, figure in figures.items() if name != floor]
    reference = figures.get(floor, best(engines) if engines else None)
    for cell in cells:
        if reference and cell.subject in figures:
            cell.ratio = figures[cell.subject] / reference
