"""`triptych logs`: the commands that read the daemons' logs. Each is a module that is loaded when it is asked for."""

import importlib

import click

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


class Commands(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        return list(LAZY)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  as above
        if cmd_name not in LAZY:
            return None
        module, _, attribute = LAZY[cmd_name][0].partition(":")
        command: click.Command = getattr(importlib.import_module(module), attribute)
        return command

    def format_commands(
        self,
        ctx: click.Context,  # noqa: ARG002  click's signature
        formatter: click.HelpFormatter,
    ) -> None:
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in LAZY.items()])


@click.group(name="logs", cls=Commands)
def group() -> None:
    """Read the daemons' logs: what happened, by engine."""
