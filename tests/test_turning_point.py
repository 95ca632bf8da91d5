"""CS-Fluctuation, valleys and detectors: against the oracle, against slow references, and by their invariants."""

from __future__ import annotations

import gzip
import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import lora_forensics as lf
from lora_forensics.detectors import DETECTORS, Curve
from lora_forensics.errors import UsageError
from lora_forensics.turning_point import cs_fluctuation, fluctuation, official_stop, valleys

ORACLE = json.loads(gzip.decompress((Path(__file__).parent / "data" / "oracle" / "csf.json.gz").read_bytes()))

CASES = pytest.mark.parametrize("case", ORACLE, ids=[f"{n}-M{case['window']}" for n, case in enumerate(ORACLE)])

UNIT = st.floats(-1, 1, allow_subnormal=False)


def walk(seed: int, count: int, drift: float = 0.0) -> np.ndarray:
    """A random walk of the size of real cosines."""
    return np.cumsum(np.random.default_rng(seed).normal(drift, 1e-5, count))


def slow_fluctuation(cosine: list[float], window: int, rates: list[float]) -> list[float]:
    """Eq. 3 and 4 with sums and loops."""

    def average(values: list[float]) -> list[float]:
        return [math.fsum(values[i : i + window]) / window for i in range(len(values) - window + 1)]

    ma = average(cosine)
    x = average([b - a for a, b in itertools.pairwise(ma)])
    found = []
    for j in range(len(x) - window + 1):
        part = x[j : j + window]
        mean = math.fsum(part) / window
        found.append(math.fsum((v - mean) ** 2 for v in part) / window / rates[j])
    return found


def slow_valleys(series: list[float]) -> list[int]:
    """One pass that remembers whether it is falling; a NaN makes it forget."""
    found, falling, before = [], False, math.nan
    for index, value in enumerate(series):
        if math.isnan(value) or math.isnan(before):
            falling = False
        elif value > before:
            if falling:
                found.append(index - 1)
            falling = False
        elif value < before:
            falling = True
        before = value
    return found


def official_loop(cosine: np.ndarray, window: int) -> tuple[int, int] | None:
    """The released code as it runs: called after every sample, with one variable that outlives the call.

    Each call computes the variances so far, loops over them from the start and counts the changes of the derivative
    from falling to rising; the previous derivative is never reset. At the second change it stops there and then.
    """
    previous = 0.0
    for newest in range(len(cosine)):
        variances = [
            float(np.var([np.mean(np.diff(averages[k : k + window + 1])) for k in range(j, j + window)]))
            for averages in [[np.mean(cosine[k : k + window]) for k in range(newest + 2 - window)]]
            for j in range(newest + 1 - 3 * window + 2)
        ]
        changes = 0
        for index in range(1, len(variances)):
            derivative = variances[index] - variances[index - 1]
            if previous < 0 < derivative:
                changes += 1
                if changes == 2:
                    return newest, index
            previous = derivative
    return None


def index_of(detector: str, curve: Curve) -> int | None:
    """The checkpoint that a detector names."""
    found = DETECTORS[detector](curve)
    return None if found is None else found.index


@CASES
def test_fluctuation_equals_the_oracle(case: dict[str, Any]) -> None:
    """Every value of CS-Fluctuation is the oracle's to 1e-9, relative."""
    found = cs_fluctuation(case["cosine"], case["window"], case["learning_rate"])
    assert found.dtype == np.float64
    np.testing.assert_allclose(found, case["cs_fluctuation"], rtol=1e-9, atol=0)


@CASES
def test_valleys_and_detectors_equal_the_oracle(case: dict[str, Any]) -> None:
    """All valleys, the second one, and the official code's answer are the oracle's."""
    found = cs_fluctuation(case["cosine"], case["window"], case["learning_rate"])
    assert valleys(found).tolist() == case["valleys"]
    curve = Curve(np.array(case["cosine"]), case["window"], case["learning_rate"])
    assert index_of("algorithm1", curve) == case["algorithm1"]
    official = case["official"]
    assert official_stop(case["cosine"], case["window"]) == (
        official and (official["detected_at"], official["reported"])
    )
    assert index_of("official", curve) == (official and official["reported"])


