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
_ORDER = tuple(_COMMANDS)


class GitHubReport:
    """A line a finding, the worst first since GitHub shows ten of a sort, and one for each verdict."""

    filename: str | None = "annotations.txt"

    def render(self, summary: Summary) -> str:
        """The lines."""
        open_ = [entry for entry in marked(summary) if not accepted(entry[3], summary.gate)]
        open_.sort(key=lambda entry: _ORDER.index(entry[2].severity) if entry[2].severity in _ORDER else 0)
        lines = []
        for run, path, finding, _ in open_:
            name, title = _COMMANDS.get(finding.severity, "warning"), f"{finding.rule}{': ' if run else ''}{run}"
            lines.append(_command(name, title, finding.message, finding.hint, _file(path)))
        lines += [*_skipped(summary), *map(_verdict, summary.runs)]
        return "\n".join([*lines, _command("notice", "lora-forensics", text.totals(summary))]) + "\n"


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
