"""The mean of neighbouring checkpoints as an adapter of the run's own form, and how far it is from the exact mean."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lora_forensics import __version__
from lora_forensics.adapters import KINDS, AdapterLayout, Settings, read_layout, read_settings
from lora_forensics.average.choosing import Choice, choose
from lora_forensics.average.means import MEANS, NOT_LINEAR, Mean, Part, Rank, mean_of
from lora_forensics.average.saving import (
    AVERAGED,
    header_with_ranks,
    place_for,
    save,
    save_settings,
    settings_with_ranks,
)
from lora_forensics.base_model import BaseModel, find_base
from lora_forensics.errors import BaseModelError, CheckpointError, UsageError
from lora_forensics.moments import widened
from lora_forensics.pipeline import ScanOptions
from lora_forensics.records import SCHEMA, Checkpoint, Run, Unresolved
from lora_forensics.scan import find_run
from lora_forensics.store import load_measured, stored_name, stored_verdict
from lora_forensics.tensors import Tensors, open_tensors
from lora_forensics.values import read_object

DTYPES = ("float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True)
class AverageOptions:
    """What to average, and how to save it."""

    checkpoints: tuple[str, ...] = ()
    around: str | None = None
    window: int = 3
    """Checkpoints, the one in the middle included."""
    ema: float | None = None
    """Decay; None is the plain mean."""
    rank: Rank = None
    dtype: str | None = None
    output: Path | None = None
    """None is a name in OUT/<run>."""
    force: bool = False
    """Overwrite."""


@dataclass(frozen=True, slots=True)
class Average:
    """What was saved."""

    run: str
    path: Path
    choice: Choice
    modules: Mapping[str, Mean]
    kinds: tuple[str, ...]
    full_rank: int
    """Largest sum of ranks of a module: that of an exact mean; 0 without factors."""

    @property
    def relative_error(self) -> float:
        """|saved - mean| / |mean| over all modules; NaN if the mean is zero."""
        known = [mean for mean in self.modules.values() if mean.change] or list(self.modules.values())
        return _ratio(math.hypot(*(mean.error for mean in known)), math.hypot(*(mean.norm for mean in known)))

    def errors(self) -> dict[str, float]:
        """The same of each module."""
        return {name: _ratio(mean.error, mean.norm) for name, mean in self.modules.items()}

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "run": self.run,
            "path": self.path.as_posix(),
            **_told(self.choice),
            "why": self.choice.why,
            "relative_error": self.relative_error,
            "modules": {
                name: {"relative_error": error, "norm": self.modules[name].norm, "rank": self.modules[name].rank}
                for name, error in self.errors().items()
            },
        }


@dataclass(frozen=True, slots=True)
class _Source:
    """One opened checkpoint."""

    checkpoint: Checkpoint
    file: Tensors
    settings: Settings
    layout: AdapterLayout

    def scale(self, name: str, tensors: Mapping[str, torch.Tensor]) -> float | None:
        module = self.layout.modules[name]
        kind = KINDS[module.kind]
        values = {role: t.item() for role, t in tensors.items() if role in kind.scalars and t.numel() == 1}
        told = kind.scale(values, self.settings.of(name), name, module.layout.rank)
        return self.checkpoint.scale if told is None else told


def average_run(run: Path, scan: ScanOptions, options: AverageOptions) -> Average:
    """Average checkpoints of one run and save the result in its own form.

    `run` is named as for `pick_checkpoint`; of `scan` OUT, the trainer and the base are used.

    Raises:
        UsageError: no such run or checkpoint, or the place is taken.
        EvidenceError: nothing says which checkpoints to take.
        CheckpointError: there is no mean of these checkpoints in the run's own form; the message says why.
        BaseModelError: the mean needs the base model, which cannot be had.
        SeriesError: the place cannot be written.
    """
    found, root = find_run(run, scan)
    name = stored_name(scan.out, found)
    stored = load_measured(scan.out / name) if name else None
    choice = choose(
        found,
        stored_verdict(scan.out / name) if name else None,
        options.checkpoints,
        options.around,
        options.window,
        options.ema,
    )
    output = options.output or scan.out / (name or found.name) / _name(choice, options)
    path, config = place_for(choice.checkpoints, output)
    _check_place(found, scan.out, [path, *([config] if config else [])], options.force)
    before = tuple(Path(file) for file in stored.notes.base_files) if stored else ()
    weight = _Weights(found, root, scan.base, before)
    sources = _open(choice.checkpoints)
    saved, means = _means(sources, choice, options, weight)
    newest = sources[-1]
    kinds = tuple(sorted({module.kind for module in newest.layout.modules.values()}))
    full = max((sum(s.layout.modules[n].layout.rank or 0 for s in sources) for n in newest.layout.modules), default=0)
    average = Average(name or found.name, path, choice, means, kinds, full)
    _save(average, saved, newest, config)
    return average


def _means(
    sources: Sequence[_Source], choice: Choice, options: AverageOptions, weight: _Weights
) -> tuple[dict[str, torch.Tensor], dict[str, Mean]]:
    """All tensors to save, by their names in the file, and the mean of each module."""
    newest = sources[-1]
    dtype = getattr(torch, options.dtype) if options.dtype else None
    saved: dict[str, torch.Tensor] = {}
    means: dict[str, Mean] = {}
    for name, module in newest.layout.modules.items():
        own = [source.layout.modules[name] for source in sources]
        tensors = [
            {role: source.file.read(key) for role, key in module.keys.items()}
            for source, module in zip(sources, own, strict=True)
        ]
        for source, read in zip(sources, tensors, strict=True):
            _check_finite(source, read)
        scales = [source.scale(name, read) for source, read in zip(sources, tensors, strict=True)]
        config = newest.settings.of(name)
        below = partial(weight, name, newest)
        part = Part(module, tensors, scales, choice.weights, config, options.rank, dtype, below)
        try:
            means[name] = MEANS[module.kind](part)
        except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
            raise CheckpointError(f"{name}: its numbers are too large or too small to decompose") from error
        saved |= {module.keys[role]: tensor for role, tensor in means[name].tensors.items()}
    for key in newest.layout.foreign:
        found = [source.file.read(key) for source in sources]
        if all(torch.equal(tensor, found[-1]) for tensor in found):
            saved[key] = found[-1]
        elif key.endswith((".bias", ".weight")) and found[-1].is_floating_point():
            saved[key] = mean_of(found, choice.weights).to(dtype or found[-1].dtype)
        else:
            raise CheckpointError(f"{key} differs between the checkpoints, and no kind of adapter knows what it is")
    order = {key: place for place, key in enumerate(newest.file.infos)}
    return dict(sorted(saved.items(), key=lambda entry: order[entry[0]])), means


def _open(checkpoints: Sequence[Checkpoint]) -> list[_Source]:
    """The checkpoints, all of one form.

    Raises:
        CheckpointError: one is damaged, of a kind without a mean, or of another form than the last.
    """
    sources = []
    for checkpoint in checkpoints:
        file = open_tensors(checkpoint.path)
        settings = read_settings(checkpoint.config, file.metadata)
        sources.append(_Source(checkpoint, file, settings, read_layout(file.infos, settings)))
    newest = sources[-1]
    for name, unread in newest.layout.unread.items():
        raise CheckpointError(f"{newest.checkpoint.name}: {name} cannot be read: {unread.reason}")
    if not newest.layout.modules:
        raise CheckpointError(f"{newest.checkpoint.name}: no adapter in it")
    for name, module in newest.layout.modules.items():
        if module.kind not in MEANS:
            raise CheckpointError(f"{name} is {module.kind}: {NOT_LINEAR}", "keep the one checkpoint that `pick` names")
    for source in sources:
        if _form(source) != _form(newest):
            message = f"{source.checkpoint.name} and {newest.checkpoint.name} have other modules, kinds or shapes"
            raise CheckpointError(message, "name checkpoints of one training with --checkpoints")
    return sources


def _form(source: _Source) -> object:
    """What must be equal for checkpoints to have a mean; their ranks need not be."""
    modules = {n: (m.kind, m.layout.rows, m.layout.columns, sorted(m.keys)) for n, m in source.layout.modules.items()}
    linear = {
        key: source.file.infos[key].shape
        for module in source.layout.modules.values()
        if module.layout.rank is None
        for key in module.keys.values()
    }
    return modules, linear, {key: source.file.infos[key].shape for key in source.layout.foreign}


def _check_finite(source: _Source, tensors: Mapping[str, torch.Tensor]) -> None:
    for tensor in tensors.values():
        if not bool(torch.isfinite(widened(tensor)).all()):
            raise CheckpointError(f"{source.checkpoint.name} holds NaN or Inf", "leave it out with --checkpoints")


class _Weights:
    """The frozen weights, opened for the first kind that asks for one."""

    def __init__(self, run: Run, root: Path, given: Sequence[Path], before: Sequence[Path]) -> None:
        self._run, self._root = run, root
        self._given, self._before = tuple(given), before
        self._base: BaseModel | None = None

    def __call__(self, name: str, source: _Source) -> torch.Tensor:
        """Rows x columns, float64.

        Raises:
            BaseModelError: there is no base, or the module has no weight in it.
        """
        layout = source.layout.modules[name].layout
        base = self._base = self._base or self._open()
        ref = base.resolve({name: (layout.rows, layout.columns)}, source.file.metadata)[name]
        if isinstance(ref, Unresolved):
            raise BaseModelError(
                f"{base.path} has no weight for {name}: {ref.reason}", "give the right one with --base"
            )
        return widened(base.rows(ref, 0, base.shape(ref)[0])).double()

    def _open(self) -> BaseModel:
        try:
            return find_base(self._run.base, self._run.path, self._root, self._given)
        except BaseModelError as error:
            if not self._given and self._before and all(path.exists() for path in self._before):
                return find_base(self._run.base, self._run.path, self._root, self._before)
            raise BaseModelError(f"a mean of DoRA needs the base model: {error.message}", error.hint) from error


def _check_place(run: Run, out: Path, paths: Sequence[Path], force: bool) -> None:
    """Refuse to overwrite, and to put a file where the next scan would take it for a checkpoint.

    Raises:
        UsageError: either.
    """
    for path in paths:
        real = Path(os.path.realpath(path))
        if real.is_relative_to(os.path.realpath(run.path)) and not real.is_relative_to(os.path.realpath(out)):
            hint = "leave --output out, or name a place outside of the run's folder"
            raise UsageError(f"{path} lies in the run's folder, where it would count as a checkpoint", hint)
        if path.exists() and not force:
            raise UsageError(f"{path} is there already", "use --force to overwrite it, or --output for another place")


def _name(choice: Choice, options: AverageOptions) -> str:
    steps = [choice.checkpoints[place].step for place in (0, -1)]
    parts = ["average", *(str(step) for step in steps if step is not None)]
    if options.ema is not None:
        parts.append(f"ema{options.ema:g}")
    if options.rank is not None:
        parts.append(f"rank{options.rank}")
    return "-".join(parts)


def _save(average: Average, tensors: dict[str, torch.Tensor], newest: _Source, config: Path | None) -> None:
    means = average.modules
    ranked = {name: (mean.rank, mean.scale) for name, mean in means.items() if mean.rank and mean.scale is not None}
    scales = {name: (rank, scale) for name, (rank, scale) in ranked.items() if rank and scale is not None}
    changed = any(rank != newest.layout.modules[name].layout.rank for name, (rank, _) in scales.items())
    told = {"version": __version__, **_told(average.choice), "relative_error": average.relative_error}
    header = header_with_ranks(newest.file.metadata, scales) if changed else dict(newest.file.metadata)
    header.pop("modelspec.hash_sha256", None)  # of another file
    header.setdefault("format", "pt")
    if config is not None and newest.checkpoint.config is not None:
        values = read_object(newest.checkpoint.config) or {}
        save_settings(config, settings_with_ranks(values, scales) if changed else values)
    save(average.path, tensors, {**header, AVERAGED: json.dumps(told)})


def _told(choice: Choice) -> dict[str, Any]:
    pairs = zip(choice.checkpoints, choice.weights, strict=True)
    return {
        "method": choice.method,
        "checkpoints": [{"checkpoint": c.name, "step": c.step, "weight": weight} for c, weight in pairs],
    }


def _ratio(error: float, norm: float) -> float:
    return error / norm if norm else math.nan
