"""What the terminal shows while a scan works: a progress bar with time left; nothing in a pipe."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from lora_forensics.measure import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

    from lora_forensics.estimate import Estimate


_LONG = 60
"""Seconds from which on a scan is long."""


class _Lines(Progress):
    """Says before a long piece of work what it will take; all that a log gets."""

    def expect(self, run: str, estimate: Callable[[], Estimate]) -> None:
        """One line, if it is long."""
        from lora_forensics.errors import LoraForensicsError
        from lora_forensics.reports.text import count, plain

        try:
            found = estimate()
        except LoraForensicsError:  # told where the file is measured
            return
        if found.seconds >= _LONG:
            minutes = (
                count(round(found.seconds / 60), "minute") if found.seconds < 5400 else f"{found.seconds / 3600:.0f} h"
            )
            self.say(
                f"{plain(run)}: about {minutes} and {found.memory / 1e9:.1f} GB of memory for "
                f"{count(found.modules, 'module')} at {count(found.checkpoints, 'checkpoint')} "
                f"({found.to_read / 1e9:.1f} GB to read)"
            )

    def say(self, line: str) -> None:
        """Print it."""
        click.echo(line, err=True)


class _BarProgress(_Lines):
    """Draws on a rich progress bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("looking for runs", total=None)

    def begin(self, run: str, checkpoints: int) -> None:
        """Another run on the same bar; one that is at its end starts again."""
        from lora_forensics.reports.text import plain

        task = self._bar.tasks[0]
        if task.total is None or task.finished:
            self._bar.reset(self._task, total=0)
        self._bar.update(self._task, total=(task.total or 0) + checkpoints, description=plain(run))

    def advance(self, checkpoints: float) -> None:
        """Move the bar."""
        self._bar.advance(self._task, checkpoints)

    def say(self, line: str) -> None:
        """Print it above the bar."""
        self._bar.console.print(line, markup=False, highlight=False)


@contextmanager
def console_progress(enabled: bool) -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal; else lines of what takes long."""
    if not enabled or not sys.stderr.isatty() or os.environ.get("TERM") == "dumb":
        yield _Lines() if enabled else Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("checkpoints"),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True, emoji=False)
    try:
        with Bar(*columns, console=console, transient=True) as bar:
            yield _BarProgress(bar)
    finally:
        console.show_cursor()  # Ctrl-C while the bar begins would leave it hidden


def use_color() -> bool:
    """Whether stdout wants colour: NO_COLOR, then FORCE_COLOR, then whether it is a terminal (https://no-color.org)."""
    if os.environ.get("NO_COLOR"):
        return False
    forced = os.environ.get("FORCE_COLOR")
    if forced:
        return forced != "0"
    return sys.stdout.isatty() and os.environ.get("TERM") != "dumb"


def terminal_width() -> int:
    """Cells of a line: as wide as the terminal, within bounds; 80 in a pipe."""
    return max(40, min(shutil.get_terminal_size((80, 24)).columns, 200))
