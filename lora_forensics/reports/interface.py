"""What every report is."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

from lora_forensics.records import Summary
from lora_forensics.redaction import Redaction


class Report(Protocol):
    """Turns a summary into text; options belong to the variant's constructor, writing and exit codes to the caller."""

    filename: str | None
    """Name of the file in OUT; None for a report that is printed."""

    def render(self, summary: Summary) -> str:
        """The whole report, ending with a newline."""
        ...


@runtime_checkable
class PagedReport(Report, Protocol):
    """A report of several files."""

    def check(self) -> None:
        """Whether what it needs is installed: before the work, not after.

        Raises:
            UsageError: an extra is missing; the hint names it.
        """
        ...

    def pages(self, summary: Summary, hidden: Redaction | None = None) -> Iterator[tuple[str, str]]:
        """Its other files: place in OUT, and the whole text; to be shared, if `hidden` takes names out of them."""
        ...
