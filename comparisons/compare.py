"""`triptych compare`: the engines on the same workloads, or on the user's own traffic.

Writes `results.json` and `report.html`, prints the table (or, with --json, the results), and
says with its exit code whether a cell is broken.
"""

import datetime as dt
import random
import re
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparisons import own_traffic, runner
from comparisons.own_traffic import Traffic
from comparisons.recordings import flags
from comparisons.recordings.script import Script
from comparisons.report import page, table
from comparisons.results import Cell, Results, Run, WorkloadFacts, machine
from comparisons.runner import Bench, Cores
from comparisons.subjects import Direct, Engine, Subject
from comparisons.workloads import signals
from comparisons.workloads.table import WORKLOADS, Workload
from services.config import ENGINES
from services.core.addresses import Address

GATE_CROSSED, UNAVAILABLE, INTERRUPTED = 99, 69, 130
WINDOW, QUICK_WINDOW = 0.4, 0.2  # seconds in which a cell is measured
ROUNDS, QUICK_ROUNDS = 3, 1
# without --rounds no round is begun that would end later than this: 2 minutes are promised
BUDGET = 115.0


class Unavailable(click.ClickException):
    exit_code = UNAVAILABLE


@click.command("compare")
@click.option("--quick", is_flag=True, help="One round of short windows: half a minute at most.")
@click.option(
    "--engine", "engines", type=click.Choice(ENGINES), multiple=True, help="Only this engine; repeatable."
)
@click.option(
    "--workload",
    "names",
    type=click.Choice([workload.name for workload in WORKLOADS]),
    multiple=True,
    help="Only this workload; repeatable.",
)
@click.option(
    "--recording",
    metavar="FILE",
    help="Only this workload: your own recording, as `triptych record` writes it.",
)
@click.option(
    "--rounds", type=click.IntRange(1, 1000), help="How often every cell is measured; 3, or 1 with --quick."
)
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    default="triptych-compare",
    show_default=True,
    help="The folder for results.json and report.html.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the results instead of the table.")
@click.option("--seed", type=click.IntRange(0), help="Of the order and the bytes; by default a new one.")
@click.option("--upstream", metavar="HOST:PORT", help="Your own server; needs --client.")
@click.option(
    "--client", metavar="COMMAND", help="Your own client, with {host} and {port} where they belong."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=60.0,
    show_default=True,
    help="Seconds for a --client run.",
)
def command(
    *,
    quick: bool,
    engines: tuple[str, ...],
    names: tuple[str, ...],
    recording: str | None,
    rounds: int | None,
    out: Path,
    as_json: bool,
    seed: int | None,
    upstream: str | None,
    client: str | None,
    timeout: float,
) -> int:
    """Run the three engines on the same workloads, or on your own traffic."""
    if (upstream is None) != (client is None):
        raise click.UsageError("--upstream and --client belong together: give both or neither")
    if sum([client is not None, bool(names), recording is not None]) > 1:
        raise click.UsageError("--workload, --recording and --client have no place beside each other")
    if upstream is not None and client is not None:
        _check_own(upstream, client)
        try:
            own_traffic.reach(upstream)
        except own_traffic.Unusable as error:
            raise Unavailable(str(error)) from error
    out.mkdir(parents=True, exist_ok=True)
    cores = Cores.choose()
    if cores.daemon is None:
        click.echo(f"triptych: {cores.note}", err=True)
    results = Results(
        created=dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        command=without_paths(sys.argv[1:]),
        seed=random.SystemRandom().randrange(2**32) if seed is None else seed,
        quick=quick,
        rounds=rounds or (QUICK_ROUNDS if quick else ROUNDS),
        machine=machine(pinned=cores.daemon is not None, pinning=cores.note),
        subjects=[Direct.name, *(engine for engine in ENGINES if engine in engines or not engines)],
        client=without_paths(shlex.split(client or "")),
    )
    workloads = [workload for workload in WORKLOADS if workload.name in names or not names]
    if recording is not None:
        workloads = [_recorded(recording)]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with Bench(cores, results.seed, QUICK_WINDOW if quick else WINDOW) as bench, _progress() as progress:
        if client is not None and upstream is not None:
            rows: Rows = _own_rows(bench, results, Traffic(client, upstream, timeout))
            cells = len(results.subjects)
        else:
            rows = _rows(bench, results, workloads)
            cells = sum(len(results.subjects) - (workload.upstream is None) for workload in workloads)
        task = progress.add_task("", total=cells * results.rounds)
        begun = time.monotonic()
        longest = 0.0
        try:
            for number in range(1, results.rounds + 1):
                if rounds is None and time.monotonic() - begun + longest > BUDGET:
                    results.rounds = number - 1
                    click.echo(
                        f"triptych: this machine has time for {results.rounds} rounds in two minutes",
                        err=True,
                    )
                    break
                round_begun = time.monotonic()
                for entry in rows(number):
                    progress.update(task, advance=1, description=f"round {number}: {_name(entry)}")
                longest = max(longest, time.monotonic() - round_begun)
            results.complete = True
        except KeyboardInterrupt:
            click.echo("triptych: interrupted, what was measured so far is written", err=True)
        except own_traffic.Unusable as error:
            raise Unavailable(str(error)) from error
        results.seconds = round(time.monotonic() - begun, 1)
    results.workloads = [_told(results, workload) for workload in workloads if client is None]
    (out / "results.json").write_bytes(msgspec.json.format(msgspec.json.encode(results), indent=1))
    (out / "report.html").write_text(page.render(results), encoding="utf-8")
    if as_json:
        click.echo(msgspec.json.encode(results))
    else:
        Console().print(table.render(results))
        click.echo(f"{out / 'report.html'} and {out / 'results.json'}; seed {results.seed}")
    if not results.complete:
        return INTERRUPTED
    return GATE_CROSSED if results.broken() else 0


