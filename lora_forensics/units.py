"""Units of work of the measuring half: a chunk of checkpoints of one run, read once, measured module by module.

A unit is a picklable value and `measure_unit` is at the top level, so that any engine can run it anywhere.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
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
from lora_forensics.moments import (
    Moments,
    Weight,
    begun_anew,
    count_nonfinite,
    fitting,
    full_precision,
    wide_device,
    widened,
)
from lora_forensics.notices import Notices
from lora_forensics.records import Checkpoint, Skipped, Unresolved, WeightRef
from lora_forensics.remote import RemotePath
from lora_forensics.series import MODULE_COLUMNS, STORAGE_COLUMNS
from lora_forensics.stacking import BATCHES, UnreadableError, ahead, keep_freed_memory, read_together
from lora_forensics.tensors import Tensors, open_tensors


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
    memory: int = 1 << 30
    """Bytes that what is read of checkpoints, and what is computed of it, may take about."""
    align: bool = False
    """Also compare neighbours that are stored in other types or ranks: widened, and padded with zeros."""
    origin: bool = True
    """The first is the first of its run."""
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
class _Opened:
    """One checkpoint whose header was read."""

    index: int
    """Position in the unit."""
    checkpoint: Checkpoint
    file: Tensors
    layout: AdapterLayout
    settings: Settings


@dataclass(frozen=True, slots=True)
class _Group:
    """One module at neighbouring checkpoints whose tensors for it can be stacked."""

    entries: list[_Opened]
    module: AdapterModule
    """As the first of them has it."""
    apart: bool = False
    """The first is the run's first and no neighbour of the second."""

    @property
    def bytes(self) -> int:
        infos = self.entries[0].file.infos
        return len(self.entries) * sum(8 * math.prod(infos[key].shape) for key in self.module.keys.values())

    @property
    def stretch(self) -> tuple[int, ...]:
        """The checkpoints; one that lacks the module may lie between the first and the others."""
        return tuple(entry.index for entry in self.entries)

    @property
    def same_names(self) -> bool:
        """Whether its tensors are called the same in all checkpoints."""
        layouts = {id(entry.layout): entry.layout for entry in self.entries}.values()
        return all(layout.modules[self.module.name].keys == self.module.keys for layout in layouts)

    def read_one_by_one(self, role: str) -> list[torch.Tensor]:
        """The tensors of one role where names differ."""
        found = []
        for entry in self.entries:
            try:
                found.append(entry.file.read(entry.layout.modules[self.module.name].keys[role]))
            except CheckpointError as error:
                raise UnreadableError(entry.index, error) from error
        return found


_Tensors = list[torch.Tensor] | torch.Tensor
"""Of several checkpoints: stacked if they could be."""


def measure_unit(unit: Unit, advance: Callable[[float], None] | None = None) -> UnitResult:
    """Measure all modules of a unit; `advance` is told of progress, in checkpoints."""
    keep_freed_memory()
    broken: dict[int, Skipped] = {}
    while True:
        try:
            return _measure(unit, broken, advance)
        except UnreadableError as failure:  # inside the data: as if it had not been there from the start
            broken[failure.index] = Skipped.because(unit.checkpoints[failure.index].path, failure.error)


