"""diffusers' example scripts: `checkpoint-<step>/pytorch_lora_weights.safetensors`. Facts from diffusers 58eb52c.

The final file lies in the run's folder; TensorBoard events and all arguments (hparams.yml) below `logs/`, where
accelerate's tracker puts them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.assembly import Told, assemble, with_final
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, stat_checkpoint
from lora_forensics.checkpoints.logs import Log
from lora_forensics.checkpoints.logs.settings import base_of_card, read_yaml
from lora_forensics.checkpoints.logs.tensorboard import event_files, tensorboard_scalars
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Run, Skipped
from lora_forensics.values import as_count

WEIGHTS = "pytorch_lora_weights.safetensors"
_CHECKPOINT = re.compile(r"checkpoint-(\d{1,15})")
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
        Trap("alpha stands in the header (lora_adapter_metadata), per part of the model, not in tensors"),
        Trap("the logged rate of Prodigy lacks its factor d: unknown"),
        Trap("checkpoints hold optimizer.bin, scheduler.bin and random states: no adapters"),
    )
    save_more_often = (
        "save more often by a lower --checkpointing_steps, and leave out --checkpoints_total_limit, which deletes"
    )

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the checkpoint folders below `folder`, and the final file in it."""
        found: list[Checkpoint] = []
        lost: list[Skipped] = []
        for name, path in sorted(folder.folders.items()):
            match = _CHECKPOINT.fullmatch(name)
            if match and (entry := open_weights(path, name, int(match[1]))) is not None:
                del folder.folders[name]
                (found if isinstance(entry, Checkpoint) else lost).append(entry)  # type: ignore[arg-type] # by type
        final = final_file(folder)
        if isinstance(final, Skipped):
            lost.append(final)
        if not found and not isinstance(final, Checkpoint):
            yield from lost
            return
        tracked = read_tracked(folder.path)
        if isinstance(final, Checkpoint):
            found = with_final(found, final, _last_step(tracked))
        yield assemble(self, folder.path, "", found, _told(folder.path, tracked), lost)


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
    places = [path for path in (root, *_folders(root)) if event_files(path)]
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


def _last_step(tracked: Tracked) -> int | None:
    """Of a training that ran to its end, as the final file says that it did."""
    planned = as_count(tracked.arguments.get("max_train_steps"))
    return planned or max((curve.steps[-1] for curve in tracked.log.curves.values()), default=None)


def _folders(path: Path) -> list[Path]:
    try:
        return sorted(entry for entry in path.iterdir() if entry.is_dir())
    except OSError:
        return []
