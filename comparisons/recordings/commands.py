"""`triptych recording`: what is in a recording, and a recording as a capture."""

from io import BufferedWriter
from itertools import pairwise
from pathlib import Path

import click

from comparisons.recordings import flags, pcapng
from comparisons.recordings.format import Conversation
from comparisons.units import microseconds, size

SHOWN = 100  # conversations
QUOTED = 40  # bytes of what a client said first
ENDINGS = {"end": "FIN", "reset": "RST", "open": "-"}


@click.group(name="recording")
def group() -> None:
    """Look into a recording, or export it."""


@group.command()
@click.argument("file")
def show(file: str) -> None:
    """A line for each of its first hundred conversations."""
    recording = flags.opened(file)
    header, conversations = recording.header, recording.conversations
    about = [each for each in (header.title, header.client, header.server) if each]
    if about:
        click.echo("; ".join(about))
    click.echo(
        f"{len(conversations):,} conversations in {microseconds(recording.duration_us)}, "
        f"{size(recording.bytes_c2s)} from clients, {size(recording.bytes_s2c)} to them"
    )
    click.echo(
        f"{'':>6} {'start':>9} {'lasted':>9} {'sent':>10} {'received':>10} {'turns':>6} {'ends':>9}  first words"
    )
    for number, each in enumerate(conversations[:SHOWN]):
        click.echo(_line(number, each, recording.first_us))
    if len(conversations) > SHOWN:
        click.echo(f"and {len(conversations) - SHOWN:,} more")


@group.command()
@click.argument("file")
@click.argument("out", type=click.Path(path_type=Path, dir_okay=False))
def export(file: str, out: Path) -> None:
    """Write it to OUT, a new pcapng file that Wireshark reads."""
    if out.suffix != ".pcapng":
        raise click.UsageError(f"{out}: an export is a pcapng file, so name it .pcapng")
    recording = flags.opened(file)
    packets = -2  # the first two blocks are none
    with BufferedWriter(flags.created(str(out))) as written:
        for block in pcapng.export(recording):
            written.write(block)
            packets += 1
    click.echo(f"{out}: {len(recording.conversations):,} conversations as {packets:,} packets")


def _line(number: int, conversation: Conversation, first_us: int) -> str:
    steps = conversation.steps
    sent, received = conversation.bytes_of("client"), conversation.bytes_of("server")
    said = [step.who for step in steps if step.what == "data"]
    turns = sum(one == "client" and other == "server" for one, other in pairwise(said))
    ends = "/".join(ENDINGS[each] for each in conversation.endings.values())
    first = next((step.data for step in steps if step.what == "data" and step.who == "client"), b"")
    words = repr(first[:QUOTED])[2:-1] + ("..." if len(first) > QUOTED else "")
    lasted = microseconds(steps[-1].when_us if steps else 0)
    return (
        f"{number:>6} {microseconds(conversation.start_us - first_us):>9} {lasted:>9} "
        f"{size(sent):>10} {size(received):>10} {turns:>6} {ends:>9}  {words}"
    )
