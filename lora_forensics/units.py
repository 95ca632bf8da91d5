"""Units of work of the measuring half: a chunk of checkpoints of one run, read once, measured module by module.

A unit is a picklable value and `measure_unit` is at the top level, so that any engine can run it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lora_forensics.adapters import KINDS, AdapterLayout, AdapterModule, read_layout, read_settings
from lora_forensics.base_model import BaseModel, open_base
from lora_forensics.errors import CheckpointError
from lora_forensics.metrics import METRICS
from lora_forensics.moments import Weight, full_precision
from lora_forensics.notices import Notices
from lora_forensics.records import Checkpoint, Skipped, Unresolved, WeightRef
from lora_forensics.series import MODULE_COLUMNS
from lora_forensics.tensors import open_tensors


@dataclass(frozen=True, slots=True)
class Unit:
    """Some checkpoints of a run, in order."""

    run: str
    checkpoints: tuple[Checkpoint, ...]
    lead: bool
    """The first is not measured: it is the predecessor of the second."""
    base: tuple[Path, ...]
    """Files or folders of the base model; none if there is none."""
    base_fingerprint: str
    """Of these files, so that a worker notices when they are replaced."""
    device: str
    align: bool = False
    """Also compare neighbours that are stored in other types or ranks: widened, and padded with zeros."""


@dataclass(slots=True)
class UnitResult:
    """Rows of layers.parquet by column, and what went wrong."""

    rows: dict[str, list[Any]]
    dtypes: dict[str, str] = field(default_factory=dict)
    """Checkpoint to the type that most of its numbers are stored in."""
    skipped: list[Skipped] = field(default_factory=list)
    notices: Notices = field(default_factory=Notices)
    layouts: dict[str, AdapterLayout] = field(default_factory=dict)
    """Checkpoint to its modules."""
    refs: dict[str, WeightRef] = field(default_factory=dict)
    """Module to the weight below it; of several shapes of a module the last."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One checkpoint in memory."""

    index: int
    """Position in the unit."""
    checkpoint: Checkpoint
    layout: AdapterLayout
    tensors: dict[str, dict[str, torch.Tensor]]
    """Module to role to tensor."""
    scales: dict[str, float | None]


@dataclass(frozen=True, slots=True)
class _Entry:
    """One module of one loaded checkpoint."""

    loaded: _Loaded
    module: AdapterModule

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return self.loaded.tensors[self.module.name]

    def signature(self, align: bool) -> tuple[Any, ...]:
        """What must be equal for entries to be stacked."""
        tensors = sorted(self.tensors.items())
        if align:
            layout = self.module.layout
            return self.module.kind, layout.rows, layout.columns, tuple((role, t.dim()) for role, t in tensors)
        return self.module.kind, tuple((role, t.shape, t.dtype) for role, t in tensors)


def measure_unit(unit: Unit, advance: Callable[[float], None] | None = None) -> UnitResult:
    """Measure all modules of a unit; `advance` is told of progress, in checkpoints."""
    result = UnitResult({column.name: [] for column in (*MODULE_COLUMNS, *(metric.column for metric in METRICS))})
    loaded = [entry for index in range(len(unit.checkpoints)) if (entry := _load(unit, index, result)) is not None]
    modules = {name: module for entry in loaded for name, module in entry.layout.modules.items()}
    base = _open_base(unit.base, unit.base_fingerprint) if unit.base else None
    references = _references(base, loaded) if base else {}
    share = (len(unit.checkpoints) - unit.lead) / max(len(modules), 1)
    with full_precision():
        for name in modules:
            for group in _groups(name, loaded, unit.align):
                layout = group[0].module.layout
                found = references.get((name, layout.rows, layout.columns))
                if isinstance(found, Unresolved):
                    result.notices.unresolved[name] = found.reason
                ref = found if isinstance(found, WeightRef) else None
                if ref is not None:
                    result.refs[name] = ref
                _measure_group(unit, group, base, ref, result)
            if advance is not None:
                advance(share)
    return result


def _references(base: BaseModel, loaded: list[_Loaded]) -> dict[tuple[str, int, int], WeightRef | Unresolved]:
    """The weight below every module in every shape that it has: two trainings may share a folder."""
    found: dict[tuple[str, int, int], WeightRef | Unresolved] = {}
    for entry in loaded:
        modules = entry.layout.modules
        shapes = {name: (module.layout.rows, module.layout.columns) for name, module in modules.items()}
        new = {name: shape for name, shape in shapes.items() if (name, *shape) not in found}
        found.update({(name, *shapes[name]): ref for name, ref in base.resolve(new).items()} if new else {})
    return found


