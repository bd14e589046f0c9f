"""The verdicts for readers: a table of rules and peers, and what was seen where a rule does not hold."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import msgspec
from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from comparisons.conformance.play import JUDGED, Status, Verdict
from comparisons.scenarios.rules import TABLE

STYLES: Mapping[Status, str] = {"kept": "green", "broken": "bold red", "finding": "yellow"}


class VerdictResults(msgspec.Struct, frozen=True, kw_only=True):
    """`seen`: what was wrong, or what was observed where the rule was kept, or why it was not played."""

    rule: int
    title: str
    scenario: str
    status: Status
    seen: str
    seconds: float


class PeerResults(msgspec.Struct, frozen=True, kw_only=True):
    name: str
    version: str
    verdicts: list[VerdictResults]

    @classmethod
    def of(cls, name: str, version: str, verdicts: Sequence[Verdict]) -> "PeerResults":
        return cls(
            name=name,
            version=version,
            verdicts=[
                VerdictResults(
                    rule=verdict.rule.number,
                    title=verdict.rule.title,
                    scenario=verdict.rule.name,
                    status=verdict.status,
                    seen=verdict.seen,
                    seconds=round(verdict.seconds, 2),
                )
                for verdict in verdicts
            ],
        )


class Results(msgspec.Struct, kw_only=True):
    """What --json prints. All peers have verdicts on the same rules, in the same order."""

    format: int = 1
    seconds: float = 0.0
    rules: Mapping[int, str] = msgspec.field(default_factory=lambda: TABLE)
    without_scenario: list[int] = msgspec.field(default_factory=list)
    peers: list[PeerResults] = msgspec.field(default_factory=list)


def table(results: Results, *, verbose: bool) -> RenderableType:
    """One line for each scenario, under its rule; below it, one for each that does not hold."""
    grid = Table(box=None, pad_edge=False, header_style="dim")
    grid.add_column("")
    for peer in results.peers:
        grid.add_column(f"{peer.name}\n{peer.version}", no_wrap=True)
    for number, verdicts in _by_rule(results):
        grid.add_row(f"[bold]{_numbered(number)}[/]")
        for row in zip(*verdicts, strict=True):
            grid.add_row(f"  {escape(row[0].title)}", *map(_mark, row))
    parts: list[RenderableType] = [grid, ""]
    for peer in results.peers:
        told = [verdict for verdict in peer.verdicts if verbose or verdict.status in {"broken", "finding"}]
        parts += [
            f"[dim]{peer.name}, rule {verdict.rule}:[/] {escape(verdict.title)}: {_mark(verdict)}"
            + (f", {escape(verdict.seen)}" if verdict.seen else "")
            for verdict in told
        ]
        parts += [] if verbose else _not_played(peer)
    if results.without_scenario:
        parts.append(
            f"No scenario shows rule {listed(results.without_scenario)} yet: nothing is said of them."
        )
    parts += [f"{peer.name}: {_counts(peer)}" for peer in results.peers]
    parts.append(f"{results.seconds:.0f} s")
    return Group(*parts)


def markdown(results: Results) -> str:
    """One line for each rule: how many of the scenarios that could be played show that it holds."""
    heads = [f"{peer.name} {peer.version}".strip() for peer in results.peers]
    lines = [f"| rule | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    lines += [
        f"| {_numbered(number)} | {' | '.join(map(_cell, verdicts))} |"
        for number, verdicts in _by_rule(results)
    ]
    return "\n".join(lines) + "\n"


def listed(numbers: Sequence[int]) -> str:
    *first, last = map(str, numbers)
    return f"{', '.join(first)} and {last}" if first else last


def _by_rule(results: Results) -> Iterator[tuple[int, list[list[VerdictResults]]]]:
    """Each rule that was played, with the verdicts of each peer."""
    for number in TABLE:
        verdicts = [[each for each in peer.verdicts if each.rule == number] for peer in results.peers]
        if any(verdicts):
            yield number, verdicts


def _not_played(peer: PeerResults) -> Iterator[str]:
    """A line for each reason why something could not be shown."""
    reasons: dict[tuple[Status, str], set[int]] = {}
    for verdict in peer.verdicts:
        if verdict.status not in {*JUDGED, "not applicable"}:
            reasons.setdefault((verdict.status, verdict.seen), set()).add(verdict.rule)
    for (status, why), numbers in reasons.items():
        yield f"[dim]{peer.name}, rule {listed(sorted(numbers))}:[/] {status}, {escape(why)}"


def _numbered(number: int) -> str:
    return f"{number} {TABLE[number]}" if number else TABLE[number]


def _mark(verdict: VerdictResults) -> str:
    word = verdict.status.upper() if verdict.status == "broken" else verdict.status
    return f"[{STYLES.get(verdict.status, 'dim')}]{word}[/]"


def _cell(verdicts: Sequence[VerdictResults]) -> str:
    counts = Counter(verdict.status for verdict in verdicts)
    judged = sum(counts[status] for status in JUDGED)
    if not judged:
        return ""
    if counts["kept"] == judged:
        return "yes"
    cell = f"{counts['kept']} of {judged}" if counts["kept"] else "no"
    cell = f"**{cell}**" if counts["broken"] else cell
    return f"{cell} (finding)" if counts["finding"] else cell


def _counts(peer: PeerResults) -> str:
    counts = Counter(verdict.status for verdict in peer.verdicts)
    return ", ".join(
        f"{count} {status}" for status, count in sorted(counts.items(), key=lambda item: -item[1])
    )
