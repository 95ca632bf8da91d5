"""PEFT adapters saved by the Hugging Face Trainer; TRL, unsloth, axolotl and LLaMA-Factory write the same.

`<run>/checkpoint-<step>/adapter_model.safetensors` (older: `.bin`) with adapter_config.json and trainer_state.json;
the final adapter lies in `<run>` itself. Each trainer_state.json holds the history from the start: the newest is read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, place, stat_checkpoint, with_rates
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count, as_number, read_object

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIG = "adapter_config.json"
_EVALUATION = re.compile(r"eval_(?:.+_)?loss")
_STATE = "trainer_state.json"
_COMPANIONS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(pt|pth|bin)$")


class PeftTrainer:
    """`checkpoint-<step>` folders."""

    name = "peft"
    about = "PEFT adapters saved by the Hugging Face Trainer; TRL, unsloth, axolotl and LLaMA-Factory write the same"
    recognised = "checkpoint-<step>/adapter_model.safetensors (or .bin), and the final adapter in the run's folder"
    traps: tuple[Trap, ...] = (
        Trap("alpha is in adapter_config.json only: without it the scale is unknown, and norms assume 1"),
        Trap("each trainer_state.json holds the history from the start: the newest is read"),
        Trap("the final adapter has no step of its own unless trainer_state.json lies beside it"),
        Trap("with load_best_model_at_end the final adapter is that of an earlier step: its step is unknown"),
        Trap("gradient accumulation and processes are not recorded: the number of samples is unknown"),
        Trap("a folder with adapter_config.json and no weights is a save that was not finished"),
        Trap("logged numbers may be bare NaN tokens, which JSON does not know"),
        Trap("several adapters of one model lie in sub-folders named after them", verified=False),
    )
    save_more_often = (
        "set save_strategy='steps' and a smaller save_steps; leave save_total_limit unset, it deletes checkpoints"
    )

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the checkpoint folders below `folder` and the final adapter in it."""
        found: list[Checkpoint] = []
        skipped: list[Skipped] = []
        numbered = ((_CHECKPOINT.fullmatch(name), name) for name in folder.folders)
        saved = [(int(match[1]), name) for match, name in numbered if match]
        for step, name in sorted(saved):
            entry = _open(folder.folders[name], name, step)
            if entry is None:
                continue
            del folder.folders[name]
            (found if isinstance(entry, Checkpoint) else skipped).append(entry)  # type: ignore[arg-type] # by type
        final = self._final(folder)
        if isinstance(final, Skipped):
            skipped.append(final)
        if not found and not isinstance(final, Checkpoint):
            yield from skipped
            return
        yield self._run(folder, found, final if isinstance(final, Checkpoint) else None, skipped)

    @staticmethod
    def _final(folder: Folder) -> Checkpoint | Skipped | None:
        entry = _open(folder.path, "", None)
        if entry is not None:
            for name in [n for n in folder.files if n in (*_WEIGHTS, _CONFIG) or _COMPANIONS.match(n)]:
                del folder.files[name]
        return entry

    def _run(self, folder: Folder, found: list[Checkpoint], final: Checkpoint | None, skipped: list[Skipped]) -> Run:
        own = read_object(folder.path / _STATE) or {}
        state = max(_newest_state(found), own, key=lambda state: as_count(state.get("global_step")) or 0)
        if final is not None:
            found = [*found, replace(final, step=_own_step(own))]
        placed = place(found)
        epoch, step = as_number(state.get("epoch")), as_count(state.get("global_step"))
        per_epoch = as_number(step / epoch) if epoch and epoch > 1e-9 and step else None
        batch = as_count(state.get("train_batch_size"))
        return Run(
            name="",
            path=folder.path,
            trainer=self.name,
            checkpoints=_logged(placed.checkpoints, state, per_epoch),
            unplaced=placed.unplaced,
            steps_per_epoch=per_epoch,
            batch_size=batch,
            base=_base(found[0].config),
            findings=(*placed.findings, *_elsewhere(placed.checkpoints, skipped, state)),
            skipped=tuple(skipped),
            save_more_often=self.save_more_often,
        )


