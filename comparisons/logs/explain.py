"""`triptych logs explain`: the story of one session, or where the time of the slowest ones went.

`story.py` tells a session, `blame.py` cuts the time of many into shares; here they are asked for and shown.
"""

import json
import os
from collections.abc import Mapping, Sequence

import click
import msgspec
from rich.console import Console

from comparisons.logs.blame import COLUMNS, SHARES, Blame, blame
from comparisons.logs.options import log_files
from comparisons.logs.quantiles import QUANTILES
from comparisons.logs.reader import open_logs
from comparisons.logs.show import console, duration, printable, table
from comparisons.logs.story import STATES, Story, tell

GROUPS = ("engine", "service", "listener", "upstream", "termination")


class NotThere(click.ClickException):
    """The logs have no such session (sysexits.h: the data are wrong)."""

    exit_code = os.EX_DATAERR


class Slowness(msgspec.Struct, frozen=True, kw_only=True):
    """What --slow --json prints: version 1 of that format."""

    version: int = 1
    by: str
    slow: str
    groups: list[Blame]


@click.command(name="explain")
@log_files
@click.option(
    "--slow", type=click.Choice(list(QUANTILES)), help="Instead of a session: those from this percentile on."
)
@click.option("--by", type=click.Choice(GROUPS), help="With --slow: what is set side by side; engine.")
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(
    files: tuple[str, ...],
    backend: str,
    master: str | None,
    slow: str | None,
    by: str | None,
    as_json: bool,
) -> None:
    """Tell a session's story, or where the slowest sessions' time went.

    \b
    triptych logs explain SESSION FILE...       SESSION is the id in its lines
    triptych logs explain --slow p99 FILE...    by engine, or by what --by names
    """  # noqa: D301  \b keeps click from joining the lines
    if slow is not None:
        with open_logs(files, COLUMNS, backend, master) as logs:
            found = Slowness(by=by or "engine", slow=slow, groups=blame(logs, by or "engine", slow))
        if as_json:
            click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
        else:
            _show_slowness(found)
        return
    if by is not None:
        raise click.UsageError("--by goes with --slow")
    session, *names = files
    if not names:
        raise click.UsageError("SESSION and FILE are needed, or --slow and FILE")
    with open_logs(names, None, backend, master) as logs:
        story = tell(logs, session)
    if story is None:
        raise NotThere(
            f"no session {printable(session)} in these logs; its id is the field `session` of its lines"
        )
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(story), indent=2))
    else:
        _show_story(story)


def _show_story(story: Story) -> None:
    out = console()
    out.print(f"Session {printable(story.session)}, {story.engine}, opened {story.opened}\n", style="bold")
    for sentence in story.told:
        out.print(printable(sentence))
    timeline = table("Timeline, from accept", ">when", "what")
    for moment in story.timeline:
        timeline.add_row(_signed(moment.after_us), printable(moment.what))
    out.print("", timeline)
    if story.history:
        letters = table("The client's connection, in the order of the wire", "", "")
        for letter, meaning in story.history:
            letters.add_row(letter, meaning)
        out.print("", letters)
    if story.state:
        out.print(f"\nstate {story.state}: {STATES.get(story.state, 'not one of ours')}")
    if story.unknown:
        out.print("\nNot in the log", style="bold")
        for each in story.unknown:
            out.print(f"  {each}")


def _signed(after_us: int) -> str:
    return f"-{duration(-after_us)}" if after_us < 0 else duration(after_us)


def _show_slowness(found: Slowness) -> None:
    out = console()
    if not found.groups:
        out.print("no session")
        return
    for group in found.groups:
        _show_group(out, group, found.slow)
    shares = table(
        f"Where their time went (beside it: all sessions), by {found.by}",
        "",
        *(title for group in found.groups for title in (f">{printable(group.name)}", ">all")),
    )
    columns = [
        tenths for group in found.groups for tenths in (_tenths(group.shares_us), _tenths(group.usual_us))
    ]
    for share, title in SHARES.items():
        if any(column[share] for column in columns):
            shares.add_row(
                title, *(f"{column[share] / 10:.1f} %" if column[share] else "" for column in columns)
            )
    out.print("", shares)


def _show_group(out: Console, group: Blame, slow: str) -> None:
    out.print(
        f"{printable(group.name)}: {group.sessions:,} of {group.of:,} sessions took {duration(group.from_us)} ({slow}) or more"
    )
    for count, what in (
        (group.failed, "did not end in order"),
        (group.faulted, "met faults on purpose"),
        (
            group.retransmitted,
            f"sent segments again, {group.retransmissions:,} in all; how long that took is not logged",
        ),
    ):
        if count:
            out.print(f"  {count:,} of them {what}")


def _tenths(shares: Mapping[str, int]) -> dict[str, int]:
    """Tenths of a percent that add up to 1,000: what rounding leaves goes to the largest remainders."""
    total = sum(shares.values()) or 1
    tenths = {share: amount * 1000 // total for share, amount in shares.items()}
    remainders: Sequence[str] = sorted(shares, key=lambda share: -(shares[share] * 1000 % total))
    for share in remainders[: 1000 - sum(tenths.values()) if any(shares.values()) else 0]:
        tenths[share] += 1
    return tenths
