"""Values from files that anybody may have written: JSON objects and numbers, bounded, or nothing."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

_LARGEST = 2**63 - 1
"""What a table can hold as a whole number."""


def read_object(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file; None if it cannot be read or is something else. Bare NaN tokens are taken."""
    try:
        return parse_object(path.read_text("utf-8"))
    except (OSError, ValueError):
        return None


def parse_object(text: str) -> dict[str, Any] | None:
    """The object in a JSON text; None if it is no JSON, too deep, or something else."""
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return document if isinstance(document, dict) else None


def as_number(value: object) -> float | None:
    """A finite number that is no boolean; None for all else."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) else None


def as_count(value: object) -> int | None:
    """A whole number of at least 0 that a table can hold; None for all else."""
    number = as_number(value)
    return int(number) if number is not None and 0 <= number < _LARGEST else None


def spelt_number(text: str | None) -> float | None:
    """The finite number that a text spells; None for all else."""
    try:
        return as_number(float(text or ""))
    except ValueError:
        return None
