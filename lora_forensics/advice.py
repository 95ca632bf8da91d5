"""What a person should know besides the verdict: findings about health and evidence, and the status in a sentence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.notices import some
from lora_forensics.records import Candidate, Finding, Keep, RunNotes, Status, TurningPoint
from lora_forensics.rules import Thresholds
from lora_forensics.similarity import Similarity, Window
from lora_forensics.turning_point import MINIMUM_CHECKPOINTS

COMPARE = "compare the candidates on a few samples that were not trained on"

_MAKE = ("module", "rank", "rows", "columns")
"""Columns in which two checkpoints of one training agree."""

NO_SERIES = "no module has a cosine throughout the checkpoints: there is no series to look for a valley in"
"""Where checkpoints are many but none of their modules can be followed."""


def health(
    layers: pl.DataFrame, similarity: Similarity, unit: str = "step", places: pl.DataFrame | None = None
) -> list[Finding]:
    """NaN, Inf and adapters that do nothing; `places` tells in which type they were stored."""
    found = []
    broken = layers.filter(pl.col("nonfinite") > 0)
    if not broken.is_empty():
        steps = broken["step"].unique().sort().to_list()
        names = broken["module"].unique(maintain_order=True).to_list()
        among = f"{len(names)} of {layers['module'].n_unique()} modules"
        message = f"NaN or Inf in {among} at {_steps(steps, unit)}: {some(names)}"
        found.append(
            Finding("nonfinite", "error", message, "lower the learning rate or save in float32; use none of these")
        )
    if "base_norm" in layers.columns and not layers.filter(~pl.col("base_norm").is_finite()).is_empty():
        names = layers.filter(~pl.col("base_norm").is_finite())["module"].unique(maintain_order=True).to_list()
        message = f"NaN or Inf in the base model below {len(names)} of the modules, {names[0]} first"
        found.append(Finding("base-nonfinite", "error", message, "copy or download the base model again"))
    steps = _steps_of_zeros(layers, "delta_norm")
    if steps:
        message = f"the adapter changes nothing at {_steps(steps, unit)}: {_what_is_zero(layers, steps, places)}"
        hint = "an adapter at step 0 is like that; later it was not trained, or was saved wrongly"
        first = steps == [0] or (steps == [layers["step"].min()] and layers["step"].n_unique() > 1)
        found.append(Finding("zero-change", "info" if first else "error", message, hint))
    found.extend(_changes(layers, unit, steps))
    if similarity.dropped:
        message = f"most modules have no cosine at {_steps(list(similarity.dropped), unit)}: left out of the series"
        found.append(Finding("checkpoint-undefined", "info", message))
    return found


def _what_is_zero(layers: pl.DataFrame, steps: list[int], places: pl.DataFrame | None) -> str:
    """Which factors are zero; in a narrow type also the share of zeros in the others."""
    still = layers.filter(pl.col("step").is_in(steps))
    if not {"up_norm", "down_norm"} <= set(layers.columns) or still["down_norm"].fill_nan(None).null_count():
        return "every change of a weight is zero"
    which = "all B are zero" if still["down_norm"].min() else "A and B are zero, not B alone"
    shares = still["zero_share"].drop_nulls().to_list() if "zero_share" in layers.columns else []
    if not shares:  # of the types in which small numbers become 0
        return which
    known = pl.Series(dtype=pl.String) if places is None else places.filter(pl.col("step").is_in(steps))["dtype"]
    types = "/".join(sorted(set(known.drop_nulls()))) or "a narrow type"
    share = sum(shares) / len(shares)
    others = f" and {share:.0%} of the other numbers" if share else ""
    return f"{which}{others}, stored as {types}, which rounds small numbers to 0"


def _what_changes(layers: pl.DataFrame, step: int) -> str:
    """How the modules of a checkpoint differ from those of the one before."""
    before = layers.filter(pl.col("step") < step)["step"].max()
    old, new = (
        {module: tuple(make) for module, *make in layers.filter(pl.col("step") == at).select(_MAKE).iter_rows()}
        for at in (before, step)
    )
    gone, added = ([m for m in one if m not in two] for one, two in ((old, new), (new, old)))
    said = [
        f"{len(names)} of {len({*old, *new})} modules {'are' if names[1:] else 'is'} {what}, {names[0]} first"
        for names, what in ((gone, "gone"), (added, "new"))
        if names
    ]
    other = next((module for module in new if module in old and old[module] != new[module]), None)
    if other is not None:
        was, now = old[other], new[other]
        what, place = ("the rank", slice(0, 1)) if was[0] != now[0] else ("the shape", slice(1, 3))
        sizes = [" x ".join("?" if n is None else str(n) for n in make[place]) for make in (was, now)]
        said.append(f"{what} of {other} is {sizes[1]}, it was {sizes[0]}")
    return "; ".join(said)


def _changes(layers: pl.DataFrame, unit: str, zeros: Sequence[int]) -> list[Finding]:
    """Where a run becomes another one, or stands still; `zeros` are steps at which it changes nothing anyway."""
    found = []
    shape = pl.concat_str(_MAKE, separator="|", ignore_nulls=True)
    make = layers.group_by("step").agg(shape.sort().hash().sum().alias("make")).sort("step")
    steps = make.filter(pl.col("make") != pl.col("make").shift())["step"].to_list()
    if steps:
        message = f"modules, shapes or ranks change at {_steps(steps, unit)}: {_what_changes(layers, steps[0])}"
        hint = "two trainings may have written into one folder: give each its own"
        found.append(Finding("mixed-runs", "warning", message, hint))
    if "step_size" in layers.columns:
        still = [step for step in _steps_of_zeros(layers, "step_size") if step not in zeros]
        if still:
            message = f"the adapter is the same as at the checkpoint before at {_steps(still, unit)}"
            hint = "it is not being trained, or one state is saved again and again"
            found.append(Finding("unchanged", "error", message, hint))
    return found


def advice(
    places: pl.DataFrame,
    turning: TurningPoint | None,
    keep: Keep | None,
    similarity: Similarity,
    evidence: dict[str, Any],
    unit: str = "step",
    enough: int = Thresholds().few_checkpoints,
) -> list[Finding]:
    """What a person should know before acting on the verdict."""
    found = []
    if similarity.gaps:
        low, high = similarity.gaps
        message = f"checkpoints that can be used are {low} to {high} {unit}s apart: CS is interpolated to even steps"
        found.append(Finding("uneven-cadence", "warning", message, "save at one interval, and keep every checkpoint"))
    band = evidence.get("null_band")
    if keep is not None and keep.rests_on == "weights":
        message = "half of the way is no sign of overfitting; fresh test runs did not show it to beat the middle one"
        found.append(Finding("weak-evidence", "info", message, COMPARE))
    if turning is not None and keep is not None and keep.rests_on == "turning_point":
        if band and not evidence["inside_null_band"]:
            message = "a random walk seldom turns there; that alone does not show overfitting"
        elif band:
            message = "a random walk turns there, too: no evidence beyond the window"
        else:
            message = "a second valley is weak evidence: a random walk has one too, at a place set by the window"
        hint = COMPARE
        if len(similarity.frame) < enough:
            hint += f"; below {enough} checkpoints, picks were no better than the middle one in tests"
        found.append(Finding("weak-evidence", "info", message, hint))
    if turning is not None:
        found.extend(_schedule(places, turning))
    best = {"held_out_loss": "the lowest held-out loss", "probe": "the best in the probe"}
    what = best.get(keep.rests_on) if keep else None
    past = keep.step if what and keep else turning.step if turning else None
    last = places["step"][-1] if len(places) else 0
    if past is not None and last > past:
        found.append(
            Finding(
                "last-is-past",
                "info" if not what and evidence.get("inside_null_band") else "warning",
                f"the last checkpoint ({unit} {last}) is past {what or 'the turning point'} ({unit} {past})",
            )
        )
    return found


def deleted(notes: RunNotes, places: pl.DataFrame) -> list[Finding]:
    """What `prune` took away: measured rows stay in the series as long as they can be compared with new ones."""
    known = set(places["checkpoint"]) & set(notes.pruned)
    lost = len(notes.pruned) - len(known)
    found = []
    if known:
        message = f"{len(known)} checkpoints of the series were deleted by prune; what was measured of them is used"
        found.append(Finding("pruned", "info", message, "they are never named as the one to keep"))
    if lost:
        message = f"{lost} checkpoints that prune deleted cannot be measured again, and are missing in the series"
        hint = "the verdict from before they were deleted stands in the run's pruned.json"
        found.append(Finding("pruned", "warning", message, hint))
    return found


def _schedule(places: pl.DataFrame, turning: TurningPoint) -> list[Finding]:
    """A finding if the turning point rests on checkpoints in the warm-up, or behind the decay, of the rate."""
    rates = places["learning_rate"].to_numpy()
    seen = rates[places["step"].is_between(turning.step, turning.support_end_step).to_numpy()]
    peak = np.nanmax(rates, initial=0.0)
    if seen.size < 2 or not np.isfinite(seen).all() or not peak > 0:
        return []
    if seen[0] < 0.9 * peak and (np.diff(seen) >= 0).all() and seen[-1] > seen[0]:
        return [Finding("follows-schedule", "warning", "the turning point lies in the warm-up of the learning rate")]
    if seen.max() < 0.1 * peak:
        message = "the turning point lies where the learning rate has decayed below a tenth: everything settles there"
        return [Finding("follows-schedule", "warning", message)]
    return []


def message_of(
    status: Status,
    places: pl.DataFrame,
    series: pl.DataFrame,
    window: Window,
    notes: RunNotes,
    turning: TurningPoint | None,
) -> str:
    """The status in a sentence that says what to do."""
    size, values = window.size or 2, series["cs_fluctuation"].count()
    return {
        "unhealthy": "every saved adapter is zero or not finite: the training diverged, or nothing was trained",
        "no_base_model": notes.base_problem or "no base model: cosines are not known",
        "too_few_checkpoints": _too_few(len(places), len(series), size, notes),
        "no_second_valley": (
            f"no second valley in {values} values of CS-Fluctuation at a window of {size} checkpoints; this does not "
            f"say that nothing is overfitted{f', --window {max(2, size // 2)} sees more' if size > 2 else ''}"
        ),
        "turning_point": f"turning point at {notes.step_unit} {turning.step if turning else ''}, at a window of {size}",
    }[status]


def _too_few(there: int, count: int, size: int, notes: RunNotes) -> str:
    """Why there is no series, or how many checkpoints one needs."""
    rules = {finding.rule: finding for finding in notes.findings}
    if count == 0 and (there or notes.findings or notes.skipped):
        known = next(
            (rules[rule].message for rule in ("base-missing", "module-unread", "step-unknown") if rule in rules), ""
        )
        lost = f"no checkpoint could be read: {notes.skipped[0].reason}" if notes.skipped else ""
        return known or lost or NO_SERIES
    needed = max(MINIMUM_CHECKPOINTS, 3 * size + 3)
    have = f"{count} checkpoint{'' if count == 1 else 's'} with a cosine, a second valley needs {needed} or more"
    if count >= MINIMUM_CHECKPOINTS:
        return f"{have} at a window of {size}: use --window {(count - 3) // 3} or less"
    return f"{have}; to save more often, {notes.save_more_often}" if notes.save_more_often else have


def few(status: Status, places: pl.DataFrame, candidates: Sequence[Candidate]) -> list[Finding]:
    """What the study says of runs that are too short for a valley."""
    if status != "too_few_checkpoints" or len(places) not in range(3, MINIMUM_CHECKPOINTS) or len(candidates) < 2:
        return []
    message = "in tests with 3 to 8 checkpoints the one at half of the way was, on average, no worse than the middle "
    return [Finding("few-checkpoints", "info", f"{message}or the last one", COMPARE)]


def _steps_of_zeros(layers: pl.DataFrame, column: str) -> list[int]:
    """Steps at which a column is 0 for every module; unknown is not 0."""
    zero = (pl.col(column) == 0).fill_null(value=False).all()
    return layers.group_by("step").agg(zero.alias("zero")).filter(pl.col("zero"))["step"].sort().to_list()


def _steps(steps: list[int], unit: str) -> str:
    """Steps in words: all of a few, the ends of many."""
    if len(steps) > 4:
        return f"{len(steps)} checkpoints ({unit}s {steps[0]} to {steps[-1]})"
    return f"{unit}{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"
