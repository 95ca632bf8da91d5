"""junit.xml: a test suite a run, a test case a finding, for the test panels of CI servers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lora_forensics.errors import UsageError
from lora_forensics.gate import accepted, counts, fingerprints
from lora_forensics.records import Finding, Skipped, Summary, Verdict
from lora_forensics.reports import text

if TYPE_CHECKING:
    from junitparser import TestCase, TestSuite

_UNSAID = frozenset({"error"})
"""What fails where no `--fail-on` says it."""


class JUnitReport:
    """The first case of a run is its verdict; a finding fails where `--fail-on` names it, and passes otherwise.

    Without `--fail-on`, errors fail. A run without a base model is an error; a finding of the baseline and a file that
    was skipped are skipped cases.

    Raises:
        UsageError: junitparser is missing.
    """

    filename: str | None = "junit.xml"

    def render(self, summary: Summary) -> str:
        """The document."""
        try:
            from junitparser import JUnitXml
        except ImportError as error:
            raise UsageError(
                "the junit report needs junitparser", "install it: pip install 'lora-forensics[ci]'"
            ) from error

        document: Any = JUnitXml("lora-forensics")
        for verdict in summary.runs:
            document.add_testsuite(_suite(verdict, summary))
        if alone := _findings("", summary.findings, summary) + _skipped(summary.skipped):
            document.add_testsuite(_closed("files of no run", alone))
        document.update_statistics()
        document._elem.attrib.pop("skipped", None)  # not of the root in the schemas of Jenkins; the suites have it
        written: bytes = document.tostring()
        return written.decode("utf-8").rstrip() + "\n"


def _suite(verdict: Verdict, summary: Summary) -> TestSuite:
    name = text.plain(verdict.run) or "."
    cases = [_verdict(verdict, name), *_findings(verdict.run, verdict.findings, summary)]
    return _closed(name, cases + _skipped(verdict.skipped))


def _findings(run: str, findings: Iterable[Finding], summary: Summary) -> list[TestCase]:
    cases = []
    times: Counter[str] = Counter()
    for finding, fingerprint in fingerprints(run, findings, summary.gate):
        times[finding.rule] += 1  # servers know a case by its name: two of one name are one
        name = f"{finding.rule} {times[finding.rule]}" if times[finding.rule] > 1 else finding.rule
        result = None
        if accepted(fingerprint, summary.gate):
            result = _result("Skipped", "accepted by the baseline")
        elif counts(finding, summary.gate.fail_on or _UNSAID):
            result = _result("Failure", finding.message, finding.severity, finding.hint)
        cases.append(_case(name, text.plain(run) or ".", f"{finding.severity}: {finding.message}", result))
    return cases


def _verdict(verdict: Verdict, name: str) -> TestCase:
    kept = f"{text.plain(verdict.keep.checkpoint)}: " if verdict.keep else ""
    status = text.STATUS.get(verdict.status, text.plain(verdict.status))
    lost = verdict.status == "no_base_model"
    result = _result("Error", text.headline(verdict), verdict.status) if lost else None
    return _case("verdict", name, f"{kept}{text.why(verdict)}\n{status}: {text.headline(verdict)}", result)


def _skipped(skipped: Iterable[Skipped]) -> list[TestCase]:
    return [
        _case(entry.path.as_posix(), "skipped files", result=_result("Skipped", entry.reason))
        for entry in skipped
        if not entry.expected
    ]


def _case(name: str, suite: str, said: str = "", result: Any = None) -> TestCase:
    from junitparser import TestCase

    case = TestCase(text.plain(name), suite, 0)
    if result is not None:
        case.result = [result]
    if said:
        case.system_out = "\n".join(map(text.plain, said.splitlines()))
    return case


def _result(kind: str, message: str, sort: str = "", details: str = "") -> Any:
    import junitparser

    result = getattr(junitparser, kind)(text.plain(message), text.plain(sort) or None)
    if details:
        result.text = text.plain(details)
    return result


def _closed(name: str, cases: list[TestCase]) -> TestSuite:
    from junitparser import TestSuite

    suite = TestSuite(name)
    suite.add_testcases(cases)
    return suite
