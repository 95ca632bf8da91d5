"""The history that the Hugging Face Trainer keeps (`log_history`), and what it tells about checkpoints."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.assembly import Told, mean_of
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.logs.entries import Entry
from lora_forensics.values import as_count, as_number, parse_object

STATE = "trainer_state.json"
_EVALUATION = re.compile(r"eval_(?:.+_)?loss")
_FLAT = re.compile(r'\{[^{}]*"step":[^{}]*\}')
_TAIL, _LAST = 4096, 4
"""Bytes at the end of a trainer_state.json, and how many of the entries in them are looked at."""


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
        return mean_of([self.curve(name) for name in (["eval_loss"] if "eval_loss" in names else names)])

    def steps_per_epoch(self) -> float | None:
        """Optimizer steps; by the planned training where that fits, for batches that are left over are a step."""
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

    def told(self) -> Told:
        """What it tells about a run."""
        return Told(
            rates=self.curve("learning_rate"),
            train_loss=self.curve("loss"),
            held_out=self.held_out(),
            epochs=self.curve("epoch"),
            steps_per_epoch=self.steps_per_epoch(),
            batch_size=as_count((self.state or {}).get("train_batch_size")),
        )


def last_entries(state: Path) -> list[Entry]:
    """The last entries of a trainer_state.json, without reading all of it; none if there are none."""
    try:
        with state.open("rb") as file:
            file.seek(max(0, file.seek(0, 2) - _TAIL))
            text = file.read().decode("utf-8", "replace")
    except OSError:
        return []
    return [entry for found in _FLAT.findall(text)[-_LAST:] if (entry := parse_object(found)) is not None]


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
