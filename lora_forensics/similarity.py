"""CS over the checkpoints of a run: which modules and checkpoints enter, which window, and CS-Fluctuation.

Rules and formulas: docs/method.md; the arithmetic on plain arrays is in `turning_point`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.detectors import DEFAULT_DETECTOR, DETECTORS, Curve
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.records import Finding
from lora_forensics.rules import Thresholds
from lora_forensics.series import CHECKPOINT_COLUMNS, MODULE_COLUMNS, SERIES_COLUMNS, schema
from lora_forensics.turning_point import MINIMUM_CHECKPOINTS

SIMILARITIES = {"flat": "cosine", "rowwise": "cosine_rowwise"}
"""Name in `--similarity` to column."""

UNEVEN = 1.1
"""Checkpoints count as even while the largest step between them is at most this many times the smallest."""

SCOPE = ("unet", "transformer", "model")
"""Components that enter CS unless others are named: the denoiser or the language model, as the official code does."""

DEFAULT_WINDOW_STEPS = 100
"""Window where the epoch is not known."""


@dataclass(frozen=True, slots=True)
class AssessOptions:
    """How to read the series."""

    window: str = "auto"
    """auto, epoch, or a number of checkpoints."""
    detector: str = DEFAULT_DETECTOR
    """A name in `detectors.DETECTORS`."""
    similarity: str = "flat"
    """flat or rowwise."""
    component: tuple[str, ...] = ()
    """Components that enter CS; `all` for all; empty for the denoiser or the language model."""
    learning_rate: float | None = None
    """Overrules the rates that the trainer recorded."""
    thresholds: Thresholds = field(default_factory=Thresholds)
    """Bounds of rules."""

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: an unknown name, or a window that is no whole number of at least 2.
        """
        for value, known, what in (
            (self.detector, DETECTORS, "detector"),
            (self.similarity, SIMILARITIES, "similarity"),
        ):
            if value not in known:
                raise UsageError(f"no {what} is called {value!r}", f"choose from {', '.join(known)}")
        if self.window not in ("auto", "epoch"):
            if not self.window.isdecimal() or len(self.window) > 9:
                raise UsageError(
                    f"window {self.window!r} is neither auto, epoch nor a number of checkpoints",
                    "use --window auto, or a whole number such as --window 5",
                )
            if int(self.window) < 2:
                raise UsageError(
                    f"a window of {self.window} is too small: the variance of one value is always 0",
                    "use --window 2 or more",
                )
        if self.learning_rate is not None and not 0 < self.learning_rate < math.inf:
            raise UsageError(
                f"a learning rate of {self.learning_rate} is no finite number above 0",
                "leave --learning-rate out to use the recorded rates",
            )


@dataclass(frozen=True, slots=True)
class Similarity:
    """CS over the checkpoints that are used."""

    frame: pl.DataFrame
    """One row per checkpoint used, with the means of all metrics."""
    scope: pl.DataFrame
    """The rows of layers.parquet whose components enter CS, with a base weight or without."""
    components: tuple[str, ...]
    dropped: tuple[int, ...]
    """Steps at which more than half of the modules have no cosine."""
    noise: float
    """Standard deviation of one value of CS from storage and arithmetic."""
    modules: pl.DataFrame
    """One row per module that is averaged: module, component, role, cosines (a list along the rows of frame)."""
    saved: tuple[int, ...]
    """Steps of the checkpoints that are used; those of frame, unless it is interpolated."""
    gaps: tuple[int, int] | None = None
    """Smallest and largest step between checkpoints, where they were interpolated to even ones."""


@dataclass(frozen=True, slots=True)
class Window:
    """The window of all moving averages."""

    size: int | None
    """M, in checkpoints; None where none fits."""
    reason: str
    """Why this one, in one clause."""


