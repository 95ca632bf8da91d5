"""What every report is."""

from __future__ import annotations

from typing import Protocol

from lora_forensics.records import Summary


class Report(Protocol):
    """Turns a summary into text; options belong to the variant's constructor, writing and exit codes to the caller."""

    filename: str | None
    """Name of the file in OUT; None for a report that is printed."""

    def render(self, summary: Summary) -> str:
        """The whole report, ending with a newline."""
        ...
