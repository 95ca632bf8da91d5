"""summary.md: GitHub-flavoured Markdown, for a job summary or a pull request."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import quote

from lora_forensics.records import Finding, Skipped, Summary, Verdict
from lora_forensics.reports import text

_LISTED = 50
"""Skipped files that are listed for one run before the rest is only counted."""

_MOST = 900_000
"""Bytes of tables and sections: GitHub shows nothing of a job summary above 1 MiB."""

PICTURES = (
    ("similarity.png", "cosine similarity and CS-Fluctuation over the steps"),
    ("modules.png", "cosine of each module over the steps"),
    ("decomposition.png", "magnitude against direction change of each module"),
)
"""Files in `<run>/plots` that are shown, and what is on them."""

_TAME = re.compile(r"[\w ./=,+:()~-]+")
_SPECIAL = re.compile(r"[\\`*{}\[\]<>&|~$]|(?<!\w)_|_(?!\w)|(?<=:)/(?=/)|(?<=[wW]{3})\.|[@#]")


class MarkdownReport:
    """A table of all runs, then a section for each; what came from files cannot become markup, a link or a mention."""

    filename: str | None = "summary.md"

    def render(self, summary: Summary) -> str:
        """The document."""
        lines = ["# Which checkpoint to keep", "", f"{text.totals(summary)}.", ""]
        lines += _table(summary)
        left = _MOST - _size(lines)
        for place, verdict in enumerate(summary.runs):
            section = _section(verdict, summary.folder)
            left -= _size(section)
            if left < 0:
                lines += [f"{text.count(len(summary.runs) - place, 'more run')}: no room here; see summary.json", ""]
                break
            lines += section
        lines += _skipped(summary.skipped, ["## Skipped", ""])
        return "\n".join(lines).rstrip() + "\n"


def _size(lines: Sequence[str]) -> int:
    return sum(len(line.encode("utf-8", "replace")) + 1 for line in lines)


def prose(data: object) -> str:
    """Text from a file inside a sentence or a table cell."""
    return _SPECIAL.sub(_entity, text.plain(data))


def code(data: object) -> str:
    """A name from a file, in code type."""
    name = text.plain(data)
    if _TAME.fullmatch(name):
        return f"`{name}`"
    # Inside <code> Markdown still reads its own signs, so they are entities as everywhere else.
    return f"<code>{prose(name)}</code>"


def _entity(found: re.Match[str]) -> str:
    sign = found[0]
    # The invisible space after @ and # keeps GitHub from making mentions and references after the page was rendered.
    return f"&#{ord(sign)};&#8203;" if sign in "@#" else f"&#{ord(sign)};"


def _table(summary: Summary) -> list[str]:
    if not summary.runs:
        return []
    rows = ["| run | verdict | keep | rests on | turning point |", "|---|---|---|---|---|"]
    for verdict in summary.runs:
        keep, point = verdict.keep, verdict.turning_point
        cells = (
            code(verdict.run or "."),
            prose(text.STATUS.get(verdict.status, verdict.status)),
            code(keep.checkpoint) if keep else "no answer",
            prose(text.RESTS_ON.get(keep.rests_on, keep.rests_on)) if keep else "-",
            f"step {point.step}" if point else "-",
        )
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, ""]


def _section(verdict: Verdict, folder: Path | None) -> list[str]:
    lines = [f"## {code(verdict.run or '.')}", "", f"{prose(text.facts(verdict))}.", "", *_verdict(verdict)]
    lines += [_finding(finding) for finding in verdict.findings]
    lines += [
        f"- **Compare**: {code(candidate.checkpoint)}, step {candidate.step}: {prose(candidate.why)}"
        for candidate in verdict.candidates
    ]
    lines.append("")
    for picture in _pictures(verdict, folder):
        lines += [picture, ""]
    return lines + _skipped(verdict.skipped)


def _verdict(verdict: Verdict) -> Iterator[str]:
    why = prose(text.why(verdict))
    yield f"- **Keep**: {code(verdict.keep.checkpoint) if verdict.keep else 'no answer'}: {why}"
    if scored := text.probe(verdict):
        yield f"- **Probe**: {prose(scored)}"
    said = "" if verdict.keep is None else text.headline(verdict)
    notes = (text.turning(verdict) or said, text.window(verdict), text.spread(verdict), text.last(verdict))
    if any(notes):
        yield f"- **CS-Fluctuation**: {'; '.join(prose(note) for note in notes if note)}"
    course = text.analyses(verdict)
    if course:
        yield f"- **Course**: {prose(course)}"
    base = verdict.base_model
    if base.total:
        known = f", {code(base.path)}" if base.path else ""
        yield f"- **Base model**: {base.matched} of {text.count(base.total, 'module')} have a base weight{known}"


def _finding(finding: Finding) -> str:
    hint = f"<br>{prose(finding.hint)}" if finding.hint else ""
    return f"- **{prose(finding.severity)}**: {prose(finding.message)}{hint}"


def _pictures(verdict: Verdict, folder: Path | None) -> Iterator[str]:
    for name, title in PICTURES:
        # os.path.isfile says no, and does not raise, for a name that no file can have.
        if folder is not None and os.path.isfile(folder / verdict.run / "plots" / name):
            yield f"![{title}]({quote(f'{verdict.run}/plots/{name}', errors='surrogateescape')})"


def _skipped(skipped: Sequence[Skipped], title: Sequence[str] = ()) -> list[str]:
    """The files that were left out, folded away; those that are no checkpoint anyway are not listed."""
    shown = [entry for entry in skipped if not entry.expected]
    if not shown:
        return []
    lines = [*title, "<details>", f"<summary>{text.count(len(shown), 'file')} skipped</summary>", ""]
    lines += [f"- {code(entry.path.as_posix())}: {prose(entry.reason)}" for entry in shown[:_LISTED]]
    if len(shown) > _LISTED:
        lines += [f"- and {times} more: {prose(reason)}" for reason, times in text.reasons(shown[_LISTED:])]
    return [*lines, "", "</details>", ""]
