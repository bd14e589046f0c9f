"""A split on a terminal: the table that lives while it runs, and what came of it."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from comparisons.effects import METRICS, Effect, Finding, Metric
from comparisons.sidebyside.arms import Account, Arm
from comparisons.units import microseconds, size

# the tail and what is typical say it all to a reader; --json has the percentiles between them
SHOWN = ("typical", "p99", "share", "mean")
STYLES = {"better": "green", "worse": "red", "no difference": "", "not enough data": "dim"}
BY_NAME = {metric.name: metric for metric in METRICS}


def arms(accounts: Mapping[Arm, Account], rates: Mapping[Arm, float]) -> Table:
    """What the logs say so far; `rates` are sessions a second."""
    table = Table(box=SIMPLE_HEAD, show_edge=False)
    table.add_column("", min_width=11)
    columns = (
        "sessions",
        "open",
        "a second",
        "first byte p50",
        "p99",
        "duration p50",
        "p99",
        "resets",
        "bytes",
    )
    for column in columns:
        table.add_column(column, justify="right")
    for arm, account in accounts.items():
        percentiles: list[str] = []
        for name in ("first_byte_us", "duration_us"):
            values = account.values[name]
            percentiles += (
                map(microseconds, np.percentile(values, (50, 99), method="inverted_cdf"))
                if values
                else ("-", "-")
            )
        table.add_row(
            arm.name,
            f"{account.sessions:,}",
            f"{account.open:,}",
            f"{rates[arm]:,.0f}",
            *percentiles,
            f"{sum(account.resets):,}",
            size(account.bytes_c2s + account.bytes_s2c),
        )
    return table


def findings(base: str, told: Sequence[Finding]) -> RenderableType:
    """Everything against the base, then each of them in a line."""
    parts: list[RenderableType] = []
    lines = []
    for other, group in groupby(told, key=lambda finding: finding.other):
        shown = [finding for finding in group if finding.statistic in SHOWN]
        parts += [_against(base, other, shown), ""]
        lines.append(Text.assemble((f"{other}: ", "bold"), _sentence(shown)))
    return Group(*parts, *lines)


def _against(base: str, other: str, shown: Sequence[Finding]) -> Table:
    title = f"{other} against {base}" + (", another process of it: the noise" if other == "control" else "")
    table = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, show_edge=False)
    table.add_column("", min_width=19)
    table.add_column(base, justify="right", min_width=11)
    table.add_column(other, justify="right", min_width=11)
    table.add_column("difference, 95 % interval", justify="right", min_width=30)
    table.add_column("verdict", min_width=15)
    for finding in shown:
        metric = BY_NAME[finding.metric]
        cells = ("-", "-", "-") if finding.effect is None else _cells(metric, finding.effect)
        table.add_row(_label(finding), *cells, Text(finding.verdict, STYLES[finding.verdict]))
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
