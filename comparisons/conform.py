"""`triptych conform`: the behaviour table as a test of any TCP proxy or echo service.

Starts each peer as a process of its own (or takes an address that is already up), plays the scripted clients
and upstreams of `comparisons/scenarios` on it, and prints which rules hold and what was seen where they do
not. The test suite of our engines plays the same scripts. Nothing but loopback is touched.
"""

import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from shutil import which
from typing import Any

import click
import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from comparisons.conformance import junit, play, report
from comparisons.peers import custom
from comparisons.peers.known import KNOWN
from comparisons.peers.peer import Peer
from comparisons.scenarios.rules import TABLE

GATE_CROSSED, NO_PERMISSION, UNAVAILABLE, CONFIGURATION, INTERRUPTED = 99, 77, 69, 78, 130
# a report in a file or a pipe has no terminal to fit
WIDTH = 160


class Unavailable(click.ClickException):
    exit_code = UNAVAILABLE


class Numbers(click.ParamType[list[int]]):
    """Numbers of the table's rules, as in 4,5."""

    name = "numbers"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        words = str(value).split(",")
        numbers = [int(word) if word.isascii() and word.isdigit() else -1 for word in words]
        if unknown := [word for word, number in zip(words, numbers, strict=True) if number not in TABLE]:
            self.fail(
                f"{unknown[0]!r} is no rule: the table has 1 to 23, and 0 for hostile clients", param, ctx
            )
        return numbers


@click.command("conform")
@click.option(
    "--peer", "peers", type=click.Choice(list(KNOWN)), multiple=True, help="One that is known; repeatable."
)
@click.option(
    "--command",
    "command_line",
    metavar="COMMAND",
    help="Starts your own in the foreground; {listen} and {upstream}, or {host}, {port}, {upstream_host}, "
    "{upstream_port}, say where. {upstream2}, {idle_ms}, {half_close_ms}, {connect_ms}, {drain_ms}, "
    "{dead_peer_ms} and {buffer} let more rules be played.",
)
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="A file for --command, which names it {config}; the same placeholders are replaced in it.",
)
@click.option("--address", metavar="ADDR", help="One that is already up, instead of a command.")
@click.option(
    "--upstream-listen",
    "upstreams",
    metavar="ADDR",
    multiple=True,
    help="Where it dials; conform listens there. Given twice, for two upstreams.",
)
@click.option("--echo", is_flag=True, help="The command or address is an echo service, not a proxy.")
@click.option("--rule", "numbers", type=Numbers(), metavar="N,N", help="Only these rules.")
@click.option("--verbose", is_flag=True, help="Print what was seen of every rule.")
@click.option("--markdown", is_flag=True, help="Print a table for a README instead, a line for each rule.")
@click.option("--json", "as_json", is_flag=True, help="Print everything for a machine instead.")
@click.option(
    "--junit",
    "junit_path",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Write the results as JUnit XML, too.",
)
def command(
    *,
    peers: tuple[str, ...],
    command_line: str | None,
    config: Path | None,
    address: str | None,
    upstreams: tuple[str, ...],
    echo: bool,
    numbers: list[int] | None,
    verbose: bool,
    markdown: bool,
    as_json: bool,
    junit_path: Path | None,
) -> int:
    """Test any TCP proxy or echo service against the behaviour table."""
    if markdown and as_json:
        raise click.UsageError("--markdown and --json: give one of them")
    chosen = [KNOWN[name] for name in dict.fromkeys(peers)]
    chosen += _own(command_line, config, address, upstreams, echo=echo)
    if not chosen:
        raise click.UsageError("nothing to test: give --peer, --command or --address")
    rules = play.scenarios_of(numbers or ())
    missing = play.without_scenario(numbers or ())
    if not rules:
        raise click.UsageError(f"no scenario shows rule {report.listed(missing)} yet")
    for peer in chosen:
        for program in peer.programs:
            if which(program) is None:
                raise Unavailable(f"{peer.name}: {program} is not installed, or not on PATH")
    if junit_path:
        junit_path.touch()  # what cannot be written is told now, and not when all is done
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    results = report.Results(without_scenario=missing)
    began = time.monotonic()
    interrupted = False
    with _progress() as progress:
        task = progress.add_task("", total=len(chosen) * len(rules))
        try:
            for peer in chosen:
                progress.update(task, description=peer.name)
                version = peer.version()
                verdicts = play.play(peer, rules, lambda _: progress.advance(task))
                results.peers.append(report.PeerResults.of(peer.name, version, verdicts))
        except KeyboardInterrupt:
            interrupted = True
    results.seconds = round(time.monotonic() - began, 1)
    if junit_path:
        junit_path.write_bytes(junit.document(results))
    if as_json:
        click.echo(msgspec.json.format(msgspec.json.encode(results), indent=1))
    elif markdown:
        click.echo(report.markdown(results), nl=False)
    else:
        console = Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False)
        console.print(report.table(results, verbose=verbose))
    return INTERRUPTED if interrupted else _exit_code(results)


def _own(
    command_line: str | None,
    config: Path | None,
    address: str | None,
    upstreams: Sequence[str],
    *,
    echo: bool,
) -> list[Peer]:
    """The peers that have no adapter."""
    if config and command_line is None:
        raise click.UsageError("--config is a file for --command: give both")
    if upstreams and address is None:
        raise click.UsageError("--upstream-listen is where an --address dials: give both")
    if echo and command_line is None and address is None:
        raise click.UsageError("--echo tells what a --command or an --address is: give one of them")
    try:
        peers = [] if command_line is None else [custom.by_command(command_line, config, echo=echo)]
        return peers if address is None else [*peers, custom.by_address(address, upstreams, echo=echo)]
    except ValueError as error:
        raise click.UsageError(str(error)) from error


def _exit_code(results: report.Results) -> int:
    met = {verdict.status for peer in results.peers for verdict in peer.verdicts}
    if "broken" in met:
        return GATE_CROSSED
    if "needs root" in met:
        return NO_PERMISSION
    # nothing was shown: that is no success
    return 0 if met & set(play.JUDGED) else CONFIGURATION


def _progress() -> Progress:
    """On stderr, and only if that is a terminal."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("{task.description}")
    return Progress(*columns, console=console, transient=True, disable=not console.is_terminal)
