"""Options of a scan in CI: what fails, which findings are accepted, and what may be shared."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_forensics.commands.parameters import HERE
from lora_forensics.commands.printing import complain, print_report, say

if TYPE_CHECKING:
    from lora_forensics.gate import Entry
    from lora_forensics.records import Gate, Summary
    from lora_forensics.scan import Scan

F = TypeVar("F", bound=Callable[..., Any])

REDACT = "Leave out paths, prompts and names that people chose; reports for sharing go to OUT/redacted."


def gating(command: F) -> F:
    """`--fail-on`, `--baseline`, `--write-baseline` and `--redact`."""
    for option in reversed(
        (
            click.option(
                "--fail-on",
                multiple=True,
                help="Exit with 1 on this rule, or on this severity or worse (info, warning, error; repeatable).",
            ),
            click.option(
                "--baseline",
                type=HERE,
                help="Accept the findings in this file; without --fail-on, new warnings and errors exit with 1.",
            ),
            click.option("--write-baseline", type=HERE, help="Accept today's findings: write them to this file."),
            click.option("--redact", is_flag=True, help=REDACT),
        )
    ):
        command = option(command)
    return command


@dataclass(frozen=True, slots=True)
class Gating:
    """What a person asked for."""

    gate: Gate
    before: tuple[Entry, ...]
    """Of the baseline."""
    write: Path | None

    @classmethod
    def of(cls, fail_on: tuple[str, ...], baseline: Path | None, write_baseline: Path | None) -> Gating:
        """Checked before the work, not after.

        Raises:
            UsageError: there is no such rule, or no such baseline.
        """
        from lora_forensics.gate import DEFAULT, read_baseline
        from lora_forensics.records import Gate
        from lora_forensics.rules import matching

        wanted = frozenset(matching(fail_on)) or (DEFAULT if baseline else frozenset())
        before = read_baseline(baseline) if baseline else []
        known = frozenset(entry.fingerprint for entry in before)
        return cls(Gate(wanted, known, accepts_all=write_baseline is not None), tuple(before), write_baseline)

    def end(self, done: Scan, printed: str, redact: bool, verbose: bool, after: str = "", strict: bool = False) -> int:
        """Settle, print the report that is called so ('' for none) and what comes after it; gives the exit code."""
        told = list(self.settle(done.summary))
        for line in () if redact else told:
            complain(line)
        done = done.redacted() if redact else done
        if printed:
            print_report(printed, done.summary, verbose=verbose)
        if after:
            say(after)
        code, reason = done.outcome(strict)
        if reason:
            complain(reason)
        return code

    def settle(self, summary: Summary) -> Iterator[str]:
        """Write what is to be written; lines on entries that stand for nothing any more."""
        from lora_forensics.gate import stale, write_baseline
        from lora_forensics.reports.text import count, plain

        if self.write is not None:
            number = write_baseline(self.write, _without_paths(summary), self.before)
            yield f"{count(number, 'finding')} accepted in {self.write}"
            return
        gone, elsewhere = stale(self.before, summary)
        for entry in gone:
            yield f"the baseline accepts what is gone: {plain(f'{entry.run}: {entry.rule} ({entry.severity})')}"
        if elsewhere:
            yield f"the baseline also holds {count(len(elsewhere), 'finding')} of runs that were not scanned"
        if gone:
            yield "--write-baseline with the same file takes them out"


def _without_paths(summary: Summary) -> Summary:
    """The same findings in sentences that may be committed: a baseline is read on other machines."""
    from lora_forensics.records import Summary
    from lora_forensics.redaction import Redaction

    said = Redaction(Summary(())).finding
    runs = tuple(replace(verdict, findings=tuple(map(said, verdict.findings))) for verdict in summary.runs)
    return replace(summary, runs=runs, findings=tuple(map(said, summary.findings)))
