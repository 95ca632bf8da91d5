"""DiffSynth-Studio: `step-500.safetensors` or `epoch-0.safetensors`. Facts from DiffSynth-Studio fed7b18.

Files have no metadata; training_args.json beside them holds the arguments, loss.csv and tensorboard_log/ the losses.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.adapters import looks_like_adapter
from lora_forensics.checkpoints.assembly import Told, as_epochs, assemble
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, from_header, unit_scale
from lora_forensics.checkpoints.logs.entries import csv_rows
from lora_forensics.checkpoints.logs.tensorboard import tensorboard_scalars
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count, as_number, read_object, spelt_number

_NAME = re.compile(r"(step|epoch)-(\d{1,15})\.safetensors")
_PATH = re.compile(r'"([^"]+)"')
_RAMP = 5
"""Steps at the start with a third of the rate: torch's ConstantLR as it is without arguments."""
_EPOCHS_ONLY = Finding(
    "epochs-only",
    "warning",
    "nothing tells the steps of these files: epochs are counted instead",
    "save with --save_steps",
)


class DiffSynth:
    """`step-<N>` and `epoch-<N>` without padding."""

    name = "diffsynth"
    about = "DiffSynth-Studio"
    recognised = "step-500.safetensors or epoch-0.safetensors with keys of a LoRA, no zeros before the number"
    traps: tuple[Trap, ...] = (
        Trap("epochs count from 0: epoch-0 is saved after the first"),
        Trap("steps count batches, not steps of the optimizer: divided by gradient_accumulation_steps"),
        Trap("no alpha is saved: it is the rank, so the scale is 1"),
        Trap("the rate of the first five steps is a third of --learning_rate"),
        Trap("keys hold the adapter's name (lora_A.default.weight), their prefix depends on an argument"),
        Trap(
            "a rerun into one folder leaves files of the older run, which are not told apart",
            verified=False,
        ),
    )
    save_more_often = "set --save_steps to a smaller number of batches"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the numbered files in `folder`."""
        found: list[tuple[str, Checkpoint]] = []
        lost: list[Skipped] = []
        for name in list(folder.files):
            match = _NAME.fullmatch(name)
            if match is None or (len(match[2]) > 1 and match[2][0] == "0"):
                continue
            header = folder.header(name)
            if isinstance(header, CheckpointError):
                lost.append(Skipped.because(folder.files[name], header))
            elif looks_like_adapter(header.infos):
                known = from_header(folder.files[name], name, int(match[2]), header)
                found.append((match[1], replace(known, scale=unit_scale(header))))
        if not found:
            return
        for path in [*(checkpoint.path for _, checkpoint in found), *(entry.path for entry in lost)]:
            del folder.files[path.name]
        yield self._run(folder, found, lost)

    def _run(self, folder: Folder, found: list[tuple[str, Checkpoint]], lost: list[Skipped]) -> Run:
        arguments = read_object(folder.path / "training_args.json") or {}
        accumulated = as_count(arguments.get("gradient_accumulation_steps")) or 1
        log = tensorboard_scalars(folder.path / "tensorboard_log")
        losses = log.first("loss") if log.curves else _losses(folder.path / "loss.csv")
        epochs = [(checkpoint.step or 0) + 1 for kind, checkpoint in found if kind == "epoch"]
        batches = _batches_per_epoch(arguments, losses, epochs)
        per_epoch = batches / accumulated if batches else None
        placed = []
        for kind, checkpoint in found:
            number = checkpoint.step or 0
            if kind == "step":
                placed.append(replace(checkpoint, step=number // accumulated))
            else:
                step = round((number + 1) * per_epoch) if per_epoch else None
                placed.append(replace(checkpoint, step=step, epoch=float(number + 1)))
        told = Told(
            scheduled=_rates(arguments),
            train_loss=losses.moved(per=accumulated),
            steps_per_epoch=per_epoch,
            batch_size=accumulated if arguments else None,  # its loader gives one sample at a time
            base=BaseReference(name=_base(arguments)),
            findings=log.findings,
        )
        if per_epoch is None and len(epochs) == len(found):
            counted = [replace(c, step=(c.step or 0) + 1) for _, c in found]
            told = replace(told, scheduled=Curve(), train_loss=Curve())
            return as_epochs(assemble(self, folder.path, "", counted, told, lost), _EPOCHS_ONLY)
        return assemble(self, folder.path, "", placed, told, lost)


def _batches_per_epoch(arguments: dict[str, Any], losses: Curve, epochs: list[int]) -> float | None:
    """Of a training that ran to its end, by the last batch whose loss was logged."""
    planned = as_count(arguments.get("num_epochs"))
    if not planned or not losses.steps or max(epochs, default=0) != planned or losses.steps[-1] % planned:
        return None
    return losses.steps[-1] / planned


def _rates(arguments: dict[str, Any]) -> Curve:
    rate = as_number(arguments.get("learning_rate"))
    if rate is None or arguments.get("customized_optimizer"):
        return Curve()
    return Curve.of([(1, rate / 3), (_RAMP, rate / 3), (_RAMP + 1, rate)])


def _losses(path: Path) -> Curve:
    rows = (row for row in csv_rows(path) if row.get("key") == "loss")
    return Curve.of((spelt_number(row.get("step")), spelt_number(row.get("value"))) for row in rows)


def _base(arguments: dict[str, Any]) -> str | None:
    """The first model that --model_id_with_origin_paths or --model_paths names."""
    repository, paths = arguments.get("model_id_with_origin_paths"), arguments.get("model_paths")
    if isinstance(repository, str) and repository:
        return repository.partition(",")[0].partition(":")[0]
    match = _PATH.search(paths) if isinstance(paths, str) else None
    return match[1] if match else None
