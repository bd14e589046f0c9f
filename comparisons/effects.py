"""Is it different, by how much, and does it matter: the statistics of everything that compares sessions.

`compare` sets samples of sessions against one base sample and says for every metric of the log how large
the difference is, in the metric's own unit, with a 95 % interval, and whether that is better or worse.
What is shared by `triptych split` (engines dealt at random) and `triptych logs diff` (before and after) is
all in here; where the sessions come from is not.

A difference alone is no verdict, since with enough sessions every difference is significant. The margin of
a statistic is the largest of the metric's absolute floor, its relative tolerance, and the noise: what the
control, a second process of the base's own engine, differs from the base. Then

    better, worse      the whole interval lies beyond the margin, on that side, and Holm's method agrees
    no difference      it does not, though the interval is narrow enough: no wider than the margin to either side
    not enough data    the interval is wider: a difference that matters may hide in it, and more sessions
                       would tell

The typical value is told by the Hodges-Lehmann shift: the median of all differences between a session of
one side and a session of the other. It moves by 2 ms where every session takes 2 ms longer, and one session
that took a minute does not move it. Its interval takes both sides to have the same shape; where one engine
only has a longer tail the percentiles tell it.

Sessions that end near each other in time are alike: one bad moment of a process meets all that are open.
So every method asks how much the difference itself moves in time (`inflation`, by batch means), and takes n
sessions for as many as they are worth. What both sides went through together, such as a busy minute of the
machine or a client that sends more, is in no difference and costs nothing. That is why values come in the
order in which their sessions ended. What no statistic mends: sessions of one client are alike too, where
the client decides the engine (a sticky split: then clients are the units, and the intervals here are too
narrow); and engines that share a machine slow each other.

What a connection waited before it was accepted is no metric here: the log has it in steps of the kernel's
clock, 4 ms and more.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import stats

Integers = NDArray[np.int64]
Verdict = Literal["better", "worse", "no difference", "not enough data"]
Statistic = Literal["typical", "p50", "p90", "p99", "share", "mean"]

CONFIDENCE = 0.95
SIGNIFICANT = 1 - CONFIDENCE
Z = float(stats.norm.ppf(1 - SIGNIFICANT / 2))
# below it the normal approximations do not hold, and no interval would be of use to anybody
FEWEST = 20
# a percentile with fewer sessions beyond it is told by single sessions: p99 needs 500
FEWEST_BEYOND = 5
# intervals of CPU time: 10 degrees of freedom cost the interval an eighth of its width
FEWEST_INTERVALS = 11
# the ends of an interval are the 50th of them from either end
RESAMPLES = 2000
# enough for a variance, and each long enough to hold a bad moment as a whole
BATCHES = 20
PERCENTILES: tuple[tuple[Statistic, int], ...] = (("p50", 50), ("p90", 90), ("p99", 99))


class Metric(msgspec.Struct, frozen=True):
    """What is compared, and which difference nobody needs to hear of: below `relative` of the base's
    value or below `floor`, in the metric's unit.
    """

    name: str
    title: str
    unit: Literal["us", "bytes/s", "share"]
    better: Literal["lower", "higher"]
    relative: float
    floor: float


# Floors: a tenth of a millisecond is what a busy machine adds to anything; CPU time comes in steps of 10 ms
# for an interval of many sessions; a reset in a hundred sessions is one that somebody notices.
TIMERS = (
    Metric("connect_us", "connect", "us", "lower", 0.1, 100),
    Metric("first_byte_us", "first byte", "us", "lower", 0.1, 100),
    Metric("duration_us", "duration", "us", "lower", 0.1, 100),
    Metric("max_gap_us", "largest gap", "us", "lower", 0.1, 100),
)
THROUGHPUT = Metric("throughput", "throughput", "bytes/s", "higher", 0.1, 1000)
RESETS = Metric("resets", "resets", "share", "lower", 0.1, 0.01)
CPU = Metric("cpu_us", "CPU a session", "us", "lower", 0.1, 20)
SESSION_METRICS = (*TIMERS, THROUGHPUT)
METRICS = (*SESSION_METRICS, RESETS, CPU)


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The sessions of one side.

    Attributes:
        values: by the name of a metric of `SESSION_METRICS`: one integer for each session that has it,
            shape (n,), in the order in which they ended. n differs between metrics: a null of the log is left out.
        resets: shape (sessions,): 1 for a session that ended by a reset and 0 for another, in the same order.
        cpu: shape (k, 2): for k intervals of time, the microseconds of CPU that the process used and the
            sessions that ended in it. Empty where that is not known.

    """

    values: Mapping[str, Integers]
    resets: Integers
    cpu: Integers


