"""Two checkpoints side by side: what differs in their text, their modules and their changes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_forensics.inspection.looking import dated, inspect_file
from lora_forensics.inspection.metadata import differing
from lora_forensics.inspection.values import Difference, Inspection, ModuleFacts, ModulePair
from lora_forensics.measure import resolve_device
from lora_forensics.rules import Thresholds
from lora_forensics.tensors import Tensors, open_tensors
from lora_forensics.units import Unit, measure_unit

_CLOSE = 1e-6
"""Relative: what a padded change may differ from the same change on its own."""


def compare_files(
    first: str | Path,
    second: str | Path,
    base: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    *,
    download: bool = False,
    thresholds: Thresholds | None = None,
) -> Difference:
    """What differs between two checkpoints; arguments and errors as for `inspect_file`.

    Changes of other ranks or types are compared as well: widened, and padded with zeros. Where padding would alter
    a change (the sizes of its tensors are no ranks), distance and rotation are NaN.
    """
    one, two = (inspect_file(path, base, device, download=download, thresholds=thresholds) for path in (first, second))
    pairs = _pairs(one, two, resolve_device(device))
    names = [{module.module for module in found.modules} | set(found.unread) for found in (one, two)]
    same, changed = _compare_tensors(open_tensors(one.path), open_tensors(two.path))
    return Difference(
        one,
        two,
        differing(_text(one), _text(two)),
        tuple(sorted(names[0] - names[1])),
        tuple(sorted(names[1] - names[0])),
        pairs,
        same,
        changed,
    )


def _pairs(one: Inspection, two: Inspection, device: str) -> tuple[ModulePair, ...]:
    """Modules that both have; the base model is read for it only where a change cannot be told without."""
    first, second = ({module.module: module for module in found.modules} for found in (one, two))
    moved = _movement(one.path, two.path, (), device)
    needs_base = any(
        name in second and (row["delta_norm"] is None or math.isnan(row["delta_norm"])) and _known(first[name])
        for (where, name), row in moved.items()
        if where == "first" and name in first
    )
    if needs_base:
        moved = _movement(one.path, two.path, tuple(map(Path, one.base.paths)), device)
    pairs = []
    for name, module in first.items():
        if name not in second:
            continue
        other = second[name]
        rows = moved.get(("first", name)), moved.get(("second", name))
        step, rotation = math.nan, math.nan
        if rows[0] and rows[1] and _kept(rows[0], module) and _kept(rows[1], other):
            step, rotation = (_number(rows[1][column]) for column in ("step_size", "rotation"))
        aspects = [{a: getattr(m, a) for a in ("adapter", "rank", "scale", "shape")} for m in (module, other)]
        changed = differing(*aspects)
        norms = (module.metric("delta_norm"), other.metric("delta_norm"))
        pairs.append(ModulePair(name, module.component, module.role, norms, step, rotation, changed))
    return tuple(pairs)


def _movement(first: Path, second: Path, base: tuple[Path, ...], device: str) -> dict[tuple[str, str], dict[str, Any]]:
    """Rows of both files, the second measured after the first, by file and module."""
    checkpoints = tuple(
        replace(dated(path)[0], name=name, step=step)
        for step, (name, path) in enumerate((("first", first), ("second", second)))
    )
    unit = Unit("", checkpoints, 0, base, "", device, align=True)
    try:
        result = measure_unit(unit)
    except (RuntimeError, ValueError, IndexError):  # padded tensors that are no longer an adapter
        result = measure_unit(replace(unit, align=False))
    columns = ("delta_norm", "step_size", "rotation")
    places = zip(result.rows["checkpoint"], result.rows["module"], strict=True)
    return {place: {c: result.rows[c][index] for c in columns} for index, place in enumerate(places)}


def _known(module: ModuleFacts) -> bool:
    return math.isfinite(module.metric("delta_norm"))


def _kept(row: Mapping[str, Any], module: ModuleFacts) -> bool:
    """Whether a change has the same norm in company as alone."""
    return math.isclose(_number(row["delta_norm"]), module.metric("delta_norm"), rel_tol=_CLOSE, abs_tol=1e-300)


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _text(found: Inspection) -> dict[str, Any]:
    """The header's keys and, under their file's name, those of adapter_config.json."""
    return {**found.metadata, **{f"adapter_config.json: {key}": value for key, value in found.config.items()}}


def _compare_tensors(first: Tensors, second: Tensors) -> tuple[int, int]:
    """How many tensors of one name are equal in type, shape and bits, and how many are not."""
    shared = [name for name in first.infos if name in second.infos]
    same = sum(
        first.infos[name] == second.infos[name] and torch.equal(_bits(first.read(name)), _bits(second.read(name)))
        for name in shared
    )
    return same, len(shared) - same


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)
