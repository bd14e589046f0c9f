"""`triptych replay`: a recording's clients against a real server, or its servers for real clients."""

import os
import signal
from collections import Counter
from pathlib import Path

import click
import msgspec
from msgspec.structs import replace

from comparisons.recordings import flags
from comparisons.recordings.clients import Came, Clients, Report, Times
from comparisons.recordings.format import Recording
from comparisons.recordings.served import Served, Servers
from comparisons.units import microseconds
from services.config import ListenerConfig
from services.core.addresses import Address
from services.endpoints import EndpointError, close_listeners, exposure, open_listeners, resolve

VERSION = 1  # of what --json prints
SHOWN = 10  # conversations that went differently, and clients that nobody knows
INTERRUPTED = 130
ENDED = {"end": "FIN", "reset": "RST", "open": "nothing"}


class Unreachable(click.ClickException):
    exit_code = os.EX_UNAVAILABLE


class Played(msgspec.Struct, frozen=True):
    """What --json prints: `report` of the clients' side, `served` of the servers'. `speed` null is as fast as it goes."""

    version: int
    recording: str
    speed: float | None
    loops: int
    report: Report | None = None
    served: Served | None = None


def speed(text: str) -> float:
    """How many times as fast as recorded; 0 for max."""
    if text == "max":
        return 0.0
    try:
        found = float(text.removesuffix("x"))
    except ValueError:
        found = 0.0
    if not 0.001 <= found <= 1_000_000:
        raise click.BadParameter(f"{text!r} is neither max nor a number from 0.001 on, as in 10")
    return found


@click.command("replay")
@click.argument("file")
@click.option(
    "--upstream",
    type=flags.upstream,
    metavar="ADDR",
    help="The server, or a proxy before it, to play the clients against.",
)
@click.option(
    "--serve",
    type=flags.listener,
    metavar="ADDR",
    help="Play the servers here, for clients that say what was recorded.",
)
@click.option(
    "--speed", "times", type=speed, metavar="N|max", default="1", show_default=True, help="Times as recorded."
)
@click.option("--loops", type=click.IntRange(1), help="Play it so many times; 1 if not given.")
@click.option(
    "--concurrency",
    type=click.IntRange(1),
    help="Play at most so many conversations at a time; the others wait, and are late.",
)
@click.option(
    "--proxy-protocol",
    "introduced",
    is_flag=True,
    help="Begin with a PROXY header: what is played is then the `pair` in the upstream's log.",
)
@click.option(
    "--json", "as_json", is_flag=True, help="All of it as JSON, also every conversation with its port."
)
def command(
    *,
    file: str,
    upstream: Address | None,
    serve: Address | None,
    times: float,
    loops: int | None,
    concurrency: int | None,
    introduced: bool,
    as_json: bool,
) -> int:
    """Play a recording again: FILE is what `triptych record` wrote, or redis or http, which come with it."""
    if (upstream is None) == (serve is None):
        raise click.UsageError(
            "give --upstream ADDR to play the clients, or --serve ADDR to play the servers"
        )
    if serve is not None and (loops or concurrency or introduced):
        raise click.UsageError(
            "--loops, --concurrency and --proxy-protocol are for --upstream: --serve serves whoever comes"
        )
    recording = flags.opened(file)
    if not recording.conversations:
        raise flags.NoRecording(f"{file}: there is no conversation in it; record some")
    played = Played(VERSION, Path(file).name, times or None, loops or 1)
    try:
        if upstream is not None:
            clients = Clients(
                recording,
                resolve(upstream),
                speed=times,
                loops=loops or 1,
                concurrency=concurrency,
                introduced=introduced,
            )
            played = replace(played, report=_play(clients))
        elif serve is not None:
            played = replace(played, served=_serve(recording, serve, times))
    except EndpointError as error:
        click.echo(f"triptych: {error.message}", err=True)
        return error.exit_code
    report = played.report
    if report and all(came.reply == "not opened" for came in report.conversations):
        why = report.conversations[0].detail if report.conversations else "interrupted"
        raise Unreachable(f"--upstream: {upstream} cannot be reached: {why}")
    if as_json:
        click.echo(msgspec.json.encode(played))
    elif report:
        _print_report(report)
    elif played.served:
        _print_served(played.served)
    return INTERRUPTED if report and not report.complete else 0


