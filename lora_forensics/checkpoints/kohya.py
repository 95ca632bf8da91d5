"""kohya sd-scripts: `name-000001.safetensors` (epoch), `name-step00000020.safetensors`, `name.safetensors` (last).

Step and session stand in the header's `ss_*` metadata. Traps: step files store the epochs finished so far, epoch files
count from 1; `--no_metadata` leaves only the file's name; one folder often holds several runs.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from lora_forensics.checkpoints.history import Curve, schedule
from lora_forensics.checkpoints.interface import Folder, Trap, from_header, place, with_rates
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import SAFETENSORS, Header
from lora_forensics.values import as_count, as_number

_STEP = re.compile(r"(?P<stem>.*?)(?:-|^at-)step(?P<step>\d{8,15})")
_EPOCH = re.compile(r"(?P<stem>.*?)(?:-|^epoch-)(?P<epoch>\d{6,15})")
_PREFIXES = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_", "oft_unet_")
_STATE = re.compile(r".*-state")
_ADAPTIVE = re.compile(r"prodigy|dadapt|adafactor|schedulefree", re.IGNORECASE)
"""Optimizers whose real rate is not the one that was asked for."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file and what its name and header tell."""

    path: Path
    header: Header
    stem: str
    kind: str
    """step, epoch or last."""
    step: int | None
    epoch: int | None
    """Epochs by the file's name."""

    @property
    def meta(self) -> Mapping[str, str]:
        return self.header.metadata


class Kohya:
    """Numbered files with kohya key names."""

    name = "kohya"
    about = "kohya sd-scripts, and what writes its key names with numbered files"
    recognised = (
        "name-000001.safetensors (epoch), name-step00000020.safetensors, name.safetensors (last),"
        " with keys that start with lora_unet_, lora_te, lora_transformer_, lycoris_ or oft_unet_"
    )
    traps: tuple[Trap, ...] = (
        Trap("ss_epoch counts finished epochs in step files and from 1 in epoch files: epochs follow from the step"),
        Trap("--no_metadata leaves the file's name alone: epoch files without metadata are counted in epochs"),
        Trap("a rerun under one name writes into the same folder: runs are told apart by ss_session_id"),
        Trap("the last file has no number, and mostly equals a numbered one: equal tensors count once"),
        Trap("an output name that ends in digits, such as a date, is no epoch"),
        Trap("optimizers that set their own rate (Prodigy, D-Adaptation, ...) do not have the recorded one"),
        Trap("a missing alpha means a scale of 1; an alpha of 0 means the rank"),
        Trap("<name>-state folders are training states, not checkpoints"),
    )
    save_more_often = (
        "set --save_every_n_steps (or --save_every_n_epochs 1), and leave out --save_last_n_steps/_epochs, which delete"
    )

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """The runs in `folder`: one for each stem and session."""
        files, damaged = _read(folder)
        groups = _sessions(files)
        for name in [n for n in folder.folders if groups and _STATE.fullmatch(n)]:
            yield Skipped(folder.folders.pop(name), "training state", expected=True)
        for group in groups:
            lost = tuple(s for stem, s in damaged if stem == group[0].stem)
            damaged = [(stem, s) for stem, s in damaged if stem != group[0].stem]
            yield self._run(folder.path, group, lost)
        yield from (skipped for _, skipped in damaged)

    def _run(self, folder: Path, files: list[_File], skipped: tuple[Skipped, ...]) -> Run:
        last = max(files, key=lambda file: (_int(file.meta, "ss_steps") or 0, len(file.meta)))
        by_epochs = all(file.step is None for file in files) and any(file.epoch for file in files)
        # where an epoch ends on a step that was saved, two numbered files and the last one can be of one step
        files = sorted(files, key=lambda file: ("step", "epoch", "last").index(file.kind))
        found = [
            from_header(file.path, file.path.name, file.epoch if by_epochs else file.step, file.header)
            for file in files
        ]
        placed = place(found)
        per_epoch = 1.0 if by_epochs else _steps_per_epoch(files)
        named = {file.path: file.epoch for file in files}
        rates = Curve() if by_epochs else _rates(last.meta)
        dated = [replace(c, epoch=_epoch(c, per_epoch, named[c.path])) for c in placed.checkpoints]
        return Run(
            name=last.stem,
            path=folder,
            trainer=self.name,
            checkpoints=with_rates(dated, rates),
            unplaced=placed.unplaced,
            step_unit="epoch" if by_epochs else "step",
            steps_per_epoch=per_epoch,
            train_samples=_int(last.meta, "ss_num_train_images"),
            batch_size=_int(last.meta, "ss_total_batch_size") or _int(last.meta, "ss_batch_size_per_device"),
            base=_base(last.meta),
            findings=(*placed.findings, *([_EPOCHS_ONLY] if by_epochs else [])),
            skipped=skipped,
            save_more_often=self.save_more_often,
        )


