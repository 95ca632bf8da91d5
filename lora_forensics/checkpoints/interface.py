"""What a trainer's layout is to discovery."""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from lora_forensics.checkpoints.history import Curve
from lora_forensics.errors import CheckpointError
from lora_forensics.records import Checkpoint, Finding, Run, Skipped
from lora_forensics.remote import scanned
from lora_forensics.tensors import SAFETENSORS, Header, file_fingerprint, read_header, same_content


@dataclass(slots=True)
class Folder:
    """One folder of the searched tree, read once; trainers take from it what is theirs."""

    path: Path
    files: dict[str, Path] = field(default_factory=dict)
    """File names not yet taken."""
    folders: dict[str, Path] = field(default_factory=dict)
    """Sub-folder names not yet taken; the rest is searched next."""
    insisted: bool = False
    """One trainer was asked for by name: it takes what fits its layout without the marks that tell it from others."""
    _headers: dict[str, Header | CheckpointError] = field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Folder:
        """List a folder.

        Raises:
            OSError: it cannot be read.
        """
        folder = cls(path)
        with scanned(path) as entries:
            for entry in sorted(entries, key=lambda entry: entry.name):
                if entry.is_dir():
                    folder.folders[entry.name] = path / entry.name
                elif entry.is_symlink() and _neighbour(path, path / entry.name):
                    continue
                elif entry.is_file() or entry.is_symlink():  # a pipe or socket would block whoever opens it
                    folder.files[entry.name] = path / entry.name
        return folder

    def header(self, name: str) -> Header | CheckpointError:
        """The header of a safetensors file here, read once; the error if it is damaged."""
        if name not in self._headers:
            try:
                self._headers[name] = read_header(self.path / name)
            except CheckpointError as error:
                self._headers[name] = error
        return self._headers[name]


def _neighbour(folder: Path, link: Path) -> bool:
    """Whether a link leads to a file of its kind in the same folder, which is read under its own name."""
    place, name = os.path.split(os.path.realpath(link))
    alike = os.path.splitext(name)[1] == link.suffix
    return alike and place == os.path.realpath(folder) and os.path.exists(link)


def entries(folder: Path) -> tuple[set[str], set[str]]:
    """Names of the files and of the folders in a folder; none if it cannot be read."""
    try:
        with scanned(folder) as found:
            known = [(entry.name, entry.is_dir()) for entry in found]
    except OSError:
        return set(), set()
    return {name for name, is_folder in known if not is_folder}, {name for name, is_folder in known if is_folder}


@dataclass(frozen=True, slots=True)
class Trap:
    """One way in which a trainer's files mislead whoever reads them, and what is done about it."""

    text: str
    verified: bool = True
    """A test holds it, on files that the trainer's own code wrote or in their exact layout."""


class Trainer(Protocol):
    """One trainer family: how its files lie, and what they tell."""

    name: str
    """As `--trainer` and `formats` spell it."""
    about: str
    """What writes this layout, in one line."""
    recognised: str
    """The files that it is recognised by, in one line."""
    traps: tuple[Trap, ...]
    """For `formats`."""
    save_more_often: str
    """The setting that saves more checkpoints, and the limit that deletes them, in one sentence."""

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """The runs of this trainer whose checkpoints lie in `folder` or right below it.

        What belongs to them, damaged files included, is removed from `folder`. Names of runs are relative to it; ''
        is the folder's own name.
        """
        ...


def with_rates(checkpoints: Sequence[Checkpoint], rates: Curve) -> tuple[Checkpoint, ...]:
    """Placed checkpoints with learning rate and dose."""
    doses = rates.sums([checkpoint.step or 0 for checkpoint in checkpoints])
    return tuple(
        replace(checkpoint, learning_rate=rates.between(checkpoint.step or 0), dose=dose)
        for checkpoint, dose in zip(checkpoints, doses, strict=True)
    )


