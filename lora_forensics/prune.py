"""Which checkpoints of a run to keep, and deleting the others: only files that a scan has read, and never without one.

Every deletion is written down before and after it happens (OUT/<run>/pruned.json); later scans go on using what was
measured of the deleted checkpoints.
"""

from __future__ import annotations

import hashlib
import os
import stat
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_forensics.assess import versions
from lora_forensics.checkpoint_names import named
from lora_forensics.checkpoints.adapter_folder import COMPANIONS, CONFIG
from lora_forensics.checkpoints.interface import stat_checkpoint
from lora_forensics.errors import CheckpointError, EvidenceError, SeriesError
from lora_forensics.pipeline import ScanOptions
from lora_forensics.records import SCHEMA, Checkpoint, Run, Verdict
from lora_forensics.reports import to_json
from lora_forensics.scan import find_run
from lora_forensics.series import write_text
from lora_forensics.store import PRUNED, load_measured, logged, pruned_names, stored_name, stored_verdict
from lora_forensics.tables import Measured
from lora_forensics.tensors import TENSOR_FILES
from lora_forensics.values import read_object

_EVIDENCE = ("held_out_loss", "probe")
"""What a pick may rest on whatever the status is."""
_ENOUGH = ("turning_point", "no_second_valley")
"""Statuses of runs that are long enough for the other rules."""


@dataclass(frozen=True, slots=True)
class PruneOptions:
    """What stays, and when to refuse."""

    keep: tuple[str, ...] = ()
    """Checkpoints that stay, too: by name, folder or step."""
    keep_every: int | None = None
    """So do all whose step is a multiple of this."""
    whole_folders: bool = False
    """Delete what the trainer wrote beside an adapter into its checkpoint's folder, too."""
    min_age: float = 60.0
    """Minutes since the run's last save below which it counts as still being written."""


