"""The TensorBoard logs of kohya's trainers: `<logging_dir>/<prefix><YYYYmmddHHMMSS>/network_train/events.*`.

No file of a run names the logging_dir: logs lie below the output folder or beside it, or where a settings file beside
the checkpoints says. A log belongs to a session by the time at which it was begun.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import entries
from lora_forensics.checkpoints.logs import Log, unreadable
from lora_forensics.checkpoints.logs.settings import read_toml
from lora_forensics.checkpoints.logs.tensorboard import event_files, started, tensorboard_scalars
from lora_forensics.records import Finding
from lora_forensics.remote import scanned
from lora_forensics.values import read_object

_NAMES = ("log", "logs", "logging")
_MOST = 300
"""Folders that are listed in search of logs."""
_ADAPTED = "lr/d*lr"
_HELD_OUT = "loss/validation/step_average"
_HELD_OUT_EPOCHS = "loss/validation/epoch_average"


@dataclass(frozen=True, slots=True)
class Start:
    """What is known of one start of the trainer."""

    started: float | None
    saved: float | None
    """When its last file was saved."""
    last: int
    """The last step it saved."""
    alone: bool
    """No other training has files in this folder."""


@dataclass(frozen=True, slots=True)
class KohyaLog:
    """Rates and losses over the session's own steps."""

    rates: Curve = field(default_factory=Curve)
    adapted_rates: Curve = field(default_factory=Curve)
    """d times the rate, of optimizers that find their own; empty of others."""
    train_loss: Curve = field(default_factory=Curve)
    held_out: Curve = field(default_factory=Curve)
    findings: tuple[Finding, ...] = ()


def find_log(found: Mapping[Path, float | None], start: Start, per_epoch: float | None, offset: int) -> KohyaLog:
    """The log of a session; empty if none, or more than one, can be its log.

    Args:
        found: folders with logs and when they were begun, by `log_folders`.
        start: whose log is looked for.
        per_epoch: steps per epoch, for what is logged over epochs.
        offset: steps of the run before this start.
    """
    fitting = [path for path, begun in found.items() if _fits(begun, start)]
    if len(fitting) > 1:
        message = f"{len(fitting)} TensorBoard logs can be this run's, first {fitting[0]}; none is read"
        return KohyaLog(findings=(unreadable("learning rates and losses", message),))
    if not fitting and not (start.alone and len(found) == 1):
        return KohyaLog()
    log = tensorboard_scalars((fitting or list(found))[0])
    covered = max((curve.steps[-1] for curve in log.curves.values()), default=0)
    if not fitting and covered < start.last:
        return KohyaLog(findings=log.findings)
    return KohyaLog(
        rates=_denoiser(log, "lr"),
        adapted_rates=_denoiser(log, _ADAPTED),
        train_loss=log.first("loss/average", "loss/current"),
        held_out=_held_out(log, per_epoch, offset),
        findings=log.findings,
    )


def _fits(begun: float | None, start: Start) -> bool:
    if begun is None or start.started is None or start.saved is None:
        return False
    return start.started - 1 <= begun <= start.saved + 1


def _denoiser(log: Log, prefix: str) -> Curve:
    """The rate of the denoiser: `unet`, else the first group that is no text encoder, else that of the whole."""
    if prefix in log.curves:
        return log.curves[prefix]
    tags = [tag for tag in log.curves if tag.rpartition("/")[0] == prefix]
    best = min(tags, key=lambda tag: (not tag.endswith("/unet"), "textencoder" in tag, tag), default=None)
    return Curve() if best is None else log.curves[best]


def _held_out(log: Log, per_epoch: float | None, offset: int) -> Curve:
    """Validation at steps; else of epochs, which are logged over their number, counted through all sessions."""
    if _HELD_OUT in log.curves:
        return log.curves[_HELD_OUT]
    epochs = log.first(_HELD_OUT_EPOCHS)
    if not per_epoch:
        return Curve()
    pairs = zip(epochs.steps, epochs.values, strict=True)
    return Curve.of((round(epoch * per_epoch) - offset, value) for epoch, value in pairs)


def log_folders(folder: Path) -> dict[Path, float | None]:
    """Folders with event files, at most two levels below what can be the logging_dir of runs in `folder`.

    The value is when the log was begun, in seconds since 1970.
    """
    found: dict[Path, float | None] = {}
    left = _MOST
    for root in dict.fromkeys(_logging_dirs(folder)):
        level = [root]
        for _ in range(3):
            for path in level:
                if files := event_files(path):
                    times = [time for file in files if (time := started(file)) is not None]
                    found[path] = min(times, default=None)
            level = [path / name for path in level for name in sorted(entries(path)[1])][:left]
            left -= len(level)
    return found


def _logging_dirs(folder: Path) -> Iterator[Path]:
    for settings in (*_files(folder, ".json"), *_files(folder, ".toml")):
        document = (read_object(settings) if settings.suffix == ".json" else read_toml(settings)) or {}
        named = document.get("logging_dir")
        if isinstance(named, str) and named:
            yield folder / named  # as it is, if it is absolute
            yield folder.parent / Path(named.replace("\\", "/")).name  # where the folders were moved together
    for parent in (folder, folder.parent):
        yield from (parent / name for name in _NAMES)


def _files(folder: Path, suffix: str) -> list[Path]:
    """Small files of settings, the newest last in name first."""
    try:
        with scanned(folder) as entries:
            found = [e.name for e in entries if e.name.endswith(suffix) and e.is_file() and e.stat().st_size < 1 << 20]
    except OSError:
        return []
    return [folder / name for name in sorted(found, reverse=True)[:8]]
