"""results.sarif: findings as SARIF 2.1.0 (OASIS), for code scanning and editors."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any
from urllib.parse import quote

from lora_forensics.gate import accepted, marked
from lora_forensics.records import Finding, Gate, Summary, Verdict
from lora_forensics.reports import text
from lora_forensics.reports.json import to_json
from lora_forensics.reports.markdown import prose
from lora_forensics.rules import RULES

_SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
_LEVELS = {"error": "error", "warning": "warning", "info": "note"}
_ORDER = {"error": 0, "info": 2}
_MOST = 5000
"""Results, and files that were skipped, in one document: code scanning refuses more than 25,000 and 10 MB, zipped, and
shows 5,000, the worst first."""


class SarifReport:
    """One result a finding, in the folder of its run; skipped files are notifications, verdicts are properties.

    Folders below the working directory, in CI the checkout, are given relative to it. Every result has a place with a
    line and a scheme that a checkout may have: code scanning refuses a whole file for one result without.
    """

    filename: str | None = "results.sarif"

    def render(self, summary: Summary) -> str:
        """The document, indented."""
        every = list(marked(summary))
        if len(every) > _MOST:
            every.sort(key=lambda entry: _ORDER.get(entry[2].severity, 1))
        found = every[:_MOST]
        rules = sorted({finding.rule for _, _, finding, _ in found})
        results = [_result(*entry, rules, summary.gate) for entry in found]
        driver: dict[str, Any] = {"name": "lora-forensics", "rules": [_rule(rule) for rule in rules]}
        if version := summary.versions.get("lora-forensics"):
            driver["semanticVersion"] = version
        run = {
            "tool": {"driver": driver},
            "columnKind": "utf16CodeUnits",
            "invocations": [
                {
                    "executionSuccessful": True,
                    "toolExecutionNotifications": [*_left_out(len(every) - _MOST), *_notifications(summary)],
                }
            ],
            "results": results,
            "properties": {"verdicts": [_verdict(verdict) for verdict in summary.runs]},
        }
        return to_json({"$schema": _SCHEMA, "version": "2.1.0", "runs": [run]})


def _rule(rule: str) -> dict[str, Any]:
    known = RULES.get(rule)
    if known is None:
        return {"id": text.plain(rule), "shortDescription": {"text": "a finding of another version"}}
    more = f"`lora-forensics rules {rule}` says more."
    return {
        "id": rule,
        "shortDescription": {"text": text.plain(known.about)},
        "fullDescription": {"text": text.plain(known.why)},
        "help": {"text": f"{text.plain(known.fix)} {more}", "markdown": f"{prose(known.fix)} {more}"},
        "defaultConfiguration": {"level": _LEVELS[known.severity]},
    }


def _result(
    run: str, path: str | None, finding: Finding, fingerprint: str, rules: list[str], gate: Gate
) -> dict[str, Any]:
    parts = (f"{run}: {finding.message}" if run else finding.message, finding.hint)
    result = {
        "ruleId": text.plain(finding.rule),
        "ruleIndex": rules.index(finding.rule),
        "level": _LEVELS.get(finding.severity, "warning"),
        "message": {"text": ". ".join(_message(part) for part in parts if part)},
        "locations": [_location(path, run, "/")],
        # code scanning reads this one name and no other
        "partialFingerprints": {"primaryLocationLineHash": fingerprint},
    }
    if accepted(fingerprint, gate):
        result["suppressions"] = [{"kind": "external", "justification": "accepted by the baseline"}]
    return result


def _left_out(number: int, what: str = "findings") -> Iterator[dict[str, Any]]:
    if number > 0:
        said = f"{number} more {what} are left out: code scanning takes no more than {_MOST}; summary.json has all"
        yield {"level": "warning", "message": {"text": said}}


def _notifications(summary: Summary) -> Iterator[dict[str, Any]]:
    skipped = [entry for entry in text.all_skipped(summary) if not entry.expected]
    yield from _left_out(len(skipped) - _MOST, "skipped files")
    for entry in skipped[:_MOST]:
        yield {
            "level": "warning",
            "message": {"text": _message(f"skipped: {entry.reason or 'no reason given'}")},
            "locations": [_location(entry.path.as_posix(), entry.path.name)],
        }


def _verdict(verdict: Verdict) -> dict[str, Any]:
    keep = text.plain(verdict.keep.checkpoint) if verdict.keep else None
    said = {"run": verdict.run, "status": verdict.status, "why": text.why(verdict), "message": verdict.message}
    return {**{name: text.plain(value) for name, value in said.items()}, "keep": keep}


def _location(path: str | None, name: str, end: str = "") -> dict[str, Any]:
    """Where a thing lies; its name where that is not said, or is no file of this machine."""
    known = name or "lora-forensics" if path is None or "://" in path else path
    place = uri(known, Path.cwd()) + end
    base = {} if place.startswith("file:") else {"uriBaseId": "%SRCROOT%"}
    return {"physicalLocation": {"artifactLocation": {"uri": place, **base}, "region": {"startLine": 1}}}


def uri(path: str, root: PurePath) -> str:
    """A path as a URI: relative to `root` where it lies below, else absolute."""
    place = type(root)(path)
    if place.is_relative_to(root):
        place = place.relative_to(root)
    if not place.is_absolute():
        return quote(place.as_posix(), errors="surrogateescape")
    return "file:///" + quote(place.as_posix().lstrip("/"), safe="/:", errors="surrogateescape")


def _message(data: str) -> str:
    """Plain text as SARIF's messages spell it: no links, no placeholders."""
    spelt = text.plain(data).replace("{", "{{").replace("}", "}}")
    return spelt.replace("[", "\\[").replace("]", "\\]")
