"""The report that a person reads first: verdicts in the terminal."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lora_forensics.records import Finding, Skipped, Summary, Verdict
from lora_forensics.reports import text

if TYPE_CHECKING:
    from rich.console import Console

_INDENT = 2
_LABEL = 9
"""Width of the column of labels, its gap included."""
_NARROWEST = 20
_REASONS = 3
"""Reasons for skipping that are named before the rest is only counted."""

_STYLES = {"run": "bold", "keep": "bold green", "none": "yellow", "quiet": "dim", "error": "bold red"}
_STYLES |= {"warning": "yellow", "info": "cyan"}

_ORDER = {"error": 0, "warning": 1, "info": 2}
_MOST = 12
"""Lines of one run unless more are asked for, skipped files and what a path needs not counted."""

FINDING_LABELS = {"error": "error", "warning": "warning", "info": "note"}
"""Severity to the word before a finding."""


class TerminalReport:
    """One compact block a run: what it is, which file to keep and why, then what is worth knowing.

    Lines keep to `width` unless a path in them is longer than that: paths are never broken.
    """

    filename: str | None = None

    def __init__(self, width: int = 80, color: bool = False, verbose: bool = False) -> None:
        self._width = width
        self._color = color
        self._verbose = verbose

    def render(self, summary: Summary) -> str:
        """All runs, then what was skipped outside of them, then one line of totals."""
        page = Page(self._width, self._color)
        for verdict in summary.runs:
            self._run(page, verdict)
            page.blank()
        if self._skipped(page, summary.skipped):
            page.blank()
        where = f"; reports in {text.plain(summary.folder.as_posix())}/" if summary.folder else ""
        page.line(text.totals(summary) + where)
        return page.text()

    def _run(self, page: Page, verdict: Verdict) -> None:
        end = page.lines + _MOST
        page.head(text.plain(verdict.run) or ".", text.facts(verdict))
        self._verdict(page, verdict)
        left = sorted(text.untold(verdict), key=lambda finding: _ORDER.get(finding.severity, 0))
        while left and (self._verbose or page.lines + page.room(left[0].message) <= end - (len(left) > 1)):
            self._finding(page, left[0], end - (len(left) > 1))
            left.pop(0)
        if left:
            page.row("", f"{text.count(len(left), 'more finding')}: -v lists all", style="quiet")
        if self._verbose:
            self._details(page, verdict)
        self._skipped(page, verdict.skipped)

    def _verdict(self, page: Page, verdict: Verdict) -> None:
        if verdict.keep is None:
            page.row("keep", "no answer", style="none")
        else:
            page.path("keep", text.plain(verdict.keep.checkpoint), style="keep")
        page.row("why", text.why(verdict))
        page.row("probe", text.probe(verdict))
        if self._verbose or verdict.keep is None or verdict.keep.rests_on != "held_out_loss":
            page.row("compare", text.candidates(verdict))
        elsewhere = verdict.keep is not None and verdict.turning_point is None
        where = text.headline(verdict) if elsewhere else text.turning(verdict)
        page.row("CS", "; ".join(filter(None, (where, text.window(verdict), text.spread(verdict)))))

    def _finding(self, page: Page, finding: Finding, end: int) -> None:
        label = FINDING_LABELS.get(finding.severity, text.plain(finding.severity))
        page.row(label, text.plain(finding.message), label_style=finding.severity)
        fits = finding.severity != "info" and page.lines + page.room(finding.hint) <= end
        if self._verbose or fits:
            rule = f"({text.plain(finding.rule)})" if self._verbose else ""
            page.row("", " ".join(filter(None, (text.plain(finding.hint), rule))), style="quiet")

    def _details(self, page: Page, verdict: Verdict) -> None:
        base = verdict.base_model
        if base.total:
            known = f", {text.plain(base.path)}" if base.path else ""
            page.row("base", f"{base.matched} of {text.count(base.total, 'module')} have a base weight{known}")
        page.row("panel", text.agreement(verdict))
        page.row("course", text.analyses(verdict))

    def _skipped(self, page: Page, skipped: tuple[Skipped, ...]) -> bool:
        """What was left out; what is no checkpoint anyway is listed only when asked for."""
        shown = [entry for entry in skipped if self._verbose or not entry.expected]
        if self._verbose and shown:
            page.row("skipped", text.count(len(shown), "file"))
            for entry in shown:
                page.row("", text.plain(entry.path.as_posix()), elide=True)
                page.row("", text.plain(entry.reason), style="quiet")
        elif shown:
            page.row("skipped", _summed(shown), style="quiet")
        return bool(shown)


def _summed(skipped: Sequence[Skipped]) -> str:
    """One file with its reason, or how many files for which reasons."""
    if len(skipped) == 1:
        return text.plain(f"{skipped[0].path.as_posix()}: {skipped[0].reason}")
    ranked = text.reasons(skipped)
    named = [f"{times} x {reason}" for reason, times in ranked[:_REASONS]]
    rest = [text.count(len(ranked) - _REASONS, "other reason")] if len(ranked) > _REASONS else []
    return f"{text.count(len(skipped), 'file')}: {'; '.join(named + rest)}"


class Page:
    """Lines of at most `width` cells, written through rich's Text so that nothing in the data is read as markup."""

    def __init__(self, width: int, color: bool) -> None:
        from rich.console import Console

        self._file = io.StringIO()
        self.width = max(width, _INDENT + _LABEL + _NARROWEST)
        self._console: Console = Console(
            file=self._file,
            width=self.width,
            height=100,
            force_terminal=color,
            color_system="standard" if color else None,
            no_color=not color,
            legacy_windows=False,
            markup=False,
            emoji=False,
            highlight=False,
        )

    def text(self) -> str:
        """Everything written so far."""
        return self._file.getvalue()

    @property
    def lines(self) -> int:
        """Lines written so far."""
        return self._file.getvalue().count("\n")

    def room(self, sentence: str) -> int:
        """Lines that a sentence needs beside its label."""
        return len(list(text.wrapped(sentence, self.width - _INDENT - _LABEL)))

    def blank(self) -> None:
        """An empty line."""
        self._file.write("\n")

    def line(self, sentence: str, style: str = "") -> None:
        """A line at the margin."""
        for part in text.wrapped(sentence, self.width):
            self._print((part, style))

    def raw(self, lines: Iterable[str]) -> None:
        """Lines as they are: tables."""
        for line in lines:
            self._print((line, ""))

    def head(self, name: str, about: str) -> None:
        """The first line of a block: a name, and beside it, or below if that is too long, what it is."""
        from rich.cells import cell_len

        if cell_len(name) + 3 + cell_len(about) <= self.width:
            self._print((name, _STYLES["run"]), ("   ", ""), (about, _STYLES["quiet"]))
            return
        self._print((name, _STYLES["run"]))
        for part in text.wrapped(about, self.width - _INDENT):
            self._print((" " * _INDENT, ""), (part, _STYLES["quiet"]))

    def row(self, label: str, sentence: str, style: str = "", label_style: str = "quiet", elide: bool = False) -> None:
        """A label and its text, wrapped beside it; nothing for an empty text."""
        from rich.cells import cell_len

        room = self.width - _INDENT - _LABEL
        label = " " * _INDENT + label.ljust(_LABEL - 1) + " "
        for part in [_elided(sentence, room)] if elide else text.wrapped(sentence, room):
            if cell_len(part) > room and label.strip():
                self._print((label.rstrip(), _STYLES.get(label_style, "")))
                label = " " * (_INDENT + _LABEL)
            self._print((label, _STYLES.get(label_style, "")), (part, _STYLES.get(style, "")))
            label = " " * (_INDENT + _LABEL)

    def path(self, label: str, path: str, style: str) -> None:
        """A label and a path that is neither broken nor shortened: below the label where it is too long."""
        from rich.cells import cell_len

        label = " " * _INDENT + label.ljust(_LABEL)
        if cell_len(label) + cell_len(path) <= self.width:
            self._print((label, _STYLES["quiet"]), (path, _STYLES[style]))
            return
        self._print((label.rstrip(), _STYLES["quiet"]))
        self._print((" " * _INDENT, ""), (path, _STYLES[style]))

    def _print(self, *parts: tuple[str, str]) -> None:
        from rich.text import Text

        self._console.print(Text.assemble(*parts), soft_wrap=True)


def _elided(path: str, room: int) -> str:
    """A path whose middle is left out where it would not fit."""
    from rich.cells import cell_len, set_cell_size

    if cell_len(path) <= room:
        return path
    head = set_cell_size(path, (room - 3) // 3).rstrip()
    tail = path
    while cell_len(tail) > room - 3 - cell_len(head):
        tail = tail[1:]
    return f"{head}...{tail}"
