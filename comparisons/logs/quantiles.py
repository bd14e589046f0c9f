"""Quantiles by HdrHistogram's buckets, as expressions that every backend evaluates alike.

A value counts as the highest value of its bucket: itself below 2,048, above that at most one part in
1,024 more than was measured (HdrHistogram with three significant figures, its highest equivalent value).
The buckets come from integer comparisons and a bitwise or, the ranks from integer products, so DuckDB and
Spark agree to the last digit, and what is grouped never outgrows some tens of thousands of buckets.

A quantile is the nearest rank: p90 is the lowest bucket that at least 90 % of the sessions do not exceed.
"""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir

# name: its rank among a thousand
QUANTILES = {"p50": 500, "p90": 900, "p99": 990, "p999": 999}
# values below 2 to the power of this have a bucket each
EXACT_BITS = 11
# and those from the next power on again: no timer of ours reaches two years
LAST_BITS = 46


def bucket(value: ir.IntegerValue) -> ir.IntegerValue:
    """The highest value of the bucket that `value`, at least 0, falls into."""
    steps = [(value < 2**EXACT_BITS, value)]
    steps += [
        (value < 2**bits, value | (2 ** (bits - EXACT_BITS) - 1)) for bits in range(EXACT_BITS + 1, LAST_BITS)
    ]
    return ibis.cases(*steps, else_=value)


def quantile_rows(table: ir.Table, by: Sequence[str], timers: Sequence[str]) -> ir.Table:
    """A row for each group and timer that has values: the columns of `by`, `timer`, how many `sessions`
    reached it, and QUANTILES in the timer's unit.
    """
    values = ibis.union(
        *(
            table.select(*by, timer=ibis.literal(number, "int16"), value=table[timer])
            for number, timer in enumerate(timers)
        )
    )
    counts = (
        values.filter(values.value.notnull())
        .group_by(*by, "timer", bucket=bucket(values.value))
        .aggregate(sessions=lambda each: each.count())
    )
    group = (*by, "timer")
    ranked = counts.mutate(
        upto=counts.sessions.sum().over(
            ibis.window(group_by=group, order_by="bucket", preceding=None, following=0)
        ),
        all=counts.sessions.sum().over(ibis.window(group_by=group)),
    )
    quantiles = {
        name: ranked.bucket.min(where=ranked.upto * 1000 >= ranked["all"] * rank)
        for name, rank in QUANTILES.items()
    }
    found = ranked.group_by(*group).aggregate(sessions=ranked["all"].max(), **quantiles)
    # while there were millions of rows the timer was a number
    names = ibis.cases(*((found.timer == number, timer) for number, timer in enumerate(timers)))
    return found.mutate(timer=names).order_by(*group)