def choose_window(wanted: str, count: int, cadence: float | None, steps_per_epoch: float | None) -> Window:
    """M in checkpoints, and why, in one clause.

    `auto` is one epoch, or 100 steps where the epoch is not known, within 2 .. floor((T - 3) / 3).

    Raises:
        UsageError: `epoch` is asked for and not known.
    """
    if wanted not in ("auto", "epoch"):
        return Window(int(wanted), "as asked for")
    if wanted == "epoch" and not steps_per_epoch:
        raise UsageError(
            "this run does not tell how many steps an epoch has", "give --window as a number of checkpoints"
        )
    if count < MINIMUM_CHECKPOINTS or not cadence:
        return Window(None, "too few checkpoints for any window")
    target = steps_per_epoch or DEFAULT_WINDOW_STEPS
    what = f"one epoch ({target:g} steps)" if steps_per_epoch else f"{target} steps, since the epoch is not known"
    size, most = round(target / cadence), (count - 3) // 3
    if size < 2:
        return Window(2, f"the smallest there is: {what} is less than two checkpoints")
    if size > most:
        return Window(most, f"the largest that {count} checkpoints allow: {what} would be {size}")
    return Window(size, what)


def complete(layers: pl.DataFrame) -> pl.DataFrame:
    """The table with all columns that are read here; those that may be missing become null."""
    missing = [name for name in ("run", "step", "module", "cosine") if name not in layers.columns]
    if missing:
        raise SeriesError(f"the table has no column {', '.join(missing)}", "it should come from a scan: layers.parquet")
    if layers["run"].n_unique() > 1:
        raise SeriesError("the table holds several runs", "assess one at a time: layers.filter(run == ...)")
    wanted = {
        **schema(MODULE_COLUMNS),
        **dict.fromkeys(("cosine", "cosine_rowwise", "cosine_noise", "delta_norm"), pl.Float64),
        "nonfinite": pl.Int64,
    }
    return _with_columns(layers, wanted)


def _with_columns(frame: pl.DataFrame, wanted: Mapping[str, Any]) -> pl.DataFrame:
    """The table with these columns in these types; null where they are missing.

    Raises:
        SeriesError: a column holds something else.
    """
    absent = [pl.lit(None, dtype).alias(name) for name, dtype in wanted.items() if name not in frame.columns]
    try:
        return frame.with_columns(absent).with_columns(pl.col(name).cast(dtype) for name, dtype in wanted.items())
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise SeriesError(f"a column holds values of another type: {reason}", "it should come from a scan") from error


def places_of(layers: pl.DataFrame, checkpoints: pl.DataFrame | None) -> pl.DataFrame:
    """One row per checkpoint of the run, by step.

    Raises:
        SeriesError: the table of checkpoints has no steps, one step twice, or several runs.
    """
    if checkpoints is None or checkpoints.is_empty():
        checkpoints = layers.select("run", "step", "epoch", "checkpoint").unique("step")
    if "step" not in checkpoints.columns:
        raise SeriesError("the table of checkpoints has no column step", "it should come from a scan")
    if checkpoints["step"].is_duplicated().any():
        raise SeriesError("the table of checkpoints has a step twice", "give the checkpoints of one run, each once")
    places = _with_columns(checkpoints, schema(CHECKPOINT_COLUMNS))
    names = pl.coalesce("run", pl.lit(first_known(layers, "run"), pl.String))
    unnamed = pl.format("step {}", pl.col("step"))
    return places.with_columns(names, pl.col("epoch").fill_nan(None), pl.col("checkpoint").fill_null(unnamed)).sort(
        "step"
    )


