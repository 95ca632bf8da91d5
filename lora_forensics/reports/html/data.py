"""The numbers of a run's page: aggregated and rounded, for the charts and the tables beside them."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import polars as pl

from lora_forensics.plots.names import Floats, Row, model_order, row_labels, spans
from lora_forensics.records import Verdict
from lora_forensics.reports.html.tables import RunTables

STEPS, CELL_STEPS, CELL_ROWS, POINTS, POINT_STEPS = 400, 100, 160, 4000, 24
"""At most so many steps in a line, steps and rows in a heat map, points and their steps in a scatter plot."""
_UNKNOWN = 65535
_SERIES = ("cosine", "cosine_rowwise", "cs_fluctuation", "valley", "path_length", "directness", "magnitude_direction")
_CHECKPOINTS = ("epoch", "learning_rate", "dose", "train_loss", "held_out_loss")

Lines = dict[str, list[Any]]
"""Columns by name, `step` first; all of one length."""


def rounded(value: Any, digits: int = 5) -> float | int | None:
    """A number with few digits; None for what is no finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return value if isinstance(value, int) else float(f"{value:.{digits}g}")


def better(verdict: Verdict) -> str:
    """Which scores of a probe are better: 'higher' or 'lower'."""
    found = verdict.evidence.get("probe")
    return "higher" if isinstance(found, dict) and found.get("maximise") else "lower"


def lines(tables: RunTables, verdict: Verdict) -> Lines:
    """What is known at each step: of the checkpoint, of the series, and quantiles of every metric over modules."""
    known: dict[int, dict[str, Any]] = {}
    sources: tuple[tuple[pl.DataFrame, tuple[str, ...] | None], ...] = (
        (tables.checkpoints, ("checkpoint", *_CHECKPOINTS)),
        (tables.series, ("checkpoint", *_CHECKPOINTS, *_SERIES)),
        (_quantiles(tables, verdict), None),
    )
    for frame, wanted_columns in sources:
        if "step" not in frame.columns:
            continue
        chosen = [name for name in (wanted_columns or frame.columns) if name in frame.columns and name != "step"]
        for row in frame.drop_nulls("step").select("step", *chosen).iter_rows(named=True):
            step = row.pop("step")
            known.setdefault(step, {}).update({name: v for name, v in row.items() if v is not None})
    for step, score in _scores(verdict).items():
        known.setdefault(step, {})["probe_score"] = score
    wanted = {point.step for point in verdict.points()}
    wanted |= {step for step, row in known.items() if row.get("valley") is not None or "probe_score" in row}
    steps = _thinned(sorted(known), wanted, STEPS)
    names = list(dict.fromkeys(name for step in steps for name in known[step]))
    table: Lines = {"step": steps}
    for name in names:
        column = [known[step].get(name) for step in steps]
        table[name] = [str(v) if v is not None else "" for v in column] if name == "checkpoint" else _numbers(column)
    kept = {"step", "checkpoint"}
    return {name: column for name, column in table.items() if name in kept or any(v is not None for v in column)}


def cells(tables: RunTables) -> dict[str, Any]:
    """A heat map of every metric, 16 bits a cell: rows are modules, or their means by block and role where many.

    Returns:
        `steps`, `rows` [label, what it stands for, modules], and `maps` {metric: [low, high, 2 %, 98 %, cells]}.
    """
    layers, metrics = tables.layers, tables.metrics()
    if not metrics or not {"step", "module"} <= set(layers.columns):
        return {"steps": [], "rows": [], "maps": {}}
    layers = _placed(layers)
    rows: list[Row] = sorted(layers.select("component", "module").unique().rows(), key=model_order)
    labels = row_labels(rows)
    roles = dict(layers.select("module", "role").unique("module").rows())
    groups, names = _grouped(rows, labels, roles)
    place = pl.DataFrame(
        {"component": [c for c, _ in rows], "module": [m for _, m in rows], "row": groups},
        schema={"component": pl.String, "module": pl.String, "row": pl.Int64},
    )
    every = sorted(layers["step"].unique().to_list())
    steps = _thinned(every, set(), CELL_STEPS)
    chosen = layers.filter(pl.col("step").is_in(steps)).join(place, on=["component", "module"])
    finite = [pl.when(pl.col(name).is_finite()).then(pl.col(name)).mean().alias(name) for name in metrics]
    means = chosen.group_by("row", "step").agg(finite)
    maps = {}
    at = means["row"].to_numpy(), np.searchsorted(np.array(steps), means["step"].to_numpy())
    for name in metrics:
        matrix = np.full((len(names), len(steps)), np.nan)
        matrix[at] = means[name].to_numpy()
        if np.isfinite(matrix).any():
            maps[name] = _packed(matrix)
    return {"steps": steps, "rows": names, "maps": maps}


