"""OneTrainer: `<workspace>/save/<prefix><time>-save-<step>-<epoch>-<epoch step>.safetensors`. Facts from 23df383.

Beside save/ lie backup/, config/ (settings of every start) and tensorboard/ (a log of every start); the final file lies
where the settings say. Everything counts batches, and times are local, to the second.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.assembly import Told, assemble, mean_of, with_final
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, entries, from_header, unit_scale
from lora_forensics.checkpoints.logs import Log
from lora_forensics.checkpoints.logs.tensorboard import tensorboard_scalars
from lora_forensics.checkpoints.sessions import continued, goes_on, resumed, superseded
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import SAFETENSORS, Header, read_header
from lora_forensics.values import as_count, parse_object, read_object

_TIME = r"(?P<time>\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d)"
_PROGRESS = r"(?P<step>\d{1,15})-(?P<epoch>\d{1,15})-(?P<inside>\d{1,15})"
_SAVE = re.compile(rf"(?P<prefix>.*?){_TIME}-save-{_PROGRESS}\.safetensors")
_BACKUP = re.compile(rf"(?P<prefix>){_TIME}-backup-{_PROGRESS}")
_START = re.compile(rf"(?P<prefix>.*?){_TIME}(?:\.json)?")
_MARK = "ot_branch"
_VALIDATION = "loss/validation_step/"
_ABOVE = 3
"""Folders above the workspace in which a relative output_model_destination is looked for."""


@dataclass(frozen=True, slots=True)
class _Save:
    path: Path
    name: str
    header: Header
    time: str
    step: int
    """Batches so far."""
    epoch: int
    """Epochs finished."""
    inside: int
    """Batches since."""


@dataclass(frozen=True, slots=True)
class _Session:
    """The saves between one start of the trainer and the next."""

    saves: tuple[_Save, ...]
    settings: dict[str, Any]
    log: Log

    @property
    def accumulated(self) -> int:
        """Batches for one step of the optimizer."""
        return as_count(self.settings.get("gradient_accumulation_steps")) or 1

    def goes_on(self, before: Sequence[_Save]) -> bool:
        """Whether it went on from a backup: by the first step that it logged, else by those that it saved."""
        logged = self.log.first("loss/train_step").steps
        if logged:
            return logged[0] >= self.accumulated
        return goes_on([save.step for save in before], [save.step for save in self.saves])


class OneTrainer:
    """Saves with time and progress in their names."""

    name = "onetrainer"
    about = "Nerogar OneTrainer"
    recognised = "save/<prefix><time>-save-<step>-<epoch>-<epoch step>.safetensors, backup/<time>-backup-..."
    traps: tuple[Trap, ...] = (
        Trap("numbers in the names have no zeros before them: ordered as numbers"),
        Trap("steps count batches: divided by gradient_accumulation_steps of config/"),
        Trap("no step, epoch or rate in the header: names, config/ and tensorboard/ tell them"),
        Trap("the tensorboard counts from 0: what is logged at n is of batch n + 1"),
        Trap("the key style is a setting; diffusers' has the scale folded in, the others keep alpha"),
        Trap("files in kohya's keys look like kohya's: the name, or ot_branch in the header, tells them apart"),
        Trap("a save that failed stays half-written: skipped by its size"),
        Trap("backups are training states; they are the checkpoints only where nothing was saved"),
        Trap("the final file lies elsewhere (output_model_destination), and its step only in the log"),
        Trap("trainings with one destination overwrite its file: it is the newest one's; of two workspaces nobody's"),
        Trap("a training that goes on from a backup repeats steps: the later saves count"),
    )
    save_more_often = "lower 'save every' on the backup tab; nothing deletes saves (rolling backups are others)"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """The runs whose workspace or save folder is `folder`."""
        lost: list[Skipped] = []
        saves = _saves(folder, lost)
        space = folder.path.parent if folder.path.name == "save" else folder.path
        inner = folder.folders.get("save")
        if not saves and inner is not None:
            below = Folder(inner, {name: inner / name for name in sorted(entries(inner)[0])})
            saves = _saves(below, lost)
            if saves or lost:
                del folder.folders["save"]
                yield from _others(below)
        spoiled: list[Skipped] = []
        backups = _backups(folder, spoiled)
        if backups or spoiled:
            path = folder.folders.pop("backup")
            lost += [Skipped(path, "backups: training states", expected=True)] if saves else spoiled
            saves = saves or ({None: backups} if backups else {})
        for name in [] if saves else _finals(folder):
            yield Skipped(
                folder.files.pop(name),
                "a final file of OneTrainer: unknown which saves are of its run",
                rule="unplaced-adapter",
            )
        runs = [(prefix, run) for prefix, found in saves.items() for run in _joined(_sessions(found, prefix, space))]
        newest = {_destination(run): run for _, run in sorted(runs, key=lambda entry: entry[1][-1].saves[-1].time)}
        for prefix, run in runs:
            mine = [entry for entry in lost if entry.expected or entry.path.name.startswith(prefix or "")]
            lost = [entry for entry in lost if entry not in mine]
            yield self._run(folder.path, prefix or "", run, mine, newest[_destination(run)] is run)
        yield from lost

    def _run(self, folder: Path, prefix: str, sessions: Sequence[_Session], lost: list[Skipped], newest: bool) -> Run:
        settings = next((s.settings for s in reversed(sessions) if s.settings), {})
        accumulated = sessions[-1].accumulated
        saves = [save for session in sessions for save in session.saves]
        per_epoch = next(((save.step - save.inside) / save.epoch for save in saves if save.epoch), None)
        found, findings = _checkpoints(sessions, folder, accumulated, per_epoch)
        logs = [session.log for session in sessions]
        final = _final(sessions[-1], folder, accumulated) if newest else None  # the older one's was overwritten
        name = settings.get("base_model_name")
        batch = as_count(settings.get("batch_size"))
        told = Told(
            rates=continued([_rate(log).moved(1, accumulated) for log in logs]),
            train_loss=continued([log.first("loss/train_step").moved(1, accumulated) for log in logs]),
            held_out=continued([_held_out(log).moved(1, accumulated) for log in logs]),
            steps_per_epoch=per_epoch / accumulated if per_epoch else None,
            batch_size=batch * accumulated if batch else None,
            base=BaseReference(name=name if isinstance(name, str) else None),
            findings=(*findings, *(finding for log in logs for finding in log.findings)),
        )
        if final is not None:
            found = with_final(found, final, final.step)
        return assemble(self, folder, prefix.rstrip("-_ "), found, told, lost)


def _saves(folder: Folder, lost: list[Skipped]) -> dict[str | None, list[_Save]]:
    """The saves of a folder by prefix, taken out of it; damaged ones go to `lost`."""
    found: dict[str | None, list[_Save]] = {}
    matches = [match for name in folder.files if (match := _SAVE.fullmatch(name))]
    for match in matches:
        path, header = folder.files.pop(match.string), folder.header(match.string)
        if isinstance(header, CheckpointError):
            lost.append(Skipped.because(path, header))
        else:
            found.setdefault(match["prefix"], []).append(_save(path, match, header))
    return found


def _backups(folder: Folder, lost: list[Skipped]) -> list[_Save]:
    """The LoRAs in the backups of a workspace; damaged ones go to `lost`."""
    place = folder.folders.get("backup")
    found: list[_Save] = []
    for name in sorted(entries(place)[1]) if place else []:
        weights = folder.path / "backup" / name / "lora" / "lora.safetensors"
        match = _BACKUP.fullmatch(name)
        if match and weights.is_file():
            try:
                found.append(_save(weights, match, read_header(weights)))
            except CheckpointError as error:
                lost.append(Skipped.because(weights, error))
    return found


def _save(path: Path, match: re.Match[str], header: Header) -> _Save:
    return _Save(path, path.name, header, match["time"], int(match["step"]), int(match["epoch"]), int(match["inside"]))


def _finals(folder: Folder) -> list[str]:
    """Files with OneTrainer's mark and no progress in their names."""
    headers = {name: folder.header(name) for name in folder.files if name.endswith(SAFETENSORS)}
    return [name for name, header in headers.items() if isinstance(header, Header) and _MARK in header.metadata]