def _open(folder: Path, name: str, step: int | None) -> Checkpoint | Skipped | None:
    """The adapter in a folder; None if it holds none."""
    path = next((folder / weights for weights in _WEIGHTS if (folder / weights).is_file()), None)
    config = folder / _CONFIG
    if path is None:
        missing = f"has {_CONFIG} but no {_WEIGHTS[0]}: the save was not finished"
        return Skipped(folder, missing) if config.is_file() else None
    try:
        return stat_checkpoint(
            path, f"{name}/{path.name}" if name else path.name, step, config if config.is_file() else None
        )
    except CheckpointError as error:
        return Skipped.because(path, error)


def _newest_state(found: list[Checkpoint]) -> dict[str, Any]:
    """The newest readable trainer_state.json of the checkpoints."""
    states = (read_object(checkpoint.path.parent / _STATE) for checkpoint in reversed(found))
    return next((state for state in states if state), {})


def _own_step(state: dict[str, Any]) -> int | None:
    """The step of the final adapter: in the run's own trainer_state.json, unless the best was loaded at the end."""
    return None if state.get("best_model_checkpoint") is not None else as_count(state.get("global_step"))


def _logged(
    checkpoints: tuple[Checkpoint, ...], state: dict[str, Any], per_epoch: float | None
) -> tuple[Checkpoint, ...]:
    """The checkpoints with what the trainer logged at their steps."""
    log = _log(state)
    epochs, rates, losses = (
        Curve.of((entry.get("step"), entry.get(key)) for entry in log) for key in ("epoch", "learning_rate", "loss")
    )
    held_out = _held_out(state)
    filled = []
    for checkpoint in checkpoints:
        step = checkpoint.step or 0
        epoch = epochs.at(step)
        filled.append(
            replace(
                checkpoint,
                epoch=epoch if epoch is not None or not per_epoch else step / per_epoch,
                train_loss=losses.last(step),
                held_out_loss=held_out.at(step),
            )
        )
    return with_rates(filled, rates)


def _log(state: dict[str, Any]) -> list[dict[str, Any]]:
    log = state.get("log_history")
    return [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []


def _held_out(state: dict[str, Any]) -> Curve:
    """`eval_loss`; with several evaluation sets (`eval_<name>_loss`) their mean where all were evaluated."""
    log = _log(state)
    names = sorted({key for entry in log for key in entry if _EVALUATION.fullmatch(str(key))})
    names = ["eval_loss"] if "eval_loss" in names else names
    curves = [Curve.of((entry.get("step"), entry.get(name)) for entry in log) for name in names]
    steps = set.intersection(*(set(curve.steps) for curve in curves)) if curves else set()
    return Curve.of((step, sum(curve.at(step) or 0.0 for curve in curves) / len(curves)) for step in steps)


def _elsewhere(checkpoints: tuple[Checkpoint, ...], skipped: list[Skipped], state: dict[str, Any]) -> list[Finding]:
    """A finding if the lowest held-out loss was logged at a step that was not saved."""
    held_out = _held_out(state)
    saved = {checkpoint.step for checkpoint in checkpoints}
    if not held_out.steps:
        return []
    best = min(range(len(held_out.steps)), key=lambda index: held_out.values[index])
    step, loss = held_out.steps[best], held_out.values[best]
    if step in saved:
        return []
    if any(f"checkpoint-{step}" in entry.path.parts for entry in skipped):
        message = f"the lowest held-out loss, {loss:.4g}, was logged at step {step}, whose checkpoint cannot be read"
        return [Finding("held-out-elsewhere", "warning", message)]
    common = sum(other in saved for other in held_out.steps)
    message = f"the lowest held-out loss, {loss:.4g}, was logged at step {step}, which was not saved"
    message += f"; {common or 'none'} of {len(held_out.steps)} evaluations fall on saved checkpoints"
    return [Finding("held-out-elsewhere", "warning", message, "set eval_steps to save_steps")]


def _base(config: Path | None) -> BaseReference:
    """What adapter_config.json says about the base model."""
    document = (read_object(config) if config else None) or {}
    name, revision = document.get("base_model_name_or_path"), document.get("revision")
    return BaseReference(name=str(name) if name else None, revision=str(revision) if revision else None)
