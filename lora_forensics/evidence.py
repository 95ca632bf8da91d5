"""How strong the evidence for a turning point is: what chance gives, what other windows and other modules give.

Everything here describes; nothing grades. No indicator that was tried predicts how good a pick is (docs/validity.md).
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.detectors import DETECTORS, SCALES, Curve
from lora_forensics.turning_point import Floats

SIMULATIONS = 1000
RESAMPLES = 200
_SEED = 20261120


def null_band(curve: Curve, steps: list[int], saved: list[int], detector: str) -> dict[str, Any]:
    """Where the detector turns on random walks: `null_band`, the central 95 % in steps, and how often it does not.

    The walks have the run's own checkpoints, gaps, window and rates, and no training in them. With `steps` other than
    `saved` they are interpolated to even steps as the run was.
    """
    rates = tuple(np.broadcast_to(curve.rates, curve.cosine.shape).tolist())
    found = _simulated(tuple(steps), tuple(saved), curve.window, rates, detector)
    if not found:
        return {"null_band": None, "null_without": 1.0}
    low, high = np.quantile(found, [0.025, 0.975], method="closest_observation")
    return {"null_band": [steps[int(low)], steps[int(high)]], "null_without": 1 - len(found) / SIMULATIONS}


def window_sweep(curve: Curve, steps: list[int], detector: str) -> list[dict[str, int | None]]:
    """The step that the detector names at every window that fits."""
    largest = (len(steps) - 3) // 3
    windows = sorted({window for window in (*SCALES, curve.window) if window <= largest})
    found = {window: DETECTORS[detector](replace(curve, window=window)) for window in windows}
    return [{"window": window, "step": None if at is None else steps[at.index]} for window, at in found.items()]


def layer_interval(curve: Curve, modules: Floats, steps: list[int], detector: str) -> dict[str, Any] | None:
    """Where the turning point goes when modules are drawn again with replacement: the central 90 %, in steps.

    Args:
        curve: how to look at CS.
        modules: (modules, T) cosines.
        steps: (T,)
        detector: its name.
    """
    if len(modules) < 2:
        return None
    draws = np.random.default_rng(_SEED).integers(0, len(modules), (RESAMPLES, len(modules)))
    weights = np.apply_along_axis(np.bincount, 1, draws, minlength=len(modules)) / len(modules)
    found = [at.index for cosine in weights @ modules if (at := DETECTORS[detector](replace(curve, cosine=cosine)))]
    if not found:
        return None
    low, high = np.quantile(found, [0.05, 0.95], method="closest_observation")
    return {"low_step": steps[int(low)], "high_step": steps[int(high)], "without": 1 - len(found) / RESAMPLES}


def by_group(
    curve: Curve, modules: pl.DataFrame, steps: list[int], detector: str, column: str
) -> dict[str, int | None]:
    """The step that the detector names on the mean of each component's or role's modules.

    Args:
        curve: how to look at CS.
        modules: columns `column`, `cosines` (lists of T).
        steps: (T,)
        detector: its name.
        column: component or role.
    """
    found: dict[str, int | None] = {}
    for (name,), part in modules.group_by(column, maintain_order=True):
        if name is not None:
            cosine = np.mean(part["cosines"].to_list(), axis=0)
            at = DETECTORS[detector](replace(curve, cosine=cosine))
            found[str(name)] = None if at is None else steps[at.index]
    return found


def agreement(series: pl.DataFrame, places: pl.DataFrame, turning: int | None) -> list[dict[str, Any]]:
    """Which quantity says what, side by side: the step at which each settles or turns.

    Args:
        series: series.parquet.
        places: checkpoints.parquet.
        turning: step of the second valley.
    """
    steps = series["step"].to_list()
    dose, loss = places.drop_nulls("dose"), places.filter(pl.col("held_out_loss").is_finite())
    spent = dose.filter(pl.col("dose") >= pl.col("dose").max() / 2)
    found: list[dict[str, Any]] = [
        {"indicator": "held-out loss is lowest", "step": _first(loss.sort("held_out_loss", "step"))},
        {"indicator": "CS-Fluctuation has its second valley", "step": turning},
        {"indicator": "half of the dose (sum of learning rates) is spent", "step": _first(spent)},
    ]
    for name, column, rule in (
        ("norm growth bends", "mean_delta_norm", _knee),
        ("rotation has settled to a tenth of its peak", "mean_rotation", _settled),
        ("step size has settled to a tenth of its peak", "mean_step_size", _settled),
        ("effective rank is highest", "mean_effective_rank", _highest),
    ):
        values = series[column].to_numpy() if column in series.columns else np.empty(0)
        finite = np.isfinite(values)
        at = rule(values[finite]) if finite.sum() > 3 else None
        found.append({"indicator": name, "step": None if at is None else np.array(steps)[finite][at].item()})
    return found


@lru_cache(maxsize=64)
def _simulated(
    steps: tuple[int, ...], saved: tuple[int, ...], window: int, rates: tuple[float, ...], detector: str
) -> list[int]:
    """Indices that the detector names on random walks, without those where it names none."""
    generator = np.random.default_rng(_SEED)
    gaps = np.diff(saved, prepend=saved[0] - 1)
    walks = (generator.standard_normal((SIMULATIONS, len(saved))) * np.sqrt(gaps)).cumsum(axis=-1)
    if steps != saved:
        walks = np.array([np.interp(steps, saved, walk) for walk in walks])
    curves = (Curve(walk, window, np.array(rates)) for walk in walks)
    return [at.index for curve in curves if (at := DETECTORS[detector](curve))]


def _knee(values: Floats) -> int:
    """Where a curve lies farthest above its chord."""
    chord = np.linspace(values[0], values[-1], values.size)
    return int(np.argmax(values - chord))


def _settled(values: Floats) -> int | None:
    """The first after the peak at or below a tenth of it."""
    peak = int(np.argmax(values))
    low = np.flatnonzero(values[peak:] <= values[peak] / 10)
    return peak + int(low[0]) if low.size else None


def _highest(values: Floats) -> int:
    return int(np.argmax(values))


def _first(places: pl.DataFrame) -> int | None:
    return None if places.is_empty() else int(places["step"][0])


def movement(layers: pl.DataFrame) -> pl.DataFrame:
    """How far all modules together moved since the checkpoint before, at the first since the base: step, moved."""
    if not {"step_size", "delta_norm"} <= set(layers.columns):
        return pl.DataFrame(schema={"step": pl.Int64, "moved": pl.Float64})
    first = pl.col("step") == pl.col("step").min()
    squares = layers.select("step", square=pl.when(first).then("delta_norm").otherwise("step_size").fill_nan(None) ** 2)
    square = pl.col("square")
    moved = pl.when(square.count() > 0).then(square.sum().sqrt()).otherwise(float("nan"))
    return squares.group_by("step").agg(moved.alias("moved")).sort("step")
