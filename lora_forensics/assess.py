"""Composer of the reading half: the tables of a run to its series, evidence and verdict. Never touches torch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.advice import advice, deleted, few, health, message_of
from lora_forensics.course import (
    course_findings,
    course_of,
    in_words,
    modules_of,
    reset_findings,
    resets,
    stray_end,
    stray_findings,
)
from lora_forensics.detectors import DEFAULT_DETECTOR, DETECTORS, Curve, half_of_path
from lora_forensics.evidence import agreement, by_group, layer_interval, movement, null_band, window_sweep
from lora_forensics.probed import Answer, Probed, answer_of, with_best
from lora_forensics.records import (
    BaseModelSummary,
    Candidate,
    Keep,
    RestsOn,
    RunNotes,
    Status,
    TurningPoint,
    Verdict,
    describe_adapter,
)
from lora_forensics.similarity import (
    AssessOptions,
    Similarity,
    Window,
    choose_window,
    complete,
    curve_of,
    first_known,
    means_of,
    places_of,
    series_of,
    similarity_of,
)
from lora_forensics.triage import (
    base_findings,
    encoder_findings,
    few_findings,
    file_findings,
    module_findings,
    outliers,
    step_findings,
    storage_findings,
)
from lora_forensics.turning_point import MINIMUM_CHECKPOINTS, Floats


@dataclass(frozen=True, slots=True)
class Assessment:
    """A verdict and the series that it was read from."""

    verdict: Verdict
    series: pl.DataFrame
    """series.parquet."""
    modules: pl.DataFrame
    """modules.parquet."""


def assess_run(
    layers: pl.DataFrame,
    checkpoints: pl.DataFrame | None = None,
    *,
    notes: RunNotes | None = None,
    window: str | int = "auto",
    detector: str = DEFAULT_DETECTOR,
    similarity: str = "flat",
    component: str | Sequence[str] = (),
    learning_rate: float | None = None,
) -> Verdict:
    """The verdict on one run.

    Args:
        layers: at least `run, step, module, cosine`; other columns of layers.parquet may be missing or null.
        checkpoints: checkpoints.parquet; may be left out.
        notes: what a measured run knows besides its tables.
        window: `auto`, `epoch` or a number of checkpoints.
        detector: a name in `detectors.DETECTORS`.
        similarity: `flat` (Eq. 2) or `rowwise` (the released language-model code).
        component: components that enter CS; `all` for all.
        learning_rate: overrules the recorded rates.

    Raises:
        UsageError: an option that cannot be meant.
        SeriesError: a column that must be there is missing, or the table holds several runs.
    """
    components = (component,) if isinstance(component, str) else tuple(component)
    options = AssessOptions(str(window), detector, similarity, components, learning_rate)
    return assess(layers, checkpoints, notes, options).verdict


def assess(
    layers: pl.DataFrame,
    checkpoints: pl.DataFrame | None = None,
    notes: RunNotes | None = None,
    options: AssessOptions | None = None,
    probed: Probed | None = None,
) -> Assessment:
    """As `assess_run`, with the series; the answer of a probe counts for more than anything else."""
    notes, options = notes or RunNotes(), options or AssessOptions()
    layers = everything = complete(layers)
    whole = places_of(layers, checkpoints)
    cuts = resets(layers)
    places = whole
    if cuts:
        layers, places = (table.filter(pl.col("step") >= cuts[-1]) for table in (layers, whole))
    stray = stray_end(layers, cuts)
    if stray is not None:
        layers, places = (table.filter(pl.col("step") != stray) for table in (layers, places))
    similarity = similarity_of(layers, places, options)
    steps = similarity.frame["step"].to_list()
    cadence = float(np.median(np.diff(steps))) if len(steps) > 1 else None
    window = choose_window(options.window, len(steps), cadence, first_known(places, "steps_per_epoch"))
    curve, findings = curve_of(similarity, window.size, options) if window.size and steps else (None, [])
    series = series_of(similarity.frame, curve)
    turning = _turning_point(series, curve, similarity, options)
    status = _status(similarity.scope, series, window, turning)
    turning = turning if status == "turning_point" else None
    broken = broken_steps(layers, places)
    modules = modules_of(layers, places)
    scoped = modules.filter(pl.col("module").is_in(similarity.scope["module"].unique().implode()))
    course = course_of(similarity.scope, places, scoped)
    told = _with_course(series, course, similarity.scope, places)
    way = _until_broken(similarity.scope, broken)
    keep, evidence = _keep(places, _by_weights(way, places, status, options), turning, broken)
    far = outliers(everything, broken, options.thresholds)
    candidates = _candidates(keep, turning, places, way, broken, far)
    answer = _answer(probed, whole, broken, notes.step_unit)
    if answer is not None:
        keep, evidence = _probed_keep(answer, whole), evidence | {"probe": answer.evidence}
        candidates = with_best(candidates, answer)
    if turning is not None and curve is not None:
        evidence |= _describe(similarity, series, curve, turning, options.detector)
    if keep is not None and keep.checkpoint in notes.pruned:
        keep = None
    evidence["valleys"] = series.filter(pl.col("valley").is_not_null())["step"].to_list()
    evidence["steps"] = [whole["step"][0], whole["step"][-1]] if len(whole) else None
    evidence["resets"] = cuts
    evidence["analyses"] = in_words(scoped, course, similarity.scope)
    evidence["alignment"] = "value j is computed from checkpoints j .. j+3M-2 and belongs to checkpoint j"
    evidence["agreement"] = agreement(told, places, turning.step if turning else None)
    candidates = tuple(candidate for candidate in candidates if candidate.checkpoint not in notes.pruned)
    unit, bounds = notes.step_unit, options.thresholds
    unfit = base_findings(status, notes)
    mismatch = any(entry.rule == "base-mismatch" for entry in unfit)  # which says the same of all modules at once
    message = message_of(status, places, series, window, notes, turning)
    findings = [
        *file_findings(notes.skipped),
        *(entry for entry in notes.findings if not mismatch or entry.rule != "module-unresolved"),
        *unfit,
        *reset_findings(cuts, unit),
        *stray_findings(stray, whole, unit),
        *step_findings(whole, notes, bounds),
        *health(everything, similarity, unit, whole),
        *module_findings(everything, broken, bounds, unit),
        *storage_findings(everything, whole, bounds, unit),
        *findings,
        *advice(places, turning, keep, similarity, evidence, unit, bounds.few_checkpoints),
        *(encoder_findings(layers, places, options, curve.window, turning, unit) if turning and curve else ()),
        *few_findings(status, message, notes, len(whole)),
        *few(status, places, candidates),
        *deleted(notes, places),
        *course_findings(scoped, course, similarity.scope, status, unit),
        *(answer.findings if answer else ()),
    ]
    name = str(first_known(layers, "run") or first_known(places, "run") or "run")
    verdict = Verdict(
        run=name,
        status=status,
        keep=keep,
        turning_point=turning,
        candidates=candidates,
        evidence=evidence,
        last_is_past_turning_point=None if turning is None else places["step"][-1] > turning.step,
        window=window.size,
        window_reason=window.reason,
        cadence_steps=cadence,
        detector=options.detector,
        similarity=options.similarity,
        components=similarity.components,
        base_model=notes.base if notes.base.total else _summary(layers),
        checkpoints=len(whole),
        findings=tuple(findings),
        skipped=notes.skipped,
        trainer=notes.trainer,
        adapter=_adapter(layers),
        path=notes.path,
        step_unit=unit,
        message=message,
        versions=versions(),
    )
    return Assessment(verdict, told, modules)


def versions() -> dict[str, str]:
    """Versions of what a verdict depends on, without importing any of it."""
    return dict(_versions())


@cache
def _versions() -> dict[str, str]:
    found = {}
    for name in ("lora-forensics", "torch", "polars", "scipy"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _with_course(series: pl.DataFrame, course: pl.DataFrame, scope: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    """The series with the columns of the course; without any cosine, one row per checkpoint of all that needs none."""
    if series.is_empty() and not scope.is_empty():
        there = places.filter(pl.col("step").is_in(scope["step"].implode()))
        means = means_of(scope).rename({"modules": "all"}).drop("all", "mean_cosine", "mean_cosine_rowwise")
        blank = series.drop(name for name in series.columns if name.startswith("mean_")).clear()
        known = there.select("run", "step", "epoch", "checkpoint", "learning_rate")
        series = pl.concat([blank, known], how="diagonal").join(means, on="step", how="left").sort("step")
    return series.join(course, on="step", how="left", maintain_order="left")


def _turning_point(
    series: pl.DataFrame, curve: Curve | None, similarity: Similarity, options: AssessOptions
) -> TurningPoint | None:
    found = DETECTORS[options.detector](curve) if curve is not None else None
    if found is None:
        return None
    row = series.row(found.index, named=True)
    end = series["step"][found.support_end]
    end = min(step for step in similarity.saved if step >= end)  # an interpolated step rests on the save behind it
    return TurningPoint(found.index, row["step"], row["epoch"], row["checkpoint"], end)


def _describe(
    similarity: Similarity, series: pl.DataFrame, curve: Curve, turning: TurningPoint, detector: str
) -> dict[str, Any]:
    """What chance, other windows, other modules and other quantities say."""
    steps, saved = series["step"].to_list(), list(similarity.saved)
    cosines = np.array(similarity.modules["cosines"].to_list())
    names = dict(series.select("step", "checkpoint").iter_rows())
    interval = layer_interval(curve, cosines, steps, detector)
    if interval is not None:
        interval |= {"low": names[interval["low_step"]], "high": names[interval["high_step"]]}
    null = null_band(curve, steps, saved, detector)
    band = null["null_band"]
    return {
        **null,
        "inside_null_band": None if band is None else band[0] <= turning.step <= band[1],
        "window_sweep": window_sweep(curve, steps, detector),
        "layer_interval": interval,
        "components": by_group(curve, similarity.modules, steps, detector, "component"),
        "roles": by_group(curve, similarity.modules, steps, detector, "role"),
        "noise": similarity.noise,
    }


def _status(scope: pl.DataFrame, series: pl.DataFrame, window: Window, turning: TurningPoint | None) -> Status:
    """The first that holds for the modules that enter CS, in the order of the contract."""
    norm = pl.col("delta_norm")
    dead = (pl.col("nonfinite") > 0) | (norm == 0) | ~norm.is_finite() | (norm.is_null() & pl.col("cosine").is_nan())
    if not scope.is_empty() and scope.select(dead.fill_null(value=False).all()).item():
        return "unhealthy"
    if not scope.is_empty() and scope["cosine"].null_count() == len(scope):
        return "no_base_model"
    if window.size is None or len(series) < 3 * window.size + 3:
        return "too_few_checkpoints"
    return "no_second_valley" if turning is None else "turning_point"


def broken_steps(layers: pl.DataFrame, places: pl.DataFrame) -> list[int]:
    """Steps whose file could not be read, or holds NaN or Inf. What only waits for its base model has no print yet."""
    nonfinite = set(layers.filter(pl.col("nonfinite") > 0)["step"])
    waiting = pl.col("fingerprint").is_null() & pl.col("fingerprint").is_not_null().any()
    there = set(places.filter(~waiting)["step"])
    return sorted((there - set(layers["step"])) | nonfinite)


def _until_broken(scope: pl.DataFrame, broken: list[int]) -> pl.DataFrame:
    """Without the end of a run that broke and never recovered: its way is the one to the last whole file."""
    whole = scope.filter(~pl.col("step").is_in(broken))
    return scope if whole.is_empty() else scope.filter(pl.col("step") <= whole["step"].max())


def _by_weights(scope: pl.DataFrame, places: pl.DataFrame, status: Status, options: AssessOptions) -> int | None:
    """The step that the detector keeps because of how the weights moved; None where the run is too short for it."""
    keeper = DETECTORS[options.detector].keeper
    if keeper is None or status not in ("turning_point", "no_second_valley"):
        return None
    return _kept_step(keeper, scope, places)


def _kept_step(keeper: Callable[[Floats], int | None], scope: pl.DataFrame, places: pl.DataFrame) -> int | None:
    moved = movement(scope.filter(pl.col("step").is_in(places["step"].implode())))
    index = keeper(moved["moved"].to_numpy())
    return None if index is None else int(moved["step"][index])


def _keep(
    places: pl.DataFrame, by_weights: int | None, turning: TurningPoint | None, broken: list[int]
) -> tuple[Keep | None, dict[str, Any]]:
    """Held-out loss overrules everything; then what the detector keeps. A broken file only where all of them are."""
    logged = places.filter(pl.col("held_out_loss").is_finite())
    whole = logged.filter(~pl.col("step").is_in(broken))
    logged = logged if whole.is_empty() else whole
    if len(logged) < 2:  # one value compares nothing
        step = turning.step if by_weights is None and turning else by_weights
        rests_on: RestsOn = "turning_point" if by_weights is None else "weights"
        saved = None if step is None else _saved_by(places, step, broken)
        keep = None if saved is None else Keep(saved["checkpoint"], saved["step"], saved["epoch"], rests_on)
        return keep, {"held_out": None}
    best = logged.sort("held_out_loss", "step").row(0, named=True)
    losses = dict(logged.select("step", "held_out_loss").iter_rows())
    held_out = {
        "checkpoint": best["checkpoint"],
        "step": best["step"],
        "loss": best["held_out_loss"],
        "last_loss": logged["held_out_loss"][-1],
        "at_turning_point": losses.get(turning.step, losses.get(_saved_step(places, turning))) if turning else None,
    }
    return Keep(best["checkpoint"], best["step"], best["epoch"], "held_out_loss"), {"held_out": held_out}


def _answer(probed: Probed | None, places: pl.DataFrame, broken: list[int], unit: str) -> Answer | None:
    """What a probe says of the whole files that are there."""
    whole = places.filter(~pl.col("step").is_in(broken))
    whole = places if whole.is_empty() else whole
    steps = dict(whole.select("checkpoint", "step").iter_rows())
    return answer_of(probed, steps, dict(whole.select("checkpoint", "fingerprint").iter_rows()), unit)


def _probed_keep(answer: Answer, places: pl.DataFrame) -> Keep:
    epoch = places.filter(pl.col("step") == answer.step)["epoch"][0]
    return Keep(answer.checkpoint, answer.step, epoch, "probe")


def _saved_by(places: pl.DataFrame, step: int, broken: list[int]) -> dict[str, Any] | None:
    """The last whole checkpoint that was saved at or before a step."""
    usable = places.filter((pl.col("step") <= step) & ~pl.col("step").is_in(broken))
    return None if usable.is_empty() else usable.row(-1, named=True)


def _saved_step(places: pl.DataFrame, turning: TurningPoint) -> int:
    """The step of the turning point's checkpoint; before its own where steps are interpolated."""
    return int(places.filter(pl.col("checkpoint") == turning.checkpoint)["step"][0])