def _measure(unit: Unit, broken: Mapping[int, Skipped], advance: Callable[[float], None] | None) -> UnitResult:
    """All modules of all checkpoints but the broken ones.

    Raises:
        UnreadableError: another one is broken; its position is that in the unit.
    """
    columns = (*MODULE_COLUMNS, *(metric.column for metric in METRICS), *ANALYSIS_COLUMNS, *STORAGE_COLUMNS)
    result = UnitResult({column.name: [] for column in columns})
    opened: list[_Opened] = []
    for index in range(len(unit.checkpoints)):
        if index in broken:
            result.skipped.append(broken[index])
        elif (entry := _open(unit, index, result, opened[-1] if opened else None)) is not None:
            opened.append(entry)
    groups = _groups(opened, unit.align, unit.origin)
    base = _open_base(unit.base, unit.base_fingerprint) if unit.base else None
    references = _references(base, opened) if base else {}
    share = (len(unit.checkpoints) - unit.lead) / max(len(groups), 1)
    far = any(isinstance(checkpoint.path, RemotePath) for checkpoint in unit.checkpoints)  # each read is a request
    batches = _batches(groups, unit.memory // (2 if far else BATCHES))
    with full_precision(), closing(ahead((batch, _read(batch)) for batch in batches)) as ready:
        for batch, tensors in ready:
            for group, stacked in zip(batch, tensors, strict=True):
                layout, name = group.module.layout, group.module.name
                found = references.get((name, layout.rows, layout.columns))
                if isinstance(found, Unresolved):
                    result.notices.unresolved[name] = found.reason
                ref = found if isinstance(found, WeightRef) else None
                if ref is not None:
                    result.refs[name] = ref
                try:
                    _measure_group(unit, group, stacked, base, ref, references, result)
                except CheckpointError as error:
                    result.notices.unread[name] = error.message
                if advance is not None:
                    advance(share)
    return result


def _batches(groups: list[_Group], limit: int) -> Iterator[list[_Group]]:
    """Groups whose tensors together stay below the limit, in order; a larger one alone."""
    batch: list[_Group] = []
    held = 0
    for group in groups:
        if batch and held + group.bytes > limit:
            yield batch
            batch, held = [], 0
        batch.append(group)
        held += group.bytes
    if batch:
        yield batch


def _read(batch: list[_Group]) -> list[dict[str, _Tensors]]:
    """The tensors of every group by role; what several of them share is read once."""
    wanted: dict[tuple[int, ...], dict[str, None]] = {}
    for group in batch:
        if group.same_names:
            wanted.setdefault(group.stretch, {}).update(dict.fromkeys(group.module.keys.values()))
    entries = {group.stretch: group.entries for group in batch}
    found = {stretch: _read_stretch(entries[stretch], names) for stretch, names in wanted.items()}
    return [
        {role: found[group.stretch][key] for role, key in group.module.keys.items()}
        if group.same_names
        else {role: group.read_one_by_one(role) for role in group.module.keys}
        for group in batch
    ]


def _read_stretch(entries: list[_Opened], names: Iterable[str]) -> dict[str, _Tensors]:
    try:
        return read_together([entry.file for entry in entries], names)
    except UnreadableError as failure:
        raise UnreadableError(entries[failure.index].index, failure.error) from failure


def _references(base: BaseModel, opened: list[_Opened]) -> References:
    """The weight below every module in every shape that it has: two trainings may share a folder."""
    found: References = {}
    for entry in opened:
        modules = entry.layout.modules
        shapes = {name: (module.layout.rows, module.layout.columns) for name, module in modules.items()}
        new = {name: shape for name, shape in shapes.items() if (name, *shape) not in found}
        if new:
            refs = base.resolve(new, entry.file.metadata)
            found.update({(name, *shapes[name]): ref for name, ref in refs.items()})
    return found


def _below(base: BaseModel | None, group: _Group, references: References) -> dict[str, Layer | None]:
    """All modules of the group's kind in its first checkpoint, and the layers that the base has for them."""
    found: dict[str, Layer | None] = {}
    for name, module in group.entries[0].layout.modules.items():
        if module.kind == group.module.kind:
            ref = references.get((name, module.layout.rows, module.layout.columns))
            found[name] = _layer(base, ref) if base and isinstance(ref, WeightRef) else None
    return found


def _open(unit: Unit, index: int, result: UnitResult, before: _Opened | None) -> _Opened | None:
    """One checkpoint; its layout is that of the one before where the headers are equal, as in nearly all runs."""
    checkpoint = unit.checkpoints[index]
    try:
        file = open_tensors(checkpoint.path)
        settings = read_settings(checkpoint.config, file.metadata)
        if before is not None and before.file.infos == file.infos and before.settings.told() == settings.told():
            layout = before.layout
        else:
            layout = read_layout(file.infos, settings)
        if not layout.modules and not layout.unread:
            raise CheckpointError(
                "no adapter in it: none of its tensors is one that an adapter writes", rule="foreign-file"
            )
    except CheckpointError as error:
        result.skipped.append(Skipped.because(checkpoint.path, error))
        return None
    if index >= unit.lead:
        sizes: dict[str, int] = {}
        for info in file.infos.values():
            sizes[info.dtype] = sizes.get(info.dtype, 0) + math.prod(info.shape)
        result.layouts[checkpoint.name] = layout
        result.dtypes[checkpoint.name] = max(sizes, key=lambda dtype: sizes[dtype], default="")
    notices = result.notices
    notices.unread.update({name: entry.reason for name, entry in layout.unread.items()})
    # peft stores a copy of a frozen embedding with an adapter on it: no trained weight
    notices.full_weights.update({name: None for name in layout.foreign if not name.endswith(".base_layer.weight")})
    return _Opened(index, checkpoint, file, layout, settings)


def _groups(opened: list[_Opened], align: bool, origin: bool) -> list[_Group]:
    """Every module at stretches of neighbouring checkpoints whose tensors for it can be stacked."""
    alike = [list(run) for _, run in groupby(opened, key=lambda entry: id(entry.layout))]
    found = []
    for name in dict.fromkeys(name for run in alike for name in run[0].layout.modules):
        runs = [run for run in alike if name in run[0].layout.modules]
        for _, same in groupby(runs, key=lambda run: _signature(run[0], name, align)):
            entries = [entry for run in same for entry in run]
            for _, near in groupby(enumerate(entries), key=lambda pair: pair[1].index - pair[0]):
                stretch = [entry for _, entry in near]
                apart = origin and stretch[0].index > 0 and entries[0].index == 0
                stretch = [entries[0], *stretch] if apart else stretch
                found.append(_Group(stretch, stretch[0].layout.modules[name], apart))
    return found


def _signature(entry: _Opened, name: str, align: bool) -> tuple[Any, ...]:
    """What must be equal for entries to be stacked."""
    module, infos = entry.layout.modules[name], entry.file.infos
    tensors = [(role, key, infos[key]) for role, key in sorted(module.keys.items())]
    if align:
        layout = module.layout
        return module.kind, layout.rows, layout.columns, tuple((role, len(info.shape)) for role, _, info in tensors)
    return module.kind, module.layout, tuple((role, info.shape, info.dtype) for role, _, info in tensors)


def _measure_group(
    unit: Unit,
    group: _Group,
    tensors: dict[str, _Tensors],
    base: BaseModel | None,
    ref: WeightRef | None,
    references: References,
    result: UnitResult,
) -> None:
    entries, module = group.entries, group.module
    lead = max(sum(entry.index < unit.lead for entry in entries), int(group.apart))
    if len(entries) == lead:
        return
    kind = KINDS[module.kind]
    stacked = {role: _stack(tensor) for role, tensor in tensors.items()}
    scales = _scales(group, stacked, result.notices)
    stack = Stack(
        module=module.name,
        layout=module.layout,
        tensors={role: tensor for role, tensor in stacked.items() if role not in kind.scalars | kind.aside},
        scale=torch.tensor([1.0 if value is None else value for value in scales], dtype=torch.float64),
        lead=lead,
        config=entries[0].settings.of(module.name),
        layers=partial(_below, base, group, references),
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
            analysed = analyse(unit.analyses, frozen, change, whole, module.layout.rank)
    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
        raise CheckpointError("its numbers are too large or too small to compute with") from error
    moments = _exact(moments, _repeats(stacked.values(), stack.scale)[lead:])
    if entries[0].index or not unit.origin:  # the run's first checkpoint is gone, or does not have this module
        moments = replace(moments, down_moved=torch.full_like(moments.down_moved, torch.nan))
    if group.apart:
        moments = begun_anew(moments)
    if stack.aside:
        moments = replace(moments, nonfinite=moments.nonfinite + count_nonfinite(*stack.aside.values())[lead:])
    if unit.biases:
        last = entries[-1]
        key = last.layout.modules[module.name].bias
        with fitting():
            if key is None:
                changed = kind.bias_change(stack, weight)
            else:
                changed = less_bias(widened(last.file.read(key))[None], stack)
        if changed is not None:
            result.bias_norms[module.name] = float(changed[-1].norm())
    count = len(entries) - lead
    result.rows["zero_share"].extend(_zero_shares(stacked.values())[lead:] or [None] * count)
    for metric in METRICS:
        known = metric.needs <= moments.known
        result.rows[metric.column.name].extend(metric.compute(moments).tolist() if known else [None] * count)
    for extra in ANALYSIS_COLUMNS:
        result.rows[extra.name].extend(analysed.get(extra.name, [None] * count))
    rows, columns = (weight.rows, weight.columns) if weight else (module.layout.rows, module.layout.columns)
    same = {
        "run": unit.run,
        "component": module.component,
        "module": module.name,
        "tensor": ref.label() if ref else None,
        "block": module.block,
        "role": module.role,
        "adapter": module.kind,
        "rank": module.layout.rank,
        "rows": rows,
        "columns": columns,
    }
    for column, value in same.items():
        result.rows[column].extend([value] * count)
    for entry, known_scale in zip(entries[lead:], scales[lead:], strict=True):
        result.rows["step"].append(entry.checkpoint.step)
        result.rows["epoch"].append(entry.checkpoint.epoch)
        result.rows["checkpoint"].append(entry.checkpoint.name)
        result.rows["scale"].append(known_scale if kind.scaled else None)


def _scales(group: _Group, tensors: Mapping[str, torch.Tensor], notices: Notices) -> list[float | None]:
    """The multiplier at every checkpoint, None where it is unknown."""
    name, kind = group.module.name, KINDS[group.module.kind]
    numbers = {role: t.flatten().tolist() for role, t in tensors.items() if role in kind.scalars and t[0].numel() == 1}
    scales = []
    for place, entry in enumerate(group.entries):
        config = entry.settings.of(name)
        values = {role: column[place] for role, column in numbers.items()}
        told = kind.scale(values, config, name, entry.layout.modules[name].layout.rank)
        scales.append(entry.checkpoint.scale if told is None else told)
        if config.initialisation and not kind.corrected:
            notices.initialisations[config.initialisation] = None
        if scales[-1] is None and kind.scaled:
            notices.scale_unknown[name] = None
    return scales


_GLANCE = 64
"""Numbers of a tensor that are compared before all are: of what moves, some of the first ones do."""


def _repeats(tensors: Iterable[torch.Tensor], scale: torch.Tensor) -> torch.Tensor:
    """(n,) whether all numbers of a checkpoint, and its scale, are those of the one before; never so of the first."""
    same = scale[1:] == scale[:-1]
    for tensor in tensors:
        exact = tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor
        rows = exact.reshape(len(exact), math.prod(exact.shape[1:]))
        for part in (rows[:, :_GLANCE], rows):
            if same.any():
                same = same & (part[1:] == part[:-1]).all(dim=1)
    return torch.cat([torch.zeros(1, dtype=torch.bool), same])


def _exact(moments: Moments, repeated: torch.Tensor) -> Moments:
    """Where nothing has moved, no rounding of the products says that something has."""
    norm2, repeated = moments.norm2, repeated.to(moments.norm2.device)
    inner, before = (torch.where(repeated, norm2, old) for old in (moments.inner_previous, moments.previous_norm2))
    return replace(moments, inner_previous=inner, previous_norm2=before)


_NARROW = (torch.float16, torch.float8_e4m3fn, torch.float8_e5m2)
"""Types in which small numbers become 0."""


def _zero_shares(tensors: Iterable[torch.Tensor]) -> list[float | None]:
    """The share of zeros at every checkpoint among numbers in narrow types; empty if there are none."""
    narrow = [widened(tensor).flatten(1) for tensor in tensors if tensor.dtype in _NARROW and tensor[0].numel() > 1]
    if not narrow:
        return []
    zeros = torch.stack([(tensor == 0).sum(dim=1) for tensor in narrow]).double()
    sizes = torch.tensor([[tensor.shape[1]] for tensor in narrow]).expand_as(zeros)
    partly = zeros < sizes
    shares = (zeros * partly).sum(dim=0) / (sizes * partly).sum(dim=0)
    return [None if share != share else share for share in shares.tolist()]


def _stack(tensors: _Tensors) -> torch.Tensor:
    """Tensors on a new first axis; where types or sizes differ (`Unit.align`), in the widest, zeros at the ends."""
    if isinstance(tensors, torch.Tensor):
        return tensors
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