def _others(folder: Folder) -> Iterator[Skipped]:
    for name, path in folder.files.items():
        if name.endswith(SAFETENSORS):
            yield Skipped(path, "in a save folder of OneTrainer, but not named like a save", rule="unplaced-adapter")


def _sessions(saves: list[_Save], prefix: str | None, space: Path) -> list[_Session]:
    """The saves between the starts of the trainer; each start writes its settings and begins a log."""
    settings, logs = _stamped(space / "config", prefix), _stamped(space / "tensorboard", prefix)
    grouped: dict[tuple[str, str], list[_Save]] = {}
    for save in sorted(saves, key=lambda save: (save.time, save.step)):
        start = tuple(max((time for time in known if time <= save.time), default="") for known in (settings, logs))
        grouped.setdefault((start[0], start[1]), []).append(save)
    sessions = []
    for (configured, logged), group in grouped.items():
        told = read_object(settings[configured]) if configured else None
        embedded = parse_object(group[-1].header.metadata.get("ot_config", "")) or {}
        log = tensorboard_scalars(logs[logged]) if logged else Log()
        sessions.append(_Session(tuple(group), told or embedded, log))
    return [part for session in sessions for part in _split(session)]


def _split(session: _Session) -> Iterator[_Session]:
    """Where no start is recorded, steps that go back tell one."""
    group: list[_Save] = []
    for save in session.saves:
        if group and save.step <= group[-1].step:
            yield replace(session, saves=tuple(group))
            group = []
        group.append(save)
    yield replace(session, saves=tuple(group))


