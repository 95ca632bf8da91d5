"""PEFT adapters saved by the Hugging Face Trainer; TRL, unsloth and axolotl write the same.

`<run>/checkpoint-<step>/adapter_model.safetensors` (older: `.bin`) with adapter_config.json and trainer_state.json; the
final adapter lies in `<run>` itself, adapters other than `default` in sub-folders named after them. Each
trainer_state.json holds the history from the start: the newest is read, and what contradicts it is another training's.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.adapter_folder import (
    CONFIG,
    WEIGHTS,
    open_adapter,
    recorded_base,
    without_adapter,
)
from lora_forensics.checkpoints.assembly import assemble
from lora_forensics.checkpoints.interface import Folder, Trap, entries
from lora_forensics.checkpoints.logs import unreadable
from lora_forensics.checkpoints.logs.tensorboard import event_files, tensorboard_scalars
from lora_forensics.checkpoints.trainer_history import STATE, History, last_entries, marks
from lora_forensics.records import Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count, read_object

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_UNFINISHED = re.compile(r"tmp-checkpoint-\d{1,15}")
_COMPANIONS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(pt|pth|bin)$")
_TAGS = {"train/loss": "loss", "train/learning_rate": "learning_rate", "train/epoch": "epoch"}
_DEFAULT = ""
"""PEFT's adapter `default`, which has no folder of its own."""


@dataclass(slots=True)
class Save:
    """One time at which the trainer saved: a checkpoint folder, or the run's own folder at the end."""

    folder: Path
    name: str
    step: int | None
    adapters: dict[str, Checkpoint] = field(default_factory=dict)
    marks: dict[tuple[int, str], float] = field(default_factory=dict)
    """Of its history's last entries."""


class PeftTrainer:
    """`checkpoint-<step>` folders."""

    name = "peft"
    about = "PEFT adapters saved by the Hugging Face Trainer; TRL, unsloth and axolotl write the same"
    recognised = "checkpoint-<step>/adapter_model.safetensors (or .bin), and the final adapter in the run's folder"
    traps: tuple[Trap, ...] = (
        Trap("alpha is in adapter_config.json only: without it the scale is unknown, and norms assume 1"),
        Trap("each trainer_state.json holds the history from the start: the newest is read"),
        Trap("a rerun into the same folder leaves longer trainings' checkpoints: histories that differ are two runs"),
        Trap("steps are optimizer steps; with gradient accumulation train_batch_size is that of one micro-batch"),
        Trap("the final adapter has no step of its own unless trainer_state.json lies beside it"),
        Trap("with load_best_model_at_end the final adapter is that of an earlier step: its step is unknown"),
        Trap("a folder with adapter_config.json and no weights is a save that was not finished"),
        Trap("axolotl writes adapter_config.json into the run's folder when training starts: no unfinished save"),
        Trap("tmp-checkpoint-<step> is an interrupted save of transformers 4.36 to 4.39", verified=False),
        Trap("under DeepSpeed ZeRO-3 an adapter may be saved with empty tensors, under FSDP as shards: skipped"),
        Trap("logged numbers may be bare NaN tokens, which JSON does not know"),
        Trap("several adapters of one model lie in sub-folders named after them: each is a run (DPO's `ref`)"),
    )
    save_more_often = (
        "set save_strategy='steps' and a smaller save_steps; leave save_total_limit unset, it deletes checkpoints"
    )

    def claims(self, folder: Folder) -> bool:
        """Whether a folder with this layout is of this trainer; here any is."""
        return bool(folder.folders or folder.files)

    def log(self, folder: Path) -> tuple[History, tuple[Finding, ...]]:
        """What was logged beside the checkpoints, for when no trainer_state.json tells: TensorBoard in `runs/`."""
        return tensorboard_history(sorted((folder / "runs").rglob("*")) if (folder / "runs").is_dir() else [])

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """A run for each training and each adapter: the checkpoint folders below `folder` and the final save in it."""
        if not self.claims(folder):
            return
        saves, skipped = _checkpoints(folder)
        final = _final(folder, {adapter for save in saves for adapter in save.adapters}, skipped, bool(saves))
        if final is not None:
            saves.append(final)
        if not saves:
            yield from skipped
            return
        trainings, lost = _trainings(saves)
        skipped += lost
        findings = [_RERUN] if len(trainings) > 1 else []
        for training in trainings:
            history, logs = self._history(folder.path, training, alone=len(trainings) == 1)
            for adapter in sorted({adapter for save in training for adapter in save.adapters}):
                yield self.run(folder.path, adapter, training, history, [*findings, *logs], skipped)
                skipped = []

    def _history(self, folder: Path, training: list[Save], alone: bool) -> tuple[History, tuple[Finding, ...]]:
        """The newest readable trainer_state.json; where there is none, what else was logged, if it is of this one."""
        newest: dict[str, Any] = {}
        damaged: list[Finding] = []
        for save in reversed([save for save in training if save.name]):
            newest = read_object(save.folder / STATE) or {}
            if newest:
                break
            if (save.folder / STATE).is_file():
                damaged = [unreadable(str(save.folder / STATE), "is no JSON object; another one is read")]
        own = next((read_object(save.folder / STATE) for save in training if not save.name), None) or {}
        best = max(newest, own, key=_progress)
        history = History.of(best)
        if history.entries or not alone:
            return history, tuple(damaged)
        logged, findings = self.log(folder)
        return replace(logged, state=best or logged.state), (*damaged, *findings)

    def run(
        self,
        folder: Path,
        adapter: str,
        training: list[Save],
        history: History,
        findings: Sequence[Finding],
        skipped: list[Skipped],
    ) -> Run:
        """The run of one adapter in one training."""
        found = [save.adapters[adapter] for save in training if adapter in save.adapters]
        told = replace(history.told(), base=recorded_base(found[0].config), findings=tuple(findings))
        return assemble(self, folder, adapter, found, told, skipped)


