"""The index of all runs."""

from __future__ import annotations

import os
from collections import Counter
from urllib.parse import quote

from lora_forensics.records import Summary, Verdict
from lora_forensics.reports import text
from lora_forensics.reports.html.page import document, esc
from lora_forensics.reports.html.parts import THEME, Markup, skipped, table, tools

_HEADS = (
    "run",
    "keep",
    "step",
    "rests on",
    "status",
    "turning point",
    "last",
    "checkpoints",
    "adapter",
    "errors",
    "warnings",
)
_NUMERIC = frozenset((2, 5, 6, 7, 9, 10))


def index_page(summary: Summary) -> str:
    """The document: every run with its answer, what was found most often, what was left out."""
    verdicts = summary.runs
    answers = sorted({text.STATUS.get(v.status, text.plain(v.status)) for v in verdicts})
    rests = sorted({text.RESTS_ON.get(v.keep.rests_on, v.keep.rests_on) for v in verdicts if v.keep})
    found = Counter((f.severity, f.rule) for v in verdicts for f in v.findings if f.severity != "info")
    often = "".join(
        f"<li><code>{esc(rule)}</code> ({esc(severity)}): {text.count(times, 'finding')}</li>"
        for (severity, rule), times in found.most_common(12)
    )
    runs = table("runs", f"{text.totals(summary)}.", _HEADS, [_row(v, summary) for v in verdicts], _NUMERIC)
    body = f"""<a class="skip" href="#main">Skip to the runs</a>
<header><h1>Which checkpoint to keep</h1><p>{esc(text.totals(summary))}.</p>{THEME}</header>
<main id="main" class="wrap">
<h2>Runs</h2>{tools("runs", [("Rests on", 3, rests), ("Status", 4, answers)])}{runs}
{_lonely(summary)}
<h2>Errors and warnings</h2>{f"<ul>{often}</ul>" if often else "<p>None.</p>"}
<h2>Skipped</h2>{skipped(text.all_skipped(summary))}
</main>
<footer>{_versions(summary)}</footer>"""
    return document("Which checkpoint to keep", body)


def _lonely(summary: Summary) -> str:
    """Why runs have no answer: each sentence once, with the runs that it is about."""
    runs: dict[str, list[str]] = {}
    for verdict in summary.runs:
        if verdict.keep is None:
            runs.setdefault(text.headline(verdict), []).append(verdict.run or ".")
    items = "".join(
        f"<li>{esc(why)}<br><span class=quiet>{text.count(len(names), 'run')}: "
        f"{', '.join(f'<code>{esc(name)}</code>' for name in names)}</span></li>"
        for why, names in sorted(runs.items(), key=lambda entry: -len(entry[1]))
    )
    return f"<h2>Without an answer</h2><ul>{items}</ul>" if items else ""


def _versions(summary: Summary) -> str:
    return ", ".join(f"{esc(name)} {esc(version)}" for name, version in summary.versions.items())


def _row(verdict: Verdict, summary: Summary) -> list[object]:
    keep, point = verdict.keep, verdict.turning_point
    name = esc(verdict.run or ".")
    steps = verdict.evidence.get("steps")
    last = steps[1] if isinstance(steps, list) and len(steps) == 2 and isinstance(steps[1], int) else None
    severities = Counter(finding.severity for finding in verdict.findings)
    there = summary.folder is not None
    return [
        Markup(f'<a href="{_link(verdict.run)}">{name}</a>' if there else name),
        keep.checkpoint if keep else "no answer",
        keep.step if keep else None,
        text.RESTS_ON.get(keep.rests_on, keep.rests_on) if keep else "",
        text.STATUS.get(verdict.status, verdict.status),
        point.step if point else None,
        last,
        verdict.checkpoints,
        verdict.adapter or "",
        severities["error"],
        severities["warning"],
    ]


def _link(run: str) -> str:
    """A relative address in which nothing of a name has a meaning."""
    return quote(os.path.join(".", run, "report.html").replace(os.sep, "/"), errors="surrogateescape")
