"""What lets a pipeline decide: which findings count, and a baseline of those that were accepted.

A finding is known by its run, rule and severity, and its number among those that share them: not by its sentence, which
changes with every new checkpoint, nor by a path. One that grows stays the same finding; one that gets worse is new.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from lora_forensics.errors import UsageError
from lora_forensics.records import SCHEMA, Finding, Gate, Summary
from lora_forensics.rules import SEVERITIES
from lora_forensics.values import read_object

DEFAULT = frozenset({"warning"})
"""What counts where a baseline is given and nothing else is said."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A finding that a baseline accepts; all but the fingerprint is for people."""

    fingerprint: str
    run: str
    rule: str
    severity: str
    message: str


def groups(summary: Summary) -> list[tuple[str, str | None, tuple[Finding, ...]]]:
    """Name, path and findings of every run, and of what belongs to none: '' and no path."""
    runs = [(verdict.run, verdict.path, verdict.findings) for verdict in summary.runs]
    return [*runs, ("", None, summary.findings)] if summary.findings else [*runs]


def fingerprints(run: str, findings: Iterable[Finding], gate: Gate) -> Iterator[tuple[Finding, str]]:
    """Each finding with its fingerprint, 16 hexadecimal digits."""
    name = gate.names.get(run, run)
    times: Counter[tuple[str, str]] = Counter()
    for finding in findings:
        own = finding.rule, finding.severity
        times[own] += 1
        text = json.dumps([*own, name, times[own]])
        yield finding, hashlib.sha256(text.encode()).hexdigest()[:16]


def marked(summary: Summary) -> Iterator[tuple[str, str | None, Finding, str]]:
    """Run, its path, finding and fingerprint of all findings."""
    for run, path, findings in groups(summary):
        for finding, fingerprint in fingerprints(run, findings, summary.gate):
            yield run, path, finding, fingerprint


def accepted(fingerprint: str, gate: Gate) -> bool:
    """Whether a baseline has it."""
    return gate.accepts_all or fingerprint in gate.accepted


def counts(finding: Finding, fail_on: Iterable[str]) -> bool:
    """Whether it is named: by its rule, or by its severity or a lower one."""
    place = SEVERITIES.index(finding.severity) if finding.severity in SEVERITIES else len(SEVERITIES)
    return finding.rule in fail_on or any(severity in fail_on for severity in SEVERITIES[: place + 1])


def failing(summary: Summary) -> Iterator[tuple[str, Finding]]:
    """All findings that fail a pipeline, each with its run ('' for none)."""
    gate = summary.gate
    for run, _, finding, fingerprint in marked(summary):
        if counts(finding, gate.fail_on) and not accepted(fingerprint, gate):
            yield run, finding


def entries(summary: Summary) -> list[Entry]:
    """All findings as a baseline accepts them, in an order that new runs do not change."""
    found = [
        Entry(fingerprint, summary.gate.names.get(run, run), *_told(finding))
        for run, _, finding, fingerprint in marked(summary)
    ]
    return sorted(found, key=lambda entry: (entry.run, entry.rule, entry.severity, entry.fingerprint))


def _told(finding: Finding) -> tuple[str, str, str]:
    return finding.rule, finding.severity, finding.message


def read_baseline(path: Path) -> list[Entry]:
    """The entries of a baseline.

    Raises:
        UsageError: it is missing, damaged or of a newer version.
    """
    hint = "write one with --write-baseline"
    if not path.is_file():
        raise UsageError(f"there is no baseline {path}", hint)
    document = read_object(path) or {}
    found = document.get("findings")
    if not isinstance(found, list) or not isinstance(document.get("schema"), int):
        raise UsageError(f"{path} is no baseline", hint)
    if document["schema"] > SCHEMA:
        raise UsageError(f"{path} has schema {document['schema']}, newer than {SCHEMA}", "upgrade lora-forensics")
    try:
        return [Entry(**{name: str(entry[name]) for name in Entry.__slots__}) for entry in found]
    except (TypeError, KeyError) as error:
        raise UsageError(f"{path} is no baseline: an entry lacks its {error}", hint) from error


def write_baseline(path: Path, summary: Summary, before: Iterable[Entry] = ()) -> int:
    """Accept today's findings, and those of `before` whose runs were not looked at; gives how many that are."""
    from lora_forensics.series import write_text  # polars, which no report needs

    seen = {"", *(summary.gate.names.get(verdict.run, verdict.run) for verdict in summary.runs)}
    kept = entries(summary) + [entry for entry in before if entry.run not in seen]
    kept.sort(key=lambda entry: (entry.run, entry.rule, entry.severity, entry.fingerprint))
    document = {"schema": SCHEMA, "findings": [asdict(entry) for entry in kept]}
    write_text(path, json.dumps(document, indent=1) + "\n")
    return len(kept)


def stale(before: Iterable[Entry], summary: Summary) -> tuple[list[Entry], list[Entry]]:
    """Entries whose finding is gone, and entries of runs that were not looked at."""
    seen = {"", *(summary.gate.names.get(verdict.run, verdict.run) for verdict in summary.runs)}
    there = {entry.fingerprint for entry in entries(summary)}
    gone = [entry for entry in before if entry.fingerprint not in there]
    return [entry for entry in gone if entry.run in seen], [entry for entry in gone if entry.run not in seen]
