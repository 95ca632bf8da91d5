"""summary.json: the summary's document, for scripts."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from lora_forensics.records import Summary

_SURROGATES = re.compile("[\ud800-\udfff]")


class JsonReport:
    """The contract's summary.json: numbers that are undefined are null, so that every parser reads it."""

    filename: str | None = "summary.json"

    def render(self, summary: Summary) -> str:
        """The document, indented, in UTF-8 text."""
        return to_json(summary.to_dict())


def to_json(document: dict[str, Any]) -> str:
    """A document as every parser reads it: null for NaN and infinities, UTF-8 throughout."""
    text = json.dumps(_finite(document), ensure_ascii=False, indent=2, allow_nan=False)
    # A file name that is no UTF-8 reaches us with lone surrogates, which no encoder accepts but JSON can escape.
    return _SURROGATES.sub(lambda found: f"\\u{ord(found[0]):04x}", text) + "\n"


def _finite(value: Any) -> Any:
    """The same document with null for NaN and infinities."""
    if isinstance(value, dict):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
