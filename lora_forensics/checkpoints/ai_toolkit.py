"""ostris ai-toolkit: `<name>_000000250.safetensors`, the final `<name>.safetensors`. Facts from ai-toolkit 27a03a9.

The step stands in the header (`training_info`) and in the name; rates and losses in loss_log.db, settings in
config.yaml beside the files.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_forensics.adapters import looks_like_adapter
from lora_forensics.checkpoints.assembly import Told, assemble
from lora_forensics.checkpoints.history import ADAPTIVE, Curve
from lora_forensics.checkpoints.interface import Folder, Trap, from_header, unit_scale
from lora_forensics.checkpoints.logs.settings import nested, read_yaml
from lora_forensics.checkpoints.logs.sqlite import sqlite_metrics
from lora_forensics.checkpoints.sessions import overwritten
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import SAFETENSORS, Header, same_content
from lora_forensics.values import as_count, as_number, parse_object

_NAME = re.compile(r"(?P<stem>.+?)(?:_(?P<step>\d{9,15}))?(?P<expert>_high_noise|_low_noise)?\.safetensors")
_FOREIGN = "ss_network_module"
"""kohya's: its final file may have a name that ends in many digits."""


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    header: Header
    stem: str
    step: int | None
    """By the file's name."""
    info: Mapping[str, Any]
    """`training_info`."""


class AiToolkit:
    """Nine-digit steps after an underscore."""

    name = "ai-toolkit"
    about = "ostris ai-toolkit"
    recognised = "name_000000250.safetensors, or training_info in the header"
    traps: tuple[Trap, ...] = (
        Trap("max_step_saves_to_keep (5 by default) deletes the earlier saves: said where the settings tell it"),
        Trap("a resumed run overwrites the unnumbered final file: its step is read from its header"),
        Trap("no alpha is saved, except for LoKr: it is always the rank, so the scale is 1"),
        Trap("gradient_accumulation_steps counts several steps for one of the optimizer: steps are divided by it"),
        Trap("with an embedding trained too the LoRA is called <name>_LoRA, and the embedding lies beside it"),
        Trap("two experts (Wan 2.2) are saved as _high_noise and _low_noise: two runs"),
        Trap("loss_log.db is in WAL mode: its newest rows lie in a second file, and reading must not create a third"),
        Trap("what is saved is the EMA where one is kept; the raw weights are not saved", verified=False),
    )
    save_more_often = "lower save.save_every, and raise save.max_step_saves_to_keep (5 by default), which deletes"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """The runs in `folder`: one for each stem."""
        files: dict[str, list[_File]] = {}
        damaged: list[tuple[str, Path, CheckpointError]] = []
        for name in [name for name in folder.files if name.endswith(SAFETENSORS)]:
            match, header = _NAME.fullmatch(name), folder.header(name)
            if match is None:
                continue
            stem = match["stem"] + (match["expert"] or "")
            step = int(match["step"]) if match["step"] else None
            if isinstance(header, CheckpointError):
                damaged.append((stem, folder.files[name], header))
                continue
            info = parse_object(header.metadata.get("training_info", "")) or {}
            numbered = step is not None and _FOREIGN not in header.metadata
            if looks_like_adapter(header.infos) and (info or numbered):
                files.setdefault(stem, []).append(_File(folder.files[name], header, stem, step, info))
        if not files:
            return
        settings = _settings(folder.path)
        for stem, group in files.items():
            lost = [(path, error) for of, path, error in damaged if of == stem]
            for path in [*(file.path for file in group), *(path for path, _ in lost)]:
                del folder.files[path.name]
            yield self._run(folder, stem, group, settings, [Skipped.because(*entry) for entry in lost])

    def _run(self, folder: Folder, stem: str, files: list[_File], settings: dict[str, Any], lost: list[Skipped]) -> Run:
        accumulated = as_count(nested(settings, "train", "gradient_accumulation_steps")) or 1
        found = [_checkpoint(file, accumulated) for file in sorted(files, key=lambda file: file.step is None)]
        other = _of_another(found, sum(file.step is not None for file in files))
        log = sqlite_metrics(folder.path / "loss_log.db")
        losses = [tag for tag in log.curves if tag.startswith("loss/")]
        meta = files[-1].header.metadata
        name = nested(settings, "model", "name_or_path")
        told = Told(
            rates=log.first("learning_rate").moved(per=accumulated),
            scheduled=_constant(settings),
            train_loss=log.first("loss/loss", *sorted(losses)).moved(per=accumulated),
            held_out=log.first("val/loss").moved(per=accumulated),
            batch_size=_batch(settings, accumulated),
            base=BaseReference(name=name if isinstance(name, str) else meta.get("ss_base_model")),
            findings=(*log.findings, *_pruned(files, settings)),
        )
        run = assemble(self, folder.path, stem, [entry for entry in found if entry not in other], told, lost)
        said = [overwritten(entry.name, "config.name") for entry in other]
        return replace(run, unplaced=(*run.unplaced, *other), findings=(*run.findings, *said))


def _of_another(found: list[Checkpoint], numbered: int) -> list[Checkpoint]:
    """The final file, where it was saved before the last numbered one and is no copy: that of a shorter rerun."""
    steps = {entry.step: entry for entry in found[:numbered]}
    return [
        final
        for final in found[numbered:]
        if final.step is not None
        and final.step < max((step or 0 for step in steps), default=0)
        and not (final.step in steps and same_content(final.path, steps[final.step].path))
    ]


def _checkpoint(file: _File, accumulated: int) -> Checkpoint:
    told = as_count(file.info.get("step"))
    step = file.step if file.step is not None else told
    epoch = as_number(file.info.get("epoch"))
    found = from_header(file.path, file.path.name, None if step is None else step // accumulated, file.header)
    return replace(found, epoch=epoch, scale=unit_scale(file.header))


def _settings(folder: Path) -> dict[str, Any]:
    """The settings of the first process in config.yaml."""
    found = nested(read_yaml(folder / "config.yaml"), "config", "process", 0)
    return found if isinstance(found, dict) else {}


def _constant(settings: dict[str, Any]) -> Curve:
    """The rate of the settings, where it does not change."""
    rate = as_number(nested(settings, "train", "lr"))
    optimizer = str(nested(settings, "train", "optimizer") or "")
    schedule = nested(settings, "train", "lr_scheduler") or "constant"
    return Curve.of([(0, rate)]) if schedule == "constant" and not ADAPTIVE.search(optimizer) else Curve()


def _batch(settings: dict[str, Any], accumulated: int) -> int | None:
    """Samples for one step of the optimizer."""
    size = as_count(nested(settings, "train", "batch_size"))
    inner = as_count(nested(settings, "train", "gradient_accumulation")) or 1
    return size * inner * accumulated if size else None


def _pruned(files: list[_File], settings: dict[str, Any]) -> list[Finding]:
    """A finding where as many saves are left as are kept, and the first is not there."""
    kept, every = (as_count(nested(settings, "save", key)) for key in ("max_step_saves_to_keep", "save_every"))
    steps = [file.step for file in files if file.step is not None]
    if not kept or not every or not steps or min(steps) <= every:
        return []
    message = f"saves before step {min(steps)} are gone: max_step_saves_to_keep is {kept}"
    return [Finding("pruned", "warning", message, "raise save.max_step_saves_to_keep: early checkpoints matter most")]
