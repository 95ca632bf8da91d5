"""Parts that the page of a run and the index share: findings, tables, what was skipped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from lora_forensics.records import Finding, Skipped
from lora_forensics.reports.html.page import esc
from lora_forensics.reports.text import count, number, reasons

_ORDER = {"error": 0, "warning": 1, "info": 2}
_WORDS = {"error": "Error", "warning": "Warning", "info": "Note"}
_ALIKE = 2
"""Findings of one rule that stand open, where there are many of it."""
LISTED = 100
"""Skipped files that are listed before the rest is only counted."""
THEME = '<button type="button" id="theme" aria-pressed="false" hidden>Dark theme</button>'


def findings(entries: Sequence[Finding], first: int = 5) -> str:
    """Findings with their fixes, the worst first; all after `first` folded away, unless they are worse than notes.

    Of many of one rule the first ones stand open: forty damaged files must not hide what else is wrong.
    """
    alike: dict[tuple[int, str], list[Finding]] = {}
    for finding in sorted(entries, key=lambda finding: _ORDER.get(finding.severity, 3)):
        alike.setdefault((_ORDER.get(finding.severity, 3), finding.rule), []).append(finding)
    items = []
    for (rank, rule), found in alike.items():
        open_ = found if len(found) <= _ALIKE + 1 else found[:_ALIKE]
        items += [(rank, _finding(finding)) for finding in open_]
        if rest := found[len(open_) :]:
            items.append((rank, f"<li>{_folded(f'{len(rest)} more: {esc(rule)}', map(_finding, rest))}</li>"))
    first = max(first, sum(rank < 2 for rank, _ in items[:12]))
    shown = [item for _, item in items]
    more = _folded(f"{len(shown) - first} more", shown[first:]) if len(shown) > first else ""
    return f"<ul class=findings>{''.join(shown[:first])}</ul>{more}"


def _folded(summary: str, items: Iterable[str]) -> str:
    return f"<details><summary>{summary}</summary><ul class=findings>{''.join(items)}</ul></details>"


def _finding(finding: Finding) -> str:
    kind = finding.severity if finding.severity in _ORDER else "info"
    fix = f'<span class="fix"><b>Do:</b> {esc(finding.hint)}</span>' if finding.hint else ""
    said = f'<span class="sev {kind}">{_WORDS[kind]}</span> {esc(finding.message)}'
    return f"<li>{said} <code>{esc(finding.rule)}</code>{fix}</li>"


def table(
    name: str,
    caption: str,
    heads: Sequence[str],
    rows: Iterable[Sequence[Any]],
    numeric: frozenset[int],
    kept: int | None = None,
    titles: Sequence[str] = (),
) -> str:
    """A sortable table inside a region that scrolls; text is escaped, numbers are shortened.

    Args:
        name: id of the table.
        caption: plain text.
        heads: heads of the columns.
        rows: values; a `Markup` stands as it is.
        numeric: places of the columns that are aligned to the right.
        kept: value of the first column whose row stands out.
        titles: what the columns mean, shown with the pointer over a head.
    """
    places = range(len(heads))
    explained = [f' title="{esc(titles[i])}"' if i < len(titles) and titles[i] else "" for i in places]
    head = "".join(
        f'<th scope="col"{" class=n" if i in numeric else ""}{explained[i]}>{esc(heads[i])}</th>' for i in places
    )
    body = "".join(_row(row, numeric, kept is not None and row[0] == kept) for row in rows)
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-labelledby="{name}-caption">'
        f'<table class="sortable" id="{name}"><caption id="{name}-caption">{esc(caption)}</caption>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


class Markup(str):
    """Markup of our own, whose parts from files are escaped already."""


def _row(row: Sequence[Any], numeric: frozenset[int], kept: bool) -> str:
    cells = [
        f"<td class=n>{_shown(value)}</td>" if place in numeric else f"<td>{_shown(value)}</td>"
        for place, value in enumerate(row)
    ]
    return f"<tr{' class=kept' if kept else ''}>{''.join(cells)}</tr>"


def _shown(value: Any) -> str:
    if isinstance(value, Markup):
        return value
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return ""
    return number(value) if isinstance(value, int | float) and not isinstance(value, bool) else esc(value)


def tools(name: str, choices: Sequence[tuple[str, int, Sequence[str]]] = ()) -> str:
    """A filter for a table: words, and a choice for each column that is named."""
    selects = "".join(
        f"<label>{esc(label)} <select data-column={column}><option value=''>all</option>"
        + "".join(f"<option>{esc(value)}</option>" for value in values)
        + "</select></label>"
        for label, column, values in choices
        if len(values) > 1
    )
    return (
        f'<div class="tools" data-for="{name}" hidden>'
        f'<label>Filter <input type="search" aria-controls="{name}"></label>'
        f'{selects}<span class="quiet" role="status"></span></div>'
    )


def skipped(entries: Sequence[Skipped]) -> str:
    """What was left out, and why; what is no checkpoint is only counted."""
    damaged = [entry for entry in entries if not entry.expected]
    foreign = [entry for entry in entries if entry.expected]
    items = "".join(
        f"<li><span class=file>{esc(e.path.as_posix())}</span>: {esc(e.reason)}</li>" for e in damaged[:LISTED]
    )
    if len(damaged) > LISTED:
        items += "".join(f"<li>and {times} more: {esc(reason)}</li>" for reason, times in reasons(damaged[LISTED:]))
    said = f"<ul>{items}</ul>" if items else "<p>No file that should have been read was left out.</p>"
    if foreign:
        inside = "".join(f"<li>{times} x {esc(reason)}</li>" for reason, times in reasons(foreign)[:LISTED])
        many = count(len(foreign), "other file")
        said += f"<details><summary>{many}: no checkpoints</summary><ul>{inside}</ul></details>"
    return said
