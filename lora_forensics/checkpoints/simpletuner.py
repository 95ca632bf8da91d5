"""SimpleTuner: `checkpoint-<step>/pytorch_lora_weights.safetensors` with training_state.json. Facts from bc8e6ab.

Metrics lie in training_metrics.jsonl and their configuration in training_metrics.json, if `report_to` includes them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

from lora_forensics.checkpoints.assembly import Told, assemble, mean_of, with_final
from lora_forensics.checkpoints.diffusers import (
    WEIGHTS,
    Tracked,
    final_file,
    last_step,
    open_weights,
    read_tracked,
    samples_a_step,
)
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, entries
from lora_forensics.checkpoints.logs import Log
from lora_forensics.checkpoints.logs.entries import read_entries
from lora_forensics.checkpoints.logs.settings import base_of_card
from lora_forensics.records import BaseReference, Checkpoint, Run, Skipped
from lora_forensics.values import read_object

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})(-rolling)?(-tmp)?")
_STATE = re.compile(r"training_state(-rank\d+)?\.json")
_GUARD, _MANIFEST = ".guard", "checkpoint_manifest.json"
_METRICS, _CONFIG = "training_metrics.jsonl", "training_metrics.json"
_EVALUATION = "loss/val/"
_EMA = re.compile(r"ema|\w+_ema")


@dataclass(frozen=True, slots=True)
class _Save:
    """One folder of a checkpoint."""

    path: Path
    name: str
    step: int
    rolling: bool
    unfinished: bool
    files: set[str]
    folders: set[str]


class SimpleTuner:
    """diffusers' layout with SimpleTuner's own state."""

    name = "simpletuner"
    about = "bghira SimpleTuner"
    recognised = f"checkpoint-<step>/{WEIGHTS} with training_state.json, .guard or checkpoint_manifest.json"
    traps: tuple[Trap, ...] = (
        Trap("checkpoint-<step>-tmp is being written, or was when the training died: skipped"),
        Trap("a checkpoint without .guard, where earlier ones have it, was not finished: skipped"),
        Trap("checkpoint-<step>-rolling is a checkpoint as any other, but is deleted by the next ones"),
        Trap("ema/ and <part>_ema/ in a checkpoint hold averaged weights: apart from the series"),
        Trap("the last line of training_metrics.jsonl may be cut off"),
        Trap("with Prodigy the logged learning_rate is d alone: prodigy_effective_lr, which is d times lr, counts"),
        Trap("steps repeated after a restart are logged twice: the later counts"),
        Trap("epochs count from 1 and are those that are going on: their length follows from where they change"),
    )
    save_more_often = "lower --checkpoint_step_interval, and raise --checkpoints_total_limit, which deletes"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the checkpoint folders below `folder`, and the final file in it."""
        saves = sorted(_saves(folder), key=lambda save: (save.step, save.rolling))
        marks = any(_STATE.fullmatch(name) or name in (_GUARD, _MANIFEST) for save in saves for name in save.files)
        if not (marks or (saves and folder.insisted) or _METRICS in folder.files):
            return
        found: list[Checkpoint] = []
        lost: list[Skipped] = []
        guarded = False
        for save in saves:
            entry = _skip(save, guarded) or open_weights(save.path, save.name, save.step)
            guarded = guarded or _GUARD in save.files
            if entry is None:
                continue
            del folder.folders[save.name]
            (found if isinstance(entry, Checkpoint) else lost).append(entry)  # type: ignore[arg-type] # by type
            averaged = [save.path / name for name in sorted(save.folders) if _EMA.fullmatch(name)]
            lost += [Skipped(path, "averaged weights (EMA) of a checkpoint", expected=True) for path in averaged]
        final = final_file(folder)
        lost += [Skipped(folder.folders.pop(n), "averaged weights (EMA)", expected=True) for n in _averaged(folder)]
        if isinstance(final, Skipped):
            lost.append(final)
        tracked = _metrics(folder.path)
        if isinstance(final, Checkpoint):
            found = with_final(found, final, last_step(tracked))
        if found:
            yield assemble(self, folder.path, "", found, _told(folder.path, tracked), lost)
        else:
            yield from lost


def _saves(folder: Folder) -> Iterator[_Save]:
    for name, path in folder.folders.items():
        if match := _CHECKPOINT.fullmatch(name):
            yield _Save(path, name, int(match[1]), match[2] is not None, match[3] is not None, *entries(path))


def _skip(save: _Save, guarded: bool) -> Skipped | None:
    """Why a save is not used; `guarded` says that an earlier one has the mark of a finished save."""
    if save.unfinished:
        return Skipped(save.path, "a temporary folder: the save was not finished", rule="unfinished-save")
    if _GUARD not in save.files and (guarded or _MANIFEST in save.files) and WEIGHTS in save.files:
        return Skipped(save.path, "has no .guard: the save was not finished", rule="unfinished-save")
    if WEIGHTS not in save.files and any(_STATE.fullmatch(name) for name in save.files):
        return Skipped(
            save.path, f"holds no {WEIGHTS}: the save was not finished, or is no LoRA", rule="unfinished-save"
        )
    return None


def _averaged(folder: Folder) -> list[str]:
    return [name for name, path in folder.folders.items() if _EMA.fullmatch(name) and WEIGHTS in entries(path)[0]]


def _metrics(folder: Path) -> Tracked:
    """Curves and configuration: SimpleTuner's own files, else a TensorBoard log."""
    points: dict[str, list[tuple[object, object]]] = {}
    records, findings = read_entries(folder / _METRICS) if (folder / _METRICS).is_file() else ([], ())
    for record in records:
        metrics = record.get("metrics")
        for key, value in metrics.items() if isinstance(metrics, dict) else ():
            points.setdefault(str(key), []).append((record.get("step"), value))
    log = Log({key: curve for key, values in points.items() if (curve := Curve.of(values)).steps}, findings)
    config = (read_object(folder / _CONFIG) or {}).get("config")
    tracked = Tracked(log) if log.curves else read_tracked(folder)
    return replace(tracked, arguments=config) if isinstance(config, dict) else tracked


def _told(folder: Path, tracked: Tracked) -> Told:
    log, config = tracked.log, tracked.arguments
    base = config.get("pretrained_model_name_or_path")
    own = "prodigy" in str(config.get("optimizer") or "").lower() or "prodigy_d" in log.curves
    return Told(
        rates=log.first("prodigy_effective_lr", *([] if own else ["learning_rate"])),
        train_loss=log.first("train_loss"),
        held_out=_held_out(log),
        steps_per_epoch=_steps_per_epoch(log.first("epoch")),
        batch_size=samples_a_step(config),
        base=BaseReference(name=base if isinstance(base, str) else base_of_card(folder)),
        findings=log.findings,
    )


def _steps_per_epoch(epochs: Curve) -> float | None:
    """By the steps at which the logged epoch, which counts from 1, changes; None where they do not agree."""
    changes = [
        (step, epoch)
        for (before, known), (step, epoch) in pairwise(zip(epochs.steps, epochs.values, strict=True))
        if epoch > known and step == before + 1
    ]
    whole = {(step - 1) / (epoch - 1) for step, epoch in changes if epoch > 1}
    return whole.pop() if len(whole) == 1 else None


def _held_out(log: Log) -> Curve:
    """Of all evaluation sets together, else the mean of theirs."""
    curves = [curve for tag, curve in log.curves.items() if tag.startswith(_EVALUATION)]
    return log.first(_EVALUATION + "pooled") if _EVALUATION + "pooled" in log.curves else mean_of(curves)
