"""kohya sd-scripts: `name-000001.safetensors` (epoch), `name-step00000020.safetensors`, `name.safetensors` (last).

Step and session stand in the header's `ss_*` metadata; `.ckpt` and `.pt` have none. Facts from sd-scripts 48d368f.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from lora_forensics.checkpoints.assembly import Told, as_epochs, assemble
from lora_forensics.checkpoints.history import ADAPTIVE, Curve, schedule
from lora_forensics.checkpoints.interface import Folder, Trap, from_header, stat_checkpoint
from lora_forensics.checkpoints.kohya_logs import Start, find_log, log_folders
from lora_forensics.checkpoints.sessions import continued, goes_on, overwritten, resumed, superseded
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Finding, Run, Skipped
from lora_forensics.tensors import SAFETENSORS, Header, pickle_mentions
from lora_forensics.values import as_count, as_number

_PICKLES = (".ckpt", ".pt")
_STEP = re.compile(r"(?s:(?P<stem>.*?))(?:-|^at-)step(?P<step>\d{8,15})")
_EPOCH = re.compile(r"(?s:(?P<stem>.*?))(?:-|^epoch-)(?P<epoch>\d{6,15})")
_PREFIXES = ("lora_unet_", "lora_te", "lora_transformer_", "lycoris_", "oft_unet_")
_STATE = "-state"
_STATES = ("train_state.json", "optimizer.bin")
_LASTING = ("ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_sd_model_name", "ss_new_sd_model_hash")
"""What a resumed session has in common with the one before it."""


@dataclass(frozen=True, slots=True)
class _File:
    """One file and what its name and header tell."""

    path: Path
    header: Header | None
    """None of a pickle."""
    stem: str
    kind: str
    """step, epoch or last."""
    step: int | None
    epoch: int | None
    """Epochs by the file's name."""

    @property
    def meta(self) -> Mapping[str, str]:
        return self.header.metadata if self.header else {}

    def checkpoint(self, step: int | None) -> Checkpoint:
        name = self.path.name
        return (
            from_header(self.path, name, step, self.header) if self.header else stat_checkpoint(self.path, name, step)
        )


_Group = list[_File]


@dataclass(frozen=True, slots=True)
class _Logs:
    """Where the TensorBoard logs of a folder's runs lie."""

    folders: Mapping[Path, float | None]
    alone: bool
    """One run has its files there."""


