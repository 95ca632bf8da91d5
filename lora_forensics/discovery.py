"""A folder tree to runs: which files are checkpoints of one training, and why the others are not. Headers only."""

from __future__ import annotations

import difflib
import os
import re
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from lora_forensics.adapters import looks_like_adapter
from lora_forensics.checkpoints import TRAINERS, Folder, Trainer
from lora_forensics.errors import CheckpointError, UsageError
from lora_forensics.records import Checkpoint, Run, Skipped
from lora_forensics.remote import fresh, place
from lora_forensics.rules import hint_of
from lora_forensics.tensors import SAFETENSORS, TENSOR_FILES

_STATES = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state|random_states|ema|trainer|recipe_state)")
_CHECKPOINT = re.compile(r"checkpoint-\d+")
_UNSAFE = re.compile(r'[<>:"|?*\\\x00-\x1f\x7f\ud800-\udfff]|[. ]+$')
_DEVICE = re.compile(r"(?:con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³])(?: *\..*)?", re.IGNORECASE)
_LONGEST = 200
"""Bytes of a folder's name: systems take 255, and a number may follow."""


def discover_runs(
    path: str | Path, trainer: str | None = None, exclude: Iterable[Path] = ()
) -> Iterator[Run | Skipped]:
    """The runs below a folder, and every tensor file that belongs to none, with the reason.

    Args:
        path: the folder; its own checkpoints count too.
        trainer: look for the layout of this one only (a name in `checkpoints.TRAINERS`).
        exclude: folders that are not entered, for example the output of an earlier scan.

    Raises:
        UsageError: `path` does not exist, is a single file, or is itself one checkpoint; the hint says what to pass.
    """
    root = fresh(place(path))
    _check_root(root)
    if trainer is not None and trainer not in TRAINERS:
        raise UsageError(f"no trainer is called {trainer!r}", f"choose from {', '.join(TRAINERS)}")
    trainers = [TRAINERS[trainer]] if trainer else list(TRAINERS.values())
    found = list(_walk(root, trainers, {Path(os.path.realpath(p)) for p in exclude}, trainer is not None))
    runs = [entry for entry in found if isinstance(entry, Run)]
    claims = Counter(os.path.realpath(c.path) for run in runs for c in (*run.checkpoints, *run.unplaced))
    names: set[str] = set()
    taken: set[str] = set()
    for run in (_undisputed(run, claims) for run in runs):
        if not _writable(run):
            yield Skipped(run.path, "its files' names are not UTF-8 and fit no table: rename them")
            continue
        taken.update(os.path.realpath(checkpoint.path) for checkpoint in (*run.checkpoints, *run.unplaced))
        name = _unique(_name(run, root), names)
        names.add(name.lower())  # file systems that ignore case
        yield replace(run, name=name)
    # a run may claim a file of another folder, which was read before the run was found
    yield from (e for e in found if isinstance(e, Skipped) and os.path.realpath(e.path) not in taken)


def _undisputed(run: Run, claims: Counter[str]) -> Run:
    """Without files elsewhere that several runs claim, as of OneTrainer's workspaces with one destination."""

    def own(checkpoint: Checkpoint) -> bool:
        return not checkpoint.name.startswith("../") or claims[os.path.realpath(checkpoint.path)] == 1

    return replace(run, checkpoints=tuple(filter(own, run.checkpoints)), unplaced=tuple(filter(own, run.unplaced)))


def _writable(run: Run) -> bool:
    """Whether the checkpoints' names can be written as text; names on Linux may be any bytes."""
    return not any("\ud800" <= letter <= "\udfff" for checkpoint in run.checkpoints for letter in checkpoint.name)


def nothing_found(paths: Iterable[Path], skipped: Sequence[Skipped]) -> UsageError:
    """The error for folders without any run: what lies there instead, and what a run looks like."""
    where = ", ".join(str(path) for path in paths)
    reasons = "; ".join(f"{entry.path}: {entry.reason}" for entry in skipped[:3])
    more = f"; and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    found = f"; left out: {reasons}{more}" if skipped else ""
    if damaged := next((entry.rule for entry in skipped if entry.rule), ""):
        return UsageError(f"no run found in {where}{found}", hint_of(damaged))
    hint = "a run is a folder with checkpoint-<step>/ folders (PEFT) or numbered .safetensors files (kohya);"
    hint += " lora-forensics formats lists all layouts"
    return UsageError(f"no run found in {where}{found}", hint)