def _candidates(
    keep: Keep | None,
    turning: TurningPoint | None,
    places: pl.DataFrame,
    scope: pl.DataFrame,
    broken: list[int],
    far: list[str],
) -> tuple[Candidate, ...]:
    """Checkpoints worth comparing on samples that were not trained on: whole files only, each once."""
    found: dict[str, Candidate] = {}

    def add(step: int | None, why: str) -> None:
        saved = None if step is None else _saved_by(places, step, broken)
        if saved is not None:
            found.setdefault(saved["checkpoint"], Candidate(saved["checkpoint"], saved["step"], why))

    if keep is not None and keep.rests_on == "held_out_loss":
        found[keep.checkpoint] = Candidate(keep.checkpoint, keep.step, "lowest held-out loss")
    if len(places) > 1:
        half = _kept_step(half_of_path, scope, places)
        add(half, "half of the way")
        rest = scope.filter(~pl.col("module").is_in(far))
        if far and not rest.is_empty():  # one module that explodes is most of the way
            add(_kept_step(half_of_path, rest, places), "half of the way without outliers")
        if turning is not None:
            add(_saved_step(places, turning), "second valley")
        if half is not None:
            if 2 < len(places) < MINIMUM_CHECKPOINTS:
                add(places["step"][(len(places) - 1) // 2], "the middle")
            add(places["step"][-1], "the last whole file" if places["step"][-1] in broken else "the last")
    return tuple(found.values())


def _summary(layers: pl.DataFrame) -> BaseModelSummary:
    modules = layers.group_by("module").agg(pl.col("cosine").is_not_null().any().alias("matched"))
    return BaseModelSummary(None, int(modules["matched"].sum()), len(modules))


def _adapter(layers: pl.DataFrame) -> str | None:
    kinds = layers["adapter"].drop_nulls().unique().sort().to_list()
    ranks = layers["rank"].drop_nulls().unique().sort().to_list()
    return describe_adapter(kinds, ranks) if kinds else None