def _load(unit: Unit, index: int, result: UnitResult) -> _Loaded | None:
    checkpoint = unit.checkpoints[index]
    try:
        file = open_tensors(checkpoint.path)
        layout = read_layout(file.infos)
        if not layout.modules and not layout.unread:
            raise CheckpointError("no adapter in it: none of its tensors is one that an adapter writes")
        settings = read_settings(checkpoint.config, file.metadata)
        # in the file's own order: one pass over the disk
        owners = {key: (name, role) for name, module in layout.modules.items() for role, key in module.keys.items()}
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layout.modules}
        for key in file.infos:
            if key in owners:
                name, role = owners[key]
                tensors[name][role] = file.read(key)
    except CheckpointError as error:
        result.skipped.append(Skipped.because(checkpoint.path, error))
        return None
    sizes: dict[str, int] = {}
    for info in file.infos.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
    if index >= unit.lead:
        result.layouts[checkpoint.name] = layout
        result.dtypes[checkpoint.name] = max(sizes, key=lambda dtype: sizes[dtype], default="")
    notices = result.notices
    notices.unread.update({name: entry.reason for name, entry in layout.unread.items()})
    # peft stores a copy of a frozen embedding with an adapter on it: no trained weight
    notices.full_weights.update({name: None for name in layout.foreign if not name.endswith(".base_layer.weight")})
    scales: dict[str, float | None] = {}
    for name, module in layout.modules.items():
        config = settings.of(name)
        kind = KINDS[module.kind]
        values = {role: t.item() for role, t in tensors[name].items() if role in kind.scalars and t.numel() == 1}
        told = kind.scale(values, config, name, module.layout.rank)
        scales[name] = checkpoint.scale if told is None else told
        if config.initialisation:
            notices.initialisations[config.initialisation] = None
        if scales[name] is None:
            notices.scale_unknown[name] = None
    return _Loaded(index, checkpoint, layout, tensors, scales)


def _groups(name: str, loaded: list[_Loaded], align: bool) -> Iterator[list[_Entry]]:
    """Stretches of neighbouring checkpoints whose tensors for a module can be stacked."""
    entries = [_Entry(entry, entry.layout.modules[name]) for entry in loaded if name in entry.layout.modules]
    numbered = enumerate(entries)
    for _, group in groupby(numbered, key=lambda pair: (pair[1].loaded.index - pair[0], pair[1].signature(align))):
        yield [entry for _, entry in group]


def _measure_group(
    unit: Unit, group: list[_Entry], base: BaseModel | None, ref: WeightRef | None, result: UnitResult
) -> None:
    lead = int(unit.lead and group[0].loaded.index == 0)
    if len(group) == lead:
        return
    first = group[0].module
    kind = KINDS[first.kind]
    roles = [role for role in first.keys if role not in kind.scalars]
    stacked = {role: _stack([entry.tensors[role] for entry in group]) for role in roles}
    scales = [entry.loaded.scales[first.name] for entry in group]
    scale = torch.tensor([1.0 if value is None else value for value in scales], dtype=torch.float64)
    weight = None if base is None or ref is None else _weight(base, ref)
    moments = kind.change(stacked, scale, lead).moments(weight, torch.device(unit.device))
    count = len(group) - lead
    for metric in METRICS:
        known = (weight is not None or not metric.needs_base) and (
            not metric.needs_core or moments.singular.shape[1] > 0
        )
        result.rows[metric.column.name].extend(metric.compute(moments).tolist() if known else [None] * count)
    same = {
        "run": unit.run,
        "component": first.component,
        "module": first.name,
        "tensor": ref.label() if ref else None,
        "block": first.block,
        "role": first.role,
        "adapter": first.kind,
        "rank": first.layout.rank,
        "rows": first.layout.rows,
        "columns": first.layout.columns,
    }
    for column, value in same.items():
        result.rows[column].extend([value] * count)
    for entry, known_scale in zip(group[lead:], scales[lead:], strict=True):
        result.rows["step"].append(entry.loaded.checkpoint.step)
        result.rows["epoch"].append(entry.loaded.checkpoint.epoch)
        result.rows["checkpoint"].append(entry.loaded.checkpoint.name)
        result.rows["scale"].append(known_scale)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors on a new first axis; where types or sizes differ (`Unit.align`), in the widest, zeros at the ends."""
    if len({(t.shape, t.dtype) for t in tensors}) == 1:
        return torch.stack(tensors)
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stacked = torch.zeros(len(tensors), *shape, dtype=torch.float64)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return stacked


def _weight(base: BaseModel, ref: WeightRef) -> Weight:
    rows, columns = base.shape(ref)
    return Weight(rows, columns, lambda start, stop: base.rows(ref, start, stop))


@lru_cache(maxsize=1)
def _open_base(paths: tuple[Path, ...], _fingerprint: str) -> BaseModel:
    """A worker opens a base once for all units of a run, and again when it was replaced."""
    return open_base(paths)
