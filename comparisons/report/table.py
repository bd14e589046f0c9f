"""The results on a terminal: subjects side by side, the floor first, medians over the rounds."""

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from comparisons.report import figures
from comparisons.results import Results


def render(results: Results) -> RenderableType:
    parts: list[RenderableType] = []
    if results.runs:
        parts.append(_table(results.subjects, figures.run_lines(results, ranges=False)))
    for workload in results.workloads:
        broken = {subject for subject, _, _ in figures.faults(results, workload.name)}
        lines = figures.lines(results, workload, ranges=False)
        if broken:
            lines.append(("broken", ["BROKEN" if name in broken else "" for name in results.subjects]))
        parts += [Text(f"\n{workload.title}", style="bold"), _table(results.subjects, lines)]
    parts += [
        f"[bold red]broken[/] {escape(f'{figures.name(entry)}, round {entry.round}: {entry.broken}')}"
        for entry in results.broken()
    ]
    parts += [
        f"[dim]{run.subject}, round {run.round}:[/] {escape(line)}"
        for run in results.runs
        for line in run.last_lines
    ]
    return Group(*parts)


def _table(subjects: Sequence[str], lines: Sequence[tuple[str, Sequence[str]]]) -> Table:
    """One table; all have the same widths, so that they stand below each other."""
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column("", min_width=23)
    for subject in subjects:
        table.add_column(subject, justify="right", min_width=12)
    for label, texts in lines:
        table.add_row(f"  {label}", *map(escape, texts))
    return table