def similarity_of(layers: pl.DataFrame, places: pl.DataFrame, options: AssessOptions) -> Similarity:
    """CS: drop checkpoints where most modules have no cosine, then average modules that have one at all the others."""
    column = SIMILARITIES[options.similarity]
    if layers[column].null_count() == len(layers) > layers["cosine"].null_count():
        raise SeriesError(f"the table has no {options.similarity} cosines: {column} is empty", "use --similarity flat")
    scope, components = _scope(layers, options)
    whole = scope
    scope = scope.filter(pl.col("step").is_in(places["step"].implode()))
    scope = scope.filter(pl.col(column).is_not_null().any().over("module"))  # without a base weight: not in scope
    defined = pl.col(column).is_finite().fill_null(value=False)
    modules = scope["module"].n_unique()
    counts = scope.group_by("step").agg(defined.sum().alias("defined"))
    kept = counts.filter(pl.col("defined") * 2 >= modules)["step"]
    used = scope.filter(pl.col("step").is_in(kept.implode()) & defined)
    used = used.filter(pl.len().over("module") == len(kept))
    series = means_of(used).rename({"mean_cosine": "cosine", "mean_cosine_rowwise": "cosine_rowwise"})
    series = places.select("run", "step", "epoch", "checkpoint", "learning_rate").join(series, on="step", how="inner")
    dropped = set(scope["step"]) - set(kept)
    by_module = used.sort("step").group_by("module", maintain_order=True)
    modules_used = by_module.agg(pl.first("component"), pl.first("role"), pl.col(column).alias("cosines"))
    series = series.sort("step").with_columns(interpolated=pl.lit(False))
    saved = tuple(series["step"].to_list())
    noise = _noise(used, series, column)
    return _even(Similarity(series, whole, components, tuple(sorted(dropped)), noise, modules_used, saved))


def means_of(rows: pl.DataFrame) -> pl.DataFrame:
    """How many modules there are at each step, and the mean of each metric over them."""
    metrics = [
        name
        for name, dtype in rows.schema.items()
        if dtype == pl.Float64 and name not in ("epoch", "scale", "zero_share")
    ]
    means = [pl.col(name).fill_nan(None).mean().alias(f"mean_{name}") for name in metrics]
    return rows.group_by("step").agg(pl.len().cast(pl.Int64).alias("modules"), *means)


def _noise(used: pl.DataFrame, series: pl.DataFrame, column: str) -> float:
    """Rounding of the stored adapters, independent over modules, and of the arithmetic."""
    largest = np.abs(series[column].to_numpy()).max(initial=0.0)
    stored = used.group_by("step").agg((pl.col("cosine_noise").pow(2).sum().sqrt() / pl.len()).alias("noise"))["noise"]
    known = stored.fill_nan(None).drop_nulls().to_numpy()
    rounding = float(np.median(known)) if known.size else 0.0
    return math.hypot(rounding, 8 * np.finfo(np.float64).eps * largest)


def _even(similarity: Similarity) -> Similarity:
    """Checkpoints at uneven intervals, interpolated to even steps; each row names the last checkpoint saved by then."""
    frame = similarity.frame
    steps = frame["step"].to_numpy()
    gaps = np.diff(steps)
    # the final save of a training often follows the last numbered one by less than an interval
    inner = gaps[:-1] if len(gaps) > 1 and gaps[-1] < np.median(gaps) else gaps
    if len(steps) < MINIMUM_CHECKPOINTS or inner.max() <= UNEVEN * inner.min():
        return similarity
    # a single long pause must not turn into thousands of rows
    cadence = max(round(float(np.median(gaps))), math.ceil((steps[-1] - steps[0]) / (4 * len(steps))), 1)
    grid = np.arange(steps[0], steps[-1] + 1, cadence)
    saved = np.searchsorted(steps, grid, side="right") - 1
    even = frame[saved].with_columns(
        pl.Series("step", grid, dtype=pl.Int64), pl.Series("interpolated", ~np.isin(grid, steps), dtype=pl.Boolean)
    )
    floats = [name for name, dtype in frame.schema.items() if dtype == pl.Float64 and not frame[name].null_count()]
    even = even.with_columns(pl.Series(name, np.interp(grid, steps, frame[name].to_numpy())) for name in floats)
    cosines = [np.interp(grid, steps, values).tolist() for values in similarity.modules["cosines"].to_list()]
    modules = similarity.modules.with_columns(pl.Series("cosines", cosines, dtype=pl.List(pl.Float64)))
    return replace(similarity, frame=even, modules=modules, gaps=(int(gaps.min()), int(gaps.max())))


