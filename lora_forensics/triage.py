"""What is wrong with a run, read from its tables: sizes, types, scales, steps, times. Never touches torch.

Each function returns the findings of one topic; the rules are documented in `rules`, their bounds in `Thresholds`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise

import polars as pl

from lora_forensics.detectors import DETECTORS
from lora_forensics.notices import some
from lora_forensics.records import Finding, RunNotes, Skipped, Status, TurningPoint
from lora_forensics.rules import RULES, Thresholds, hint_of
from lora_forensics.similarity import AssessOptions, curve_of, similarity_of

_UNNAMED = "unreadable-file"
"""The rule of a file that was left out for a reason without one."""
_MOST_REGULAR = 2 / 3
"""Share of the intervals that must equal the common one, for others to count as gaps."""
_LISTED = 3


def file_findings(skipped: Iterable[Skipped]) -> list[Finding]:
    """One finding for each rule that says why files were left out; what is no checkpoint anyway is none."""
    by_rule: dict[str, list[Skipped]] = {}
    for entry in skipped:
        if not entry.expected:
            by_rule.setdefault(entry.rule or _UNNAMED, []).append(entry)
    found = []
    for rule, entries in by_rule.items():
        named = "; ".join(f"{entry.path.as_posix()}: {entry.reason}" for entry in entries[:_LISTED])
        more = f"; and {len(entries) - _LISTED} more" if len(entries) > _LISTED else ""
        found.append(Finding(rule, RULES[rule].severity, f"left out: {named}{more}", hint_of(rule)))
    return found


def base_findings(status: Status, notes: RunNotes) -> list[Finding]:
    """Why there are no cosines: no base model, or one of another make."""
    if status != "no_base_model":
        return []
    base = notes.base
    rule = "base-mismatch" if base.path and base.total and not base.matched else "no-base-model"
    message = notes.base_problem or "no base model: cosines are not known"
    return [Finding(rule, RULES[rule].severity, message, hint_of(rule))]


def few_findings(status: Status, message: str, notes: RunNotes, count: int) -> list[Finding]:
    """That there is no verdict for want of checkpoints, and which setting of this trainer saves more."""
    if status != "too_few_checkpoints" or not count:
        return []
    hint = notes.save_more_often
    said = message.removesuffix(f"; to save more often, {hint}") if hint else message
    return [Finding("too-few-checkpoints", "warning", said, f"to save more often, {hint}" if hint else "")]


def module_findings(layers: pl.DataFrame, broken: Sequence[int], bounds: Thresholds, unit: str) -> list[Finding]:
    """Modules that stand out at the last whole checkpoint: dead, far above their family, larger than their weight."""
    last = _in_families(layers, broken)
    if last.is_empty():
        return []
    still = pl.col("delta_norm") == 0
    low = (pl.col("members") >= bounds.family) & (pl.col("size") * bounds.dead_factor < pl.col("median"))
    where = f"at {unit} {last['step'][0]}"
    found = []
    dead = last.filter(still | low)["module"].to_list()
    if dead and not last.select(still.all()).item():
        message = f"{len(dead)} of {len(last)} modules change nothing or next to it {where}: {some(dead)}"
        found.append(Finding("dead-modules", "warning", message, hint_of("dead-modules")))
    far = _outliers(last, bounds)
    if far:
        message = f"{len(far)} of {len(last)} modules change more than {bounds.outlier_factor:g} times the median of "
        found.append(
            Finding(
                "outlier-modules",
                "warning",
                f"{message}their family {where}: {some(far)}",
                hint_of("outlier-modules"),
            )
        )
    above = last.filter(pl.col("relative_norm") > bounds.relative_norm)
    large, times = above["module"].to_list(), above["relative_norm"].to_list()
    if large:
        than = "larger than" if bounds.relative_norm == 1 else f"more than {bounds.relative_norm:g} times"
        message = f"{len(large)} of {len(last)} changes are {than} the weight below {where}"
        message += f" (up to {max(times):.2g} times): {some(large)}"
        found.append(Finding("larger-than-weight", "warning", message, hint_of("larger-than-weight")))
    return found


def outliers(layers: pl.DataFrame, broken: Sequence[int], bounds: Thresholds) -> list[str]:
    """Modules that `outlier-modules` names."""
    return _outliers(_in_families(layers, broken), bounds)


def _outliers(last: pl.DataFrame, bounds: Thresholds) -> list[str]:
    far = (pl.col("members") >= bounds.family) & (pl.col("size") > bounds.outlier_factor * pl.col("median"))
    return [] if last.is_empty() else last.filter(far)["module"].to_list()


def _in_families(layers: pl.DataFrame, broken: Sequence[int]) -> pl.DataFrame:
    """The last whole checkpoint: how large each change is, and how large those of its sort are; empty if not known."""
    whole = layers.filter(~pl.col("step").is_in(list(broken)))
    if whole.is_empty() or "delta_norm" not in whole.columns:
        return whole.clear()
    last = whole.filter(pl.col("step") == pl.col("step").max())
    last = last.with_columns(_known(last, "relative_norm"), pl.col("delta_norm").fill_nan(None))
    family = ["component", "role", "adapter"]
    relative = pl.col("relative_norm").gt(0).fill_null(value=False).all().over(family)
    usual = pl.when(pl.col("size") > 0).then("size")
    last = last.with_columns(size=pl.when(relative).then("relative_norm").otherwise("delta_norm"))
    return last.with_columns(median=usual.median().over(family), members=usual.count().over(family))


def storage_findings(layers: pl.DataFrame, places: pl.DataFrame, bounds: Thresholds, unit: str) -> list[Finding]:
    """Zeros that a narrow type has made, and types and scales that change inside the run."""
    found = []
    if "zero_share" in layers.columns:
        shares = layers.group_by("step").agg(pl.col("zero_share").mean()).drop_nulls()
        high = shares.filter(pl.col("zero_share") > bounds.zero_share).sort("step")
        if len(high):
            worst = max(high["zero_share"].to_list())
            message = f"up to {worst:.0%} of the numbers are exactly 0 at {_steps(high['step'].to_list(), unit)}"
            types = ", ".join(sorted(set(places["dtype"].drop_nulls())))
            message += f", stored as {types}" if types else ""
            found.append(Finding("flushed-to-zero", "warning", message, hint_of("flushed-to-zero")))
    typed = places.filter(pl.col("dtype").is_not_null()).sort("step")
    changed = typed.filter(pl.col("dtype") != pl.col("dtype").shift())["step"].to_list()
    if changed:
        counts = typed.group_by("dtype").len().sort("len", descending=True).iter_rows()
        message = f"the type of the numbers changes at {_steps(changed, unit)}: "
        message += ", ".join(f"{number} in {dtype}" for dtype, number in counts)
        found.append(Finding("dtype-changes", "warning", message, hint_of("dtype-changes")))
    found.extend(_scales(layers, unit))
    return found


def _scales(layers: pl.DataFrame, unit: str) -> list[Finding]:
    """Where a multiplier differs from that of the checkpoint before, ranks being equal."""
    if "scale" not in layers.columns:
        return []
    before = [pl.col(name).shift().over("module").alias(f"{name}_before") for name in ("scale", "rank")]
    moved = layers.sort("step").with_columns(before)
    same_rank = pl.col("rank").eq_missing(pl.col("rank_before"))
    moved = moved.filter(same_rank & ((pl.col("scale") - pl.col("scale_before")).abs() > 1e-6 * pl.col("scale").abs()))
    if moved.is_empty():
        return []
    first = moved.row(0, named=True)
    steps = moved["step"].unique().sort().to_list()
    message = f"the scale changes at {_steps(steps, unit)}: of {first['module']} from {first['scale_before']:g} to "
    return [Finding("scale-changes", "warning", f"{message}{first['scale']:g}", hint_of("scale-changes"))]


def step_findings(places: pl.DataFrame, notes: RunNotes, bounds: Thresholds) -> list[Finding]:
    """Checkpoints that should be there and are not, and those that were written in another order than their steps."""
    unit = notes.step_unit
    found = _order(places, unit, bounds.rewritten_seconds)
    steps = places["step"].to_list()
    gaps = [after - before for before, after in pairwise(steps)]
    if gaps and gaps[-1] < min(gaps[:-1], default=0):  # the end of a training falls anywhere
        del gaps[-1]
    interval = max(set(gaps), key=lambda gap: (gaps.count(gap), -gap), default=0)
    if notes.pruned or len(gaps) < 2 or gaps.count(interval) < _MOST_REGULAR * len(gaps):
        return found
    lost = [
        step
        for before, gap in zip(steps, gaps, strict=False)
        if gap % interval == 0
        for step in range(before + interval, before + gap, interval)
    ]
    if len(lost) > sum(not entry.expected for entry in notes.skipped):  # damaged files are told as such
        are = "is" if len(lost) == 1 else "are"
        message = f"saved every {interval} {unit}s, but {_steps(lost, unit)} {are} missing"
        found.append(Finding("missing-steps", "warning", message, hint_of("missing-steps")))
    told = any(finding.rule == "pruned" for finding in notes.findings)
    before = steps[0] // interval - 1 if steps[0] % interval == 0 and not told else 0
    if before > 0:
        message = f"saved every {interval} {unit}s, but the first that is left is {unit} {steps[0]}: {before} are gone"
        hint = notes.save_more_often or hint_of("keep-limit")
        found.append(Finding("keep-limit", "warning", message, f"look whether they lie elsewhere; else {hint}"))
    return found


def _order(places: pl.DataFrame, unit: str, seconds: float) -> list[Finding]:
    """One single break in the files' times: all from some step on were written before all that come before it."""
    known = places.filter(pl.col("modified").is_not_null()).sort("step")
    steps, times = known["step"].to_list(), known["modified"].to_list()
    if known.sort("checkpoint")["modified"].is_sorted():
        return []  # copied one by one in the order of their names, of which 1000 comes before 200
    breaks = [place for place in range(1, len(times)) if times[place] < times[place - 1]]
    if (
        len(breaks) != 1
        or breaks[0] in (1, len(times) - 1)
        or min(times[: breaks[0]]) - max(times[breaks[0] :]) < seconds
    ):
        return []
    first = steps[breaks[0]]
    message = f"{unit}s {first} to {steps[-1]} were written before {unit}s {steps[0]} to {steps[breaks[0] - 1]}"
    return [Finding("out-of-order", "warning", message, hint_of("out-of-order"))]