def _walk(root: Path, trainers: Sequence[Trainer], excluded: set[Path], insisted: bool) -> Iterator[Run | Skipped]:
    seen: set[Path] = set()
    taken: set[Path] = set()
    pending, links = [root], deque[Path]()
    while pending or links:
        path = pending.pop() if pending else links.popleft()  # when all that they can lead to is known
        real = Path(os.path.realpath(path))  # resolve() raises on a link to itself
        if real in seen or real in excluded or not taken.isdisjoint((real, *real.parents)):  # links may form loops
            continue
        seen.add(real)
        try:
            folder = Folder.read(path)
            folder.insisted = insisted
        except OSError as error:
            yield Skipped(path, f"folder cannot be read: {error.strerror or error}")
            continue
        names = set(folder.folders)
        for trainer in trainers:
            yield from trainer.find(folder)
        taken.update(real / name for name in names - folder.folders.keys())
        yield from _leftovers(folder)
        below = [path for name, path in folder.folders.items() if not name.startswith(".")]
        links.extend(path for path in below if path.is_symlink())
        pending.extend(path for path in reversed(below) if not path.is_symlink())


def _leftovers(folder: Folder) -> Iterator[Skipped]:
    """Tensor files that no trainer took."""
    for name, path in folder.files.items():
        if not name.endswith(TENSOR_FILES) or name.startswith("."):
            continue
        if _STATES.match(name):
            yield Skipped(path, "training state", expected=True)
        elif not name.endswith(SAFETENSORS):
            yield Skipped(path, "a pickle outside the layout of a known trainer: not opened", expected=True)
        else:
            yield _explain(path, folder.header(name))


def _explain(path: Path, header: object) -> Skipped:
    if isinstance(header, CheckpointError):
        return Skipped.because(path, header)
    infos = header.infos  # type: ignore[attr-defined] # Header, the other member of the union
    if looks_like_adapter(infos):
        return Skipped(path, "an adapter, but not in the layout of a known trainer", rule="unplaced-adapter")
    return Skipped(path, f"no adapter: {len(infos)} tensors such as {next(iter(infos), 'none')!r}", expected=True)


def _check_root(root: Path) -> None:
    if root.is_file():
        run = root.absolute().parent
        run = run.parent if _CHECKPOINT.fullmatch(run.name) else run
        raise UsageError(
            f"{root} is one file; a verdict needs the checkpoints of a run side by side",
            f"scan its folder: lora-forensics scan {run if root.is_absolute() else os.path.relpath(run)}",
        )
    if not root.is_dir():
        near = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        match = difflib.get_close_matches(root.name, near, 1)
        raise UsageError(
            f"{root} does not exist", f"did you mean {root.parent / match[0]}?" if match else "check the path"
        )
    weights = [*root.glob("adapter_model.*"), *root.glob("pytorch_lora_weights.safetensors")]
    if _CHECKPOINT.fullmatch(root.resolve().name) and weights:
        raise UsageError(
            f"{root} is one checkpoint of a run; a verdict needs its neighbours",
            f"scan the run: lora-forensics scan {root.parent if root.is_absolute() else os.path.normpath(root / '..')}",
        )


def _name(run: Run, root: Path) -> str:
    """The run's place relative to what was searched, safe as a path on every system."""
    relative = os.path.relpath(run.path, root)
    parts = [part for part in Path(relative).parts if part not in (".", "..")]
    if run.name:
        parts.append(run.name)
    return "/".join(map(safe_name, parts)) or safe_name(root.resolve().name or "run")


def safe_name(part: str) -> str:
    """A folder's name that every system takes; Windows keeps some for devices, whatever their ending."""
    whole = _UNSAFE.sub("_", part).encode("utf-8")
    safe = whole[:_LONGEST].decode("utf-8", "ignore").rstrip(". ") or "_"
    return f"_{safe}" if _DEVICE.fullmatch(safe) else safe


def _unique(name: str, taken: set[str]) -> str:
    candidate, number = name, 2
    while candidate.lower() in taken:
        candidate, number = f"{name}-{number}", number + 1
    return candidate
