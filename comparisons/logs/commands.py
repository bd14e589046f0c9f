"""`triptych logs`: the commands that read the daemons' logs. Each is a module that is loaded when it is asked for."""

import click

from services.lazy import LazyGroup

LAZY = {
    "summary": (
        "comparisons.logs.summary_view:command",
        "How many sessions, how they ended, how long it took.",
    ),
    "diff": ("comparisons.logs.diff:command", "One engine against another, before against after."),
    "explain": (
        "comparisons.logs.explain:command",
        "The story of a session; where a slow percentile's time went.",
    ),
    "check": ("comparisons.logs.check:command", "What must hold in every log, as a gate."),
    "page": ("comparisons.logs.page:command", "One offline page, the engines side by side."),
    "tail": ("comparisons.logs.tail:command", "The lines as they come."),
    "sql": ("comparisons.logs.sql:command", "Ask in SQL."),
    "export": ("comparisons.logs.export:command", "The sessions in other tools' formats."),
    "compact": (
        "comparisons.logs.compact:command",
        "Lines into Parquet, which every command reads in their place.",
    ),
}


@click.group(name="logs", cls=LazyGroup, lazy=LAZY)
def group() -> None:
    """Read the daemons' logs: what happened, by engine."""
