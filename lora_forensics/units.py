"""Units of work of the measuring half: a chunk of checkpoints of one run, read once, measured module by module.

A unit is a picklable value and `measure_unit` is at the top level, so that any engine can run it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from lora_forensics.adapters import (
    KINDS,
    AdapterLayout,
    AdapterModule,
    Layer,
    Settings,
    Stack,
    less_bias,
    read_layout,
    read_settings,
)
from lora_forensics.analyses import ANALYSIS_COLUMNS
from lora_forensics.analyses.frozen import Frozen, analyse
from lora_forensics.base_model import BaseModel, open_base
from lora_forensics.errors import CheckpointError
from lora_forensics.metrics import METRICS
from lora_forensics.moments import Weight, count_nonfinite, fitting, full_precision, wide_device, widened
from lora_forensics.notices import Notices
from lora_forensics.records import Checkpoint, Skipped, Unresolved, WeightRef
from lora_forensics.series import MODULE_COLUMNS
from lora_forensics.tensors import TensorInfo, open_tensors

_SAVED_BIAS = "saved bias"
"""Role of a bias beside any kind's tensors."""


@dataclass(frozen=True, slots=True)
class Unit:
    """Some checkpoints of a run, in order."""

    run: str
    checkpoints: tuple[Checkpoint, ...]
    lead: int
    """How many of the first are not measured: the run's first, and the one before the others, or one that is both."""
    base: tuple[Path, ...]
    """Files or folders of the base model; none if there is none."""
    base_fingerprint: str
    """Of these files, so that a worker notices when they are replaced."""
    device: str
    align: bool = False
    """Also compare neighbours that are stored in other types or ranks: widened, and padded with zeros."""
    spectra: bool = False
    """All singular values of every change, whatever that takes."""
    biases: bool = False
    """Also the norms of the changes of biases."""
    analyses: tuple[str, ...] = ()
    """Names in `analyses.ANALYSES`."""
    cache: Path | None = None
    """A folder for decompositions of base weights."""


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
    bias_norms: dict[str, float] = field(default_factory=dict)
    """Module to the norm of its bias' change at the last checkpoint, where one is asked for, and known."""
    refs: dict[str, WeightRef] = field(default_factory=dict)
    """Module to the weight below it; of several shapes of a module the last."""


References = dict[tuple[str, int | None, int | None], WeightRef | Unresolved]
"""Module and shape to the weight below it."""


@dataclass(frozen=True, slots=True)
class _Loaded:
    """One checkpoint in memory."""

    index: int
    """Position in the unit."""
    checkpoint: Checkpoint
    infos: Mapping[str, TensorInfo]
    layout: AdapterLayout
    tensors: dict[str, dict[str, torch.Tensor]]
    """Module to role to tensor."""
    scales: dict[str, float | None]
    settings: Settings
    metadata: Mapping[str, str]


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
        layout = self.module.layout
        if align:
            return self.module.kind, layout.rows, layout.columns, tuple((role, t.dim()) for role, t in tensors)
        return self.module.kind, layout, tuple((role, t.shape, t.dtype) for role, t in tensors)


def measure_unit(unit: Unit, advance: Callable[[float], None] | None = None) -> UnitResult:
    """Measure all modules of a unit; `advance` is told of progress, in checkpoints."""
    columns = (*MODULE_COLUMNS, *(metric.column for metric in METRICS), *ANALYSIS_COLUMNS)
    result = UnitResult({column.name: [] for column in columns})
    loaded: list[_Loaded] = []
    for index in range(len(unit.checkpoints)):
        if (entry := _load(unit, index, result, loaded[-1] if loaded else None)) is not None:
            loaded.append(entry)
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
                try:
                    _measure_group(unit, group, base, ref, partial(_below, base, group[0], references), result)
                except CheckpointError as error:
                    result.notices.unread[name] = error.message
            if advance is not None:
                advance(share)
    return result