def stat_checkpoint(path: Path, name: str, step: int | None, config: Path | None = None) -> Checkpoint:
    """A checkpoint with size, time and fingerprint filled in; the fingerprint covers its configuration.

    Raises:
        CheckpointError: the file is damaged.
    """
    if path.suffix == SAFETENSORS:
        header = read_header(path)
        if header.size == header.data_start:
            raise CheckpointError(f"{path}: {_EMPTY}", rule="empty-tensors")
        found = from_header(path, name, step, header)
    else:
        fingerprint = file_fingerprint(path)
        stat = path.stat()
        found = Checkpoint(path, name, step, size=stat.st_size, modified=stat.st_mtime, fingerprint=fingerprint)
    if config is None:
        return found
    fingerprint = found.fingerprint
    with contextlib.suppress(OSError):  # measuring says what is wrong with it
        fingerprint = hashlib.sha256(fingerprint.encode() + config.read_bytes()).hexdigest()[:16]
    return replace(found, config=config, fingerprint=fingerprint)


def unit_scale(header: Header) -> float | None:
    """1 where no tensor holds an alpha, of trainers whose alpha is the rank then."""
    return None if any(key.endswith(".alpha") for key in header.infos) else 1.0


_EMPTY = "its tensors are empty: saved under DeepSpeed ZeRO-3 without gathering the weights, or without an adapter"


def from_header(path: Path, name: str, step: int | None, header: Header) -> Checkpoint:
    """A checkpoint whose header has been read."""
    return Checkpoint(path, name, step, size=header.size, modified=header.modified, fingerprint=header.fingerprint)


_LISTED = 1
"""Copies that a message lists before it says how many more there are."""


@dataclass(frozen=True, slots=True)
class Placed:
    """Checkpoints in order, each step once; and what had to stay out."""

    checkpoints: tuple[Checkpoint, ...]
    unplaced: tuple[Checkpoint, ...]
    findings: tuple[Finding, ...]


def place(found: list[Checkpoint]) -> Placed:
    """Order checkpoints by step; of several at one step the first given stays.

    Copies with equal tensors are dropped by content, others at a step that is taken, or without a step, are listed.
    """
    by_step: dict[int, Checkpoint] = {}
    rest: list[Checkpoint] = []
    for checkpoint in found:
        if checkpoint.step is None or checkpoint.step in by_step:
            rest.append(checkpoint)
        else:
            by_step[checkpoint.step] = checkpoint
    ordered = tuple(by_step[step] for step in sorted(by_step))
    unplaced, findings, copies = [], [], []
    for checkpoint in rest:
        same = [by_step[checkpoint.step]] if checkpoint.step is not None else reversed(ordered)
        twin = next((other for other in same if same_content(checkpoint.path, other.path)), None)
        if twin is None:
            unplaced.append(checkpoint)
            findings.append(_left_out(checkpoint, by_step))
        else:
            copies.append(f"{checkpoint.name} = {twin.name}")
    if copies:
        many = f"; and {len(copies) - _LISTED} more" if len(copies) > _LISTED else ""
        message = f"files with the same tensors count once: {'; '.join(copies[:_LISTED])}{many}"
        findings.append(Finding("duplicate", "info", message))
    return Placed(ordered, tuple(unplaced), tuple(findings))


def _left_out(checkpoint: Checkpoint, by_step: dict[int, Checkpoint]) -> Finding:
    if checkpoint.step is None:
        return Finding(
            "step-unknown",
            "warning",
            f"{checkpoint.name}: its training step cannot be known; it is left out of the series",
            "keep what tells it: the trainer's state or log beside it, or the file's metadata",
        )
    other = by_step[checkpoint.step].name
    return Finding(
        "same-step",
        "warning",
        f"{checkpoint.name} and {other} are both of step {checkpoint.step} and differ; the first is left out",
        "two trainings may have written into one folder: give each its own",
    )