def _scope(layers: pl.DataFrame, options: AssessOptions) -> tuple[pl.DataFrame, tuple[str, ...]]:
    """The modules that enter CS, and their components."""
    there = [name for name in layers["component"].unique(maintain_order=True) if name is not None]
    if not there:
        if options.component and "all" not in options.component and not layers.is_empty():
            raise UsageError("no module of this table says which component it belongs to", "leave --component out")
        return layers, ()
    if "all" in options.component:
        wanted = there
    elif options.component:
        wanted = [name for name in there if name in options.component]
        if not wanted:
            raise UsageError(
                f"no module belongs to {', '.join(options.component)}", f"this run has {', '.join(there)}, or use all"
            )
    else:
        wanted = [name for name in there if name in SCOPE] or there
    return layers.filter(pl.col("component").is_in(wanted)), tuple(wanted)


def curve_of(similarity: Similarity, size: int, options: AssessOptions) -> tuple[Curve, list[Finding]]:
    """What detectors look at, with a window of `size` checkpoints."""
    rates, findings = _rates(similarity.frame, options)
    cosine = similarity.frame[SIMILARITIES[options.similarity]].to_numpy()
    return Curve(cosine, size, rates, similarity.noise), findings


def series_of(frame: pl.DataFrame, curve: Curve | None) -> pl.DataFrame:
    """series.parquet: CS with its CS-Fluctuation and valleys, start-aligned and padded with nulls."""
    count = len(frame)
    values: dict[str, list[Any]] = {}
    if curve is not None and count:
        result = curve.fluctuation
        bottoms = {int(index): place for place, index in enumerate(curve.valleys, start=1)}
        steps = frame["step"].to_list()
        defined = range(len(result.value))
        values = {
            "cosine_ma": result.average.tolist(),
            "slope": result.slope.tolist(),
            "slope_ma": result.slope_average.tolist(),
            "cs_fluctuation": result.value.tolist(),
            "valley": [bottoms.get(index) for index in defined],
            "support_end_step": [steps[index + 3 * curve.window - 2] for index in defined],
        }
    kinds = {column.name: column.polars for column in SERIES_COLUMNS}
    padded = [
        pl.Series(name, (values.get(name, []) + [None] * count)[:count], dtype=kinds[name])
        for name in ("cosine_ma", "slope", "slope_ma", "cs_fluctuation", "valley", "support_end_step")
    ]
    extra = [name for name in frame.columns if name.startswith("mean_")]
    full = frame.with_columns(*padded, window=pl.lit(curve.window if curve else None, pl.Int64))
    return full.select(*(pl.col(name).cast(dtype) for name, dtype in kinds.items()), *extra)


def _rates(frame: pl.DataFrame, options: AssessOptions) -> tuple[Any, list[Finding]]:
    """Learning rates to divide by: one number, or one per checkpoint used."""
    if options.detector == "official":  # it leaves the division out
        return 1.0, []
    if options.learning_rate is not None:
        return options.learning_rate, []
    if frame["learning_rate"].fill_nan(None).null_count():
        message = "the learning rate is not known at every checkpoint and taken as 1 throughout"
        hint = "a constant rate moves no valley; for another schedule give --learning-rate or keep the trainer's logs"
        return 1.0, [Finding("learning-rate-unknown", "info", message, hint)] if len(frame) else []
    return frame["learning_rate"].to_numpy(), []


def first_known(frame: pl.DataFrame, column: str) -> Any:
    """The first known value of a column."""
    values: list[Any] = frame[column].drop_nulls().to_list() if column in frame.columns else []
    return next((v for v in values if not (isinstance(v, float) and math.isnan(v))), None)
