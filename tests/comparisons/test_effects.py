"""The statistics against their definitions, against scipy, and against samples whose truth is known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from comparisons.effects import (
    METRICS,
    SESSION_METRICS,
    Effect,
    Finding,
    Integers,
    Sample,
    compare,
    holm,
    inflation,
    judge,
    percentile_difference,
    proportion_difference,
    ratio_difference,
    shift,
)

# a shared machine: it decides how long an example takes
RELAXED = settings(deadline=None)
FEW = st.lists(st.integers(0, 10**7), min_size=20, max_size=39)
NAMES = [metric.name for metric in METRICS]


def integers(values: object) -> Integers:
    return np.array(values, np.int64)


def times(rng: np.random.Generator, count: int) -> Integers:
    """Microseconds as sessions take them: a millisecond or two, with a long tail."""
    return integers(rng.lognormal(7, 0.5, count))


def in_bad_moments(rng: np.random.Generator, count: int) -> Integers:
    """The same, three times as long for all sessions of some moments."""
    moments = np.repeat(rng.random(count // 25 + 1) < 0.1, 25)[:count]
    return integers(times(rng, count) * np.where(moments, 3, 1))


def sample(values: Integers, resets: Integers | None = None, cpu: Integers | None = None) -> Sample:
    """Sessions all of whose timers, and throughput, are these values."""
    return Sample(
        values={metric.name: values for metric in SESSION_METRICS},
        resets=np.zeros(len(values), np.int64) if resets is None else resets,
        cpu=np.empty((0, 2), np.int64) if cpu is None else cpu,
    )


def verdicts(found: list[Finding], metric: str) -> dict[str, str]:
    return {finding.statistic: finding.verdict for finding in found if finding.metric == metric}


@RELAXED
@given(FEW, FEW)
def test_the_shift_is_the_median_of_all_differences(base: list[int], other: list[int]) -> None:
    effect = shift(integers(base), integers(other))
    assert effect is not None
    every = np.subtract.outer(np.array(other), np.array(base))
    assert effect.difference == np.median(every)
    assert effect.low <= effect.difference <= effect.high
    assert {effect.low, effect.high} <= set(every.ravel())


@RELAXED
@given(FEW, FEW)
def test_its_probability_is_that_of_mann_and_whitney_for_as_many_sessions_as_these_are_worth(
    base: list[int], other: list[int]
) -> None:
    effect = shift(integers(base), integers(other))
    assert effect is not None
    if np.ptp([*base, *other]):
        independent = stats.mannwhitneyu(other, base, method="asymptotic", use_continuity=False).pvalue
        ranks = stats.rankdata([*base, *other])
        alike = inflation(ranks[: len(base)], ranks[len(base) :])
        assert effect.p == pytest.approx(2 * stats.norm.sf(stats.norm.isf(independent / 2) / np.sqrt(alike)))


@RELAXED
@given(FEW, FEW, st.integers(-(10**6), 10**6))
def test_what_is_added_to_every_session_is_added_to_the_shift(
    base: list[int], other: list[int], added: int
) -> None:
    before, after = shift(integers(base), integers(other)), shift(integers(base), integers(other) + added)
    assert before is not None
    assert after is not None
    assert after.difference == before.difference + added


def test_equal_sessions_have_no_shift_and_no_doubt() -> None:
    effect = shift(integers([7] * 50), integers([7] * 50))
    assert effect == Effect(base=7, other=7, difference=0, low=0, high=0, p=1)


def test_the_interval_of_the_shift_holds_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(4)
    held = 0
    for _ in range(200):
        effect = shift(times(rng, 300), times(rng, 300) + 2000)
        assert effect is not None
        held += effect.low <= 2000 <= effect.high
    assert held >= 180


def test_the_shift_of_a_hundred_thousand_sessions_a_side_needs_no_table_of_all_pairs() -> None:
    rng = np.random.default_rng(5)
    effect = shift(times(rng, 100_000), times(rng, 100_000) + 50)
    assert effect is not None
    assert 30 < effect.low < 50 < effect.high < 70


@pytest.mark.parametrize("percent", [50, 90, 99])
def test_a_percentile_has_the_interval_of_an_ordinary_bootstrap(percent: int) -> None:
    rng = np.random.default_rng(6)
    base, other = times(rng, 1000), times(rng, 1000) + 500

    def difference(one: Integers, another: Integers, axis: int) -> NDArray[np.float64]:
        first, second = (
            np.percentile(side, percent, axis=axis, method="inverted_cdf") for side in (one, another)
        )
        return np.asarray(second - first, float)

    effect = percentile_difference(base, other, percent, np.random.default_rng(1))
    assert effect is not None
    drawn = stats.bootstrap(
        (base, other), difference, vectorized=True, n_resamples=2000, method="percentile", rng=2
    ).confidence_interval
    width = drawn.high - drawn.low
    assert effect.difference == difference(base, other, 0)
    assert effect.low == pytest.approx(drawn.low, abs=width / 5)
    assert effect.high == pytest.approx(drawn.high, abs=width / 5)


def test_a_percentile_needs_five_sessions_beyond_it() -> None:
    rng = np.random.default_rng(7)
    fewer, enough = times(rng, 499), times(rng, 30_000)
    assert percentile_difference(fewer, enough, 99, rng) is None
    assert percentile_difference(enough, fewer, 99, rng) is None
    assert percentile_difference(fewer, enough, 90, rng) is not None


def test_shares_have_newcombes_interval() -> None:
    # Newcombe 1998, table II, example (a), method 10; ones spread evenly, since it has no order
    base = integers([(at + 1) * 48 // 80 - at * 48 // 80 for at in range(80)])
    other = integers([(at + 1) * 56 // 70 - at * 56 // 70 for at in range(70)])
    effect = proportion_difference(base, other)
    assert effect is not None
    assert (effect.base, effect.other) == (0.6, 0.8)
    assert effect.low == pytest.approx(0.0524, abs=5e-5)
    assert effect.high == pytest.approx(0.3339, abs=5e-5)
    assert effect.p == pytest.approx(stats.fisher_exact(np.array([[48, 32], [56, 14]])).pvalue)


def test_a_ratio_of_sums_has_an_interval_that_holds_the_truth() -> None:
    rng = np.random.default_rng(8)
    held = 0
    for _ in range(200):
        sides = []
        for cost in (500, 600):
            sessions = rng.poisson(20, 30)
            # in steps of the clock that counts it
            spent = rng.poisson(sessions * cost / 10_000) * 10_000
            sides.append(integers(np.column_stack([spent, sessions])))
        effect = ratio_difference(*sides)
        assert effect is not None
        held += effect.low <= 100 <= effect.high
    assert held >= 180


def test_holms_method_adjusts_as_it_is_written() -> None:
    # each by how many are not smaller, and never below the one before
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == []


@RELAXED
@given(st.lists(st.floats(0, 1), min_size=1, max_size=30))
def test_holms_method_keeps_the_order_and_forgives_nothing(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert all(before <= after <= 1 for before, after in zip(p_values, adjusted, strict=True))
    order = np.argsort(p_values, kind="stable")
    assert list(np.array(adjusted)[order]) == sorted(adjusted)


def test_sessions_of_one_bad_moment_are_worth_less_than_independent_ones() -> None:
    rng = np.random.default_rng(9)
    base, other = (in_bad_moments(rng, 5000).astype(float) for _ in range(2))
    assert inflation(base, other) > 3
    assert inflation(rng.permutation(base), rng.permutation(other)) < 2


def test_what_both_sides_went_through_together_costs_nothing() -> None:
    rng = np.random.default_rng(17)
    # a minute in which everything takes longer and longer
    minute = np.linspace(0, 20_000, 5000)
    base, other = (integers(times(rng, 5000) + minute) for _ in range(2))
    assert inflation(base.astype(float), other.astype(float)) < 2
    assert (
        verdicts(compare(sample(base), {"other": sample(other)}), "duration_us")["typical"] == "no difference"
    )


@RELAXED
@given(
    st.floats(-1000, 1000),
    st.floats(0, 1000),
    st.floats(0, 1000),
    st.floats(0, 1),
)
def test_a_verdict_needs_the_whole_interval_beyond_the_margin(
    difference: float, reach: float, margin: float, p_holm: float
) -> None:
    low, high = difference - reach, difference + reach
    effect = Effect(base=0, other=0, difference=difference, low=low, high=high, p=p_holm)
    lower, higher = judge(effect, margin, p_holm, "lower"), judge(effect, margin, p_holm, "higher")
    assert (lower in {"better", "worse"}) == (p_holm < 0.05 and (low > margin or high < -margin))
    opposite = {"better": "worse", "worse": "better"}
    assert higher == opposite.get(lower, lower)


def test_two_milliseconds_more_are_worse_by_two_milliseconds() -> None:
    rng = np.random.default_rng(10)
    base, again = sample(times(rng, 2000)), sample(times(rng, 2000))
    slow = sample(times(rng, 2000) + 2000)
    found = [finding for finding in compare(base, {"slow": slow}, again) if finding.metric == "first_byte_us"]
    assert [finding.verdict for finding in found] == ["worse"] * 4
    typical = found[0].effect
    assert typical is not None
    assert typical.low < 2000 < typical.high
    assert typical.high - typical.low < 200


def test_of_throughput_more_is_better_and_its_99th_percentile_is_the_slow_end() -> None:
    rng = np.random.default_rng(11)
    slow, fast = sample(times(rng, 2000) + 10_000), sample(times(rng, 2000) + 20_000)
    found = [finding for finding in compare(slow, {"fast": fast}) if finding.metric == "throughput"]
    assert [finding.verdict for finding in found] == ["better"] * 4
    p50, p99 = (
        finding.effect for statistic in ("p50", "p99") for finding in found if finding.statistic == statistic
    )
    assert p50 is not None
    assert p99 is not None
    assert p99.base < p50.base


def test_resets_and_cpu_time_have_verdicts_of_their_own() -> None:
    rng = np.random.default_rng(12)
    values = times(rng, 2000)
    cheap = integers(np.column_stack([np.full(30, 10_000), np.full(30, 20)]))
    base = sample(values, cpu=cheap)
    resets = integers(rng.random(2000) < 0.05)
    other = sample(values, resets, cheap * integers([2, 1]))
    found = compare(base, {"other": other})
    assert verdicts(found, "resets") == {"share": "worse"}
    assert verdicts(found, "cpu_us") == {"mean": "worse"}
    assert set(verdicts(found, "duration_us").values()) == {"no difference"}


def test_a_difference_that_the_control_has_as_well_is_noise() -> None:
    rng = np.random.default_rng(13)
    base, control, other = (sample(times(rng, 3000) + more) for more in (0, 400, 300))
    assert verdicts(compare(base, {"other": other}), "duration_us")["typical"] == "worse"
    assert verdicts(compare(base, {"other": other}, control), "duration_us")["typical"] == "no difference"


def test_a_difference_within_the_tolerance_is_none_however_certain() -> None:
    rng = np.random.default_rng(14)
    found = compare(sample(times(rng, 50_000)), {"other": sample(times(rng, 50_000) + 50)})
    typical = found[0]
    assert typical.p_holm is not None
    assert typical.p_holm < 1e-6
    assert typical.verdict == "no difference"


@pytest.mark.parametrize("count", [0, 1, 19])
def test_a_handful_of_sessions_is_not_enough_data(count: int) -> None:
    few, many = sample(integers(range(count))), sample(integers(range(1000)))
    for base, other in ((few, many), (many, few), (few, few)):
        found = compare(base, {"other": other})
        assert {finding.verdict for finding in found} == {"not enough data"}
        assert {finding.metric for finding in found} == set(NAMES)


def test_of_twenty_comparisons_of_one_with_itself_at_most_one_finds_a_difference() -> None:
    rng = np.random.default_rng(15)
    alarms = 0
    for _ in range(20):
        base, control, other = (
            sample(
                in_bad_moments(rng, 3000),
                integers(rng.random(3000) < 0.02),
                integers(np.column_stack([rng.poisson(3, 20) * 10_000, rng.poisson(50, 20)])),
            )
            for _ in range(3)
        )
        found = compare(base, {"other": other}, control)
        alarms += any(finding.verdict in {"better", "worse"} for finding in found)
        assert verdicts(found, "duration_us")["typical"] == "no difference"
    assert alarms <= 1


def test_the_same_samples_and_seed_give_the_same_findings() -> None:
    rng = np.random.default_rng(16)
    base, other = sample(times(rng, 1000)), sample(times(rng, 1000))
    assert compare(base, {"other": other}, seed=3) == compare(base, {"other": other}, seed=3)
