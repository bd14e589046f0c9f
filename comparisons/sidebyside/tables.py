"""A split on a terminal: the table that lives while it runs, and what came of it."""

from collections.abc import Collection, Mapping, Sequence
from itertools import groupby

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, ConsoleOptions, Group, JustifyMethod, RenderableType, RenderResult
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

from comparisons.effects import METRICS, Effect, Finding, Metric
from comparisons.sidebyside.arms import Account, Arm
from comparisons.units import microseconds, size

# the tail and what is typical say it all to a reader; --json has the percentiles between them
SHOWN = ("typical", "p99", "share", "mean")
STYLES = {"better": "green", "worse": "red", "no difference": "", "not enough data": "dim"}
DIFFERENCE = "difference, 95 % interval"
# more than any table needs
WIDEST = 1000
BY_NAME = {metric.name: metric for metric in METRICS}


class Fitting:
    """The first of some tables that fits where it is printed, else the last: none loses its last columns."""

    def __init__(self, *tables: Table) -> None:
        self._tables = tables

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        free = options.update(max_width=WIDEST)
        yield next(
            (
                each
                for each in self._tables
                if Measurement.get(console, free, each).maximum <= options.max_width
            ),
            self._tables[-1],
        )


def arms(accounts: Mapping[Arm, Account], rates: Mapping[Arm, float]) -> RenderableType:
    """What the logs say so far; `rates` are sessions a second."""
    columns = (
        "",
        "sessions",
        "open",
        "a second",
        "first byte\np50",
        "\np99",
        "duration\np50",
        "\np99",
        "resets",
        "bytes",
    )
    rows: list[list[Text | str]] = []
    for arm, account in accounts.items():
        percentiles: list[str] = []
        for name in ("first_byte_us", "duration_us"):
            values = account.values[name]
            percentiles += (
                map(microseconds, np.percentile(values, (50, 99), method="inverted_cdf"))
                if values
                else ("-", "-")
            )
        rows.append(
            [
                arm.name,
                f"{account.sessions:,}",
                f"{account.open:,}",
                f"{rates[arm]:,.0f}",
                *percentiles,
                f"{sum(account.resets):,}",
                size(account.bytes_c2s + account.bytes_s2c),
            ]
        )
    return Fitting(*(_table(columns, rows, without) for without in ((), (5, 7, 9))))


def findings(base: str, told: Sequence[Finding]) -> RenderableType:
    """Everything against the base, then each of them in a line."""
    parts: list[RenderableType] = []
    lines = []
    for other, group in groupby(told, key=lambda finding: finding.other):
        shown = [finding for finding in group if finding.statistic in SHOWN]
        parts += [_against(base, other, shown), ""]
        lines.append(Text.assemble((f"{other}: ", "bold"), _sentence(shown)))
    return Group(*parts, *lines)


def _against(base: str, other: str, shown: Sequence[Finding]) -> RenderableType:
    title = f"{other} against {base}" + (", another process of it: the noise" if other == "control" else "")
    columns = ("", base, other, DIFFERENCE, "verdict")
    rows: list[list[Text | str]] = []
    for finding in shown:
        metric = BY_NAME[finding.metric]
        cells = ("-", "-", "-") if finding.effect is None else _cells(metric, finding.effect)
        rows.append([_label(finding), *cells, Text(finding.verdict, STYLES[finding.verdict])])
    # without the amounts the difference still says it
    tables = [_table(columns, rows, without, last="left") for without in ((), (2,), (1, 2))]
    return Group(Text(title, "bold"), Fitting(*tables))


def _table(
    columns: Sequence[str],
    rows: Sequence[Sequence[Text | str]],
    without: Collection[int],
    last: JustifyMethod = "right",
) -> Table:
    """Names at the left, amounts at the right; `without` are the numbers of columns to leave out."""
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1, 0, 0))
    kept = [number for number in range(len(columns)) if number not in without]
    for number in kept:
        justify: JustifyMethod = "left" if not number else last if number == kept[-1] else "right"
        # where even that is too wide, the interval goes into a second line and the verdict stays whole
        table.add_column(columns[number], justify=justify, no_wrap=columns[number] != DIFFERENCE)
    for row in rows:
        table.add_row(*(row[number] for number in kept))
    return table


def _label(finding: Finding) -> str:
    title = BY_NAME[finding.metric].title
    return title if finding.statistic in {"share", "mean"} else f"{title}, {finding.statistic}"


def _cells(metric: Metric, effect: Effect) -> tuple[str, str, str]:
    interval = f"{_signed(metric, effect.low)} to {_signed(metric, effect.high)}"
    return (
        _amount(metric, effect.base),
        _amount(metric, effect.other),
        f"{_signed(metric, effect.difference)} ({interval})",
    )


def _sentence(shown: Sequence[Finding]) -> str:
    """worse: connect (+1.9 ms, p99 +13.5 ms), resets (+2%); no difference in 7 of 12; not enough data for 1"""
    said = []
    for verdict in ("worse", "better"):
        of_them: dict[str, list[str]] = {}
        for finding in shown:
            if finding.verdict == verdict and finding.effect is not None:
                metric = BY_NAME[finding.metric]
                where = "p99 " if finding.statistic == "p99" else ""
                told = where + _signed(metric, finding.effect.difference)
                of_them.setdefault(metric.title, []).append(told)
        if of_them:
            said.append(
                f"{verdict}: " + ", ".join(f"{title} ({', '.join(of)})" for title, of in of_them.items())
            )
    for verdict, words in (("no difference", "no difference in"), ("not enough data", "not enough data for")):
        count = sum(finding.verdict == verdict for finding in shown)
        if count:
            said.append(f"{words} {count} of {len(shown)}")
    return "; ".join(said)


def _amount(metric: Metric, value: float) -> str:
    match metric.unit:
        case "us":
            return microseconds(value)
        case "bytes/s":
            return f"{size(value)}/s"
        case "share":
            return f"{value:.2%}"


def _signed(metric: Metric, value: float) -> str:
    return f"{'-' if value < 0 else '+'}{_amount(metric, abs(value))}"
