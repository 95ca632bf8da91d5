"""Logs of one line a record: JSON lines and CSV. The last line may be cut off while it is written."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lora_forensics.values import parse_object


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a file, line by line; lines that are none are left out."""
    try:
        with path.open("r", encoding="utf-8", errors="replace") as file:
            for line in file:
                if (record := parse_object(line)) is not None:
                    yield record
    except OSError:
        return


def csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """The rows of a file with a header; numbers are text as they stand there."""
    try:
        with path.open("r", encoding="utf-8", errors="replace", newline="") as file:
            for row in csv.DictReader(file):
                yield {key: value for key, value in row.items() if isinstance(key, str) and isinstance(value, str)}
    except (OSError, csv.Error):
        return
