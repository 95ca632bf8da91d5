"""A comparison in the terminal: letters for runs, columns as many as fit, and what all runs share said once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from lora_forensics.comparison.values import MEASURES, Comparison
from lora_forensics.reports.terminal import Page
from lora_forensics.reports.text import number, plain, wrapped

_LISTED = 5
"""Files and runs that could not be compared, unless all is asked for."""
_LABEL, _COLUMN, _GAP = 16, 16, 2
"""Cells of the column of labels, of the narrowest column of a run, and of the gap inside of that."""
_BRIEF = ("cosine", "held_out_loss", "path_length")
"""What is followed along the axis unless all is asked for."""


def comparison_text(found: Comparison, width: int, color: bool = False, verbose: bool = False) -> str:
    """The page: who is who, which settings differ, what came of it, and the courses side by side."""
    page = Page(width, color)
    for letter, run in zip(letters(len(found.runs)), found.runs, strict=True):
        page.path(letter, plain(run.name), style="run")
    page.blank()
    same = {name: value for name, value in found.same().items() if value != "?"}
    differing = found.differing()
    _block(page, "settings that differ" if differing else "no setting differs", differing)
    if same and verbose:
        _block(page, "the same in all runs", {name: [value] * len(found.runs) for name, value in same.items()})
    elif same:
        page.line(f"the same in all: {', '.join(f'{name} {plain(value)}' for name, value in same.items())}", "quiet")
        page.blank()
    if partly := found.partly():
        page.line(f"told by some runs only, {'' if verbose else 'shown by -v, '}they may differ:", "quiet")
        _block(page, ", ".join(map(plain, partly)), partly if verbose else {})
    _block(page, "what came of it", found.results())
    places = found.places()
    for measure in found.measures if verbose else [name for name in found.measures if name in _BRIEF]:
        rows = {
            f"{found.align} {place:.4g}": [_value(found, i, measure, place) for i in range(len(found.runs))]
            for place in places
        }
        if rows:
            page.line(f"{MEASURES[measure]}, at the nearest checkpoint", "run")
            page.line(found.notes.get(measure, ""), "quiet")
            page.raw(_table(rows, page.width))
    if not places:
        page.line(f"the runs share no {found.align} at which they can be compared", "none")
        page.blank()
    elif unknown := [letters(len(found.runs))[place] for place in found.without()]:
        page.line(f"no {found.align} is known of {', '.join(unknown)}", "none")
        page.blank()
    if found.left_out:
        page.line("not compared", "run")
        for entry in found.left_out[: None if verbose else _LISTED]:
            page.line(f"{plain(entry.path)}: {plain(entry.reason)}", "none")
        if not verbose and len(found.left_out) > _LISTED:
            page.line(f"and {len(found.left_out) - _LISTED} more: -v", "quiet")
    return page.text().rstrip("\n") + "\n"


def letters(number_of_runs: int) -> list[str]:
    """A, B, ..., Z, AA, AB, ..."""
    names: list[str] = []
    for index in range(number_of_runs):
        name, left = "", index
        while left >= 0:
            name, left = chr(ord("A") + left % 26) + name, left // 26 - 1
        names.append(name)
    return names


def _value(found: Comparison, index: int, measure: str, place: float) -> str:
    value = found.at(found.runs[index], measure, place)
    return "-" if value is None else number(value)


def _broken(line: str, room: int) -> Iterator[str]:
    """A word that is longer than its column, in parts: none of it is lost."""
    from rich.cells import cell_len

    part, used = "", 0
    for sign in line:
        size = cell_len(sign)
        if part and used + size > room:
            yield part
            part, used = "", 0
        part, used = part + sign, used + size
    yield part


def _block(page: Page, title: str, rows: Mapping[str, list[str]]) -> None:
    page.line(title, "run")
    page.raw(_table(rows, page.width))
    if not rows:
        page.blank()


def _table(rows: Mapping[str, list[str]], width: int) -> Iterator[str]:
    """One value a run and row, in as many stretches of columns as the width needs; values wrap inside their column."""
    from rich.cells import set_cell_size

    def lines(value: str, room: int) -> list[str]:
        return [part for line in wrapped(plain(value), room) for part in _broken(line, room)] or [""]

    several = max(map(len, rows.values()), default=0)
    fit = max(1, min((width - _LABEL) // _COLUMN, several))
    room = min(max(_COLUMN, (width - _LABEL) // fit), 2 * _COLUMN)
    for start in range(0, several, fit):
        part = slice(start, start + fit)
        yield " " * _LABEL + "".join(head.ljust(room) for head in letters(several)[part]).rstrip()
        for label, values in rows.items():
            cells = [lines(value, room - _GAP) for value in values[part]]
            heads = lines(label, _LABEL - 1)
            for line in range(max(map(len, [heads, *cells]))):
                texts = (set_cell_size(c[line] if line < len(c) else "", room - _GAP) + " " * _GAP for c in cells)
                head = heads[line] if line < len(heads) else ""
                yield (set_cell_size(head, _LABEL - 1) + " " + "".join(texts)).rstrip()
        yield ""