def _joined(sessions: list[_Session]) -> list[list[_Session]]:
    """Runs as their sessions: one that went on from a backup joins the one before."""
    runs: list[list[_Session]] = []
    for session in sessions:
        if runs and session.goes_on(runs[-1][-1].saves):
            runs[-1].append(session)
        else:
            runs.append([session])
    return runs


def _checkpoints(
    sessions: Sequence[_Session], folder: Path, accumulated: int, per_epoch: float | None
) -> tuple[list[Checkpoint], list[Finding]]:
    """The checkpoints of a run; where it was resumed, what was saved after that step is left out."""
    found: list[Checkpoint] = []
    findings: list[Finding] = []
    for session in reversed(sessions):
        begun = min((checkpoint.step or 0 for checkpoint in found), default=None)
        mine = [_checkpoint(save, folder, accumulated, per_epoch) for save in session.saves]
        lost = [checkpoint for checkpoint in mine if begun is not None and (checkpoint.step or 0) >= begun]
        if lost and begun is not None:
            findings.append(superseded(lost, begun))
        if begun is not None:
            findings.append(resumed(begun))
        found += [checkpoint for checkpoint in mine if checkpoint not in lost]
    return found, findings


def _checkpoint(save: _Save, folder: Path, accumulated: int, per_epoch: float | None) -> Checkpoint:
    name = save.path.relative_to(folder).as_posix()
    found = from_header(save.path, name, save.step // accumulated, save.header)
    epoch = save.epoch + save.inside / per_epoch if per_epoch else 0.0 if not save.step else None
    return replace(found, epoch=epoch, scale=unit_scale(save.header))


def _destination(sessions: Sequence[_Session]) -> str:
    return str(sessions[-1].settings.get("output_model_destination"))


def _final(session: _Session, folder: Path, accumulated: int) -> Checkpoint | None:
    """The final file where the settings say that it lies, if its keys are those of the saves and it is newer."""
    named, last = session.settings.get("output_model_destination"), session.saves[-1]
    if not isinstance(named, str) or not named.endswith(SAFETENSORS):
        return None
    parts = Path(named.replace("\\", "/"))
    places = (
        [parts] if parts.is_absolute() else [root / parts for root in (folder, *folder.absolute().parents[:_ABOVE])]
    )
    for path in places:
        try:
            header = read_header(path)
            name = Path(os.path.relpath(path, folder)).as_posix()
        except (CheckpointError, ValueError):  # on Windows no relative path leads to another drive
            continue
        if header.infos == last.header.infos and header.modified >= last.header.modified:
            logged = session.log.first("loss/train_step").steps
            step = (logged[-1] + 1) // accumulated if logged else None
            return replace(from_header(path, name, step, header), scale=unit_scale(header))
    return None


def _rate(log: Log) -> Curve:
    """The denoiser's: what is neither a text encoder nor an embedding."""
    tags = [tag for tag in log.curves if tag.startswith("lr/")]
    best = min(tags, key=lambda tag: ("text_encoder" in tag, "embedding" in tag, tag), default="")
    return log.first(best)


def _held_out(log: Log) -> Curve:
    """The mean of all concepts, else that of the only one."""
    tags = [tag for tag in log.curves if tag.startswith(_VALIDATION)]
    whole = _VALIDATION + "total_average"
    return log.curves[whole] if whole in tags else mean_of([log.curves[tag] for tag in tags])


def _stamped(folder: Path, prefix: str | None) -> dict[str, Path]:
    """What was written at the starts of the trainer, by time; of any prefix for None, since backups have none."""
    found = [(name, _START.fullmatch(name)) for name in sorted(set().union(*entries(folder)))]
    return {match["time"]: folder / name for name, match in found if match and prefix in (None, match["prefix"])}
