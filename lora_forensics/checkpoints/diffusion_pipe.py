"""diffusion-pipe: `<YYYYmmdd_HH-MM-SS>/epoch<N>/` and `step<N>/`. Facts from diffusion-pipe 8f83dbf.

Each holds adapter_model.safetensors (SDXL: lora.safetensors in kohya's keys) and a copy of the TOML; TensorBoard events
lie in the run's folder.
"""

from __future__ import annotations

import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.assembly import Told, as_epochs, assemble, mean_of
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, stat_checkpoint
from lora_forensics.checkpoints.logs import Log, unreadable
from lora_forensics.checkpoints.logs.settings import nested, read_toml
from lora_forensics.checkpoints.logs.tensorboard import tensorboard_scalars
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import read_header
from lora_forensics.values import as_count, as_number

_FOLDER = re.compile(r"(epoch|step)(\d{1,15})")
_WEIGHTS = ("adapter_model.safetensors", "lora.safetensors")
_CONFIG = "adapter_config.json"
_STATE = re.compile(r"global_step\d+")
_PREFIX = "diffusion_model."
_BASES = ("transformer_path", "checkpoint_path", "diffusers_path", "ckpt_path", "diffusion_model", "unet_path")
_EPOCHS_ONLY = Finding(
    "epochs-only",
    "warning",
    "nothing tells the steps of these epochs: epochs are counted instead, and learning rates are unknown",
    "keep the TensorBoard events of the run, or save with save_every_n_steps",
)


class DiffusionPipe:
    """Folders `epoch<N>` and `step<N>`."""

    name = "diffusion-pipe"
    about = "tdrussell diffusion-pipe"
    recognised = "epoch<N>/ and step<N>/ with adapter_model.safetensors or lora.safetensors, and the TOML"
    traps: tuple[Trap, ...] = (
        Trap("the header has no step, epoch or rate: the folder's name, the TOML and the TensorBoard log tell them"),
        Trap("a folder tmp/ inside a save means that it was interrupted: skipped"),
        Trap("global_step<N>/ and latest are DeepSpeed's training state, not checkpoints"),
        Trap("train/epoch_loss is logged over epochs: the steps of an epoch follow from when it was logged"),
        Trap("with x_axis_examples the log counts examples: divided by the samples of one step"),
        Trap("Prodigy's rate is d (train/prodigy_d) times lr; Automagic logs its mean rate"),
        Trap("the last save is an epoch or a step as any other; one that equals another counts once"),
    )
    save_more_often = "set save_every_n_steps, or save_every_n_epochs = 1; nothing deletes saves"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run: the saves below `folder`."""
        saves: list[tuple[str, int, Checkpoint]] = []
        skipped: list[Skipped] = []
        beside = (*folder.files, *folder.folders)
        marked = folder.insisted or any(name.endswith(".toml") or _STATE.fullmatch(name) for name in beside)
        for name in list(folder.folders):
            match = _FOLDER.fullmatch(name)
            entry = _open(folder.folders[name], name, marked) if match else None
            if match is None or entry is None:
                continue
            del folder.folders[name]
            if isinstance(entry, Skipped):
                skipped.append(entry)
            else:
                saves.append((match[1], int(match[2]), entry))
        if not saves:
            yield from skipped
            return
        states = [name for name in folder.folders if _STATE.fullmatch(name)]
        skipped += [Skipped(folder.folders.pop(name), "training state", expected=True) for name in states]
        yield self._run(folder, saves, skipped)

    def _run(self, folder: Folder, saves: list[tuple[str, int, Checkpoint]], skipped: list[Skipped]) -> Run:
        settings = _settings(folder, saves[-1][2].path.parent)
        log, axis = _on_steps(tensorboard_scalars(folder.path), settings)
        last = max((number for kind, number, _ in saves if kind == "epoch"), default=0)
        per_epoch, ends = _epochs(log, settings, last)
        numbered = [(number, checkpoint) for kind, number, checkpoint in saves if kind == "epoch"]
        by_epochs = len(numbered) == len(saves) and not ends and per_epoch is None
        found = []
        for kind, number, checkpoint in sorted(saves, key=lambda save: save[0] == "epoch"):
            step = number if kind == "step" or by_epochs else ends.get(number)
            if step is None and per_epoch:
                step = round(number * per_epoch)
            found.append(replace(checkpoint, step=step, epoch=float(number) if kind == "epoch" else None))
        batch, gas = as_count(settings.get("micro_batch_size_per_gpu")), settings.get("gradient_accumulation_steps", 1)
        told = Told(
            rates=Curve() if by_epochs else _own_rates(log, settings),
            scheduled=Curve() if by_epochs else _scheduled(settings, per_epoch),
            train_loss=Curve() if by_epochs else log.first("train/loss"),
            held_out=Curve() if by_epochs else _held_out(log, settings),
            steps_per_epoch=per_epoch,
            batch_size=batch * gas if batch and as_count(gas) else None,
            base=BaseReference(name=_base(settings)),
            findings=(*log.findings, *axis),
        )
        run = assemble(self, folder.path, "", found, told, skipped)
        return as_epochs(run, _EPOCHS_ONLY) if by_epochs else run


def _open(path: Path, name: str, marked: bool) -> Checkpoint | Skipped | None:
    """The adapter in the folder of one save; None if it is none of this trainer's.

    Args:
        path: the folder.
        name: its name, relative to the run.
        marked: what lies beside the folder is this trainer's.
    """
    try:
        names = {entry for entry in os.listdir(path) if not entry.endswith(".toml")}
        marked = marked or len(names) < len(os.listdir(path))
    except OSError:
        return None
    weights = next((weights for weights in _WEIGHTS if weights in names), None)
    if "tmp" in names and names <= {"tmp", _CONFIG, *_WEIGHTS}:
        return Skipped(path, "has a folder tmp: the save was not finished", rule="unfinished-save")
    if weights is None:
        return None
    try:
        header = read_header(path / weights)
        if not (marked or any(key.startswith(_PREFIX) for key in header.infos)):
            return None
        return stat_checkpoint(path / weights, f"{name}/{weights}", None, path / _CONFIG if _CONFIG in names else None)
    except CheckpointError as error:
        return Skipped.because(path / weights, error) if marked else None


def _settings(folder: Folder, save: Path) -> dict[str, Any]:
    """The TOML with an [adapter]: the run's own, else the copy beside a save. Another TOML describes the data."""
    paths = [path for name, path in folder.files.items() if name.endswith(".toml")]
    paths += [path for path in sorted(save.iterdir()) if path.suffix == ".toml"]
    found = (read_toml(path) for path in paths)
    return next((settings for settings in found if "optimizer" in settings or "adapter" in settings), {})


