"""Looking at one checkpoint: its text, its tensors, and one pass of the measuring half over its modules."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from lora_forensics.adapters import KINDS, AdapterLayout, AdapterModule, read_layout, read_settings
from lora_forensics.adapters.naming import without_prefix
from lora_forensics.base_model import BaseModel, check_hash, find_base
from lora_forensics.checkpoints import TRAINERS, Folder
from lora_forensics.errors import BaseModelError, CheckpointError, UsageError, WeightlessError
from lora_forensics.inspection.health import health
from lora_forensics.inspection.metadata import facts
from lora_forensics.inspection.values import BaseFacts, Contents, Inspection, ModuleFacts, TensorFacts
from lora_forensics.measure import resolve_device
from lora_forensics.metrics import METRICS
from lora_forensics.moments import widened
from lora_forensics.records import BaseReference, Checkpoint, Run
from lora_forensics.remote import listed, place
from lora_forensics.rules import Thresholds
from lora_forensics.tensors import TENSOR_FILES, Tensors, open_tensors
from lora_forensics.units import Unit, UnitResult, measure_unit
from lora_forensics.values import read_object

_CONFIG = "adapter_config.json"
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin", "pytorch_lora_weights.safetensors")
_MOVEMENT = ("rotation", "step_size")
"""Metrics that need a checkpoint before."""
_BLOCK = 1 << 24
"""Numbers whose statistics are taken at once."""
_SECTION = re.compile(r".*?(?:^|[._])\d+(?=[._]|$)")


def inspect_file(
    path: str | Path,
    base: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    *,
    download: bool = False,
    spectra: bool = False,
    thresholds: Thresholds | None = None,
) -> Inspection:
    """Everything that one checkpoint tells: its text, kinds, ranks, scales, norms, spectra, health.

    Args:
        path: the file, or the folder that an adapter was saved as. An adapter_config.json beside it is read.
        base: the frozen model's file or folder, or several; None looks where the file itself says.
        device: auto, cpu, cuda, cuda:N or mps.
        download: the base model may be fetched from the Hugging Face hub.
        spectra: all singular values, also of changes without a thin core.
        thresholds: bounds of findings; those of a scan if left out.

    Raises:
        UsageError: no such file, or a folder with none or several in it.
        CheckpointError: it is damaged, refused, or holds no adapter.
        BaseModelError: `base` was given and cannot be used.
    """
    device = resolve_device(device)
    checkpoint, run = dated(adapter_file(place(path)))
    file = open_tensors(checkpoint.path)
    named = [] if base is None else [base] if isinstance(base, str | Path) else base
    frozen, problem = _find_base(checkpoint, run, [listed(place(p)) for p in named], download)
    paths, fingerprint = (frozen.paths, frozen.fingerprint) if frozen else ((), "")
    result = measure_unit(Unit("", (checkpoint,), 0, paths, fingerprint, device, spectra=spectra, biases=True))
    try:
        read_layout(file.infos, read_settings(checkpoint.config, file.metadata))
    except WeightlessError as error:  # nothing to measure, and still much to tell
        result.skipped.clear()
        result.notices.unread[checkpoint.name] = error.message
        result.layouts[checkpoint.name] = AdapterLayout({}, {}, tuple(file.infos))
    if result.skipped:
        hint = "--keys lists the tensors of any file, --metadata its text"
        raise CheckpointError(f"{checkpoint.path}: {result.skipped[0].reason}", hint)
    tensors = tensor_facts(file)
    config = read_object(checkpoint.config) or {} if checkpoint.config else {}
    modules = _modules(result, checkpoint, file.metadata, frozen, {t.name: t for t in tensors})
    odd_base = check_hash(frozen, run.base) if frozen and run else None
    damage = health(modules, tensors, thresholds or Thresholds())
    stat = checkpoint.path.stat()
    return Inspection(
        path=checkpoint.path,
        size=stat.st_size,
        modified=stat.st_mtime,
        trainer=run.trainer if run else None,
        step=checkpoint.step,
        epoch=checkpoint.epoch,
        learning_rate=checkpoint.learning_rate,
        train_loss=checkpoint.train_loss,
        held_out_loss=checkpoint.held_out_loss,
        facts=facts(file.metadata, config),
        modules=modules,
        unread=dict(result.notices.unread),
        other_tensors=result.layouts[checkpoint.name].foreign,
        tensors=tensors,
        base=BaseFacts(frozen.path, tuple(map(str, frozen.paths))) if frozen else BaseFacts(problem=problem),
        findings=(*damage, *([odd_base] if odd_base else []), *result.notices.findings()),
        metadata=file.metadata,
        config=config,
    )


def read_contents(path: str | Path, tensors: bool, metadata: bool) -> Contents:
    """The tensors of any tensor file with their statistics, its metadata, or both; no adapter needs to be in it.

    Raises:
        UsageError: no such file, or a folder with none or several in it.
        CheckpointError: it is damaged or refused.
    """
    path = adapter_file(place(path))
    file = open_tensors(path)
    config = read_object(path.parent / _CONFIG) or {}
    return Contents(path, tensor_facts(file) if tensors else None, file.metadata if metadata else None, config)


def adapter_file(path: Path) -> Path:
    """The file itself, or the adapter in a folder.

    Raises:
        UsageError: it does not exist, or the folder does not hold exactly one.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UsageError(f"{path} does not exist", "give a checkpoint: a .safetensors file or an adapter's folder")
    for name in _WEIGHTS:
        if (path / name).is_file():
            return path / name
    files = sorted(file for file in path.iterdir() if file.suffix == TENSOR_FILES[0] and file.is_file())
    if len(files) == 1:
        return files[0]
    found = f"{len(files)} .safetensors files" if files else "no .safetensors file"
    raise UsageError(f"{path}: {found} in this folder, and no {_WEIGHTS[0]}", "name one file, or scan the folder")