_EPOCHS_ONLY = Finding(
    "epochs-only",
    "warning",
    "the files hold no metadata: their steps are unknown, so all steps below count epochs",
    "train without --no_metadata",
)


def _read(folder: Folder) -> tuple[list[_File], list[tuple[str, Skipped]]]:
    """Files of kohya in a folder, taken out of it, and damaged files that are named like them, with their stems."""
    files, damaged = [], []
    names = [name for name in folder.files if name.endswith(SAFETENSORS)]
    numbered = {stem for name in names if (stem := _parse_name(Path(name).stem)[0]) != Path(name).stem}
    for name in names:
        header, path = folder.header(name), folder.files[name]
        stem, kind, number = _parse_name(path.stem)
        named = header.metadata.get("ss_output_name") if not isinstance(header, CheckpointError) else None
        if (
            path.stem in numbered or path.stem == named
        ):  # an output name that ends in digits, like -20240101, is no epoch
            stem, kind, number = path.stem, "last", None
        if isinstance(header, CheckpointError):
            if kind == "last" and path.stem not in numbered:
                continue
            damaged.append((stem, Skipped.because(path, header)))
        elif any(key.startswith(_PREFIXES) for key in header.infos):
            known = _int(header.metadata, "ss_steps")
            step = number if kind == "step" else None
            epoch = number if kind == "epoch" else None
            files.append(_File(path, header, stem, kind, step if known is None else known, epoch))
        else:
            continue
        del folder.files[name]
    return files, damaged


def _parse_name(name: str) -> tuple[str, str, int | None]:
    """Stem, kind and number of a file's name; kohya's unnamed default for the final file is `last`."""
    if found := _STEP.fullmatch(name):
        return found.group("stem"), "step", int(found.group("step"))
    if found := _EPOCH.fullmatch(name):
        return found.group("stem"), "epoch", int(found.group("epoch"))
    return ("" if name == "last" else name), "last", None


def _sessions(files: list[_File]) -> list[list[_File]]:
    """Files of one stem and session; those without a session join the only one of their stem."""
    stems: dict[str, dict[str, list[_File]]] = {}
    for file in files:
        stems.setdefault(file.stem, {}).setdefault(file.meta.get("ss_session_id", ""), []).append(file)
    groups = []
    for sessions in stems.values():
        if len(sessions) == 2 and "" in sessions:
            nameless = sessions.pop("")
            next(iter(sessions.values())).extend(nameless)
        started = sorted(sessions.values(), key=lambda group: _float(group[0].meta, "ss_training_started_at") or 0.0)
        groups.extend(started)
    return groups


def _steps_per_epoch(files: list[_File]) -> float | None:
    """From an epoch file's own step, else from the recorded batches (on one process)."""
    for file in files:
        if file.epoch and file.step:
            return file.step / file.epoch
    for file in files:
        batches = _int(file.meta, "ss_num_batches_per_epoch")
        if batches:
            return float(math.ceil(batches / (_int(file.meta, "ss_gradient_accumulation_steps") or 1)))
    return None


def _rates(meta: Mapping[str, str]) -> Curve:
    """The denoiser's learning rate by its schedule; empty where the metadata does not determine it."""
    rate = _float(meta, "ss_unet_lr") or _float(meta, "ss_learning_rate")
    steps = _int(meta, "ss_max_train_steps")
    if rate is None or steps is None or _ADAPTIVE.search(meta.get("ss_optimizer", "")):
        return Curve()
    return schedule(meta.get("ss_lr_scheduler", ""), rate, _float(meta, "ss_lr_warmup_steps") or 0.0, steps)


def _epoch(checkpoint: Checkpoint, per_epoch: float | None, named: int | None) -> float | None:
    """By the file's name, which counts from 1, else from the step; `ss_epoch` means two things and is not used."""
    if named is not None:
        return float(named)
    return (checkpoint.step or 0) / per_epoch if per_epoch else None


def _base(meta: Mapping[str, str]) -> BaseReference:
    return BaseReference(
        name=_text(meta, "ss_sd_model_name"),
        sha256=_text(meta, "ss_new_sd_model_hash"),
        short_hash=_text(meta, "ss_sd_model_hash"),
    )


def _text(meta: Mapping[str, str], key: str) -> str | None:
    value = meta.get(key, "").strip()
    return value if value and value != "None" else None


def _float(meta: Mapping[str, str], key: str) -> float | None:
    """A number, or the first of a list of numbers; kohya writes 'None' for none."""
    try:
        value = json.loads(meta.get(key, ""))
    except (ValueError, RecursionError):
        return None
    return as_number(value[0] if isinstance(value, list) and value else value)


def _int(meta: Mapping[str, str], key: str) -> int | None:
    return as_count(_float(meta, key))
