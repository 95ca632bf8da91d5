"""The history that the Hugging Face Trainer keeps (`log_history`), and what it tells about checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import with_rates
from lora_forensics.checkpoints.logs.jsonl import Entry
from lora_forensics.records import Checkpoint, Finding, Skipped
from lora_forensics.values import as_count, as_number, parse_object

STATE = "trainer_state.json"
_EVALUATION = re.compile(r"eval_(?:.+_)?loss")
_FLAT = re.compile(r'\{[^{}]*"step":[^{}]*\}')
_TAIL = 4096
"""Bytes at the end of a trainer_state.json that hold its last entries."""


@dataclass(frozen=True, slots=True)
class History:
    """Logged entries in order, and the progress of the training when they were written."""

    entries: tuple[Entry, ...] = ()
    state: Mapping[str, Any] | None = None
    """The trainer_state.json that they stood in."""

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> History:
        """The history in a trainer_state.json."""
        log = state.get("log_history")
        entries = [entry for entry in log if isinstance(entry, dict)] if isinstance(log, list) else []
        return cls(tuple(entries), state)

    def curve(self, *keys: str) -> Curve:
        """The values of the first of these keys that was logged."""
        curves = (Curve.of((e.get("step"), e.get(key)) for e in self.entries if key in e) for key in keys)
        return next((curve for curve in curves if curve.steps), Curve())

    def held_out(self) -> Curve:
        """`eval_loss`; with several evaluation sets (`eval_<name>_loss`) their mean where all were evaluated."""
        names = sorted({key for entry in self.entries for key in entry if _EVALUATION.fullmatch(str(key))})
        curves = [self.curve(name) for name in (["eval_loss"] if "eval_loss" in names else names)]
        steps = set.intersection(*(set(curve.steps) for curve in curves)) if curves else set()
        return Curve.of((step, sum(curve.at(step) or 0.0 for curve in curves) / len(curves)) for step in steps)

    def steps_per_epoch(self) -> float | None:
        """Optimizer steps; whole where the planned training tells it, for batches that are left over count as a step."""
        state = self.state or {}
        step, epoch = as_count(state.get("global_step")), as_number(state.get("epoch"))
        if not step or not epoch:
            epochs = self.curve("epoch")
            step, epoch = (epochs.steps[-1], epochs.values[-1]) if epochs.steps else (None, None)
        if not step or not epoch or epoch < 1e-9:
            return None
        ratio = as_number(step / epoch)
        planned, of = as_count(state.get("max_steps")), as_count(state.get("num_train_epochs"))
        if ratio and planned and of and planned % of == 0 and planned / of - 1 < ratio <= planned / of * (1 + 1e-9):
            return planned / of
        return ratio

    def fill(self, checkpoints: Sequence[Checkpoint]) -> tuple[Checkpoint, ...]:
        """The checkpoints with what was logged at their steps."""
        epochs, losses, held_out = self.curve("epoch"), self.curve("loss"), self.held_out()
        per_epoch = self.steps_per_epoch()
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
        return with_rates(filled, self.curve("learning_rate"))

    def held_out_elsewhere(self, checkpoints: Sequence[Checkpoint], skipped: Iterable[Skipped]) -> list[Finding]:
        """A finding if the lowest held-out loss was logged at a step that was not saved."""
        held_out = self.held_out()
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


def last_entries(state: Path) -> list[Entry]:
    """The last entries of a trainer_state.json, without reading all of it; none if there are none."""
    try:
        with state.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [entry for found in _FLAT.finditer(text) if (entry := parse_object(found.group())) is not None]


def marks(entries: Iterable[Entry]) -> dict[tuple[int, str], float]:
    """What tells one training from another: its losses and gradients by step."""
    return {
        (step, key): number
        for entry in entries
        if (step := as_count(entry.get("step"))) is not None
        for key, value in entry.items()
        if key in {"loss", "grad_norm"} or _EVALUATION.fullmatch(key)
        if (number := as_number(value)) is not None
    }
