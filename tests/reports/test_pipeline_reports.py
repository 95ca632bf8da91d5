"""The reports that pipelines read, read back by others' libraries."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath

import pytest
from junitparser import Error, Failure, JUnitXml
from junitparser import Skipped as SkippedCase
from sarif_pydantic import Sarif

from lora_forensics.gate import fingerprints
from lora_forensics.records import Finding, Gate, Skipped, Summary, Verdict
from lora_forensics.reports import GitHubReport, JUnitReport, SarifReport
from lora_forensics.reports.sarif import uri

ERROR, WARNING, NOTE = (
    Finding(f"rule-{n}", s, f"seen {n}", "do it") for n, s in enumerate(("error", "warning", "info"))
)


@pytest.fixture
def judged(verdict: Callable[..., Verdict]) -> Callable[..., Summary]:
    """Makes a summary of one run with a finding of each severity, for `--fail-on` and a baseline."""

    def make(*fail_on: str, accepted: tuple[Finding, ...] = ()) -> Summary:
        one = replace(verdict("a"), findings=(ERROR, WARNING, NOTE))
        prints = dict(fingerprints(one.run, one.findings, Gate()))
        gate = Gate(frozenset(fail_on), frozenset(prints[finding] for finding in accepted))
        return Summary((one,), (), {"lora-forensics": "1.2.3"}, None, gate)

    return make


def cases(summary: Summary) -> dict[str, str]:
    """Name of each test case to what it says of itself, by junitparser."""
    names = {Failure: "failure", Error: "error", SkippedCase: "skipped"}
    suites = list(JUnitXml.fromstring(JUnitReport().render(summary).encode()))
    return {case.name: names[type(case.result[0])] if case.result else "passed" for suite in suites for case in suite}


@pytest.mark.parametrize(
    ("fail_on", "failed"),
    [
        ((), {"rule-0"}),
        (("warning",), {"rule-0", "rule-1"}),
        (("rule-2",), {"rule-2"}),
        (("info",), {"rule-0", "rule-1", "rule-2"}),
    ],
)
def test_junit_fails_what_fail_on_names(
    judged: Callable[..., Summary], fail_on: tuple[str, ...], failed: set[str]
) -> None:
    """A severity stands for all above it; without any, errors fail."""
    found = cases(judged(*fail_on))
    assert {name for name, result in found.items() if result == "failure"} == failed
    assert found["verdict"] == "passed"


def test_junit_tells_what_was_accepted_skipped_and_not_measured(
    judged: Callable[..., Summary], without_keep: Callable[..., Verdict]
) -> None:
    """The baseline's are skipped, damaged files too, foreign files are not mentioned; no base model is an error."""
    summary = judged("error", accepted=(ERROR,))
    files = (Skipped(Path("x.safetensors"), "truncated"), Skipped(Path("optimizer.pt"), "state", expected=True))
    lost = replace(without_keep("no_base_model", 3), run="b")
    found = cases(replace(summary, skipped=files))
    assert found == {
        "verdict": "passed",
        "rule-0": "skipped",
        "rule-1": "passed",
        "rule-2": "passed",
        "x.safetensors": "skipped",
    }
    assert cases(Summary((lost,)))["verdict"] == "error"


def test_junit_counts(judged: Callable[..., Summary]) -> None:
    """The totals are those of the cases."""
    document = JUnitXml.fromstring(JUnitReport().render(judged("warning")).encode())
    assert (document.tests, document.failures, document.errors, document.skipped) == (4, 2, 0, 0)


def test_sarif_is_read_by_others(judged: Callable[..., Summary], hostile: Summary, sample: Summary) -> None:
    """Typed models of the standard take every document; rules are described, levels are the standard's."""
    for summary in (judged(), hostile, sample, Summary(())):
        document = Sarif.model_validate_json(SarifReport().render(summary))
        (run,) = document.runs
        assert len(run.results or []) == sum(len(verdict.findings) for verdict in summary.runs)
        ids = [rule.id for rule in run.tool.driver.rules or []]
        for result in run.results or []:
            assert result.rule_id == ids[result.rule_index]  # type: ignore[index]
    levels = [
        result.level.value for result in Sarif.model_validate_json(SarifReport().render(judged())).runs[0].results
    ]
    assert levels == ["error", "warning", "note"]


def test_sarif_marks_what_the_baseline_accepts(judged: Callable[..., Summary]) -> None:
    """A suppression, and the fingerprint that the baseline has."""
    summary = judged(accepted=(WARNING,))
    text = SarifReport().render(summary)
    assert text.count('"suppressions"') == 1
    for _, mark in fingerprints(summary.runs[0].run, summary.runs[0].findings, summary.gate):
        assert mark in text


def test_sarif_places_are_relative_to_the_checkout(
    judged: Callable[..., Summary], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Runs below the working directory are found by code scanning; the others keep their whole place."""
    monkeypatch.chdir(tmp_path)
    summary = judged()
    for path, expected in (
        (tmp_path / "runs" / "a b", '"uri": "runs/a%20b/"'),
        (Path("/else"), '"uri": "file:///else/"'),
    ):
        one = replace(summary.runs[0], path=path.as_posix())
        assert expected in SarifReport().render(replace(summary, runs=(one,)))


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/work/runs/a", PurePosixPath("/work"), "runs/a"),
        ("/elsewhere/a:b", PurePosixPath("/work"), "file:///elsewhere/a:b"),
        ("C:/work/runs/ü", PureWindowsPath("C:\\work"), "runs/%C3%BC"),
        ("C:\\work\\runs\\a", PureWindowsPath("c:\\Work"), "runs/a"),
        ("D:/runs/a", PureWindowsPath("C:\\work"), "file:///D:/runs/a"),
        ("s3://bucket/a b", PurePosixPath("/work"), "s3://bucket/a%20b"),
        ("a\udcff", PurePosixPath("/work"), "a%FF"),
    ],
)
def test_uris(path: str, root: PurePosixPath | PureWindowsPath, expected: str) -> None:
    """On every system a path is a URI with forward slashes."""
    assert uri(path, root) == expected


def test_annotations_are_one_command_a_line(judged: Callable[..., Summary], hostile: Summary) -> None:
    """The worst first, what the baseline accepts left out; a name cannot begin a command or end a property."""
    lines = GitHubReport().render(judged(accepted=(WARNING,))).splitlines()
    assert [line.split(" ")[0] for line in lines[:2]] == ["::error", "::notice"]
    assert not any("rule-1" in line for line in lines)
    for line in GitHubReport().render(hostile).splitlines():
        assert re.fullmatch(r"::(error|warning|notice) (file=[^:,]*,)?title=[^:,]*::.*", line)


def test_annotations_escape_what_commands_are_made_of(verdict: Callable[..., Verdict]) -> None:
    """Percent signs everywhere; colons and commas in properties."""
    odd = replace(verdict("a,b::c%0A"), findings=(Finding("x", "error", "100%::stop", ""),))
    line = GitHubReport().render(Summary((odd,))).splitlines()[0]
    assert line == "::error title=x%3A a%2Cb%3A%3Ac%250A::100%25::stop"