class Effect(msgspec.Struct, frozen=True, kw_only=True):
    """How far `other` is from `base`: the `difference`, its 95 % interval from `low` to `high`, and the
    probability `p` of one at least so large where there is none. All but p in the metric's unit.
    """

    base: float
    other: float
    difference: float
    low: float
    high: float
    p: float


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One statistic of one metric, `other` against the base. `statistic` is "typical" (Hodges-Lehmann),
    a percentile ("p99": 99 % of the sessions do at least as well, so for throughput the slow end),
    "share" or "mean". `p_holm` is p, adjusted for all that was asked of all others. `effect`, `margin`
    and `p_holm` are null where there is not enough data to compute them.
    """

    other: str
    metric: str
    statistic: Statistic
    verdict: Verdict
    effect: Effect | None
    margin: float | None
    p_holm: float | None


def compare(
    base: Sample, others: Mapping[str, Sample], control: Sample | None = None, *, seed: int = 0
) -> list[Finding]:
    """Everything that can be told of `others` against `base`, in the order of `others` and `METRICS`.

    Args:
        control: sessions of another process that is the same as the base's: the noise. Without one the
            tolerance alone decides. To judge the control itself, give it as the only one of `others`.
        seed: of the bootstrap; the same seed and samples give the same findings.

    """
    rng = np.random.default_rng(seed)
    noise = {} if control is None else _effects(base, control, rng)
    found = {name: _effects(base, sample, rng) for name, sample in others.items()}
    # a family: every question of this comparison that has an answer
    asked = [(name, key) for name, effects in found.items() for key in effects if effects[key] is not None]
    p_values = [effect.p for name, key in asked if (effect := found[name][key]) is not None]
    adjusted = dict(zip(asked, holm(p_values), strict=True))
    findings = []
    for name, effects in found.items():
        for (metric, statistic), effect in effects.items():
            p_holm = adjusted.get((name, (metric, statistic)))
            margin: float | None = None
            verdict: Verdict = "not enough data"
            if effect is not None and p_holm is not None:
                margin = _margin(metric, effect, noise.get((metric, statistic)))
                verdict = judge(effect, margin, p_holm, metric.better)
            findings.append(
                Finding(
                    other=name,
                    metric=metric.name,
                    statistic=statistic,
                    verdict=verdict,
                    effect=effect,
                    margin=margin,
                    p_holm=p_holm,
                )
            )
    return findings


def judge(effect: Effect, margin: float, p_holm: float, better: Literal["lower", "higher"]) -> Verdict:
    """The verdict on one effect, by the rules at the top of this module."""
    if p_holm < SIGNIFICANT and (effect.low > margin or effect.high < -margin):
        return "better" if (effect.difference > 0) == (better == "higher") else "worse"
    return "no difference" if effect.high - effect.low <= 2 * margin else "not enough data"


def inflation(base: NDArray[np.float64], other: NDArray[np.float64]) -> float:
    """How many sessions are worth one independent one, for the difference of the means of these values:
    its variance by batch means (as in Law: Simulation Modeling and Analysis, 9.5.3), over what it would be
    if order meant nothing. At least 1, and 1 with less than a value for each batch.

    Both sides are cut into `BATCHES` batches in the order of time. Sessions that were dealt at random make
    a batch of one side last as long as that of the other, so what happened to both cancels.
    """
    if min(len(base), len(other)) < BATCHES:
        return 1.0
    means = [np.array([part.mean() for part in np.array_split(side, BATCHES)]) for side in (base, other)]
    unordered = float(np.concatenate([base, other]).var(ddof=1)) * (1 / len(base) + 1 / len(other))
    ordered = float((means[1] - means[0]).var(ddof=1)) / BATCHES
    return max(1.0, ordered / unordered) if unordered else 1.0


def shift(base: Integers, other: Integers) -> Effect | None:
    """The Hodges-Lehmann shift of `other` from `base` with the Mann-Whitney test and the interval that it
    inverts to (Hollander, Wolfe, Chicken: Nonparametric Statistical Methods, 4.1 to 4.3), normal
    approximation, corrected for ties and for the inflation of the ranks.

    Exact, in memory of O(n + m) and time of O((n + m) log(range)): the n * m differences are never made,
    an order statistic of them is found by bisection, counting those below a value with one pass over both
    sides. That is why values are integers: the bisection ends on the very difference.
    None with fewer than `FEWEST` sessions on a side. `base` and `other` of the effect are the medians.
    """
    n, m = len(base), len(other)
    if min(n, m) < FEWEST:
        return None
    every = n + m
    ranks = stats.rankdata(np.concatenate([base, other]))
    ties = np.unique(ranks, return_counts=True)[1].astype(float)
    variance = n * m / 12 * (every + 1 - (ties**3 - ties).sum() / (every * (every - 1)))
    # rounding may leave a little less than nothing
    error = math.sqrt(max(0.0, variance) * inflation(ranks[:n], ranks[n:]))
    # U of `other`, less what it is where there is no difference
    excess = float(ranks[n:].sum()) - m * (m + 1) / 2 - n * m / 2
    rank = max(1, int(n * m / 2 - Z * error))
    base, other = np.sort(base), np.sort(other)
    least, most = int(other[0] - base[-1]), int(other[-1] - base[0])
    lower_middle = _ranked_difference(base, other, (n * m + 1) // 2, least, most)
    upper_middle = _ranked_difference(base, other, n * m // 2 + 1, lower_middle, most)
    return Effect(
        base=float(np.median(base)),
        other=float(np.median(other)),
        difference=(lower_middle + upper_middle) / 2,
        low=_ranked_difference(base, other, rank, least, lower_middle),
        high=_ranked_difference(base, other, n * m + 1 - rank, upper_middle, most),
        p=float(2 * stats.norm.sf(abs(excess) / error)) if error else 1.0,
    )


def _ranked_difference(base: Integers, other: Integers, rank: int, least: int, most: int) -> int:
    """The rank-th smallest (from 1) of all other[i] - base[j], both sorted, known to be in least..most."""
    while least < most:
        middle = (least + most) // 2
        above = int(np.searchsorted(base, other - middle, side="left").sum())
        if len(base) * len(other) - above >= rank:
            most = middle
        else:
            least = middle + 1
    return least


def percentile_difference(
    base: Integers, other: Integers, percent: int, rng: np.random.Generator
) -> Effect | None:
    """The difference of a percentile (nearest rank), with a percentile bootstrap interval; p is that of
    Fisher's exact test on how many sessions of either side lie above the percentile of both together. Both
    take the sessions for as many as they are worth.

    Nothing is drawn again and again: the k-th smallest of n draws from a sample of n is the sample's
    value at rank ceil(n * B), where B is Beta(k, n + 1 - k), the k-th smallest of n uniform numbers.
    None with fewer than `FEWEST` sessions on a side, or than `FEWEST_BEYOND` independent ones beyond the
    percentile.
    """
    if min(len(base), len(other)) < FEWEST:
        return None
    both = np.sort(np.concatenate([base, other]))
    limit = both[_nearest_rank(len(both), percent) - 1]
    beyond = [side > limit for side in (base, other)]
    alike = inflation(beyond[0].astype(float), beyond[1].astype(float))
    if min(len(base), len(other)) / alike * min(percent, 100 - percent) < 100 * FEWEST_BEYOND:
        return None
    values, resampled = [], []
    for side in (np.sort(base), np.sort(other)):
        n = len(side)
        k = _nearest_rank(n, percent)
        values.append(float(side[k - 1]))
        ranks = np.ceil(n * rng.beta(k / alike, (n + 1 - k) / alike, RESAMPLES)).astype(int)
        # a Beta that rounds to 0 is of the first rank
        resampled.append(side[np.maximum(ranks, 1) - 1])
    low, high = np.quantile(resampled[1] - resampled[0], [SIGNIFICANT / 2, 1 - SIGNIFICANT / 2])
    return Effect(
        base=values[0],
        other=values[1],
        difference=values[1] - values[0],
        low=float(low),
        high=float(high),
        p=_fisher(beyond[0], beyond[1], alike),
    )


def proportion_difference(base: Integers, other: Integers) -> Effect | None:
    """The difference of the shares of ones among zeros and ones, with Newcombe's hybrid score interval
    (Statistics in Medicine 17, 1998, method 10) and Fisher's exact test, both of as many sessions as they
    are worth. None with fewer than `FEWEST` of those on a side.
    """
    if min(len(base), len(other)) < FEWEST:
        return None
    alike = inflation(base.astype(float), other.astype(float))
    shares, intervals = [], []
    for side in (base, other):
        worth = round(len(side) / alike)
        if worth < FEWEST:
            return None
        shares.append(float(side.mean()))
        hits = round(shares[-1] * worth)
        intervals.append(stats.binomtest(hits, worth).proportion_ci(CONFIDENCE, method="wilson"))
    difference = shares[1] - shares[0]
    return Effect(
        base=shares[0],
        other=shares[1],
        difference=difference,
        low=difference - math.hypot(shares[1] - intervals[1].low, intervals[0].high - shares[0]),
        high=difference + math.hypot(intervals[1].high - shares[1], shares[0] - intervals[0].low),
        p=_fisher(base, other, alike),
    )


def ratio_difference(base: Integers, other: Integers) -> Effect | None:
    """The difference of two ratios of sums, as CPU time over sessions: shape (k, 2), an amount and a count
    for each of k intervals. Intervals are the units, by the linearised variance of a ratio (Cochran:
    Sampling Techniques, 6.4) and Student's t. None with fewer than `FEWEST_INTERVALS` that have a count.
    """
    ratios, variances = [], []
    fewest = min(len(base), len(other))
    if fewest < FEWEST_INTERVALS:
        return None
    for amounts, counts in (base.T.astype(float), other.T.astype(float)):
        if (counts > 0).sum() < FEWEST_INTERVALS:
            return None
        ratio = amounts.sum() / counts.sum()
        k = len(amounts)
        ratios.append(float(ratio))
        variances.append(((amounts - ratio * counts) ** 2).sum() * k / (k - 1) / counts.sum() ** 2)
    difference, error = ratios[1] - ratios[0], float(np.sqrt(sum(variances)))
    freedom = fewest - 1
    reach = float(stats.t.ppf(1 - SIGNIFICANT / 2, freedom)) * error
    return Effect(
        base=ratios[0],
        other=ratios[1],
        difference=difference,
        low=difference - reach,
        high=difference + reach,
        p=float(2 * stats.t.sf(abs(difference) / error, freedom)) if error else float(not difference),
    )


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values adjusted by Holm's method (1979), in the order given: what is below 0.05 afterwards
    holds for all of them together.
    """
    order = np.argsort(p_values, kind="stable")
    count = len(p_values)
    stepped = np.array(p_values, float)[order] * (count - np.arange(count))
    adjusted = np.empty(count)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(stepped))
    return [float(p) for p in adjusted]


