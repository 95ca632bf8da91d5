"""Evidence: the null band keeps its promise, sweeps and intervals say what they are called."""

from __future__ import annotations

import numpy as np
import polars as pl
import pytest
from tables import layers_of

import lora_forensics as lf
from lora_forensics.detectors import DETECTORS, Curve, half_of_path
from lora_forensics.evidence import agreement, layer_interval, movement, null_band, window_sweep


def walks(seed: int, modules: int = 1, count: int = 60) -> dict[str, list[float]]:
    """Modules that are random walks."""
    steps = np.random.default_rng(seed).standard_normal((modules, count))
    return {f"m{number}": series.tolist() for number, series in enumerate(steps.cumsum(axis=-1) * 1e-5)}


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize("window", [2, 5])
def test_random_walks_lie_outside_the_band_in_five_percent(detector: str, window: int) -> None:
    """A claim of evidence where there is none: at most 5 % of random walks, and the sampling error of 400 of them."""
    steps = list(range(10, 610, 10))
    band = null_band(Curve(np.zeros(60), window), steps, steps, detector)["null_band"]
    outside = found = 0
    for seed in range(400):
        at = DETECTORS[detector](Curve(np.random.default_rng(seed).standard_normal(60).cumsum(), window))
        if at is not None:
            found += 1
            outside += not band[0] <= steps[at.index] <= band[1]
    assert found > 300
    assert outside / found < 0.075


def test_claims_of_whole_verdicts_on_random_walks_are_rare() -> None:
    """Through assess_run, with several modules and a recorded schedule."""
    claims = []
    for seed in range(60):
        verdict = lf.assess_run(layers_of(walks(seed, 4)), window=4)
        claims.append(verdict.evidence.get("inside_null_band") is False)
    assert sum(claims) <= 7  # 5 % of 60 is 3; more than 7 has a probability below 1 %


def test_the_band_depends_on_the_run() -> None:
    """No constant: checkpoints, window and detector move it."""
    steps = list(range(10, 610, 10))
    bands = {
        (window, detector): tuple(null_band(Curve(np.zeros(60), window), steps, steps, detector)["null_band"])
        for window in (2, 6)
        for detector in ("algorithm1", "multiscale")
    }
    assert len(set(bands.values())) >= 3
    short = steps[:30]
    assert null_band(Curve(np.zeros(30), 2), short, short, "algorithm1")["null_band"][1] <= short[-1]


def test_the_band_is_the_same_at_every_call() -> None:
    """Seeded and cached."""
    steps = list(range(40))
    first = null_band(Curve(np.zeros(40), 3), steps, steps, "algorithm1")
    assert null_band(Curve(np.ones(40), 3), steps, steps, "algorithm1") == first


def test_the_sweep_goes_through_windows_that_fit() -> None:
    """Each with the step that the detector names there."""
    cosine = np.random.default_rng(1).standard_normal(40).cumsum()
    steps = list(range(0, 400, 10))
    sweep = window_sweep(Curve(cosine, 5), steps, "algorithm1")
    assert [entry["window"] for entry in sweep] == [2, 3, 4, 5, 6, 8, 12]
    for entry in sweep:
        at = DETECTORS["algorithm1"](Curve(cosine, entry["window"] or 0))
        assert entry["step"] == (None if at is None else steps[at.index])


def test_modules_that_agree_give_a_narrow_interval() -> None:
    """Equal modules move nothing; independent ones spread the turning point."""
    steps = list(range(60))
    same = np.tile(np.random.default_rng(2).standard_normal(60).cumsum(), (10, 1))
    apart = np.random.default_rng(2).standard_normal((10, 60)).cumsum(axis=-1)
    narrow = layer_interval(Curve(same[0], 4), same, steps, "algorithm1")
    wide = layer_interval(Curve(apart.mean(axis=0), 4), apart, steps, "algorithm1")
    assert narrow is not None
    assert wide is not None
    assert narrow["low_step"] == narrow["high_step"]
    assert wide["high_step"] > wide["low_step"]
    assert layer_interval(Curve(same[0], 4), same[:1], steps, "algorithm1") is None


def test_other_quantities_settle_where_they_do() -> None:
    """A knee, a decay to a tenth, a peak; unknown without the column."""
    count = 50
    series = pl.DataFrame(
        {
            "step": range(0, 500, 10),
            "mean_delta_norm": [min(float(place), 20.0) for place in range(count)],
            "mean_rotation": [float("nan"), *(0.8**place for place in range(count - 1))],
            "mean_effective_rank": [-((place - 30.0) ** 2) for place in range(count)],
        }
    )
    logged: dict[str, list[float | None]] = {"dose": [0.1, 0.4, 0.7, None], "held_out_loss": [3.0, None, 1.0, 2.0]}
    places = pl.DataFrame({"step": [10, 30, 70, 80], **logged})
    found = {entry["indicator"]: entry["step"] for entry in agreement(series, places, 90)}
    assert list(found.values()) == [70, 90, 30, 200, 120, None, 300]


