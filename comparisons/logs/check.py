"""`triptych logs check`: what must hold in every log, as a gate with an exit code.

`invariants.py` says what is checked and how. Here it is shown: every finding with its name, when, where and
the evidence in one line, and what this log could not tell.
"""

import json
from itertools import groupby

import click
import msgspec

from comparisons.logs.invariants import COLUMNS, Check, Finding, judge
from comparisons.logs.options import log_files
from comparisons.logs.reader import open_logs
from comparisons.logs.show import console, printable

GATE_CROSSED = 99
# of each name; --json has them all
SHOWN = 10


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """What --json prints: version 1 of that format. `foreign` lines are not ours; a torn line of ours is
    missed by its number.
    """

    version: int = 1
    files: list[str]
    lines: int
    foreign: int
    sessions: int
    checks: list[Check]
    findings: list[Finding]


@click.command(name="check")
@log_files
@click.option("--json", "as_json", is_flag=True, help="The same as JSON.")
def command(files: tuple[str, ...], backend: str, master: str | None, as_json: bool) -> int:
    """Find what is wrong, by name: exit code 99 if anything is.

    Lost lines, totals that disagree, sessions without an end, stalled loops, leaks, bursts of errors,
    upstreams that became slow, peers that stopped reading.
    """
    with open_logs(files, COLUMNS, backend, master) as logs:
        lines = logs.lines
        [counted] = logs.rows(
            lines.aggregate(
                lines=lines.count(),
                foreign=lines.count(where=lines.kind == "foreign"),
                sessions=lines.count(where=(lines.kind == "known") & (lines.event == "session_closed")),
            )
        )
        checks, findings = judge(logs)
    found = Checked(files=list(files), checks=checks, findings=findings, **counted)
    if as_json:
        click.echo(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        _show(found)
    return GATE_CROSSED if findings else 0


def _show(found: Checked) -> None:
    out = console()
    out.print(f"{found.lines:,} lines read, {found.foreign:,} of them not ours; {found.sessions:,} sessions")
    for name, group in groupby(found.findings, key=lambda finding: finding.name):
        of_name = list(group)
        out.print(f"\n{name.upper()}", style="bold red")
        for finding in of_name[:SHOWN]:
            where = f"{finding.at}  {finding.engine}, {finding.where}"
            out.print(f"  {printable(where)}\n    {printable(finding.evidence)}", soft_wrap=True)
        if len(of_name) > SHOWN:
            out.print(f"  and {len(of_name) - SHOWN:,} more; --json has them all")
    held = [check.holds for check in found.checks if not check.untold and not check.found]
    if held:
        out.print("\nHolds")
        out.print("\n".join(f"  {each}" for each in held))
    untold = [check for check in found.checks if check.untold]
    if untold:
        out.print("\nThis log cannot tell")
        out.print("\n".join(f"  {check.holds}: {check.untold}" for check in untold), soft_wrap=True)
