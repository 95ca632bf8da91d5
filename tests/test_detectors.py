"""Detectors on random walks, smooth curves, noise, and too little."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lora_forensics.detectors import DETECTORS, Curve
from lora_forensics.turning_point import cs_fluctuation, fluctuation, noise_level, rising, valleys


def walk(seed: int, count: int) -> np.ndarray:
    """A random walk."""
    return np.random.default_rng(seed).standard_normal(count).cumsum()


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("cosine", [[], [1.0], [2.0, 1.0], [1.0] * 40, [math.nan] * 40, list(range(40)), [0.0] * 40])
def test_every_detector_says_none_where_there_is_nothing(detector: str, cosine: list[float]) -> None:
    """Contract of the table: no turning point without two valleys, and no warning either."""
    assert DETECTORS[detector](Curve(np.array(cosine, dtype=np.float64), 3)) is None


@pytest.mark.parametrize("detector", DETECTORS)
def test_every_detector_points_into_the_run(detector: str) -> None:
    """Contract of the table: plain indices of checkpoints, the support behind the turning point and inside the run."""
    for seed in range(50):
        found = DETECTORS[detector](Curve(walk(seed, 60), 3))
        if found is not None:
            assert type(found.index) is int
            assert 0 <= found.index < found.support_end < 60


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("tau", [3, 10, 40, 200])
def test_smooth_saturating_curves_have_no_turning_point(detector: str, tau: float) -> None:
    """Noise-free: nothing but the rounding of float64, which is known and set aside."""
    cosine = 1e-3 * (1 - np.exp(-np.arange(150) / tau))
    for window in (2, 3, 5, 9):
        assert DETECTORS[detector](Curve(cosine, window, noise=8 * 2**-52 * 1e-3)) is None, window


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_noise_on_a_smooth_curve_makes_few_turning_points(window: int) -> None:
    """With its own noise known, a smooth curve has one in at most 5 % of cases."""
    smooth = 1e-3 * (1 - np.exp(-np.arange(80) / 15))
    generator = np.random.default_rng(0)
    curves = [Curve(smooth + 1e-7 * generator.standard_normal(80), window, noise=1e-7) for _ in range(200)]
    assert np.mean([DETECTORS["algorithm1"](curve) is not None for curve in curves]) <= 0.05


@pytest.mark.parametrize("window", [2, 3, 5, 10])
def test_the_noise_level_is_the_mean_under_noise(window: int) -> None:
    """The closed form against 4000 simulated series."""
    noise = np.random.default_rng(0).standard_normal((4000, 60))
    assert fluctuation(noise, window).value.mean() == pytest.approx(noise_level(window), rel=0.03)


def test_a_batch_is_its_series_one_by_one() -> None:
    """Leading axes are the batch."""
    series = np.array([walk(seed, 40) for seed in range(6)]).reshape(2, 3, 40)
    batch = fluctuation(series, 4).value
    for place in np.ndindex(2, 3):
        np.testing.assert_array_equal(batch[place], cs_fluctuation(series[place], 4))


def test_shallow_valleys_are_dropped_shallowest_first() -> None:
    """A ripple inside a deep valley goes; the valley stays. A gap ends a side."""
    series = np.array([10.0, 2.0, 2.5, 1.0, 9.0, 8.5, 9.5, 0.0, 10.0])
    assert valleys(series).tolist() == [1, 3, 5, 7]
    assert rising(series, valleys(series), 1.0).tolist() == [3, 7]
    assert rising(series, valleys(series), 20.0).tolist() == []
    gap = np.array([10.0, 1.0, 1.5, math.nan, 9.0, 1.0, 9.0])
    assert rising(gap, valleys(gap), 1.0).tolist() == [5]


def test_prominence_counts_deep_valleys_only() -> None:
    """Where the plain second valley is a ripple, prominence goes on to a real one, or to none."""
    later = [
        (plain.index, deep.index)
        for seed in range(200)
        if (plain := DETECTORS["algorithm1"](Curve(walk(seed, 80), 4)))
        and (deep := DETECTORS["prominence"](Curve(walk(seed, 80), 4)))
    ]
    assert all(deep >= plain for plain, deep in later)
    assert any(deep > plain for plain, deep in later)


@pytest.mark.parametrize("seed", range(30))
def test_dropping_shallow_valleys_equals_the_slow_rule(seed: int) -> None:
    """Recompute all sides after each drop, by hand."""
    series = np.abs(walk(seed, 60))
    kept = valleys(series).tolist()
    while kept:
        edges = [0, *kept, series.size - 1]
        depth = [
            min(series[a : b + 1].max(), series[b : c + 1].max()) - series[b]
            for a, b, c in zip(edges, kept, edges[2:], strict=False)
        ]
        if min(depth) > 1.0:
            break
        del kept[int(np.argmin(depth))]
    assert rising(series, valleys(series), 1.0).tolist() == kept
