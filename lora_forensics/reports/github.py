"""annotations.txt: findings as GitHub's workflow commands; printed in a step, they stand at the top of the run's page.

`cat` of this file annotates; `summary.md` is for the job summary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

from lora_forensics.gate import accepted, marked
from lora_forensics.records import Summary, Verdict
from lora_forensics.reports import text

_COMMANDS = {"error": "error", "warning": "warning", "info": "notice"}
"""Severity to command, the worst first."""


class GitHubReport:
    """A line a finding and one for each verdict; the worst first, notes last, since GitHub shows ten of a sort."""

    filename: str | None = "annotations.txt"

    def render(self, summary: Summary) -> str:
        """The lines."""
        lines: dict[str, list[str]] = {name: [] for name in _COMMANDS.values()}
        lines["notice"] = [_command("notice", "lora-forensics", text.totals(summary)), *map(_verdict, summary.runs)]
        for run, path, finding, fingerprint in marked(summary):
            if not accepted(fingerprint, summary.gate):
                name, title = _COMMANDS.get(finding.severity, "warning"), f"{finding.rule}{': ' if run else ''}{run}"
                lines[name].append(_command(name, title, finding.message, finding.hint, _file(path)))
        lines["warning"] += _skipped(summary)
        return "\n".join(line for name in lines for line in lines[name]) + "\n"


def _verdict(verdict: Verdict) -> str:
    kept = f"keep {verdict.keep.checkpoint}: " if verdict.keep else ""
    status = text.STATUS.get(verdict.status, verdict.status)
    said = dict.fromkeys((f"{kept}{text.why(verdict)}", f"{status}: {text.headline(verdict)}"))
    return _command("notice", verdict.run or ".", "; ".join(said), "", _file(verdict.path))


def _skipped(summary: Summary) -> Iterator[str]:
    left_out = [entry for entry in text.all_skipped(summary) if not entry.expected]
    for reason, times in text.reasons(left_out):
        yield _command("warning", f"{text.count(times, 'file')} skipped", reason)


def _file(path: str | None) -> Mapping[str, str]:
    """Where the run lies, if that is in the checkout."""
    if path is None or "://" in path or not Path(path).is_relative_to(Path.cwd()):
        return {}
    return {"file": Path(path).relative_to(Path.cwd()).as_posix()}


def _command(name: str, title: str, message: str, hint: str = "", place: Mapping[str, str] | None = None) -> str:
    properties = {**(place or {}), "title": title}
    spelt = ",".join(f"{key}={_escaped(value, '%:,')}" for key, value in properties.items())
    said = f"{text.plain(message)} ({text.plain(hint)})" if hint else text.plain(message)
    return f"::{name} {spelt}::{_escaped(said)}"


def _escaped(data: str, signs: str = "%") -> str:
    return re.sub(f"[{signs}]", lambda found: f"%{ord(found[0]):02X}", text.plain(data))