def test_the_public_names_are_these_functions() -> None:
    """`lf.turning_point` has the functions of the contract."""
    assert lf.turning_point.cs_fluctuation is cs_fluctuation
    assert lf.turning_point.valleys is valleys
    assert lf.turning_point.official_stop is official_stop


@pytest.mark.parametrize("seed", range(300))
def test_official_stop_is_what_the_stateful_loop_does(seed: int) -> None:
    """The closed form stops where the released code's loop stops, on walks with and without drift."""
    rng = np.random.default_rng(seed)
    window = int(rng.integers(2, 6))
    count = int(rng.integers(3 * window - 1, 3 * window + 30))
    cosine = walk(seed, count, drift=float(rng.choice([0.0, 1e-5])))
    assert official_stop(cosine, window) == official_loop(cosine, window)


def test_the_official_code_stops_at_the_first_valley_of_a_series_that_starts_rising() -> None:
    """The variable that is never reset counts one valley too many in about half of all random series, never later."""
    early = late = 0
    for seed in range(400):
        found = cs_fluctuation(walk(seed, 60), 4)
        bottoms = valleys(found)
        if bottoms.size < 2:
            continue
        reported = index_of("official", Curve(walk(seed, 60), 4))
        early += reported == bottoms[0] + 1
        late += reported == bottoms[1] + 1
        assert (reported == bottoms[0] + 1) == (found[1] > found[0])
    assert early + late > 350
    assert 0.3 < early / (early + late) < 0.6


@pytest.mark.parametrize("window", range(2, 8))
def test_length_is_t_minus_3m_plus_2_and_never_negative(window: int) -> None:
    """T checkpoints give T - 3M + 2 values, none below 3M - 1, and the steps before it have their own lengths."""
    for count in range(40):
        steps = fluctuation(walk(1, count), window)
        assert len(steps.value) == max(0, count - 3 * window + 2)
        assert len(steps.average) == max(0, count - window + 1)
        assert len(steps.slope) == max(0, count - window)
        assert len(steps.slope_average) == max(0, count - 2 * window + 1)


@given(st.lists(UNIT, min_size=0, max_size=40), st.integers(2, 6), st.data())
@settings(deadline=None, max_examples=150)
def test_fluctuation_equals_sums_and_loops(cosine: list[float], window: int, data: st.DataObject) -> None:
    """Any series and any positive rates: the value of Eq. 4, written out with loops."""
    rates = data.draw(st.lists(st.floats(1e-7, 1), min_size=len(cosine), max_size=len(cosine)))
    found = cs_fluctuation(cosine, window, rates)
    expected = slow_fluctuation(cosine, window, rates)
    np.testing.assert_allclose(
        found * rates[: found.size], np.multiply(expected, rates[: found.size]), rtol=1e-9, atol=1e-18
    )


@pytest.mark.parametrize("window", [2, 3, 5])
def test_value_j_rests_on_checkpoints_j_to_j_plus_3m_minus_2(window: int) -> None:
    """Moving one checkpoint moves exactly the values whose support holds it."""
    cosine = walk(5, 40)
    before = cs_fluctuation(cosine, window)
    for moved in range(40):
        after = cs_fluctuation(np.where(np.arange(40) == moved, cosine + 1e-3, cosine), window)
        changed = np.flatnonzero(~np.isclose(after, before, rtol=1e-6, atol=0))
        assert changed.size
        assert changed.min() >= moved - (3 * window - 2)
        assert changed.max() <= moved
        if 3 * window - 2 <= moved < before.size:
            assert {moved - (3 * window - 2), moved} <= set(changed.tolist())


