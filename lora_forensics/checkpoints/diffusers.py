"""diffusers' example scripts: `checkpoint-<step>/pytorch_lora_weights.safetensors`. Facts from diffusers 58eb52c.

The final file lies in the run's folder; TensorBoard events and all arguments (hparams.yml) below `logs/`, where
accelerate's tracker puts them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.assembly import Told, assemble, with_final
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, entries, stat_checkpoint
from lora_forensics.checkpoints.logs import Log
from lora_forensics.checkpoints.logs.settings import base_of_card, read_yaml
from lora_forensics.checkpoints.logs.tensorboard import event_files, tensorboard_scalars
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count

WEIGHTS = "pytorch_lora_weights.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
_OTHER = "adapter_model.safetensors"
"""PEFT's, whose Trainer names its folders alike: with one in it a folder is left to be searched on."""
_OWN_RATE = re.compile(r"prodigy", re.IGNORECASE)


class Diffusers:
    """`checkpoint-<step>` folders with diffusers' name for a LoRA."""

    name = "diffusers"
    about = "the example scripts of diffusers, and what saves with its save_lora_weights"
    recognised = f"checkpoint-<step>/{WEIGHTS}, the final file beside the folders"
    traps: tuple[Trap, ...] = (
        Trap("the final file may spell its keys lora.down where the checkpoints have lora_A: equal tensors count once"),
        Trap("no step, epoch or rate in the file: steps by the folder, rates by the log below logs/"),
        Trap("the final file's step is the last of the arguments (hparams.yml) or of the log"),
        Trap("checkpoints beyond the steps of the newest arguments are of an earlier, longer training: another run"),
        Trap("alpha stands in the header (lora_adapter_metadata), per part of the model, not in tensors"),
        Trap("the logged rate of Prodigy lacks its factor d: unknown"),
        Trap("checkpoints hold optimizer.bin, scheduler.bin and random states: no adapters"),
    )
    save_more_often = "lower --checkpointing_steps, and leave out --checkpoints_total_limit, which deletes"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the checkpoint folders below `folder`, and the final file in it."""
        found: list[Checkpoint] = []
        lost: list[Skipped] = []
        for name, path in sorted(folder.folders.items()):
            match = _CHECKPOINT.fullmatch(name)
            if match and (entry := open_weights(path, name, int(match[1]))) is not None:
                if not (path / _OTHER).is_file():
                    del folder.folders[name]
                (found if isinstance(entry, Checkpoint) else lost).append(entry)  # type: ignore[arg-type] # by type
        final = final_file(folder)
        if isinstance(final, Skipped):
            lost.append(final)
        if not found and not isinstance(final, Checkpoint):
            yield from lost
            return
        tracked = read_tracked(folder.path)
        end = as_count(tracked.arguments.get("max_train_steps")) or math.inf
        earlier = [checkpoint for checkpoint in found if (checkpoint.step or 0) > end]
        found = [checkpoint for checkpoint in found if (checkpoint.step or 0) <= end]
        if isinstance(final, Checkpoint):
            found = with_final(found, final, last_step(tracked))
        findings = (_EARLIER,) if earlier else ()
        if found:
            told = _told(folder.path, tracked)
            told = replace(told, findings=(*told.findings, *findings))
            yield assemble(self, folder.path, "", found, told, lost)
        if earlier:
            yield assemble(self, folder.path, "", earlier, Told(findings=findings), () if found else lost)


_EARLIER = Finding(
    "several-trainings",
    "warning",
    "some checkpoints lie beyond the last step of the newest arguments (hparams.yml): an earlier training wrote them",
    "they are listed as a run of their own; give each training its own --output_dir",
)


@dataclass(frozen=True, slots=True)
class Tracked:
    """What accelerate's TensorBoard tracker left of a run."""

    log: Log = field(default_factory=Log)
    arguments: dict[str, Any] = field(default_factory=dict)


def open_weights(path: Path, name: str, step: int | None) -> Checkpoint | Skipped | None:
    """The LoRA in the folder of a checkpoint; None if there is none."""
    weights = path / WEIGHTS
    if not weights.is_file():
        return None
    try:
        return stat_checkpoint(weights, f"{name}/{WEIGHTS}", step)
    except CheckpointError as error:
        return Skipped.because(weights, error)


def final_file(folder: Folder) -> Checkpoint | Skipped | None:
    """The LoRA in the run's folder itself, taken out of it."""
    path = folder.files.pop(WEIGHTS, None)
    if path is None:
        return None
    try:
        return stat_checkpoint(path, WEIGHTS, None)
    except CheckpointError as error:
        return Skipped.because(path, error)


def read_tracked(folder: Path, logs: str = "logs") -> Tracked:
    """The newest log below `<folder>/logs`, in it or one level deeper, and the arguments beside it."""
    root = folder / logs
    places = [path for path in (root, *(root / name for name in sorted(entries(root)[1]))) if event_files(path)]
    if not places:
        return Tracked()
    newest = max(places, key=lambda path: event_files(path)[-1].name)
    settings = sorted(newest.glob("*/hparams.yml"))
    return Tracked(tensorboard_scalars(newest), read_yaml(settings[-1]) if settings else {})


def _told(folder: Path, tracked: Tracked) -> Told:
    log, arguments = tracked.log, tracked.arguments
    own = _OWN_RATE.search(str(arguments.get("optimizer") or ""))
    base = arguments.get("pretrained_model_name_or_path")
    revision = arguments.get("revision")
    return Told(
        rates=Curve() if own else log.first("lr", "learning_rate"),
        train_loss=log.first("loss", "step_loss", "train_loss"),
        batch_size=samples_a_step(arguments),
        base=BaseReference(
            name=base if isinstance(base, str) else base_of_card(folder),
            revision=revision if isinstance(revision, str) else None,
        ),
        findings=log.findings,
    )


def samples_a_step(arguments: dict[str, Any]) -> int | None:
    """Samples for one step of the optimizer, on one process."""
    batch = as_count(arguments.get("train_batch_size"))
    return batch * (as_count(arguments.get("gradient_accumulation_steps")) or 1) if batch else None


def last_step(tracked: Tracked) -> int | None:
    """Of a training that ran to its end, as the final file says; None if the log ends before: the file is older."""
    planned, curves = as_count(tracked.arguments.get("max_train_steps")), tracked.log.curves.values()
    if planned and curves and not any(curve.covers(planned) for curve in curves):
        return None
    return planned or max((curve.steps[-1] for curve in curves), default=None)
