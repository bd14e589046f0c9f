"""Where the time of slow sessions went, in shares that add up.

A session's time is what its client saw: from the moment its connection waited in our backlog to its close.
The log has moments that cut it into parts, and sums of what went on within them; each microsecond goes to
exactly one share, so the shares of a group add up to all of its time:

    accept       in our backlog, before accept (TCP; in steps of the kernel's clock, 4 ms on most)
    connect      from the first dial to connected; all of it where it never was
    asking       connected, until the client's first byte
    answering    from then, or from connected where the upstream speaks first, to the first byte to the
                 client: the upstream's thinking, and what was left of the question (of an echo: ours)
    client       the client did not take what was for it (its relay was paused)
    upstream     the upstream did not take, so we did not read the client: backpressure
    lag          our loop or threads were late: the longest lateness while it was open, once
    silence      the longest silence after the first answer, when neither side sent
    client_end   the upstream had ended, the client not yet
    upstream_end the client had ended, the upstream not yet (of an echo: what it still sent back)
    talking      the rest: turns and transfers that the log does not tell apart

The first four and the two ends are cut by moments and are exact. Pauses and lateness are sums that the log
does not place. Pauses are taken from the talking, what does not fit there from the ends, the answering
and the asking; lateness from the longest part after accept, since that is where it most likely fell. So
`lag` is what the engine surely was late for, and no more: other lateness than the longest is in the rest.
Of the silence only what surely lies in the talking counts: what is longer than all before the first answer
and than the ends, and is no pause and no lateness already. It is a client or an upstream that thinks, and
the log does not say which. A session in which nobody said anything is all silence.

Retransmissions have no share: the kernel counts them and does not say how long they took. They are told
beside the shares. What an older daemon or a peer does not log (the client's first byte, its end) falls to
the part that follows it: asking and answering are then one, `answering`.
"""

from collections.abc import Sequence

import ibis
import ibis.expr.types as ir
from msgspec import Struct

from comparisons.logs.quantiles import bucket, quantile_rows
from comparisons.logs.reader import Logs

SHARES = {
    "accept": "in our backlog, before accept",
    "connect": "connecting to the upstream",
    "asking": "the client, before it spoke",
    "answering": "the upstream, until its first answer",
    "client": "the client did not take",
    "upstream": "the upstream did not take: backpressure",
    "lag": "our loop was late",
    "silence": "the longest silence of both",
    "client_end": "after the upstream's end, until the client's",
    "upstream_end": "after the client's end, until the rest was sent",
    "talking": "talking: turns and transfers",
}
COLUMNS = (
    *("engine", "service", "listener", "upstream", "termination", "faults"),
    *("accept_wait_us", "connect_us", "client_first_us", "first_byte_us", "client_end_us", "upstream_end_us"),
    *("duration_us", "max_gap_us", "paused_c2s_us", "paused_s2c_us", "loop_lag_us"),
    *("bytes_c2s", "bytes_s2c", "client_retrans", "upstream_retrans"),
)
PAUSES = {"client": "paused_s2c_us", "upstream": "paused_c2s_us"}
# the parts that a pause is taken from, in this order; and those in which the engine can have been late
PAUSED_IN = ("talking", "client_end", "upstream_end", "answering", "asking")
LATE_IN = (*PAUSED_IN, "connect")


class Blame(Struct, frozen=True, kw_only=True):
    """The sessions of one group that took at least `from_us`, set against all of its `of` sessions.

    `shares_us` are sums over the slow sessions, `usual_us` over all; each adds up to its total.
    `retransmitted` of the slow sessions sent segments again, `faulted` met faults on purpose, and
    `failed` did not end in order.
    """

    name: str
    from_us: int
    sessions: int
    of: int
    shares_us: dict[str, int]
    usual_us: dict[str, int]
    retransmitted: int
    retransmissions: int
    faulted: int
    failed: int