def dated(path: Path) -> tuple[Checkpoint, Run | None]:
    """A checkpoint with what its trainer left in it and beside it; other checkpoints of the run are not opened."""
    parent = path.absolute().parent
    config = parent / _CONFIG if (parent / _CONFIG).is_file() else None
    try:
        for trainer in TRAINERS.values():
            for view in (Folder(parent.parent, {}, {parent.name: parent}), _alone(parent, path.name)):
                for run in trainer.find(view):
                    if not isinstance(run, Run):
                        continue
                    for checkpoint in (*run.checkpoints, *run.unplaced):
                        if checkpoint.path == parent / path.name:
                            return replace(checkpoint, path=path, name=path.name, config=config), run
    except OSError:
        pass  # a folder that may not be read tells nothing
    return Checkpoint(path, path.name, None, config=config), None


def _alone(parent: Path, name: str) -> Folder:
    """A folder as if this were its only tensor file."""
    folder = Folder.read(parent)
    kept = {other: path for other, path in folder.files.items() if other == name or path.suffix not in TENSOR_FILES}
    return Folder(parent, kept, {})


def tensor_facts(file: Tensors) -> tuple[TensorFacts, ...]:
    """Statistics of every tensor, in the file's order; one is in memory at a time."""
    return tuple(
        TensorFacts(name, info.dtype, info.shape, math.prod(info.shape), **_statistics(file.read(name)))
        for name, info in file.infos.items()
    )


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    """Fields of `TensorFacts`, in float64, by blocks."""
    flat = tensor.flatten()
    parts = []
    nonfinite = zeros = 0
    for start in range(0, len(flat), _BLOCK):
        numbers = widened(flat[start : start + _BLOCK]).double()
        known = numbers.isfinite()
        finite = numbers if bool(known.all()) else numbers[known]
        nonfinite += len(numbers) - len(finite)
        zeros += len(finite) - int(finite.count_nonzero())
        if len(finite):
            size = finite.abs()
            sums = [float(len(finite)), finite.sum().item(), size.sum().item(), (finite @ finite).item()]
            parts.append([*sums, *(end.item() for end in finite.aminmax()), size.min().item()])
    counted = {"zeros": zeros, "nonfinite": nonfinite}
    if not parts:
        return counted
    counts, totals, sizes, squares, lows, highs, least = zip(*parts, strict=True)
    count = sum(counts)
    return {
        **counted,
        "mean": sum(totals) / count,
        "minimum": min(lows),
        "maximum": max(highs),
        "mean_abs": sum(sizes) / count,
        "min_abs": min(least),
        "norm": math.sqrt(sum(squares)),
    }