@given(st.lists(UNIT, min_size=8, max_size=40), st.floats(1e-3, 1e3), st.integers(2, 3))
@settings(deadline=None, max_examples=150)
def test_scaling_cs_by_c_scales_the_fluctuation_by_c_squared(cosine: list[float], factor: float, window: int) -> None:
    """The unit of CS cancels out of where the valleys are."""
    plain = cs_fluctuation(cosine, window)
    scaled = cs_fluctuation(np.multiply(cosine, factor), window)
    np.testing.assert_allclose(scaled, plain * factor**2, rtol=1e-6, atol=1e-16 * factor**2)


@given(st.lists(UNIT, min_size=8, max_size=40), UNIT, UNIT, st.integers(2, 3))
@settings(deadline=None, max_examples=150)
def test_a_constant_and_a_trend_in_cs_change_nothing(
    cosine: list[float], level: float, trend: float, window: int
) -> None:
    """CS-Fluctuation sees neither the level of CS nor a constant slope."""
    moved = np.asarray(cosine) + level + trend * np.arange(len(cosine)) / len(cosine)
    np.testing.assert_allclose(cs_fluctuation(moved, window), cs_fluctuation(cosine, window), rtol=1e-6, atol=1e-15)


@given(st.lists(UNIT, min_size=8, max_size=40), st.integers(2, 4))
@settings(deadline=None, max_examples=100)
def test_training_backwards_gives_the_series_backwards(cosine: list[float], window: int) -> None:
    """Reversing the checkpoints reverses CS-Fluctuation: it prefers no direction of time."""
    forwards = cs_fluctuation(cosine, window)
    np.testing.assert_allclose(cs_fluctuation(cosine[::-1], window), forwards[::-1], rtol=1e-6, atol=1e-17)


@given(st.integers(0, 10_000), st.floats(1e-7, 1.0))
@settings(deadline=None, max_examples=50)
def test_a_constant_learning_rate_moves_no_valley(seed: int, rate: float) -> None:
    """Dividing by one number keeps every valley in its place."""
    cosine = walk(seed, 60)
    assert valleys(cs_fluctuation(cosine, 3, rate)).tolist() == valleys(cs_fluctuation(cosine, 3)).tolist()


def test_value_j_is_divided_by_the_rate_of_checkpoint_j() -> None:
    """Rates are aligned with the first checkpoint of the support; those at the tail are not used."""
    cosine, rates = walk(2, 20), np.linspace(1e-3, 1e-5, 20)
    plain = cs_fluctuation(cosine, 3)
    np.testing.assert_allclose(cs_fluctuation(cosine, 3, rates), plain / rates[: plain.size], rtol=1e-14)
    rates[plain.size :] = math.nan
    assert np.isfinite(cs_fluctuation(cosine, 3, rates)).all()


@pytest.mark.parametrize("bad", [0.0, -0.0, -1e-4, math.nan, -math.inf])
def test_a_rate_that_is_not_above_zero_gives_nan_there_only(bad: float) -> None:
    """A rate of 0, below 0 or NaN makes its own value NaN, without a warning, and no valley beside it."""
    cosine, rates = walk(2, 30), np.full(30, 1e-4)
    rates[7] = bad
    found = cs_fluctuation(cosine, 2, rates)
    assert np.flatnonzero(np.isnan(found)).tolist() == [7]
    assert not {6, 7, 8} & set(valleys(found).tolist())
    assert np.isnan(cs_fluctuation(cosine, 2, bad)).all()


def test_float32_input_is_computed_in_float64() -> None:
    """A table stored in float32 is widened first: the same values as its float64 copy."""
    cosine = walk(3, 40).astype(np.float32)
    assert cs_fluctuation(cosine, 3).tolist() == cs_fluctuation(cosine.astype(np.float64), 3).tolist()


def test_nan_in_cs_reaches_its_own_support_and_no_further() -> None:
    """A gap in CS gives NaN where the support holds it, not an exception."""
    cosine = walk(4, 40)
    cosine[20] = math.nan
    assert np.flatnonzero(np.isnan(cs_fluctuation(cosine, 3))).tolist() == list(range(13, 21))


