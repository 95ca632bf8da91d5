"""Which findings a person wants to hear of: `--select`, `--ignore`, and severities of their own."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

from lora_forensics.records import Finding, Skipped, Summary, Verdict
from lora_forensics.rules import RULES, Severity, matching, rule_of


@dataclass(frozen=True, slots=True)
class Selection:
    """What is told; what is stored of a run holds all findings, so that another choice needs no new scan."""

    select: tuple[str, ...] = ()
    """Rules, beginnings of rules, or severities; all if empty."""
    ignore: tuple[str, ...] = ()
    """The same; counts more than `select`."""
    severity: Mapping[str, Severity] = field(default_factory=dict)
    """Rule to the severity that its findings have instead of their own."""

    def __post_init__(self) -> None:
        """Refuse names that stand for nothing.

        Raises:
            UsageError: no rule and no severity is called so.
        """
        matching((*self.select, *self.ignore))
        for rule in self.severity:
            rule_of(rule)

    def applied(self, summary: Summary) -> Summary:
        """The summary with the findings that are wanted, and how many there were besides."""
        findings, ignored = self._chosen(summary.findings)
        runs = tuple(self._verdict(verdict) for verdict in summary.runs)
        return replace(summary, runs=runs, findings=findings, ignored=summary.ignored + ignored)

    def told(self, findings: Iterable[Finding]) -> tuple[Finding, ...]:
        """Those of them that are wanted, with the severities that are."""
        return self._chosen(findings)[0]

    def keeps_file(self, entry: Skipped) -> bool:
        """Whether a file that was left out counts as damaged."""
        rule = entry.rule or "unreadable-file"
        return bool(self._chosen([Finding(rule, RULES[rule].severity, "")])[0])

    def _verdict(self, verdict: Verdict) -> Verdict:
        findings, ignored = self._chosen(verdict.findings)
        return replace(verdict, findings=findings, ignored=verdict.ignored + ignored)

    def _chosen(self, findings: Iterable[Finding]) -> tuple[tuple[Finding, ...], int]:
        select, ignore = matching(self.select), matching(self.ignore)
        own = [replace(f, severity=self.severity.get(f.rule, f.severity)) for f in findings]
        kept = [f for f in own if (not select or {f.rule, f.severity} & select) and not {f.rule, f.severity} & ignore]
        return tuple(kept), len(own) - len(kept)