def _references(base: BaseModel, loaded: list[_Loaded]) -> References:
    """The weight below every module in every shape that it has: two trainings may share a folder."""
    found: References = {}
    for entry in loaded:
        modules = entry.layout.modules
        shapes = {name: (module.layout.rows, module.layout.columns) for name, module in modules.items()}
        new = {name: shape for name, shape in shapes.items() if (name, *shape) not in found}
        if new:
            refs = base.resolve(new, entry.metadata)
            found.update({(name, *shapes[name]): ref for name, ref in refs.items()})
    return found


def _below(base: BaseModel | None, entry: _Entry, references: References) -> dict[str, Layer | None]:
    """All modules of the entry's kind in its checkpoint, and the layers that the base has for them."""
    found: dict[str, Layer | None] = {}
    for name, module in entry.loaded.layout.modules.items():
        if module.kind == entry.module.kind:
            ref = references.get((name, module.layout.rows, module.layout.columns))
            found[name] = _layer(base, ref) if base and isinstance(ref, WeightRef) else None
    return found


def _load(unit: Unit, index: int, result: UnitResult, before: _Loaded | None) -> _Loaded | None:
    """One checkpoint; its layout is that of the one before where the headers are equal, as in nearly all runs."""
    checkpoint = unit.checkpoints[index]
    try:
        file = open_tensors(checkpoint.path)
        settings = read_settings(checkpoint.config, file.metadata)
        if before is not None and before.infos == file.infos and before.settings.told() == settings.told():
            layout = before.layout
        else:
            layout = read_layout(file.infos, settings)
        if not layout.modules and not layout.unread:
            raise CheckpointError("no adapter in it: none of its tensors is one that an adapter writes")
        owners: dict[str, list[tuple[str, str]]] = {}
        for name, module in layout.modules.items():
            for role, key in module.keys.items():
                owners.setdefault(key, []).append((name, role))
            if unit.biases and module.bias:
                owners.setdefault(module.bias, []).append((name, _SAVED_BIAS))
        tensors: dict[str, dict[str, torch.Tensor]] = {name: {} for name in layout.modules}
        for key in file.infos:  # in the file's own order: one pass over the disk
            if key in owners:
                read = file.read(key)
                for name, role in owners[key]:
                    tensors[name][role] = read
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
        if config.initialisation and not kind.corrected:
            notices.initialisations[config.initialisation] = None
        if scales[name] is None and kind.scaled:
            notices.scale_unknown[name] = None
    return _Loaded(index, checkpoint, file.infos, layout, tensors, scales, settings, file.metadata)


def _groups(name: str, loaded: list[_Loaded], align: bool) -> Iterator[list[_Entry]]:
    """Stretches of neighbouring checkpoints whose tensors for a module can be stacked."""
    entries = [_Entry(entry, entry.layout.modules[name]) for entry in loaded if name in entry.layout.modules]
    numbered = enumerate(entries)
    for _, group in groupby(numbered, key=lambda pair: (pair[1].loaded.index - pair[0], pair[1].signature(align))):
        yield [entry for _, entry in group]