def cloud(tables: RunTables, verdict: Verdict) -> dict[str, Any]:
    """Magnitude against direction change of modules: `steps`, `modules`, and `points` [step, module, x, y]."""
    pair = ("direction_change", "magnitude_change")
    empty: dict[str, Any] = {"steps": [], "modules": [], "points": []}
    if not {"step", "module", *pair} <= set(tables.layers.columns):
        return empty
    known = _scope(_placed(tables.layers), verdict).filter(*(pl.col(name).is_finite() for name in pair))
    if known.is_empty():
        return empty
    modules = known["module"].unique(maintain_order=True).to_list()
    room = max(2, min(POINT_STEPS, POINTS // min(len(modules), POINTS // 2)))
    keep = {verdict.keep.step} if verdict.keep else set()
    steps = _thinned(sorted(known["step"].unique().to_list()), keep, room)
    modules = _thinned(modules, set(), POINTS // len(steps))
    number = {name: place for place, name in enumerate(modules)}
    rows = known.filter(pl.col("step").is_in(steps) & pl.col("module").is_in(modules)).select("step", "module", *pair)
    found = [[step, number[module], rounded(x, 4), rounded(y, 4)] for step, module, x, y in rows.iter_rows()]
    return {"steps": steps, "modules": modules, "points": found}


def module_rows(tables: RunTables, verdict: Verdict, most: int) -> tuple[list[str], list[list[Any]], int, int | None]:
    """The table of modules: names of columns, rows, how many modules there are, and the step they are shown at."""
    layers = tables.layers
    if not {"step", "module"} <= set(layers.columns) or layers.is_empty():
        return [], [], 0, None
    layers = _placed(layers)
    steps = layers["step"].drop_nulls().unique()
    wanted = verdict.keep.step if verdict.keep else None
    step = wanted if wanted in steps else steps.max()
    at = layers.filter(pl.col("step") == step)
    course = [name for name in ("path_length", "directness", "settled_step") if name in tables.modules.columns]
    if course:
        own = tables.modules.select("component", "module", *course).unique(["component", "module"])
        at = at.join(own, on=["component", "module"], how="left")
    numbers = ("rank", "cosine", "relative_norm", "delta_norm", "spectral_norm", "stable_rank", "effective_rank")
    told = [name for name in (*numbers, "direction_change", *course) if name in at.columns]
    shown = [name for name in told if at[name].cast(pl.Float64, strict=False).is_finite().any()]
    total = at.height
    if total > most and "delta_norm" in at.columns:
        at = at.sort("delta_norm", descending=True, nulls_last=True).head(most)
    rows = at.select("component", "module", "role", "adapter", *shown).rows()
    rows.sort(key=lambda row: model_order((row[0], row[1])))
    return ["component", "module", "role", "kind", *shown], [list(row) for row in rows[:most]], total, _whole(step)


def _scores(verdict: Verdict) -> dict[int, float]:
    """What a probe said of each checkpoint that it scored."""
    found = verdict.evidence.get("probe")
    entries = found.get("evaluations") if isinstance(found, dict) else None
    known = [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    pairs = [(entry.get("step"), entry.get("score")) for entry in known]
    return {step: score for step, score in pairs if isinstance(step, int) and isinstance(score, int | float)}


def _whole(step: object) -> int | None:
    return step if isinstance(step, int) else None


def _placed(layers: pl.DataFrame) -> pl.DataFrame:
    """With a text in every column that says what a row is about."""
    texts = [
        (pl.col(name) if name in layers.columns else pl.lit(None, pl.String)).cast(pl.String).fill_null("").alias(name)
        for name in ("component", "module", "role", "adapter")
    ]
    return layers.with_columns(texts).drop_nulls("step")


def _scope(layers: pl.DataFrame, verdict: Verdict) -> pl.DataFrame:
    return layers.filter(pl.col("component").is_in(verdict.components)) if verdict.components else layers


def _quantiles(tables: RunTables, verdict: Verdict) -> pl.DataFrame:
    """Median and tenths over the modules in scope, of every metric at each step."""
    metrics = tables.metrics()
    if not metrics or "step" not in tables.layers.columns:
        return pl.DataFrame()
    scope = _scope(_placed(tables.layers), verdict)
    finite = {name: pl.col(name).filter(pl.col(name).is_finite()) for name in metrics}
    asked = [
        finite[name].quantile(share, "linear").alias(f"{name}.{tenth}")
        for name in metrics
        for tenth, share in (("low", 0.1), ("mid", 0.5), ("high", 0.9))
    ]
    return scope.group_by("step").agg(asked)


def _grouped(rows: Sequence[Row], labels: Sequence[str], roles: dict[str, str]) -> tuple[list[int], list[list[Any]]]:
    """A heat map's row for each module, and what each row is: label, name, how many modules."""
    keys: list[tuple[object, ...]] = [(component, module) for component, module in rows]
    if len(set(keys)) > CELL_ROWS:
        keys = [(c, label, roles.get(m, "")) for (c, m), label in zip(rows, labels, strict=True)]
    if len(set(keys)) > CELL_ROWS:
        keys = [(c, label) for (c, _), label in zip(rows, labels, strict=True)]
    order = {key: place for place, key in enumerate(dict.fromkeys(keys))}
    share = max(1, math.ceil(len(order) / CELL_ROWS))
    groups = [order[key] // share for key in keys]
    members: dict[int, list[int]] = {}
    for place, group in enumerate(groups):
        members.setdefault(group, []).append(place)
    starts = {start for start, _ in spans([labels[members[group][0]] for group in members])}
    names = []
    for group, inside in members.items():
        first = keys[inside[0]]
        name = rows[inside[0]][1] if len(inside) == 1 else " ".join(str(part) for part in first if part)
        names.append([labels[inside[0]] if group in starts else "", name, len(inside)])
    return groups, names


def _packed(matrix: Floats) -> list[Any]:
    """Lowest, highest, the bounds of the colours, and the cells as base64 of 16-bit numbers, row by row."""
    finite = matrix[np.isfinite(matrix)]
    low, high = float(finite.min()), float(finite.max())
    scale = (high - low) / (_UNKNOWN - 1) or 1.0
    cells = np.full(matrix.shape, _UNKNOWN, dtype="<u2")
    known = np.isfinite(matrix)
    cells[known] = np.round((matrix[known] - low) / scale)
    near, far = (float(v) for v in np.percentile(finite, [2, 98]))
    bounds = [rounded(v, 6) for v in (low, high, near, far)]
    return [*bounds, base64.b64encode(cells.tobytes()).decode()]


def _thinned(values: Sequence[Any], wanted: set[Any], most: int) -> list[Any]:
    """At most about `most` of the values, evenly, with those that are wanted."""
    if len(values) <= most:
        return list(values)
    even = {values[int(place)] for place in np.linspace(0, len(values) - 1, most).round()}
    few = set(sorted(wanted & set(values))[:most])
    return [value for value in values if value in even or value in few]


def _numbers(values: Iterable[Any]) -> list[float | int | None]:
    return [rounded(value) for value in values]