def test_a_smooth_saturating_curve_has_no_valley() -> None:
    """In float64 an exponential approach has no second valley to find (design, section 2)."""
    cosine = 1e-3 * (1 - np.exp(-np.arange(200) / 40))
    assert valleys(cs_fluctuation(cosine, 5)).size == 0
    assert index_of("algorithm1", Curve(cosine, 5)) is None


@pytest.mark.parametrize("window", [1, 0, -3])
def test_a_window_below_two_is_bad_usage(window: int) -> None:
    """The variance of one value is 0: the error says so."""
    with pytest.raises(UsageError, match=f"window of {window} .*too small"):
        cs_fluctuation([1.0] * 20, window)


def test_rates_of_another_length_are_bad_usage() -> None:
    """One rate per checkpoint, or one for all."""
    with pytest.raises(UsageError, match="3 learning rates for 20 checkpoints"):
        cs_fluctuation([1.0] * 20, 2, [1e-4] * 3)
    with pytest.raises(UsageError, match="single number"):
        cs_fluctuation(1.0, 2)


@pytest.mark.parametrize(
    ("series", "bottoms"),
    [
        ([], []),
        ([1], []),
        ([2, 1], []),
        ([2, 1, 2], [1]),
        ([1, 2, 1], []),
        ([3, 2, 1, 0], []),
        ([0, 1, 2, 3], []),
        ([1, 1, 1, 1], []),
        ([2, 1, 1, 2], [2]),
        ([2, 1, 1, 0, 0, 1], [4]),
        ([2, 2, 1, 2, 2, 1, 2], [2, 5]),
        ([3, 2, 2, 1, 3], [3]),
        ([3, 1, 2, 2, 3, 1], [1]),
        ([2, 1, 1], []),
        ([1, 1, 2], []),
        ([math.nan] * 5, []),
        ([2, 1, math.nan, 2], []),
        ([2, math.nan, 1, 2], []),
        ([2, math.nan, 2], []),
        ([2, 1, math.nan, 1, 2], []),
        ([2, 1, 2, math.nan, 2, 1, 2], [1, 5]),
        ([math.nan, 2, 1, 2, math.nan], [2]),
        ([math.inf, 1, math.inf], [1]),
    ],
)
def test_valleys_by_hand(series: list[float], bottoms: list[int]) -> None:
    """A flat bottom is one valley, its last sample; an end is none; nothing is counted across NaN."""
    found = valleys(series)
    assert found.dtype == np.int64
    assert found.tolist() == bottoms


@given(st.lists(st.one_of(st.integers(0, 3).map(float), st.just(math.nan)), max_size=30))
@settings(deadline=None, max_examples=400)
def test_valleys_equal_one_pass_by_hand(series: list[float]) -> None:
    """Ties and gaps in any arrangement: the valleys of a plain loop."""
    assert valleys(series).tolist() == slow_valleys(series)


@given(st.lists(st.floats(0, 1), max_size=40))
@settings(deadline=None, max_examples=100)
def test_valleys_are_strict_minima_with_a_rise_between(series: list[float]) -> None:
    """Between two valleys the series rises above both; each is below what stands beside its flat stretch."""
    found = valleys(series).tolist()
    assert found == sorted(set(found))
    for first, second in itertools.pairwise(found):
        assert max(series[first : second + 1]) > max(series[first], series[second])
    for index in found:
        assert series[index] < series[index + 1]


def test_algorithm1_needs_3m_plus_3_checkpoints() -> None:
    """With fewer than 3M + 3 checkpoints there can be no second valley, whatever the series."""
    for seed in range(200):
        assert index_of("algorithm1", Curve(walk(seed, 3 * 2 + 2), 2)) is None
    found = [index_of("algorithm1", Curve(walk(seed, 3 * 2 + 3), 2)) for seed in range(200)]
    assert any(index is not None for index in found)