def _measure_group(
    unit: Unit,
    group: list[_Entry],
    base: BaseModel | None,
    ref: WeightRef | None,
    layers: Callable[[], dict[str, Layer | None]],
    result: UnitResult,
) -> None:
    lead = sum(entry.loaded.index < unit.lead for entry in group)
    if len(group) == lead:
        return
    first = group[0].module
    kind = KINDS[first.kind]
    stacked = {role: _stack([entry.tensors[role] for entry in group]) for role in first.keys}
    scales = [entry.loaded.scales[first.name] for entry in group]
    stack = Stack(
        module=first.name,
        layout=first.layout,
        tensors={role: tensor for role, tensor in stacked.items() if role not in kind.scalars | kind.aside},
        scale=torch.tensor([1.0 if value is None else value for value in scales], dtype=torch.float64),
        lead=lead,
        config=group[0].loaded.settings.of(first.name),
        layers=layers,
        bias=lambda: None if base is None or ref is None else base.bias(ref),
        aside={role: widened(tensor) for role, tensor in stacked.items() if role in kind.aside},
    )
    weight = None if base is None or ref is None else _weight(base, ref)
    analysed: dict[str, list[float | None]] = {}
    try:
        change = kind.change(stack)
        moments = change.moments(weight, torch.device(unit.device), unit.spectra)
        if unit.analyses and weight is not None:
            frozen = Frozen(
                weight.matrix(wide_device(torch.device(unit.device))), unit.cache, f"{unit.base_fingerprint}|{ref!r}"
            )
            whole = [None if n else place for place, n in enumerate(moments.nonfinite.tolist(), start=lead)]
            analysed = analyse(unit.analyses, frozen, change, whole, first.layout.rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CheckpointError("its numbers are too large or too small to compute with") from error
    if group[0].loaded.index:  # the run's first checkpoint does not have this module
        moments = replace(moments, down_moved=torch.full_like(moments.down_moved, torch.nan))
    if stack.aside:
        moments = replace(moments, nonfinite=moments.nonfinite + count_nonfinite(*stack.aside.values())[lead:])
    if unit.biases:
        saved = group[-1].tensors.get(_SAVED_BIAS)
        with fitting():
            changed = kind.bias_change(stack, weight) if saved is None else less_bias(widened(saved)[None], stack)
        if changed is not None:
            result.bias_norms[first.name] = float(changed[-1].norm())
    count = len(group) - lead
    for metric in METRICS:
        known = metric.needs <= moments.known
        result.rows[metric.column.name].extend(metric.compute(moments).tolist() if known else [None] * count)
    for extra in ANALYSIS_COLUMNS:
        result.rows[extra.name].extend(analysed.get(extra.name, [None] * count))
    rows, columns = (weight.rows, weight.columns) if weight else (first.layout.rows, first.layout.columns)
    same = {
        "run": unit.run,
        "component": first.component,
        "module": first.name,
        "tensor": ref.label() if ref else None,
        "block": first.block,
        "role": first.role,
        "adapter": first.kind,
        "rank": first.layout.rank,
        "rows": rows,
        "columns": columns,
    }
    for column, value in same.items():
        result.rows[column].extend([value] * count)
    for entry, known_scale in zip(group[lead:], scales[lead:], strict=True):
        result.rows["step"].append(entry.loaded.checkpoint.step)
        result.rows["epoch"].append(entry.loaded.checkpoint.epoch)
        result.rows["checkpoint"].append(entry.loaded.checkpoint.name)
        result.rows["scale"].append(known_scale if kind.scaled else None)


def _stack(tensors: list[torch.Tensor]) -> torch.Tensor:
    """Tensors on a new first axis; where types or sizes differ (`Unit.align`), in the widest, zeros at the ends."""
    if len({(t.shape, t.dtype) for t in tensors}) == 1:
        return torch.stack(tensors)
    shape = [max(sizes) for sizes in zip(*(t.shape for t in tensors), strict=True)]
    stacked = torch.zeros(len(tensors), *shape, dtype=torch.float64)
    for target, tensor in zip(stacked, tensors, strict=True):
        target[tuple(slice(0, size) for size in tensor.shape)] = tensor
    return stacked


@lru_cache(maxsize=4096)
def _weight(base: BaseModel, ref: WeightRef) -> Weight:
    """One value for each weight, so that what is remembered of it serves the next unit too."""
    rows, columns = base.shape(ref)
    return Weight(rows, columns, lambda start, stop: base.rows(ref, start, stop))


@lru_cache(maxsize=4096)
def _layer(base: BaseModel, ref: WeightRef) -> Layer:
    return Layer(base.stored_shape(ref), ref.transposed and not ref.embedding, ref.embedding)


@lru_cache(maxsize=1)
def _open_base(paths: tuple[Path, ...], _fingerprint: str) -> BaseModel:
    """A worker opens a base once for all units of a run, and again when it was replaced."""
    return open_base(paths)