def blame(logs: Logs, by: str, slow: str) -> list[Blame]:
    """Where the time of each group's slowest sessions went. `slow` is one of QUANTILES."""
    parts = cut(logs.sessions.filter(logs.sessions.duration_us.notnull())).mutate(
        name=lambda each: each[by].fill_null("-")
    )
    limits = quantile_rows(parts, ["name"], ["total_us"]).select("name", from_us=slow)
    judged = parts.join(limits, "name").mutate(slow=lambda each: bucket(each.total_us) >= each.from_us)
    resent = judged.client_retrans.fill_null(0) + judged.upstream_retrans.fill_null(0)
    told = judged.group_by("name").aggregate(
        from_us=judged.from_us.max(),
        of=judged.count(),
        sessions=judged.count(where=judged.slow),
        retransmitted=judged.count(where=judged.slow & (resent > 0)),
        retransmissions=resent.sum(where=judged.slow),
        faulted=judged.count(where=judged.slow & judged.faults.notnull()),
        failed=judged.count(where=judged.slow & (judged.termination != "--")),
        **{f"slow_{share}": judged[share].sum(where=judged.slow) for share in SHARES},
        **{f"all_{share}": judged[share].sum() for share in SHARES},
    )
    return [
        Blame(
            shares_us={share: row.pop(f"slow_{share}") for share in SHARES},
            usual_us={share: row.pop(f"all_{share}") for share in SHARES},
            **row,
        )
        for row in logs.rows(told.order_by("name"))
    ]


def cut(sessions: ir.Table) -> ir.Table:
    """`sessions` with a column for each of SHARES and their sum, `total_us`."""
    dialled = sessions.upstream.notnull()
    parts = sessions.mutate(
        accept=sessions.accept_wait_us.fill_null(0),
        connect=ibis.least(
            sessions.connect_us.fill_null(dialled.ifelse(sessions.duration_us, 0)), sessions.duration_us
        ),
        mute=(sessions.bytes_c2s == 0) & (sessions.bytes_s2c == 0),
    )
    # each moment no earlier than the one before it, and no later than the close
    never_answered = parts.client_first_us.notnull().ifelse(parts.duration_us, parts.connect)
    answered = parts.first_byte_us.fill_null(never_answered)
    parts = parts.mutate(answered=ibis.least(ibis.greatest(answered, parts.connect), parts.duration_us))
    # an upstream that speaks first is not asked
    asked = (parts.client_first_us <= parts.answered).ifelse(parts.client_first_us, parts.connect)
    ended = ibis.least(
        parts.client_end_us.fill_null(parts.duration_us), parts.upstream_end_us.fill_null(parts.duration_us)
    )
    parts = parts.mutate(
        asked=ibis.greatest(asked, parts.connect),
        ended=ibis.least(ibis.greatest(ended, parts.answered), parts.duration_us),
    )
    client_first = (parts.client_end_us <= parts.upstream_end_us.fill_null(parts.client_end_us)).fill_null(
        False
    )
    parts = parts.mutate(
        asking=parts.asked - parts.connect,
        answering=parts.answered - parts.asked,
        talking=parts.ended - parts.answered,
        client_end=(~client_first).ifelse(parts.duration_us - parts.ended, 0),
        upstream_end=client_first.ifelse(parts.duration_us - parts.ended, 0),
        # how much silence there must be before some of it lies in the talking
        elsewhere=ibis.greatest(parts.answered - parts.connect, parts.duration_us - parts.ended),
    )
    for share, column in PAUSES.items():
        parts = _take(parts, share, parts[column].fill_null(0), PAUSED_IN)
    longest = ibis.greatest(*(parts[part] for part in LATE_IN))
    parts = parts.mutate(
        late_in=ibis.cases(
            *((parts[part] == longest, number) for number, part in enumerate(LATE_IN)), else_=-1
        )
    )
    late = ibis.least(parts.loop_lag_us.fill_null(0), longest)
    parts = parts.mutate(
        lag=late,
        **{
            part: parts[part] - (parts.late_in == number).ifelse(late, 0)
            for number, part in enumerate(LATE_IN)
        },
    )
    gap = parts.max_gap_us.fill_null(0)
    beyond = ibis.greatest(gap - parts.elsewhere - parts.client - parts.upstream - parts.lag, 0)
    silence = parts.mute.ifelse(parts.talking, ibis.least(beyond, parts.talking))
    parts = parts.mutate(silence=silence, talking=parts.talking - silence)
    return parts.mutate(total_us=parts.accept + parts.duration_us)


def _take(parts: ir.Table, share: str, amount: ir.IntegerValue, out_of: Sequence[str]) -> ir.Table:
    """Moves `amount` into the column `share`, from each part as much as it has."""
    parts = parts.mutate(**{share: ibis.literal(0, "int64"), "rest": amount})
    for part in out_of:
        taken = ibis.least(parts.rest, parts[part])
        parts = parts.mutate(
            **{share: parts[share] + taken, part: parts[part] - taken, "rest": parts.rest - taken}
        )
    return parts
