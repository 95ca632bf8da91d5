"""mlx-lm: `0000100_adapters.safetensors`, `adapters.safetensors` (rewritten at every save) and adapter_config.json.

The configuration holds all arguments of the last start. There is no log: losses are only printed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import replace
from typing import Any

from lora_forensics.checkpoints.adapter_folder import CONFIG
from lora_forensics.checkpoints.assembly import Told, assemble
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, stat_checkpoint
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import same_content
from lora_forensics.values import as_count, as_number, read_object

_NUMBERED = re.compile(r"(\d{7,15})_adapters\.safetensors")
_FINAL = "adapters.safetensors"
_POINTS = 2000


class MlxLm:
    """Numbered adapters beside a configuration of mlx-lm's own."""

    name = "mlx-lm"
    about = "mlx-lm (Apple silicon), and what builds on it"
    recognised = "0000100_adapters.safetensors and adapters.safetensors with keys that end in .lora_a and .lora_b"
    traps: tuple[Trap, ...] = (
        Trap("factors are transposed: lora_a is [in, r], lora_b [r, out]; the scale is given, not alpha / rank"),
        Trap("adapters.safetensors is rewritten at every save: a copy of the last numbered file counts once"),
        Trap("numbers count batches: with grad_accumulation_steps several of them are one optimizer step"),
        Trap("numbers restart from 1 when training resumes, and adapter_config.json holds the last start's arguments"),
        Trap("files beyond `iters`, or between multiples of `save_every`, are of an earlier training: another run"),
        Trap("no losses are kept, so none is known"),
    )
    save_more_often = "set --save-every to fewer iterations; nothing is deleted"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run, and another of what an earlier training left."""
        numbers = {name: int(match[1]) for name in folder.files if (match := _NUMBERED.fullmatch(name))}
        if not any(self._is_mine(folder, name) for name in (*numbers, _FINAL) if name in folder.files):
            return
        settings = (read_object(folder.path / CONFIG) if CONFIG in folder.files else None) or {}
        found: list[tuple[int, Checkpoint]] = []
        skipped: list[Skipped] = []
        for name, number in sorted(numbers.items(), key=lambda item: item[1]):
            entry = _open(folder, name, number // _accumulation(settings), configured=_fits(number, settings))
            found.extend([(number, entry)] if isinstance(entry, Checkpoint) else [])
            skipped.extend([entry] if isinstance(entry, Skipped) else [])
        final = _open(folder, _FINAL, None) if _FINAL in folder.files else None
        skipped.extend([final] if isinstance(final, Skipped) else [])
        folder.files.pop(CONFIG, None)
        mine = [entry for number, entry in found if _fits(number, settings)]
        other = [entry for number, entry in found if not _fits(number, settings)]
        if isinstance(final, Checkpoint):
            mine.append(replace(final, step=_last_step(final, mine, numbers.values(), settings)))
        findings = [_EARLIER] if mine and other else []
        findings += [_RESUMED] if settings.get("resume_adapter_file") else []
        for checkpoints, known in ((mine, settings), (other, {})):
            if checkpoints:
                yield self._run(folder, checkpoints, known, findings, skipped)
                skipped = []

    @staticmethod
    def _is_mine(folder: Folder, name: str) -> bool:
        header = folder.header(name)
        if isinstance(header, CheckpointError):
            return bool(_NUMBERED.fullmatch(name))
        return any(key.endswith(".lora_a") for key in header.infos)

    def _run(
        self,
        folder: Folder,
        found: list[Checkpoint],
        settings: Mapping[str, Any],
        findings: list[Finding],
        skipped: list[Skipped],
    ) -> Run:
        model = settings.get("model")
        told = Told(
            rates=_rates(settings),
            batch_size=as_count(settings.get("batch_size")),
            base=BaseReference(name=model if isinstance(model, str) and model else None),
            findings=tuple(findings),
        )
        return assemble(self, folder.path, "", found, told, skipped)


_EARLIER = Finding(
    "several-trainings",
    "warning",
    "some numbered files do not fit iters and save_every of adapter_config.json: an earlier training wrote them",
    "they are listed as a run of their own; give each training its own --adapter-path",
)
_RESUMED = Finding(
    "resumed",
    "info",
    "training was resumed from a file (resume_adapter_file): steps count from there, not from the first start",
)


def _open(folder: Folder, name: str, step: int | None, configured: bool = True) -> Checkpoint | Skipped:
    path = folder.files.pop(name)
    config = folder.path / CONFIG if CONFIG in folder.files and configured else None
    try:
        return stat_checkpoint(path, name, step, config)
    except CheckpointError as error:
        return Skipped.because(path, error)


def _last_step(
    final: Checkpoint, saved: list[Checkpoint], numbers: Collection[int], settings: Mapping[str, Any]
) -> int | None:
    """Of the unnumbered file: the end of the training, unless it repeats an earlier save or the end has its number."""
    end = as_count(settings.get("iters"))
    if not end or end in numbers or any(same_content(final.path, other.path) for other in reversed(saved)):
        return None
    return end // _accumulation(settings)


def _accumulation(settings: Mapping[str, Any]) -> int:
    return as_count(settings.get("grad_accumulation_steps")) or 1


def _fits(number: int, settings: Mapping[str, Any]) -> bool:
    """Whether the training of these settings would have written a file of this number."""
    every, end = as_count(settings.get("save_every")), as_count(settings.get("iters"))
    return (not every or number % every == 0) and (not end or number <= end)


def _rates(settings: Mapping[str, Any]) -> Curve:
    """The rate of each optimizer step: constant, or by mlx's schedules; unknown for Adafactor, which sets its own."""
    end = (as_count(settings.get("iters")) or 0) // _accumulation(settings)
    if settings.get("optimizer") == "adafactor" or not 0 < end < 10**9:
        return Curve()
    planned = settings.get("lr_schedule")
    rate = as_number(settings.get("learning_rate"))
    at = _schedule(planned) if planned else (lambda _: rate)
    try:  # the n-th step is taken with the schedule's value at n - 1
        return (
            Curve.of((step, at(step - 1)) for step in {*range(1, end + 1, max(1, end // _POINTS)), end})
            if at
            else Curve()
        )
    except (TypeError, ValueError, ArithmeticError):
        return Curve()


def _schedule(planned: object) -> Callable[[int], object] | None:
    """A schedule of mlx.optimizers with its warm-up; None if it is not one that is known."""
    if not isinstance(planned, dict) or planned.get("name") not in _SCHEDULES:
        return None
    arguments = planned.get("arguments")
    if not isinstance(arguments, list) or any(as_number(value) is None for value in arguments):
        return None
    decay, warmup = _SCHEDULES[planned["name"]], as_count(planned.get("warmup")) or 0
    start = as_number(planned.get("warmup_init")) or 0.0

    def at(step: int) -> object:
        if step < warmup + 1 and warmup:
            return _linear(step, start, arguments[0], warmup)
        return decay(step - (warmup + 1 if warmup else 0), *arguments)

    return at


def _linear(step: int, first: float, last: float, steps: int) -> float:
    return first + (last - first) * min(step, steps) / steps


def _cosine(step: int, first: float, steps: int, last: float = 0.0) -> float:
    return last + (first - last) * (1 + math.cos(math.pi * min(step, steps) / steps)) / 2


_SCHEDULES: dict[object, Callable[..., float]] = {
    "linear_schedule": _linear,
    "cosine_decay": _cosine,
    "exponential_decay": lambda step, first, decay: first * decay**step,
    "step_decay": lambda step, first, decay, every: first * decay ** (step // every),
}