@dataclass(frozen=True, slots=True)
class Doomed:
    """One file to delete."""

    path: Path
    checkpoint: Checkpoint
    size: int
    modified: int
    """Nanoseconds since 1970."""
    weights: bool
    """It holds the adapter's tensors."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What pruning a run would do."""

    run: Run
    folder: Path
    """OUT/<run>."""
    verdict: Verdict
    keep: dict[str, str]
    """Checkpoint to why it stays."""
    files: tuple[Doomed, ...]
    left: dict[str, str]
    """Checkpoint that might go to why it is not touched."""
    state_bytes: int
    """Of training state that stays in folders whose adapter goes."""
    young: str = ""
    """Why the run may still be written to, so that nothing may be deleted yet."""

    @property
    def by_weights(self) -> bool:
        """The pick rests on no held-out sample: in tests such a rule was not shown to beat the middle checkpoint."""
        return self.verdict.keep is None or self.verdict.keep.rests_on not in _EVIDENCE

    @property
    def checkpoints(self) -> tuple[Checkpoint, ...]:
        """Those to delete."""
        return tuple(file.checkpoint for file in self.files if file.weights)

    @property
    def freed(self) -> int:
        """Bytes of all files to delete."""
        return sum(file.size for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {
            "schema": SCHEMA,
            "run": self.run.name,
            "path": self.run.path.as_posix(),
            "keep": self.keep,
            "delete": [checkpoint.name for checkpoint in self.checkpoints],
            "files": [self.relative(file.path) for file in self.files],
            "bytes": self.freed,
            "left": self.left,
            "state_bytes": self.state_bytes,
            "by_weights": self.by_weights,
            "young": self.young,
        }

    def relative(self, path: Path) -> str:
        """A file's place in the run's folder."""
        return Path(os.path.relpath(path, self.run.path)).as_posix()


def plan_pruning(run: Path, scan: ScanOptions, options: PruneOptions) -> Plan:
    """What to delete of one run by its last scan. Reads headers only.

    `run` is named as for `pick_checkpoint`.

    Raises:
        UsageError: there is no such run, or no such checkpoint to keep.
        EvidenceError: nothing may be deleted; the message says why.
    """
    found, _ = find_run(run, scan)
    name = stored_name(scan.out, found)
    measured = load_measured(scan.out / name) if name else None
    verdict = stored_verdict(scan.out / name) if name else None
    if name is None or measured is None or verdict is None:
        raise EvidenceError(f"{found.name}: no scan of it is stored in {scan.out}", f"lora-forensics scan {run}")
    found = replace(found, name=name)
    reason = _unproven(verdict) or _changed(found, measured, verdict)
    if reason:
        raise EvidenceError(f"{found.name}: nothing is deleted: {reason}")
    keep = _keep(found, verdict, options)
    going = [checkpoint for checkpoint in found.checkpoints if checkpoint.name not in keep]
    left = {checkpoint.name: why for checkpoint in going if (why := _untouchable(found, checkpoint))}
    going = [checkpoint for checkpoint in going if checkpoint.name not in left]
    staying = [c for c in (*found.checkpoints, *found.unplaced) if c not in going]
    files = list(_unfinished(found, scan.out / name))
    files += [file for checkpoint in going for file in _own_files(found, checkpoint, staying)]
    states = list(_states(found, going, {os.path.realpath(file.path) for file in files}))
    files += states if options.whole_folders else []
    rest = 0 if options.whole_folders else sum(file.size for file in states)
    return Plan(found, scan.out / name, verdict, keep, tuple(files), left, rest, _young(found, options.min_age))


def _unproven(verdict: Verdict) -> str:
    """Why a verdict says nothing to delete by; '' if it does."""
    if verdict.keep is None:
        return f"the verdict names no checkpoint to keep ({verdict.message or verdict.status})"
    if verdict.status not in _ENOUGH and verdict.keep.rests_on not in _EVIDENCE:
        return f"the verdict is {verdict.status}, and no held-out loss stands behind its pick"
    return ""


def _changed(run: Run, measured: Measured, verdict: Verdict) -> str:
    """How the files differ from those that the last scan measured; '' if they do not."""
    there = {checkpoint.name: checkpoint.fingerprint for checkpoint in run.checkpoints}
    known = {name: marks[0] for name, marks in measured.notes.measured.items() if name not in measured.notes.pruned}
    new, gone = sorted(there.keys() - known.keys()), sorted(known.keys() - there.keys())
    other = sorted(name for name in there.keys() & known.keys() if there[name] != known[name])
    for names, what in ((new, "is new"), (gone, "is gone"), (other, "has changed")):
        if names:
            more = f", as {len(names) - 1} more" if len(names) > 1 else ""
            return f"{names[0]} {what} since the last scan{more}: scan again"
    if verdict.checkpoints != len(measured.checkpoints):
        return "the verdict is older than the tables beside it: scan again"
    if verdict.keep is not None and verdict.keep.checkpoint not in there:
        return f"the checkpoint to keep, {verdict.keep.checkpoint}, is not there: scan again"
    return ""


def _young(run: Run, minutes: float) -> str:
    """Why the run may still be written to; '' if it is old enough."""
    paths = [*(c.path for c in (*run.checkpoints, *run.unplaced)), *(skipped.path for skipped in run.skipped)]
    newest = max((path.stat().st_mtime for path in paths if path.exists()), default=0.0)
    age = (time.time() - newest) / 60
    if minutes <= 0 or age >= minutes:
        return ""
    return f"it was written to {max(age, 0):.0f} minutes ago and may still be in training (--min-age {minutes:g})"


def _keep(run: Run, verdict: Verdict, options: PruneOptions) -> dict[str, str]:
    """Checkpoints that stay, in order, and why."""
    names = [checkpoint.name for checkpoint in run.checkpoints]
    why: dict[str, str] = {}
    pick = names.index(verdict.keep.checkpoint) if verdict.keep else 0
    why[names[pick]] = f"the pick ({verdict.keep.rests_on if verdict.keep else ''})"
    for candidate in verdict.candidates:
        why.setdefault(candidate.checkpoint, f"candidate: {candidate.why}")
    if verdict.turning_point:
        why.setdefault(verdict.turning_point.checkpoint, "the turning point")
    why.setdefault(names[-1], "the last")
    for name in names[max(pick - 1, 0) : pick + 2]:
        why.setdefault(name, "neighbour of the pick")
    for wanted in options.keep:
        for checkpoint in named(run.checkpoints, wanted):
            why.setdefault(checkpoint.name, "--keep")
    for checkpoint in run.checkpoints:
        if options.keep_every and (checkpoint.step or 0) % options.keep_every == 0:
            why.setdefault(checkpoint.name, f"--keep-every {options.keep_every}")
    return {name: why[name] for name in names if name in why}


def _untouchable(run: Run, checkpoint: Checkpoint) -> str:
    """Why a file is left alone though it could go; '' if it can."""
    try:
        found = checkpoint.path.lstat()
    except OSError as error:
        return f"cannot be looked at: {error.strerror or error}"
    real = os.path.realpath(checkpoint.path)
    if stat.S_ISLNK(found.st_mode):
        return "is a link; the file that it leads to is not part of the run's folder"
    if real != os.path.normpath(os.path.join(os.path.realpath(run.path), checkpoint.name)) or ".." in checkpoint.name:
        return "lies outside of the run's folder"
    if found.st_nlink > 1:
        return f"has {found.st_nlink - 1} other name on this disk (hard link): deleting it frees nothing"
    if not found.st_mode & stat.S_IWUSR:
        return "is write-protected"
    return ""


def _own_files(run: Run, checkpoint: Checkpoint, staying: Iterable[Checkpoint]) -> Iterator[Doomed]:
    """The tensors of a checkpoint, and the configuration that was scanned with them if it is of no other."""
    yield _doomed(checkpoint.path, checkpoint, weights=True)
    config = checkpoint.config
    shared = config is None or any(other.config == config for other in staying)
    if config and not shared and config.parent == checkpoint.path.parent != run.path and _plain(config):
        yield _doomed(config, checkpoint)


def _states(run: Run, going: Iterable[Checkpoint], doomed: set[str]) -> Iterator[Doomed]:
    """What trainers write beside an adapter, in folders in which nothing else is of use when the adapter is gone."""
    tops = {Path(c.name).parts[0]: c for c in going if len(Path(c.name).parts) > 1}
    for top, checkpoint in tops.items():
        below = [Path(folder) / name for folder, _, names in os.walk(run.path / top) for name in names]
        rest = [path for path in below if os.path.realpath(path) not in doomed]
        states = [path for path in rest if path.parent == run.path / top and COMPANIONS.fullmatch(path.name)]
        if any(p.name.endswith(TENSOR_FILES) or p.name == CONFIG for p in rest if p not in states):
            continue  # another adapter lives there
        yield from (_doomed(path, checkpoint) for path in sorted(states) if _plain(path))


def _unfinished(run: Run, folder: Path) -> Iterator[Doomed]:
    """What an interrupted pruning has left beside adapters that it deleted."""
    there = {checkpoint.name for checkpoint in (*run.checkpoints, *run.unplaced)}
    for entry in logged(folder):
        path, name = run.path / str(entry.get("file")), str(entry.get("checkpoint"))
        same_folder = path.parent == (run.path / name).parent != run.path and ".." not in path.parts
        ours = path.name == CONFIG or COMPANIONS.fullmatch(path.name)
        begun = entry.get("state") in ("planned", "deleting") and name in pruned_names(folder) - there
        if begun and ours and same_folder and path.exists() and _plain(path):
            file = _doomed(path, Checkpoint(path, name, entry.get("step")))
            if file.size == entry.get("bytes"):
                yield file


def _plain(path: Path) -> bool:
    """A file of its own that is not protected: no link, no second name."""
    found = path.lstat()
    return stat.S_ISREG(found.st_mode) and found.st_nlink == 1 and bool(found.st_mode & stat.S_IWUSR)


def _doomed(path: Path, checkpoint: Checkpoint, *, weights: bool = False) -> Doomed:
    found = path.lstat()
    return Doomed(path, checkpoint, found.st_size, found.st_mtime_ns, weights)


@dataclass(frozen=True, slots=True)
class Pruned:
    """What deleting did."""

    deleted: tuple[str, ...]
    """Files, relative to the run's folder."""
    freed: int
    """Bytes."""
    failed: dict[str, str]
    """File to why it is still there."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        return {"deleted": list(self.deleted), "freed": self.freed, "failed": self.failed}


def delete(plan: Plan, by_weights: bool = False) -> Pruned:
    """Delete what a plan names, each file looked at once more and logged before and after.

    Raises:
        EvidenceError: the run may still be in training, or only the weights speak for the pick, and `by_weights` does
            not say that this is enough.
        SeriesError: the log cannot be written; nothing has been deleted.
    """
    if plan.young:
        raise EvidenceError(f"{plan.run.name}: nothing is deleted: {plan.young}")
    if plan.by_weights and not by_weights:
        raise EvidenceError(
            f"{plan.run.name}: nothing is deleted: the pick rests on the weights alone, which in tests were not shown "
            "to find a better checkpoint than the middle one",
            "score a few with `lora-forensics probe`, or say --by-weights",
        )
    log = _Log(plan)
    deleted: list[str] = []
    failed: dict[str, str] = {}
    kept: set[str] = set()
    for place, file in enumerate(plan.files):
        name = plan.relative(file.path)
        folder = Path(file.checkpoint.name).parts[0]
        try:
            reason = "its adapter is still there" if folder in kept and not file.weights else _deleted(file, log)
            if not reason:
                deleted.append(name)
                log.note(file, "deleted")
                continue
            failed[name] = reason
            kept.add(folder)
            log.note(file, "failed", reason=reason)
        except SeriesError as error:  # without a log nothing more is deleted
            rest = (plan.relative(other.path) for other in plan.files[place:])
            failed |= {name: error.message for name in rest if name not in deleted}
            break
    _remove_empty(plan)
    freed = sum(file.size for file in plan.files if plan.relative(file.path) in deleted)
    return Pruned(tuple(deleted), freed, failed)


def _deleted(file: Doomed, log: _Log) -> str:
    """Why a file could not be deleted; '' if it is gone."""
    try:
        log.note(file, "deleting", sha256=_sha256_of_unchanged(file))
        file.path.unlink()
    except CheckpointError as error:
        return error.message
    except OSError as error:
        return error.strerror or str(error)
    return ""


class _Log:
    """pruned.json: what was planned, is being deleted, and is deleted."""

    def __init__(self, plan: Plan) -> None:
        self._path = plan.folder / PRUNED
        before = read_object(self._path) or {}
        self._entries = {
            file.path: {
                "file": plan.relative(file.path),
                "checkpoint": file.checkpoint.name,
                "step": file.checkpoint.step,
                "weights": file.weights,
                "bytes": file.size,
                "fingerprint": file.checkpoint.fingerprint if file.weights else None,
                "sha256": None,
                "state": "planned",
                "time": _now(),
            }
            for file in plan.files
        }
        new = {entry["file"] for entry in self._entries.values()}
        old = [entry for entry in logged(plan.folder) if entry.get("file") not in new]
        self._document = {
            "schema": SCHEMA,
            "run": plan.run.name,
            "path": plan.run.path.resolve().as_posix(),
            "versions": versions(),
            "kept": plan.keep,
            "verdict": before.get("verdict") or plan.verdict.to_dict(),
            "files": [*old, *self._entries.values()],
        }
        self._write()

    def note(self, file: Doomed, state: str, **more: Any) -> None:
        """What becomes of a file."""
        self._entries[file.path].update(state=state, time=_now(), **more)
        self._write()

    def _write(self) -> None:
        write_text(self._path, to_json(self._document))


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def _sha256_of_unchanged(file: Doomed) -> str:
    """The file's hash.

    Raises:
        CheckpointError: it is not the file that was planned for.
        OSError: it cannot be read.
    """
    found = file.path.lstat()
    if (found.st_size, found.st_mtime_ns) != (file.size, file.modified) or not stat.S_ISREG(found.st_mode):
        raise CheckpointError("has changed since the plan was made")
    checkpoint = file.checkpoint
    if file.weights:
        again = stat_checkpoint(file.path, checkpoint.name, checkpoint.step, checkpoint.config)
        if again.fingerprint != checkpoint.fingerprint:
            raise CheckpointError("has changed since the last scan")
    with file.path.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def _remove_empty(plan: Plan) -> None:
    """Folders of deleted checkpoints in which nothing is left."""
    root = os.path.realpath(plan.run.path)
    for folder in {file.path.parent for file in plan.files}:
        while os.path.realpath(folder) != root and not folder.is_symlink():
            try:
                folder.rmdir()
            except OSError:
                break
            folder = folder.parent  # noqa: PLW2901 (climbing)
