"""`triptych logs summary`: the summary as tables for people, or as JSON for machines."""

import json
from collections.abc import Sequence
from itertools import groupby

import click
import msgspec
from rich.console import Console

from comparisons.logs.options import log_files
from comparisons.logs.show import console, duration, printable, size, table
from comparisons.logs.summary import EFFORTS, GROUPS, TIMERS, Group, Summary, summarize

BARS = " ▁▂▃▄▅▆▇█"
# of the groups by sessions: a table of thousands of upstreams is no summary; --json has them all
SHOWN = 12
QUANTILE_TITLES = {"p50": "p50", "p90": "p90", "p99": "p99", "p999": "p99.9"}


@click.command(name="summary")
@log_files
@click.option("--by", type=click.Choice(GROUPS), default="engine", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(files: tuple[str, ...], backend: str, master: str | None, by: str, as_json: bool) -> None:
    """How many sessions, how they ended, how long everything took.

    FILE is a log of JSON lines as the daemons write it, its rotated and compressed parts ('access.log*'),
    what `journalctl -o json` writes, HAProxy's tcplog, Zeek's conn.log in JSON, or a folder that
    `triptych logs compact` wrote; - is standard input.
    """
    found = summarize(files, by, backend, master)
    if as_json:
        # not msgspec's encoder: sums may go beyond 64 bits
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        show(found)


def show(found: Summary) -> None:
    out = console()
    missing = [process for process in found.processes if process.missing]
    out.print(
        f"{found.lines:,} lines read, {found.foreign:,} of them not ours; "
        f"{sum(process.missing for process in missing):,} missing"
    )
    if found.first:
        out.print(f"from {found.first} to {found.last}")
    unclosed = f"; {found.unclosed:,} more began and did not end in these files" if found.unclosed else ""
    sessions = f"{found.sessions:,} sessions" if found.sessions else "no session"
    out.print(f"{sessions}{unclosed}")

    # the busiest, in the order of their names
    busiest = sorted(found.groups, key=lambda group: -group.sessions)[:SHOWN]
    if busiest:
        _show_groups(out, found, sorted(busiest, key=lambda group: group.name))
        if len(busiest) < len(found.groups):
            out.print(f"\nand {len(found.groups) - SHOWN:,} more by {found.by}; --json has them all")
    if found.talkers:
        talkers = table("Who moved most", "client", ">sessions", ">bytes")
        for talker in found.talkers:
            talkers.add_row(printable(talker.client_ip), f"{talker.sessions:,}", size(talker.bytes))
        out.print("", talkers)
    if missing:
        gaps = table("Lines missing, by the gaps in seq", "engine", ">pid", ">worker", ">read", ">missing")
        for process in missing:
            numbers = (process.pid, process.worker, f"{process.lines:,}", f"{process.missing:,}")
            gaps.add_row(process.engine, *map(str, numbers))
        out.print("", gaps)
    if found.unknown:
        out.print("\nOurs, but not known to this version")
        for event, lines in found.unknown.items():
            out.print(f"  {event}: {lines:,}")
    if found.faults:
        out.print("\nNot ours: torn, or another program's")
        for file, faults in groupby(found.faults, key=lambda fault: fault.file):
            out.print(f"  {file}", soft_wrap=True)
            for fault in faults:
                out.print(f"    {fault.line}: {fault.text}", no_wrap=True, overflow="ellipsis")
        if found.foreign > len(found.faults):
            out.print(f"  and {found.foreign - len(found.faults):,} more")


def _show_groups(out: Console, found: Summary, groups: Sequence[Group]) -> None:
    seconds = (found.span_us or 0) / 1e6
    totals = table("Sessions", found.by, ">sessions", ">a second", ">refused", ">from clients", ">to clients")
    datagrams = table("Datagrams", found.by, ">from clients", ">to clients")
    efforts = table("For each session", found.by, *(f">{effort.replace('_', ' ')}" for effort in EFFORTS))
    endings = table("How they ended", found.by, "state", "termination", ">sessions", ">share")
    for group in groups:
        name = printable(group.name)
        rate = f"{group.sessions / seconds:,.1f}" if seconds else "-"
        moved = ("-" if total is None else size(total) for total in (group.bytes_c2s, group.bytes_s2c))
        totals.add_row(name, f"{group.sessions:,}", rate, f"{group.refused:,}", *moved)
        if group.datagrams_c2s is not None and group.datagrams_s2c is not None:
            datagrams.add_row(name, f"{group.datagrams_c2s:,}", f"{group.datagrams_s2c:,}")
        efforts.add_row(name, *(_each(getattr(group, effort), group.sessions) for effort in EFFORTS))
        for number, ending in enumerate(group.endings):
            endings.add_row(
                "" if number else name,
                printable(ending.state or "-"),
                printable(ending.termination or "-"),
                f"{ending.sessions:,}",
                f"{ending.sessions / group.sessions:.1%}",
                end_section=number == len(group.endings) - 1,
            )
    for shown in (totals, datagrams, efforts, endings):
        if shown.rows:
            out.print("", shown)
    _show_timers(out, found.by, groups)
    if found.step_us:
        opened = table(f"Open at once, by {duration(found.step_us)}", found.by, ">most", "")
        for group in groups:
            most = max(group.open, default=0)
            marks = "".join(BARS[-(-8 * count // most) if most else 0] for count in group.open)
            opened.add_row(printable(group.name), f"{most:,}", marks)
        out.print("", opened)


def _show_timers(out: Console, by: str, groups: Sequence[Group]) -> None:
    times = table(
        "How long it took", "timer", by, ">sessions", *(f">{name}" for name in QUANTILE_TITLES.values())
    )
    unseen = []
    for timer in TIMERS:
        rows = [(group.name, group.timers[timer]) for group in groups if timer in group.timers]
        for number, (name, took) in enumerate(rows):
            times.add_row(
                "" if number else timer.removesuffix("_us"),
                printable(name),
                f"{took.sessions:,}",
                *(duration(getattr(took, quantile)) for quantile in QUANTILE_TITLES),
                end_section=number == len(rows) - 1 > 0,
            )
        if not rows:
            unseen.append(timer.removesuffix("_us"))
    out.print("", times)
    if unseen:
        out.print(f"in no session, or not to be seen: {', '.join(unseen)}")


def _each(total: int | None, sessions: int) -> str:
    return "-" if total is None or not sessions else f"{total / sessions:,.1f}"