class Kohya:
    """Numbered files with kohya key names."""

    name = "kohya"
    about = "kohya sd-scripts, and what writes its key names with numbered files"
    recognised = (
        "name-000001.safetensors (epoch), name-step00000020.safetensors, name.safetensors (last), or .ckpt and .pt,"
        " with keys that start with lora_unet_, lora_te, lora_transformer_, lycoris_ or oft_unet_"
    )
    traps: tuple[Trap, ...] = (
        Trap("ss_epoch counts finished epochs in step files and from 1 in epoch files: epochs follow from the step"),
        Trap("--no_metadata leaves nothing but the file's name: epoch files without metadata are counted in epochs"),
        Trap("a rerun under one name writes into the same folder: runs are told apart by ss_session_id"),
        Trap("a resumed training has a new session and counts steps from its epoch's start: joined, steps moved on"),
        Trap("the last file has no number, and mostly equals a numbered one: equal tensors count once"),
        Trap("an output name that ends in digits, such as a date, is no epoch"),
        Trap(
            "optimizers that set their own rate (Prodigy, D-Adaptation, ...) do not have the recorded one: d*lr counts"
        ),
        Trap("losses of whole epochs are logged over epochs, not steps: moved to the epochs' last steps"),
        Trap("a missing alpha means a scale of 1; an alpha of 0 means the rank"),
        Trap("<name>-state folders are training states, not checkpoints"),
        Trap("16-bit saves (--save_precision) round small changes away: said with the checkpoints concerned"),
    )
    save_more_often = (
        "set --save_every_n_steps (or --save_every_n_epochs 1), and leave out --save_last_n_steps/_epochs, which delete"
    )
    samples = "ss_num_train_images"
    """Key of the number of training samples."""

    suffixes: tuple[str, ...] = (SAFETENSORS, *_PICKLES)

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """The runs in `folder`: one for each stem and session; a session that was resumed joins the one before."""
        files, damaged = self._read(folder)
        groups = _sessions(files)
        stems = {file.stem for file in files}
        for name in [name for name in folder.folders if name.endswith(_STATE)]:
            path = folder.folders[name]
            if _parse_name(name.removesuffix(_STATE))[0] in stems or any((path / mark).is_file() for mark in _STATES):
                yield Skipped(folder.folders.pop(name), "training state", expected=True)
        runs = _joined(groups)
        logs = log_folders(folder.path) if runs else {}
        finals = {file.stem: file for run in runs for session in run for file in session.files if file.kind == "last"}
        for run in runs:
            stem, alone = run[0].files[0].stem, len(runs) == 1
            found = self._run(folder, run, tuple(damaged.pop(stem, ())), _Logs(logs, alone=alone))
            own = [file for session in run for file in session.files]
            if stem in finals and not any(file.kind == "last" for file in own):
                found = replace(found, findings=(*found.findings, overwritten(finals[stem].path.name, "--output_name")))
            yield found

    def owns(self, header: Header) -> bool:
        """Whether a file with kohya's names is this trainer's; OneTrainer writes its own mark into the header."""
        return "ot_branch" not in header.metadata

    def _run(self, folder: Folder, sessions: Sequence[_Session], skipped: tuple[Skipped, ...], logs: _Logs) -> Run:
        per_epoch = _steps_per_epoch(sessions[0].files)
        files = [file for session in sessions for file in session.files]
        last = max(sessions[-1].files, key=lambda file: (_int(file.meta, "ss_steps") or 0, len(file.meta)))
        by_epochs = all(file.step is None for file in files) and any(file.epoch for file in files)
        found, findings = _checkpoints(sessions, by_epochs, per_epoch)
        told = Told(
            steps_per_epoch=per_epoch,
            train_samples=_int(last.meta, self.samples),
            batch_size=_int(last.meta, "ss_total_batch_size") or _int(last.meta, "ss_batch_size_per_device"),
            base=_base(last.meta),
            findings=findings,
        )
        if not by_epochs:
            told = replace(_logged(sessions, told, logs), scheduled=_rates(last.meta))
        run = assemble(self, folder.path, last.stem, found, told, skipped)
        return as_epochs(run, _EPOCHS_ONLY) if by_epochs else run

    def _read(self, folder: Folder) -> tuple[_Group, dict[str, list[Skipped]]]:
        """The files of this trainer, taken out of a folder, and by stem the damaged ones that are named like them."""
        files: _Group = []
        damaged: list[tuple[str, Path, CheckpointError]] = []
        names = [name for name in folder.files if name.endswith(self.suffixes)]
        numbered = {stem for name in names if (stem := _parse_name(Path(name).stem)[0]) != Path(name).stem}
        for name in names:
            path = folder.files[name]
            stem, kind, number = _parse_name(path.stem)
            opened = self._open(folder, path)
            header = opened if isinstance(opened, Header) else None
            named = header.metadata.get("ss_output_name") if header else None
            if path.stem in numbered or path.stem == named:  # a name that ends in digits, like -20240101, is no epoch
                stem, kind, number = path.stem, "last", None
            if isinstance(opened, CheckpointError):
                damaged.append((stem, path, opened))
            elif opened is not None:
                known = _int(header.metadata, "ss_steps") if header else None
                step = number if kind == "step" else None
                epoch = number if kind == "epoch" else None
                files.append(_File(path, header, stem, kind, step if known is None else known, epoch))
        stems = {file.stem for file in files}
        lost: dict[str, list[Skipped]] = {}
        for stem, path, error in damaged:
            if stem in stems:
                lost.setdefault(stem, []).append(Skipped.because(path, error))
                del folder.files[path.name]
        for file in files:
            del folder.files[file.path.name]
        return files, lost

    def _open(self, folder: Folder, path: Path) -> Header | CheckpointError | Literal["pickle"] | None:
        """The header of a file that is this trainer's, or the error if it is damaged; None if it is not."""
        if path.suffix in _PICKLES:
            try:
                return "pickle" if pickle_mentions(path, _PREFIXES) else None
            except CheckpointError as error:
                return error
        header = folder.header(path.name)
        if isinstance(header, CheckpointError):
            return header
        ours = any(key.startswith(_PREFIXES) for key in header.infos) and (folder.insisted or self.owns(header))
        return header if ours else None


_EPOCHS_ONLY = Finding(
    "epochs-only",
    "warning",
    "the files hold no metadata: their steps are unknown, so all steps below count epochs",
    "train without --no_metadata",
)


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


@dataclass(frozen=True, slots=True)
class _Session:
    """The files of one start of the trainer."""

    files: _Group
    offset: int = 0
    """Steps of the run before it, where it counts its own from 0."""


def _joined(groups: Sequence[_Group]) -> list[list[_Session]]:
    """Runs as their sessions: a later session of the stem that goes on where the one before ends joins it."""
    runs: list[list[_Session]] = []
    for group in groups:
        before = runs[-1][-1] if runs else None
        offset = _resumed_at(before, group) if before and before.files[0].stem == group[0].stem else None
        if offset is None:
            several = len({file.epoch for file in group if file.epoch and file.step}) > 1
            runs.append([_Session(group, _offset(group, _steps_per_epoch(group)) if several else 0)])
        else:
            runs[-1].append(_Session(group, offset))
    return runs


