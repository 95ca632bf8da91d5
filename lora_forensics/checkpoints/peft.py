"""PEFT adapters saved by the Hugging Face Trainer; TRL, unsloth, axolotl and LLaMA-Factory write the same.

`<run>/checkpoint-<step>/adapter_model.safetensors` (older: `.bin`) with adapter_config.json and trainer_state.json;
the final adapter lies in `<run>` itself. Each trainer_state.json holds the history from the start: the newest is read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.history import Curve, is_number
from lora_forensics.checkpoints.interface import Folder, place, stat_checkpoint, with_rates
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Run, Skipped

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_CONFIG = "adapter_config.json"
_STATE = "trainer_state.json"
_COMPANIONS = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state.*)\.(pt|pth|bin)$")


class PeftTrainer:
    """`checkpoint-<step>` folders."""

    name = "peft"
    save_more_often = (
        "set save_strategy='steps' and a smaller save_steps; leave save_total_limit unset, it deletes checkpoints"
    )

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the checkpoint folders below `folder` and the final adapter in it."""
        found: list[Checkpoint] = []
        skipped: list[Skipped] = []
        saved = [(int(m.group(1)), n) for n in folder.folders if (m := _CHECKPOINT.fullmatch(n))]
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
        state = _newest_state([c.path.parent for c in reversed(found)] + [folder.path])
        if final is not None:
            found = [*found, replace(final, step=_own_step(folder.path))]
        placed = place(found)
        epoch, step = state.get("epoch"), state.get("global_step")
        per_epoch = step / epoch if is_number(epoch) and is_number(step) and epoch else None
        batch = state.get("train_batch_size")
        batch = int(batch) if is_number(batch) else None
        return Run(
            name="",
            path=folder.path,
            trainer=self.name,
            checkpoints=_logged(placed.checkpoints, state, per_epoch),
            unplaced=placed.unplaced,
            steps_per_epoch=per_epoch,
            train_samples=round(per_epoch * batch) if per_epoch and batch else None,
            batch_size=batch,
            base=_base(found[0].config),
            findings=placed.findings,
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


def _newest_state(folders: list[Path]) -> dict[str, Any]:
    """The newest readable trainer_state.json; Python writes bare NaN tokens, which its reader takes."""
    for folder in folders:
        try:
            state = json.loads((folder / _STATE).read_text("utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(state, dict):
            return state
    return {}


def _own_step(folder: Path) -> int | None:
    """The step of the final adapter: in the run's own trainer_state.json, unless the best was loaded at the end."""
    state = _newest_state([folder])
    step = state.get("global_step")
    loaded_best = state.get("best_model_checkpoint") is not None
    return int(step) if is_number(step) and not loaded_best else None


def _logged(
    checkpoints: tuple[Checkpoint, ...], state: dict[str, Any], per_epoch: float | None
) -> tuple[Checkpoint, ...]:
    """The checkpoints with what the trainer logged at their steps."""
    log = state.get("log_history")
    log = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
    epochs, rates, losses, held_out = (
        Curve.of((entry.get("step"), entry.get(key)) for entry in log)
        for key in ("epoch", "learning_rate", "loss", "eval_loss")
    )
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


def _base(config: Path | None) -> BaseReference:
    """What adapter_config.json says about the base model."""
    try:
        document = json.loads(config.read_text("utf-8")) if config else {}
    except (OSError, ValueError):
        document = {}
    name, revision = document.get("base_model_name_or_path"), document.get("revision")
    return BaseReference(name=str(name) if name else None, revision=str(revision) if revision else None)