def _find_base(
    checkpoint: Checkpoint, run: Run | None, given: Sequence[Path], download: bool
) -> tuple[BaseModel | None, str]:
    """The base model, or why there is none."""
    config = read_object(checkpoint.config) or {} if checkpoint.config else {}
    name = config.get("base_model_name_or_path")
    reference = run.base if run else BaseReference(name if isinstance(name, str) else None)
    folder = run.path if run else checkpoint.path.absolute().parent
    if not given and not reference.name:
        return None, "the file does not say which base model it was trained on; pass --base PATH"
    try:
        return find_base(reference, folder, None, given, download), ""
    except BaseModelError as error:
        if given:
            raise
        return None, f"{error.message}; {error.hint}"


def _modules(
    result: UnitResult,
    checkpoint: Checkpoint,
    metadata: Mapping[str, str],
    frozen: BaseModel | None,
    tensors: Mapping[str, TensorFacts],
) -> tuple[ModuleFacts, ...]:
    """One value a measured row."""
    layout = result.layouts[checkpoint.name]
    names = [metric.column.name for metric in METRICS if metric.column.name not in _MOVEMENT]
    configured = checkpoint.config is not None or "lora_adapter_metadata" in metadata
    modules = []
    for index, name in enumerate(result.rows["module"]):
        row = {column: values[index] for column, values in result.rows.items() if column not in _MOVEMENT}
        module, ref = layout.modules[name], result.refs.get(name)
        stored = [tensors[key] for key in module.keys.values()]
        weights = [tensor for tensor in stored if tensor.entries > 1] or stored
        entries = sum(tensor.entries for tensor in weights)
        unknown = "no base model" if frozen is None else "no weight for it was looked for"
        modules.append(
            ModuleFacts(
                module=name,
                component=row["component"],
                section=_section(name),
                block=row["block"],
                role=row["role"],
                adapter=row["adapter"],
                rank=row["rank"],
                scale=row["scale"],
                scale_from=_scale_from(module, row["scale"], configured),
                shape=(row["rows"], row["columns"]),
                tensors=tuple(module.keys.values()),
                entries=sum(tensor.entries for tensor in stored),
                average_magnitude=sum(t.norm for t in weights) / len(weights) if weights else math.nan,
                average_strength=sum(t.mean_abs * t.entries for t in weights) / entries if entries else math.nan,
                metrics={"bias_norm": result.bias_norms.get(name), **{column: row[column] for column in names}},
                parts=ref.parts if ref else None,
                transposed=ref.transposed if ref else None,
                reason=None if ref else result.notices.unresolved.get(name, unknown),
            )
        )
    return tuple(modules)


def _scale_from(module: AdapterModule, scale: float | None, configured: bool) -> str:
    kind = KINDS[module.kind]
    if not getattr(kind, "scaled", True):
        return "none"
    if scale is None:
        return "unknown"
    if kind.scalars & set(module.keys):
        return "tensor"
    return "configuration" if configured else "convention"


def _section(name: str) -> str:
    rest = without_prefix(name)
    found = _SECTION.match(rest)
    return found.group() if found else rest
