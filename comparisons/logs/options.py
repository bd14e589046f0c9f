"""What every command that reads logs takes: the files, and the backend that answers."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

BACKENDS = ("duckdb", "spark")


def log_files(command: Command) -> Command:
    """Adds FILE..., --backend and --master, which `reader.open_logs` takes as they are."""
    for option in (
        click.option("--master", metavar="URL", help="Spark's; local[*] if not given."),
        click.option("--backend", type=click.Choice(BACKENDS), default="duckdb", show_default=True),
        click.argument("files", metavar="FILE...", nargs=-1, required=True),
    ):
        command = option(command)
    return command
