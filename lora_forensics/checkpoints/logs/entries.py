"""Logs of one record a line that were appended to: JSON objects, as the Hugging Face Trainer names things, and CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.logs import unreadable
from lora_forensics.records import Finding
from lora_forensics.values import as_count, parse_object

Entry = Mapping[str, Any]
"""What was logged at one step, under the Trainer's names: step, epoch, loss, learning_rate, eval_loss, ..."""


def read_entries(path: Path) -> tuple[list[dict[str, Any]], tuple[Finding, ...]]:
    """The objects of a file, in order; a torn last line is no damage, any other makes one finding."""
    found, broken = [], 0
    try:
        lines = path.read_text("utf-8", errors="replace").splitlines()
    except OSError as error:
        return [], (unreadable(str(path), error.strerror or str(error)),)
    for number, line in enumerate(lines, 1):
        entry = parse_object(line) if line.strip() else {}
        if entry is None:
            broken += number < len(lines)
        elif entry:
            found.append(entry)
    return found, (unreadable(str(path), f"{broken} lines are no JSON objects and are left out"),) if broken else ()


def continued(entries: Iterable[Entry]) -> list[Entry]:
    """What counts of a log that was appended to: where steps go back, training went on from there, or began anew."""
    kept: list[Entry] = []
    for entry in entries:
        step = as_count(entry.get("step"))
        if step is None:
            continue
        while kept and (as_count(kept[-1].get("step")) or 0) > step:
            kept.pop()
        kept.append(entry)
    return kept


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a file with a header; numbers are text as they stand there."""
    try:
        with path.open("r", encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                yield {key: value for key, value in row.items() if isinstance(key, str) and isinstance(value, str)}
    except (OSError, csv.Error):
        return