Rows = Callable[[int], Iterator[Cell | Run]]


def _rows(bench: Bench, results: Results, workloads: list[Workload]) -> Rows:
    """What yields the cells of a round, each kept as soon as it is there."""
    engines = [Engine(name) for name in results.subjects if name != Direct.name]
    order = random.Random(results.seed)  # noqa: S311  an order that can be had again is the aim

    def rows(number: int) -> Iterator[Cell]:
        for cell in runner.run_round(
            bench, number, workloads, engines, Direct(), quick=results.quick, order=order
        ):
            results.cells.append(cell)
            yield cell

    return rows


def _own_rows(bench: Bench, results: Results, traffic: Traffic) -> Rows:
    """The same for the user's own client."""
    subjects: list[Subject] = [*(Engine(name) for name in results.subjects if name != Direct.name), Direct()]
    order = random.Random(results.seed)  # noqa: S311  as above

    def rows(number: int) -> Iterator[Run]:
        for run in own_traffic.run_round(bench, number, subjects, traffic, order):
            results.runs.append(run)
            yield run

    return rows


def _recorded(file: str) -> Workload:
    """The user's own recording, both ends of it played as fast as the order of bytes allows."""
    found = flags.opened(file)
    if not any(exchange for each in found.conversations for exchange in Script(each, 0).answers):
        raise flags.NoRecording(f"{file}: nobody answers anybody in it, so there is nothing to compare")
    name = Path(file).stem
    return Workload(
        name=name,
        title=f"Proxy, replay of {name}",
        about=f"{len(found.conversations):,} recorded conversations, both ends played again as fast as the order of bytes allows.",
        kind="replay",
        service="proxy",
        upstream="load",
        recording=file,
    )


def _told(results: Results, workload: Workload) -> WorkloadFacts:
    return WorkloadFacts(
        name=workload.name,
        title=workload.title,
        about=workload.about,
        unit=workload.unit,
        size=workload.size,
        headline=workload.headline,
        reference=workload.reference,
        sentence=signals.sentence(results, workload),
        signals=signals.figures(results, workload),
    )


def _name(entry: Cell | Run) -> str:
    return f"{entry.workload}, {entry.subject}" if isinstance(entry, Cell) else entry.subject


def _check_own(upstream: str, client: str) -> None:
    try:
        address = Address.parse(upstream)
        parts = own_traffic.words(client, upstream)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if address.transport != "tcp" or not address.port:
        raise click.UsageError(f"--upstream: {upstream!r} is no HOST:PORT of a TCP server")
    if not parts:
        raise click.UsageError("--client: the command is empty")
    if "{port}" not in client:
        raise click.UsageError("--client: without {port} in it the command cannot reach what is compared")


def without_paths(arguments: list[str]) -> list[str]:
    """A command line that tells nothing of the machine's folders: of an absolute path its last part is kept."""
    return [re.sub(r"(^|=)/(\S*/)?", r"\1", argument) for argument in arguments]


def _progress() -> Progress:
    """On stderr, and only if that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
