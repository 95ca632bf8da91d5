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


def check_hash(base: BaseModel, reference: BaseReference) -> Finding | None:
    """A finding if the base's file has another hash than the run recorded; None where that cannot be told."""
    if len(base.files) != 1:
        return None
    path = base.files[0]
    short, full = _hexadecimal(reference.short_hash), _hexadecimal(reference.sha256)
    if short and short != _short_hash(path):
        return _differs(path, short, _short_hash(path))
    if full and (not short or path.stat().st_size < _FULL_HASH_LIMIT):
        with path.open("rb") as file:
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
    return Finding(
        "base-hash-differs",
        "warning",
        f"{path} is not the file that the run recorded: its hash is {actual[:10]}, recorded is {recorded[:10]}",
        "pass the base model that the run was trained on with --base; similarities to another one mean little",
    )
