"""Searching a folder, as the tests of trainers do."""

from __future__ import annotations

from pathlib import Path

from lora_forensics.discovery import discover_runs
from lora_forensics.records import Run, Skipped


def search(path: Path, trainer: str | None = None) -> tuple[list[Run], list[Skipped]]:
    """Runs, and what belongs to none."""
    found = list(discover_runs(path, trainer))
    return [f for f in found if isinstance(f, Run)], [f for f in found if isinstance(f, Skipped)]


def only(path: Path) -> Run:
    """The one run of a folder."""
    (run,), _ = search(path)
    return run


def rules(run: Run) -> list[str]:
    """The ids of its findings."""
    return [finding.rule for finding in run.findings]