def _resumed_at(before: _Session, after: _Group) -> int | None:
    """What is to be added to the steps of a session that resumed the one before; None if it is another training."""
    one, two = (max((file.meta for file in group), key=len) for group in (before.files, after))
    if any(one.get(key) != two.get(key) for key in _LASTING):
        return None
    steps = [sorted({file.step for file in group if file.step is not None}) for group in (before.files, after)]
    if steps[0] and steps[1] and steps[1][0] > steps[0][-1] and goes_on(steps[0], steps[1]):
        return before.offset
    per_epoch = _steps_per_epoch(before.files)
    offset = _offset(after, per_epoch)
    return offset if offset > _offset(before.files, per_epoch) == before.offset else None


def _offset(group: _Group, per_epoch: float | None) -> int:
    """Steps before a session that counts its own from 0 while its epochs go on, as sd-scripts does when it resumes."""
    if not per_epoch or per_epoch != int(per_epoch):
        return 0
    done = [(file, _int(file.meta, "ss_epoch")) for file in group if file.kind != "last" and file.step]
    epochs = {
        (epoch - (file.kind == "epoch")) - ((file.step or 1) - 1) // int(per_epoch)
        for file, epoch in done
        if epoch is not None
    }
    return max(0, epochs.pop()) * int(per_epoch) if len(epochs) == 1 else 0


def _checkpoints(
    sessions: Sequence[_Session], by_epochs: bool, per_epoch: float | None
) -> tuple[list[Checkpoint], tuple[Finding, ...]]:
    """The checkpoints of a run, those that count first; where it was resumed, what was saved after that is left out."""
    found: list[Checkpoint] = []
    findings: list[Finding] = []
    end = math.inf
    for session in reversed(sessions):
        # where an epoch ends on a step that was saved, two numbered files and the last one can be of one step
        ordered = sorted(session.files, key=lambda file: ("step", "epoch", "last").index(file.kind))
        placed = []
        for file in ordered:
            step = file.epoch if by_epochs else None if file.step is None else file.step + session.offset
            epoch = file.epoch or (step / per_epoch if step and per_epoch else None)
            placed.append(replace(file.checkpoint(step), epoch=None if epoch is None else float(epoch)))
        lost = [c for c in placed if c.step is not None and c.step >= end]
        if lost:
            findings.append(superseded(lost, int(end)))
        found += [c for c in placed if c not in lost]
        first = min((c.step for c in found if c.step is not None), default=0)
        if session is not sessions[0] or session.offset:
            findings.append(resumed(first))
        end = first
    return found, tuple(findings)


def _logged(sessions: Sequence[_Session], told: Told, found: _Logs) -> Told:
    """With rates and losses of the TensorBoard logs of all sessions, on one axis of steps."""
    logs = []
    for session in sessions:
        meta = max((file.meta for file in session.files), key=len)
        last = max((file.step or 0 for file in session.files), default=0)
        start = Start(_float(meta, "ss_training_started_at"), _latest(session.files), last, found.alone)
        logs.append(find_log(found.folders, start, told.steps_per_epoch, session.offset))
    offsets = [session.offset for session in sessions]
    adaptive = any(ADAPTIVE.search(file.meta.get("ss_optimizer", "")) for s in sessions for file in s.files)
    return replace(
        told,
        rates=continued([log.adapted_rates if adaptive else log.rates for log in logs], offsets),
        train_loss=continued([log.train_loss for log in logs], offsets),
        held_out=continued([log.held_out for log in logs], offsets),
        findings=(*told.findings, *(finding for log in logs for finding in log.findings)),
    )


def _latest(group: _Group) -> float | None:
    """When the last of these files was saved."""
    times = [time for file in group if (time := _float(file.meta, "ss_training_finished_at")) is not None]
    return max(times, default=None)


def _steps_per_epoch(files: list[_File]) -> float | None:
    """From the epoch files' own steps, else from the recorded batches (on one process)."""
    ends = sorted({(file.epoch, file.step) for file in files if file.epoch and file.step})
    if len(ends) > 1 and ends[-1][0] > ends[0][0]:  # their distance: a resumed session counts its steps from 0
        slope = (ends[-1][1] - ends[0][1]) / (ends[-1][0] - ends[0][0])
        return slope if slope > 0 else None
    if ends:
        return ends[0][1] / ends[0][0]
    for file in files:
        batches = _int(file.meta, "ss_num_batches_per_epoch")
        if batches:
            return float(math.ceil(batches / (_int(file.meta, "ss_gradient_accumulation_steps") or 1)))
    return None


def _rates(meta: Mapping[str, str]) -> Curve:
    """The denoiser's learning rate by its schedule; empty where the metadata does not determine it."""
    rate = _float(meta, "ss_unet_lr") or _float(meta, "ss_learning_rate")
    steps = _int(meta, "ss_max_train_steps")
    if rate is None or steps is None or ADAPTIVE.search(meta.get("ss_optimizer", "")):
        return Curve()
    return schedule(meta.get("ss_lr_scheduler", ""), rate, _float(meta, "ss_lr_warmup_steps") or 0.0, steps)


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
