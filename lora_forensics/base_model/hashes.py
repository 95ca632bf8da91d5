"""Whether the base file at hand is the one that a run was trained on."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path

from lora_forensics.base_model.model import BaseModel
from lora_forensics.records import BaseReference, Finding

_FULL_HASH_LIMIT = 1 << 30
"""Larger files are not read through where the short hash can answer: 7 GB on every scan would cost more than the
rest of it. The short hash sees 64 KiB only: it tells another model, not another version with the same beginning."""

_COMMIT = re.compile(r"[0-9a-f]{40}")
_SNAPSHOT = re.compile(rf"/snapshots/({_COMMIT.pattern})(/|$)")


def check_hash(base: BaseModel, reference: BaseReference) -> Finding | None:
    """A finding if the base is another file or revision than the run recorded; None where that cannot be told."""
    return _check_revision(base, reference) or _check_files(base, reference)


def _check_revision(base: BaseModel, reference: BaseReference) -> Finding | None:
    """The commit of a folder in the Hugging Face cache, where the run recorded one too."""
    recorded = (reference.revision or "").lower()
    for path in base.paths:
        found = _SNAPSHOT.search(path.absolute().as_posix())
        if found and _COMMIT.fullmatch(recorded) and found[1] != recorded:
            return _finding(
                f"{path} is not the revision that the run recorded: it is {found[1]}, recorded is {recorded}"
            )
    return None


def _check_files(base: BaseModel, reference: BaseReference) -> Finding | None:
    """The hash of a single file; of several (text encoders beside a denoiser) one must have it."""
    if any(path.is_dir() for path in base.paths):
        return None
    short, full = _hexadecimal(reference.short_hash), _hexadecimal(reference.sha256)
    differing = None
    for path in base.files:
        different = _difference(path, short, full)
        if different is None:
            return None
        differing = differing or different
    return differing


def _difference(path: Path, short: str, full: str) -> Finding | None:
    if short and short != _short_hash(path):
        return _differs(path, short, _short_hash(path))
    if full and (not short or path.stat().st_size < _FULL_HASH_LIMIT):
        with path.open("rb", buffering=0) as file:
            actual = hashlib.file_digest(file, "sha256").hexdigest()
        if not actual.startswith(full):  # web UIs also write the first ten digits
            return _differs(path, full, actual)
    return None


def _hexadecimal(recorded: str | None) -> str:
    """The hash in lower case; empty for what is none (trainers write "None" too)."""
    return recorded.lower() if recorded and re.fullmatch(r"[0-9a-fA-F]{8,64}", recorded) else ""


def _short_hash(path: Path) -> str:
    """The old hash of web UIs and kohya: 64 KiB at 1 MiB."""
    with path.open("rb") as file:
        file.seek(0x100000)
        return hashlib.sha256(file.read(0x10000)).hexdigest()[:8]


def _differs(path: Path, recorded: str, actual: str) -> Finding:
    return _finding(
        f"{path} is not the file that the run recorded: its hash is {actual[:10]}, recorded is {recorded[:10]}"
    )


def _finding(message: str) -> Finding:
    return Finding(
        "base-hash-differs",
        "warning",
        message,
        "pass the base model that the run was trained on with --base; similarities to another one mean little",
    )