_RERUN = Finding(
    "several-trainings",
    "warning",
    "checkpoints of several trainings lie in one folder: their logged histories contradict each other",
    "they are listed as runs of their own; give each training its own output folder",
)


def tensorboard_history(found: Sequence[Path]) -> tuple[History, tuple[Finding, ...]]:
    """The scalars of event files that the Trainer wrote into some of these folders, under its names in log_history."""
    logged: dict[int, dict[str, Any]] = {}
    findings: list[Finding] = []
    for folder in found:
        if not folder.is_dir() or not event_files(folder):
            continue
        log = tensorboard_scalars(folder)
        findings.extend(log.findings)
        for tag, curve in log.curves.items():
            key = _TAGS.get(tag) or (tag.replace("eval/", "eval_", 1) if tag.startswith("eval/") else None)
            for step, value in zip(curve.steps, curve.values, strict=True) if key else ():
                logged.setdefault(step, {"step": step})[str(key)] = value
    return History(tuple(logged[step] for step in sorted(logged))), tuple(findings[:1])


def _checkpoints(folder: Folder) -> tuple[list[Save], list[Skipped]]:
    """The checkpoint folders that hold adapters, by step, and those that should; both are taken out of `folder`."""
    saves: list[Save] = []
    skipped: list[Skipped] = []
    bare: list[tuple[str, Skipped]] = []
    numbered = ((_CHECKPOINT.fullmatch(name), name) for name in folder.folders)
    for step, name in sorted((int(match[1]), name) for match, name in numbered if match):
        save = Save(folder.folders[name], name, step)
        files, folders = entries(save.folder)
        problems = _take(save, files, folders)
        if save.adapters:
            saves.append(save)
        elif not problems:
            if not any(file.endswith(".safetensors") for file in files):  # else a model that was trained as a whole
                bare.append((name, Skipped(save.folder, without_adapter(folders), rule="unfinished-save")))
            continue
        skipped += problems
        del folder.folders[name]
    for name, problem in bare if saves else ():
        skipped.append(problem)
        del folder.folders[name]
    for name in [n for n in folder.folders if saves and _UNFINISHED.fullmatch(n)]:
        skipped.append(Skipped(folder.folders.pop(name), "a save that was interrupted", rule="unfinished-save"))
    return saves, skipped


def _take(save: Save, files: set[str], folders: set[str]) -> list[Skipped]:
    """Fill in the adapters of a save; what is wrong with the others is returned."""
    problems = []
    for adapter in (_DEFAULT, *sorted(folders)):
        inside = entries(save.folder / adapter)[0] if adapter else files
        label = "/".join(filter(None, (save.name, adapter)))
        entry = open_adapter(save.folder / adapter, inside, label, save.step)
        if isinstance(entry, Checkpoint):
            save.adapters[adapter] = entry
        elif entry is not None:
            problems.append(entry)
    if save.adapters and STATE in files:
        save.marks = marks(last_entries(save.folder / STATE))
    return problems


def _final(folder: Folder, adapters: set[str], skipped: list[Skipped], trained: bool) -> Save | None:
    """The save in the run's own folder, taken out of `folder`; of adapters in sub-folders those that are known."""
    own = read_object(folder.path / STATE) if STATE in folder.files else None
    save = Save(folder.path, "", _own_step(own or {}))
    problems = _take(save, set(folder.files), adapters & set(folder.folders))
    for name in [n for n in folder.files if n in (*WEIGHTS, CONFIG) or _COMPANIONS.match(n)]:
        if save.adapters or problems:
            del folder.files[name]
    for adapter in adapters & set(folder.folders) & set(save.adapters):
        del folder.folders[adapter]
    skipped += [p for p in problems if not (trained and p.path == folder.path)]
    return save if save.adapters else None


def _trainings(saves: list[Save]) -> tuple[list[list[Save]], list[Skipped]]:
    """Saves whose histories agree, those of the newest training first; what has none joins the only one there is."""
    left = [save for save in saves if save.marks]
    mute = [save for save in saves if not save.marks]
    trainings: list[list[Save]] = []
    while left:
        newest = max(left, key=lambda save: save.step or _progress(read_object(save.folder / STATE) or {}))
        known = marks(History.of(read_object(newest.folder / STATE) or {}).entries) | newest.marks
        same: list[Save] = []
        other: list[Save] = []
        for save in left:
            agrees = all(known.get(mark, value) == value for mark, value in save.marks.items())
            (same if agrees else other).append(save)
        trainings.append(same)
        left = other
    if len(trainings) < 2:
        return [saves], []
    trainings.sort(key=lambda training: -max(_modified(save) for save in training))
    trainings[0] += [save for save in mute if not save.name]  # the final save without a history is the newest's
    reason = "several trainings wrote into this folder and it has no history: unknown of which it is"
    return trainings, [Skipped(save.folder, reason, rule="unplaced-adapter") for save in mute if save.name]


def _modified(save: Save) -> float:
    return max(checkpoint.modified for checkpoint in save.adapters.values())


def _progress(state: Mapping[str, Any]) -> int:
    return as_count(state.get("global_step")) or 0


def _own_step(state: Mapping[str, Any]) -> int | None:
    """The step of the final adapter: in the run's own trainer_state.json, unless the best was loaded at the end."""
    step = as_count(state.get("global_step"))
    best = state.get("best_model_checkpoint")
    return step if best is None or state.get("best_global_step", -1) == step else None