def test_uneven_checkpoints_are_interpolated_and_said() -> None:
    """The series has even steps; keep is the last checkpoint saved at or before the valley."""
    steps = sorted(np.random.default_rng(5).choice(np.arange(1, 120), 60, replace=False).tolist())
    cosine = np.random.default_rng(6).standard_normal(120).cumsum() * 1e-5
    layers = pl.DataFrame(
        {"run": "r", "step": steps, "module": "m", "cosine": cosine[steps], "checkpoint": [f"c{s}" for s in steps]}
    )
    verdict = lf.assess_run(layers, window=3)
    assert "uneven-cadence" in {finding.rule for finding in verdict.findings}
    assert verdict.turning_point is not None
    assert verdict.keep is not None
    assert verdict.keep.step == max(step for step in steps if step <= verdict.turning_point.step)
    assert verdict.keep.checkpoint == f"c{verdict.keep.step}"


@pytest.mark.parametrize("tau", [5, 30, 100])
def test_a_smooth_run_has_no_turning_point(tau: float) -> None:
    """Noise-free saturating modules: no valley, no claim."""
    place = np.arange(100)
    layers = layers_of({f"m{i}": (1e-3 * (1 - np.exp(-place / (tau + i)))).tolist() for i in range(5)})
    for window in (2, 4, 8):
        verdict = lf.assess_run(layers, window=window)
        assert verdict.status == "no_second_valley"
        assert verdict.keep is None


def test_half_of_the_path_counts_movement() -> None:
    """Two modules at four checkpoints: distances 5, 5, 10 and 10; half of 30 is covered at the third."""
    layers = pl.DataFrame(
        {
            "run": "r",
            "step": [10, 10, 20, 20, 30, 30, 40, 40],
            "module": ["a", "b"] * 4,
            "cosine": 0.1,
            "delta_norm": [3.0, 4.0, 9.0, 9.0, 9.0, 9.0, 9.0, 9.0],
            "step_size": [float("nan"), float("nan"), 3.0, 4.0, 6.0, 8.0, 6.0, 8.0],
        }
    )
    moved = movement(layers)
    assert moved["moved"].to_list() == [5.0, 5.0, 10.0, 10.0]
    assert half_of_path(moved["moved"].to_numpy()) == 2
    assert half_of_path(np.array([])) is None
    assert half_of_path(np.zeros(5)) is None
    assert half_of_path(np.array([1.0, np.nan, np.nan])) is None, "most of the way is not known"
    assert movement(layers.drop("step_size")).is_empty()
    verdict = lf.assess_run(layers)
    assert verdict.keep is None
    assert [(candidate.step, candidate.why) for candidate in verdict.candidates] == [
        (30, "half of the way"),
        (20, "the middle"),
        (40, "the last"),
    ]


def test_a_final_save_soon_after_the_last_is_no_unevenness() -> None:
    """The usual end of a training: 10, 20, ..., 390 and 393; no row is lost and nothing is said."""
    layers = layers_of(walks(3, 2, 40)).with_columns(pl.col("step").replace(400, 393))
    verdict = lf.assess_run(layers, window=3)
    assert "uneven-cadence" not in {finding.rule for finding in verdict.findings}
    assert verdict.evidence["steps"] == [10, 393]


def test_a_table_with_cosines_alone_is_not_called_zero() -> None:
    """Unknown norms are not norms of 0."""
    rules = {finding.rule for finding in lf.assess_run(layers_of(walks(4, 2, 40))).findings}
    assert not {"zero-change", "unchanged", "nonfinite"} & rules


def test_a_broken_checkpoint_is_not_kept() -> None:
    """With NaN in one module at the turning point, the whole checkpoint before it is named."""
    layers = layers_of(walks(5, 4, 40)).with_columns(nonfinite=pl.lit(0), delta_norm=pl.lit(1.0))
    turning = lf.assess_run(layers, window=3).turning_point
    assert turning is not None
    extra = layers.filter(pl.col("module") == "m0").with_columns(
        module=pl.lit("broken"), nonfinite=pl.when(pl.col("step") == turning.step).then(3).otherwise(0),
        cosine=pl.when(pl.col("step") == turning.step).then(float("nan")).otherwise("cosine"),
    )  # fmt: skip
    verdict = lf.assess_run(pl.concat([layers, extra]), window=3)
    assert verdict.turning_point is not None
    assert verdict.keep is not None
    assert verdict.keep.step == verdict.turning_point.step - 10
