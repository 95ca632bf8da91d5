"""How a run went, apart from CS: its resets, its path, which modules settled, and what the papers' quantities say.

Formulas, sources and how to read each: docs/metrics.md.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.evidence import movement
from lora_forensics.records import Finding
from lora_forensics.rules import hint_of
from lora_forensics.series import COURSE_COLUMNS, RUN_MODULE_COLUMNS, schema
from lora_forensics.turning_point import Floats

FELL = 0.5
"""A change that shrank to this part of what it was before was reset: decay does not do that between two saves."""
REDRAWN = 0.8
"""1 - cos of an A and the one before, from which it was drawn anew: training leaves most of it as it was."""
MOST = 0.9
"""Share of the modules that have to agree on a reset."""
SETTLED = 0.1
"""A module has settled where it moves at most at this part of its fastest."""
_FEWEST_BEFORE = 4
"""Checkpoints from which on the last one can be told to be unlike all others."""
_LONG = 2
"""Times the usual interval, beyond which the last one is too long to tell another training by."""
_FEWEST = 5
"""Movements that are needed to call a module settled."""


def resets(layers: pl.DataFrame) -> list[int]:
    """Steps at which the adapter starts anew: its changes have shrunk, or its down factors were drawn again.

    Not the last one: a single file that is unlike the others is no series of its own.
    """
    if "delta_norm" not in layers.columns or layers.is_empty():
        return []
    norm, before, after = pl.col("delta_norm"), pl.col("before"), pl.col("after")
    strength = pl.col("delta_norm") / _column(layers, "scale").abs().replace(0.0, 1.0).fill_null(1.0)  # not its course
    known = before.is_finite() & (before > 0) & norm.is_finite()
    same = [name for name in ("module", "rank", "rows", "columns") if name in layers.columns]  # else another training
    frame = layers.select(
        "step", *same, delta_norm=strength, turned=_column(layers, "down_rotation"), down=_column(layers, "down_norm")
    ).sort("step")
    frame = frame.with_columns(before=norm.shift().over(same), after=norm.shift(-1).over(same)).filter(known)
    # an empty file between two of one size is a hole, and one at the end no start: A has to be there, or D to grow anew
    goes_on = (norm > 0) | ((after > 0) & ((after <= FELL * before) | (pl.col("down") > 0).fill_null(value=False)))
    redrawn = (norm > 0) & (pl.col("turned").fill_nan(None) > REDRAWN)
    new = ((norm <= FELL * before) & goes_on).fill_null(value=False) | redrawn.fill_null(value=False)
    share = frame.group_by("step").agg(new.mean().alias("share"))
    return share.filter((pl.col("share") >= MOST) & (pl.col("step") < layers["step"].max()))["step"].sort().to_list()


def stray_end(layers: pl.DataFrame, cuts: list[int]) -> int | None:
    """The last step, where A is drawn anew there and nowhere before: a file of another training."""
    if "down_rotation" not in layers.columns or cuts or layers["step"].n_unique() < _FEWEST_BEFORE:
        return None
    steps = layers["step"].unique().sort().to_list()
    gaps, last = np.diff(steps), steps[-1]
    if gaps[-1] > _LONG * np.median(gaps[:-1]):  # time enough for A to turn by training
        return None
    turned = pl.col("down_rotation").fill_nan(None) > REDRAWN
    other = _column(layers, "rotation").fill_nan(None).fill_null(1.0) > FELL  # else the same change, factored anew
    share = layers.filter(pl.col("step") == last).select(pl.when(turned.is_not_null()).then(turned & other).mean())
    return last if (share.item() or 0.0) >= MOST else None


def stray_findings(step: int | None, places: pl.DataFrame, unit: str) -> list[Finding]:
    """What a last file of another training means."""
    if step is None:
        return []
    name = places.filter(pl.col("step") == step)["checkpoint"][0]
    message = f"{name} ({unit} {step}) is of another training than those before it: its A were drawn anew; left out"
    return [Finding("final-overwritten", "warning", message, hint_of("final-overwritten"))]


def reset_findings(steps: list[int], unit: str) -> list[Finding]:
    """What a cut means."""
    if not steps:
        return []
    where = f"{unit}{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps[:4]))}{', ...' if steps[4:] else ''}"
    message = f"the adapter starts anew at {where}: only checkpoints from {unit} {steps[-1]} on are compared"
    hint = "if it was merged there (Chain-of-LoRA, PeriodicLoRA), give the merged model with --base; "
    return [Finding("reset", "warning", message, f"{hint}if not, give each training its own folder")]


def course_of(scope: pl.DataFrame, places: pl.DataFrame, modules: pl.DataFrame) -> pl.DataFrame:
    """COURSE_COLUMNS by step, over all modules of the scope together.

    Args:
        scope: rows of layers.parquet.
        places: checkpoints.parquet.
        modules: from `modules_of`, those of the scope.
    """
    steps = places.select("step")
    scope = scope.filter(pl.col("step").is_in(steps["step"].implode()))
    path = movement(scope).with_columns(path_length=pl.col("moved").fill_nan(None).fill_null(0).cum_sum())
    norm, before = pl.col("delta_norm"), pl.col("before")
    rotation = _column(scope, "rotation").fill_nan(None)
    frame = scope.sort("step").with_columns(before=norm.shift().over("module"))
    both = rotation.is_not_null() | ((norm * before) == 0)  # a module that is zero turns nothing, but has its share
    inner = (norm * before * (1 - rotation)).sum()
    sizes = ((norm.filter(both) ** 2).sum() * (before.filter(both) ** 2).sum()).sqrt()
    totals = frame.group_by("step").agg(
        (norm.fill_nan(None) ** 2).sum().sqrt().alias("displacement"),
        (inner / sizes).clip(-1, 1).arccos().degrees().alias("angle"),
        pl.corr(_column(scope, "direction_change").fill_nan(None), _column(scope, "magnitude_change").fill_nan(None))
        .fill_nan(None)
        .alias("magnitude_direction"),
    )
    known = modules["settled_step"]
    course = steps.join(path, on="step", how="left").join(totals, on="step", how="left").sort("step")
    return course.select(
        "step",
        "path_length",
        directness=pl.when(pl.col("path_length") > 0).then(pl.col("displacement") / pl.col("path_length")),
        angle=pl.col("angle").fill_nan(None),
        magnitude_direction="magnitude_direction",
        settled=pl.Series([_share(known, step) for step in course["step"]], dtype=pl.Float64),
    ).cast({column.name: column.polars for column in COURSE_COLUMNS})


def _share(settled: pl.Series, step: int) -> float | None:
    return int((settled <= step).sum()) / len(settled) if len(settled) else None


def _column(frame: pl.DataFrame, name: str) -> pl.Expr:
    return pl.col(name) if name in frame.columns else pl.lit(None, pl.Float64)


def modules_of(layers: pl.DataFrame, places: pl.DataFrame) -> pl.DataFrame:
    """modules.parquet: one row per module over all its checkpoints, in the order of the table."""
    dose, through = _dose(places), dict[Any, float]()
    same = ("run", "component", "role", "adapter")
    first = pl.col("step") == pl.col("step").min()
    moved = pl.when(first).then(_column(layers, "delta_norm")).otherwise(_column(layers, "step_size"))
    wanted = layers.sort("step").select(
        "step", "module", *same, moved=moved, norm=_column(layers, "delta_norm"), scale=_column(layers, "scale_mean")
    )
    last = [pl.col(name).last() for name in (*same, "norm", "scale")]
    rows = []
    for module in wanted.group_by("module", maintain_order=True).agg("step", "moved", *last).iter_rows(named=True):
        steps, way = module.pop("step"), np.array(module.pop("moved"), dtype=np.float64)
        norm, scale, owner = module.pop("norm"), module.pop("scale"), module["component"]
        length = float(np.nansum(way)) if np.isfinite(way).any() else None
        if scale is not None and math.isfinite(scale):
            through[owner] = through.get(owner, 1.0) * scale
        straight = norm / length if length and norm is not None else None
        module |= {"path_length": length, "displacement": norm, "directness": straight}
        module |= {"settled_step": _settled(steps, way, dose), "scale_through": scale and through.get(owner)}
        rows.append(module)
    return pl.DataFrame(rows, schema=schema(RUN_MODULE_COLUMNS))


def _dose(places: pl.DataFrame) -> dict[int, float]:
    """Learning rates summed up to each step, where all are known; else the steps themselves."""
    if "dose" in places.columns and places["dose"].fill_nan(None).null_count() == 0:
        return dict(places.select("step", "dose").iter_rows())
    return {step: float(step) for step in places["step"]}


def _settled(steps: list[int], way: Floats, dose: dict[int, float]) -> int | None:
    """The first step from which on all movements are slow, by dose: a decaying rate alone settles nothing."""
    spent = np.diff([dose.get(step, math.nan) for step in steps])
    speed = way[1:] / np.where(spent > 0, spent, math.nan)
    finite = np.isfinite(speed)
    if finite.sum() < _FEWEST or speed[finite].max() == 0:
        return None
    fast = np.flatnonzero(finite & (speed > SETTLED * speed[finite].max()))
    slow = finite[fast[-1] + 1 :]  # what cannot be measured has not settled
    return steps[fast[-1] + 2] if slow.size and slow.all() else None


def course_findings(
    modules: pl.DataFrame, course: pl.DataFrame, layers: pl.DataFrame, status: str, unit: str
) -> list[Finding]:
    """What of it is worth a line: modules that stopped early, intruder dimensions, and what a missing base leaves."""
    found = []
    early = course.filter((pl.col("settled") >= 0.5) & (pl.col("step") <= pl.col("step").quantile(2 / 3)))["step"]
    if len(early):
        number = int((modules["settled_step"] <= early[0]).sum())
        message = f"{number} of {len(modules)} modules had stopped moving by {unit} {early[0]}"
        found.append(Finding("settled", "info", message, "training them further changes little"))
    many = _last(layers, "intruder_dimensions")
    with_some = many.filter(many > 0)
    if len(with_some):
        message = f"{len(with_some)} of {len(many)} modules have intruder dimensions at the last checkpoint"
        hint = "with LoRA these went along with forgetting: a lower rate, a higher rank or rsLoRA have fewer"
        found.append(Finding("intruder-dimensions", "info", message, hint))
    if status == "no_base_model" and len(course) and course["path_length"].max():
        message = "norms, spectra, rotation and path need no base model and are measured; cosines are not"
        found.append(Finding("without-base", "info", message))
    return found


def in_words(modules: pl.DataFrame, course: pl.DataFrame, layers: pl.DataFrame) -> list[dict[str, Any]]:
    """Each analysis that has a value at the last checkpoint, in plain words."""
    last = course.tail(1).to_dicts()
    if not last:
        return []
    row = last[0]
    said: list[dict[str, Any]] = []

    def say(analysis: str, value: float | None, words: str) -> None:
        if value is not None and math.isfinite(value):
            said.append({"analysis": analysis, "value": value, "words": words.format(value)})

    say("magnitude_direction", row["magnitude_direction"],
        "magnitude and direction change correlate by {:+.2f} over modules (Liu et al.: LoRA positive, full "
        "fine-tuning and DoRA negative)")  # fmt: skip
    say(
        "directness",
        row["directness"],
        "the change is {:.0%} as long as the way to it (a straight line: 100%)",
    )
    say("angle", row["angle"], "the last two checkpoints are {:.1f} degrees apart as seen from the base")
    say("layer_rotation", _mean(layers, "layer_rotation"), "weights turned by {:.2g} (1 - cosine, mean over modules)")
    say("down_moved", _mean(layers, "down_moved"), "A moved by {:.1%} of its length since the first checkpoint")
    settled = int(modules["settled_step"].is_not_null().sum())
    say("settled", row["settled"] and settled, f"{{:.0f}} of {len(modules)} modules have settled")
    say("scale_mean", _mean(layers, "scale_mean"), "rows or columns are scaled by {:.3g} on average")
    say("changed_share", _mean(layers, "changed_share"), "{:.2%} of the weights' entries are changed")
    say("intruder_dimensions", _mean(layers, "intruder_dimensions"), "{:.1f} of 10 leading directions are intruders")
    say("subspace_share", _mean(layers, "subspace_share"), "{:.1%} of the change lies in the leading subspace of W")
    return said


def _last(layers: pl.DataFrame, column: str) -> pl.Series:
    """Known values of a column at the last step."""
    if column not in layers.columns or layers.is_empty():
        return pl.Series(column, [], pl.Float64)
    return layers.filter(pl.col("step") == pl.col("step").max())[column].cast(pl.Float64).fill_nan(None).drop_nulls()


def _mean(layers: pl.DataFrame, column: str) -> float | None:
    values = _last(layers, column)
    return float(values.to_numpy().mean()) if len(values) else None