def _known(frame: pl.DataFrame, name: str) -> pl.Expr:
    column = pl.col(name).fill_nan(None) if name in frame.columns else pl.lit(None, pl.Float64)
    return column.cast(pl.Float64).alias(name)


def _steps(steps: Sequence[int], unit: str) -> str:
    """Steps in words: all of a few, the ends of many."""
    if len(steps) > 4:
        return f"{len(steps)} {unit}s ({steps[0]} to {steps[-1]})"
    return f"{unit}{'s' if len(steps) > 1 else ''} {', '.join(map(str, steps))}"


def encoder_findings(
    layers: pl.DataFrame, places: pl.DataFrame, options: AssessOptions, window: int, turning: TurningPoint, unit: str
) -> list[Finding]:
    """Text encoders whose own cosines turn before those of the denoiser."""
    known = layers.filter(pl.col("cosine").is_not_null() & pl.col("component").str.starts_with("text_encoder"))
    found = []
    for name in known["component"].unique(maintain_order=True):
        own = replace(options, component=(name,))
        similarity = similarity_of(layers, places, own)
        if len(similarity.frame) < 3 * window + 3:
            continue
        at = DETECTORS[options.detector](curve_of(similarity, window, own)[0])
        step = None if at is None else similarity.frame["step"][at.index]
        before = places.filter(pl.col("step").is_between(step, turning.step, closed="left")) if step is not None else ()
        if len(before) >= window:  # of two turning points by chance one is always first
            message = f"{name} turns at {unit} {step}, the denoiser at {unit} {turning.step}"
            found.append(Finding("text-encoder-first", "info", message, hint_of("text-encoder-first")))
    return found
