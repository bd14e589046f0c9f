"""`triptych record`: put in front of a server, it keeps the conversations of real clients with their timing."""

import os
import re
import signal
import socket
import time
from collections.abc import Sequence

import click

from comparisons.flags import duration
from comparisons.front import listening
from comparisons.recordings import flags
from comparisons.recordings.format import VERSION, Header
from comparisons.recordings.keeper import Keeper
from comparisons.recordings.recorder import Recorder
from comparisons.units import size
from services.core.addresses import Address
from services.endpoints import EndpointError, resolve


class Unwritable(click.ClickException):
    exit_code = os.EX_OSERR


@click.command("record")
@click.option(
    "--listen",
    type=flags.listener,
    metavar="ADDR",
    required=True,
    help="HOST:PORT or unix:/PATH, for the clients.",
)
@click.option(
    "--upstream",
    type=flags.upstream,
    metavar="ADDR",
    required=True,
    help="HOST:PORT or unix:/PATH of the real server.",
)
@click.option("--output", metavar="FILE", required=True, help="A new file; only you may read it.")
@click.option(
    "--most-bytes", type=flags.size, default="64MiB", show_default=True, help="Keep no more than this."
)
@click.option("--most-time", type=duration, default="10m", show_default=True, help="Keep no longer.")
@click.option("--sessions", type=click.IntRange(1), help="End after so many.")
@click.option(
    "--redact",
    "patterns",
    type=flags.regex,
    multiple=True,
    help="Overwrite every match with x before anything is written; up to 4 KiB each, repeatable.",
)
def command(
    *,
    listen: Address,
    upstream: Address,
    output: str,
    most_bytes: int,
    most_time: float,
    sessions: int | None,
    patterns: tuple[re.Pattern[bytes], ...],
) -> int:
    """Keep real conversations with their timing.

    Bytes pass unchanged. Ends with Ctrl-C or SIGTERM, after --sessions or at a cap, and never cuts a
    session for that: a second Ctrl-C does.
    """
    try:
        upstreams = resolve(upstream)
        with listening(listen, upstreams, _say) as listeners:
            bound = [address for listener in listeners for address in listener.addresses]
            sockets = [each for listener in listeners for each in listener.sockets]
            told = f"recording {' and '.join(map(str, bound))} to {upstream} in {output}"
            return _record(told, sockets, upstreams, output, most_bytes, most_time, sessions, patterns)
    except EndpointError as error:
        _say(error.message)
        return error.exit_code


def _say(line: str) -> None:
    click.echo(f"triptych: {line}", err=True)


def _record(
    told: str,
    sockets: Sequence[socket.socket],
    upstreams: Sequence[Address],
    output: str,
    most_bytes: int,
    most_time: float,
    sessions: int | None,
    patterns: Sequence[re.Pattern[bytes]],
) -> int:
    header = Header(VERSION, began_us=time.time_ns() // 1000)
    with flags.created(output) as file, Keeper(file, header, patterns) as keeper:
        _say(told)
        recorder = Recorder(
            sockets,
            upstreams,
            keeper,
            most_bytes=most_bytes,
            most_time=most_time,
            sessions=sessions,
            say=_say,
        )
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: recorder.stop())
        recorder.serve()
    click.echo(
        f"{output}: {keeper.count} conversations, {size(keeper.bytes['client'])} from clients, "
        f"{size(keeper.bytes['server'])} to them"
        + (f"; {recorder.unreachable} clients turned away, no upstream" if recorder.unreachable else "")
        + (f"; {recorder.cut} sessions cut" if recorder.cut else "")
    )
    for pattern, count in zip(patterns, keeper.redacted, strict=True):
        click.echo(f"  {count} matches of {os.fsdecode(pattern.pattern)} overwritten")
    if keeper.failure:
        raise Unwritable(f"{output}: {keeper.failure.strerror}; what came before can be read")
    return 0
