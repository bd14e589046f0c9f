"""How the log commands write for people: tables, times, and nothing that acts on a terminal."""

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table


def console(*, stderr: bool = False) -> Console:
    """For text that was not written for it: no markup, no colours guessed from words."""
    return Console(markup=False, highlight=False, emoji=False, stderr=stderr)


def table(title: str, *columns: str) -> Table:
    """A table; the columns whose title begins with > are numbers."""
    made = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left")
    return made


def duration(microseconds: int) -> str:
    """Three digits and a unit: 950 µs, 1.23 ms, 45.6 s."""
    # halves of the last digit that is shown, so that nothing becomes 1000 µs by rounding
    if microseconds < 999.5:
        return f"{microseconds} µs"
    unit, amount = ("ms", microseconds / 1e3) if microseconds < 999_500 else ("s", microseconds / 1e6)
    digits = 2 if amount < 9.995 else 1 if amount < 99.95 else 0
    return f"{amount:,.{digits}f} {unit}"


def size(amount: int) -> str:
    """Three digits and a unit: 950 B, 1.23 MB."""
    for power, unit in enumerate(("B", "kB", "MB", "GB", "TB", "PB")):
        number = amount / 1000**power
        if number < 999.5:
            digits = 0 if power == 0 or number >= 99.95 else 1 if number >= 9.995 else 2
            return f"{number:.{digits}f} {unit}"
    return f"{amount / 1e18:,.0f} EB"


def printable(text: str) -> str:
    """`text` with everything that could act on a terminal written as an escape."""
    return "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