def _on_steps(log: Log, settings: dict[str, Any]) -> tuple[Log, list[Finding]]:
    """The log over steps of the optimizer, where it counts examples; without its curves if it cannot be told which."""
    if not settings.get("x_axis_examples") or "train/loss" not in log.curves:
        return log, []
    every = as_count(settings.get("logging_steps", 1)) or 1
    size = math.gcd(*log.curves["train/loss"].steps) / every
    if size < 1 or size != int(size):
        return Log(findings=log.findings), [
            unreadable("TensorBoard log", "counts examples, of an unknown number a step")
        ]
    curves = {t: c if t == "train/epoch_loss" else c.moved(per=int(size)) for t, c in log.curves.items()}
    clocks = {t: c if t == "train/epoch_loss" else c.moved(per=int(size)) for t, c in log.clocks.items()}
    return Log(curves, log.findings, clocks), []


def _epochs(log: Log, settings: dict[str, Any], last: int) -> tuple[float | None, dict[int, int]]:
    """Steps per epoch, and the last step of every epoch whose end was logged.

    By the time of the entries; else, where `last` is the last epoch of the settings, by the last step.
    """
    ends, steps = log.clocks.get("train/epoch_loss", Curve()), log.clocks.get("train/loss", Curve())
    if (as_count(settings.get("logging_steps", 1)) or 1) != 1 or not steps.steps:
        return None, {}
    found: dict[int, int] = {}
    for epoch, time in zip(ends.steps, ends.values, strict=True):
        before = bisect_right(steps.values, time)
        if before:
            found[epoch] = steps.steps[before - 1]
    if len(set(found.values())) < len(found):  # the times are not those of the training
        found = {}
    if not found and last == as_count(settings.get("epochs")) and last and steps.steps[-1] % last == 0:
        return steps.steps[-1] / last, {}
    whole = {step / epoch for epoch, step in found.items() if epoch}
    return (whole.pop() if len(whole) == 1 else None), found


def _own_rates(log: Log, settings: dict[str, Any]) -> Curve:
    """Of optimizers that find their own."""
    rate = as_number(nested(settings, "optimizer", "lr"))
    if "train/prodigy_d" in log.curves and rate is not None:
        return log.curves["train/prodigy_d"].times(rate)
    return log.first("train/automagic_avg_lr")


def _scheduled(settings: dict[str, Any], per_epoch: float | None) -> Curve:
    """By lr, warm-up and schedule of the TOML."""
    rate = as_number(nested(settings, "optimizer", "lr"))
    kind = str(nested(settings, "optimizer", "type") or "").lower()
    if (
        rate is None
        or any(word in kind for word in ("prodigy", "automagic", "generic"))
        or "force_constant_lr" in settings
    ):
        return Curve()
    warmup, schedule = as_count(settings.get("warmup_steps", 0)) or 0, settings.get("lr_scheduler", "constant")
    ramp = [(0, rate / warmup), (warmup, rate)] if warmup else []
    total = round((as_count(settings.get("epochs")) or 0) * (per_epoch or 0))
    if schedule == "constant":
        return Curve.of([*ramp, (warmup, rate)])
    if schedule == "linear" and total:
        return Curve.of([*ramp, (warmup, rate), (warmup + total, 0.0)])
    if schedule == "cosine" and total:
        low, every = 1e-6, max(1, total // 500)
        share = ((s, 0.5 * (1 + math.cos(math.pi * s / total))) for s in range(0, total + 1, every))
        return Curve.of([*ramp, *((warmup + s, low + (rate - low) * part) for s, part in share)])
    return Curve()


def _held_out(log: Log, settings: dict[str, Any]) -> Curve:
    """The mean over the evaluation sets where all were evaluated."""
    sets = settings.get("eval_datasets")
    named = [
        str(entry.get("name")) if isinstance(entry, dict) else f"eval{number}"
        for number, entry in enumerate(sets if isinstance(sets, list) else [])
    ]
    return mean_of([log.curves[f"{name}/loss"] for name in named if f"{name}/loss" in log.curves])


def _base(settings: dict[str, Any]) -> str | None:
    named = (nested(settings, "model", key) for key in _BASES)
    return next((name for name in named if isinstance(name, str) and name), None)