def _effects(
    base: Sample, other: Sample, rng: np.random.Generator
) -> dict[tuple[Metric, Statistic], Effect | None]:
    effects: dict[tuple[Metric, Statistic], Effect | None] = {}
    for metric in SESSION_METRICS:
        sides = base.values[metric.name], other.values[metric.name]
        effects[metric, "typical"] = shift(*sides)
        for statistic, percent in PERCENTILES:
            at = percent if metric.better == "lower" else 100 - percent
            effects[metric, statistic] = percentile_difference(*sides, at, rng)
    effects[RESETS, "share"] = proportion_difference(base.resets, other.resets)
    effects[CPU, "mean"] = ratio_difference(base.cpu, other.cpu)
    return effects


def _margin(metric: Metric, effect: Effect, noise: Effect | None) -> float:
    seen = 0.0 if noise is None else abs(noise.difference)
    return max(metric.floor, metric.relative * abs(effect.base), seen)


def _nearest_rank(n: int, percent: int) -> int:
    return -(-n * percent // 100)


def _fisher(base: Integers | NDArray[np.bool_], other: Integers | NDArray[np.bool_], alike: float) -> float:
    """Of ones among zeros and ones, as many as they are worth."""
    table = [[side.sum() / alike, (len(side) - side.sum()) / alike] for side in (base, other)]
    return float(stats.fisher_exact(np.rint(table).astype(np.int64)).pvalue)