def _play(clients: Clients) -> Report:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: clients.stop())
    return clients.run()


def _serve(recording: Recording, serve: Address, times: float) -> Served:
    listeners = open_listeners([ListenerConfig(name="replay", address=serve, service="echo")], {})
    try:
        sockets = [each for listener in listeners for each in listener.sockets]
        servers = Servers(recording, sockets, speed=times)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: servers.stop())
        for listener in listeners:
            for address in listener.addresses:
                if exposure("proxy", address):
                    click.echo(
                        f"triptych: {address}: anyone who can reach it can read the recording", err=True
                    )
                click.echo(f"triptych: serving on {address}", err=True)
        return servers.run()
    finally:
        close_listeners(listeners)


def _print_report(report: Report) -> None:
    came = report.conversations
    replies = Counter(each.reply for each in came)
    parts = [f"{number:,} {reply}" for reply, number in replies.most_common()]
    click.echo(
        f"{len(came):,} conversations in {report.seconds:.1f} s, their answers: {', '.join(parts) or 'none'}"
    )
    odd = [each for each in came if each.reply != "as recorded"]
    for each in odd[:SHOWN]:
        click.echo(f"  {each.conversation}.{each.loop} from {each.client or 'nowhere'}: {_difference(each)}")
    if len(odd) > SHOWN:
        click.echo(f"  and {len(odd) - SHOWN:,} more; --json has them all")
    ended = Counter((each.ended_recorded, each.ended) for each in came if each.ended_recorded != each.ended)
    for (recorded, now), number in ended.most_common():
        click.echo(f"  {number:,} servers ended otherwise: recorded {ENDED[recorded]}, now {ENDED[now]}")
    click.echo(f"{'':24}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}")
    _print_times("an answer, recorded", report.latency_recorded)
    _print_times("an answer, now", report.latency)
    _print_times("behind the schedule", report.lag)
    _print_times("  of it our own", report.own_lag)
    click.echo(
        f"{report.exchanges:,} answers timed"
        + (f", {report.untimed:,} not: nothing tells where they end" if report.untimed else "")
        + ("" if report.lag else "; at full speed there is no schedule to be behind")
    )


def _difference(came: Came) -> str:
    parts: list[str] = [came.reply] if came.reply != "different" else []
    if came.offset is not None:
        parts.append(
            f"byte {came.offset:,} was {came.was or 'the end'}, is {came.now or 'the end'}"
            + (
                f"; {came.differing:,} of {came.bytes:,} bytes differ"
                if came.differing is not None
                else f"; {came.bytes_recorded:,} bytes recorded, {came.bytes:,} now"
            )
        )
    return "; ".join([*parts, came.detail] if came.detail else parts)


def _print_served(served: Served) -> None:
    click.echo(
        f"{served.connections:,} connections: {served.played:,} to the end, {served.left:,} left before it, "
        f"{served.unknown:,} said what nobody had said"
    )
    for each in served.strangers[:SHOWN]:
        click.echo(f"  {each.client or 'a client'}: from its byte {each.offset:,} on")
    if served.lag:
        click.echo(f"{'':24}{'p50':>10}{'p90':>10}{'p99':>10}{'max':>10}")
        _print_times("behind the schedule", served.lag)


def _print_times(title: str, times: Times | None) -> None:
    if times:
        figures = (times.p50, times.p90, times.p99, times.max)
        click.echo(f"{title:24}" + "".join(f"{microseconds(each):>10}" for each in figures))
