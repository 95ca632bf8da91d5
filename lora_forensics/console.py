"""What the terminal shows while a scan works: a progress bar with time left; nothing in a pipe."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from lora_forensics.measure import Progress

if TYPE_CHECKING:
    from rich.progress import Progress as Bar


class _BarProgress(Progress):
    """Draws on a rich progress bar."""

    def __init__(self, bar: Bar) -> None:
        self._bar = bar
        self._task = bar.add_task("looking for runs", total=None)

    def begin(self, run: str, checkpoints: int) -> None:
        """Another run on the same bar; one that is at its end starts again."""
        from rich.markup import escape

        from lora_forensics.reports.text import plain

        task = self._bar.tasks[0]
        if task.total is None or task.finished:
            self._bar.reset(self._task, total=0)
        self._bar.update(self._task, total=(task.total or 0) + checkpoints, description=escape(plain(run)))

    def advance(self, checkpoints: float) -> None:
        """Move the bar."""
        self._bar.advance(self._task, checkpoints)


@contextmanager
def console_progress(enabled: bool) -> Iterator[Progress]:
    """A progress bar on stderr, if that is a terminal."""
    if not enabled or not sys.stderr.isatty():
        yield Progress()
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("checkpoints"),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=Console(stderr=True), transient=True) as bar:
        yield _BarProgress(bar)


def use_color() -> bool:
    """Whether stdout is a terminal that wants colour (https://no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
