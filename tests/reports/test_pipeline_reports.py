"""The reports that pipelines read, read back by others' libraries."""

from __future__ import annotations

import gzip
import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import pytest
from junitparser import Error, Failure, JUnitXml
from junitparser import Skipped as SkippedCase
from sarif_pydantic import Sarif
from schemas import problems, stored_schemas

from lora_forensics.gate import fingerprints
from lora_forensics.records import Finding, Gate, Skipped, Summary, Verdict
from lora_forensics.redaction import redacted
from lora_forensics.reports import GitHubReport, JUnitReport, MarkdownReport, SarifReport
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


@pytest.fixture(scope="session")
def schemas() -> dict[str, Any]:
    """JSON schemas by their address."""
    return stored_schemas()


def results(summary: Summary) -> list[dict[str, Any]]:
    """The results of a SARIF report."""
    found: list[dict[str, Any]] = json.loads(SarifReport().render(summary))["runs"][0]["results"]
    return found


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
    assert (document.tests, document.failures, document.errors) == (4, 2, 0)
    assert [(suite.tests, suite.failures, suite.skipped) for suite in document] == [(4, 2, 0)]


JENKINS = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {"name", "tests", "failures", "errors", "time", "skipped"},
    "testcase": {"name", "classname", "time"},
    "failure": {"message", "type"},
    "error": {"message", "type"},
    "skipped": {"message", "type"},
    "system-out": set(),
}
"""Elements of the schema of Jenkins' xUnit plugin (junit-10.xsd) that are written here, and their attributes."""


def test_junit_keeps_to_the_schema_of_jenkins(hostile: Summary, sample: Summary) -> None:
    """No element or attribute that strict readers refuse; results come before what was said."""
    for summary in (hostile, sample):
        root = ET.fromstring(JUnitReport().render(summary))  # noqa: S314 (our own)
        for element in root.iter():
            assert set(element.attrib) <= JENKINS[element.tag], element.tag
        for case in root.iter("testcase"):
            assert [part.tag for part in case][-1:] in ([], ["system-out"], ["skipped"])
        assert {"name", "tests", "failures", "errors"} <= set(root[0].attrib)


def test_junit_is_xml_whatever_names_hold() -> None:
    """Every character below 0x300, surrogates and non-characters: what XML cannot hold is left out."""
    odd = "".join(map(chr, [*range(0x300), 0xD800, 0xDCFF, 0xFFFE, 0xFFFF, 0x1F600])) + "]]>"
    summary = Summary((), (Skipped(Path(odd.replace("\0", "")), odd),), findings=(Finding(odd, "error", odd, odd),))
    root = ET.fromstring(JUnitReport().render(summary).encode())  # noqa: S314 (our own)
    assert len(list(root.iter("testcase"))) == 2
    assert "\U0001f600" in next(root.iter("failure")).attrib["message"]


def test_cases_of_a_run_have_names_of_their_own(judged: Callable[..., Summary]) -> None:
    """Servers take two cases of one name for one; the first keeps its name when another comes."""
    summary = judged()
    twice = replace(summary.runs[0], findings=(WARNING, replace(WARNING, message="other"), ERROR))
    assert list(cases(replace(summary, runs=(twice,)))) == ["verdict", "rule-1", "rule-1 2", "rule-0"]


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


def test_sarif_is_valid(
    judged: Callable[..., Summary], hostile: Summary, sample: Summary, schemas: dict[str, Any]
) -> None:
    """By the schema that it names; and the validator does find faults."""
    for summary in (judged(accepted=(ERROR,)), hostile, sample, redacted(sample), Summary(())):
        document = json.loads(SarifReport().render(summary))
        assert problems(schemas[document["$schema"]], document) == []
    assert problems(schemas[document["$schema"]], {**document, "runs": [{"results": [{}]}]})


def test_sarif_has_what_code_scanning_asks_for(
    judged: Callable[..., Summary], hostile: Summary, sample: Summary, verdict: Callable[..., Verdict]
) -> None:
    """Each result has a place with a line, in a scheme of a checkout, and a fingerprint under the one name it reads.

    One result without a place, or in a bucket, and the whole file is refused.
    """
    remote = replace(verdict("s3 run"), path="s3://bucket/a")
    alone = replace(judged(), findings=(ERROR,))
    prints: list[str] = []
    for summary in (alone, hostile, sample, redacted(sample), Summary((remote,))):
        found = results(summary)
        assert found
        for result in found:
            (place,) = result["locations"]
            artifact = place["physicalLocation"]["artifactLocation"]
            assert place["physicalLocation"]["region"]["startLine"] == 1
            assert re.fullmatch(r"(file:///)?[\w.~%/!$&'()*+;=@-]+", artifact["uri"]), artifact
            assert artifact["uri"].startswith("file:///") != (artifact.get("uriBaseId") == "%SRCROOT%")
            assert result["message"]["text"]
        prints += [result["partialFingerprints"]["primaryLocationLineHash"] for result in found]
    assert all(re.fullmatch("[0-9a-f]{16}", mark) for mark in prints)
    (rule,) = json.loads(SarifReport().render(Summary((), findings=(Finding("nonfinite", "error", "x"),))))["runs"][0][
        "tool"
    ]["driver"]["rules"]
    assert "lora-forensics rules nonfinite" in rule["help"]["markdown"]


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
        ("a\udcff", PurePosixPath("/work"), "a%FF"),
    ],
)
def test_uris(path: str, root: PurePosixPath | PureWindowsPath, expected: str) -> None:
    """On every system a path is a URI with forward slashes."""
    assert uri(path, root) == expected


def test_annotations_are_one_command_a_line(judged: Callable[..., Summary], hostile: Summary) -> None:
    """The worst first, what the baseline accepts left out; a name cannot begin a command or end a property."""
    lines = GitHubReport().render(judged(accepted=(WARNING,))).splitlines()
    assert [re.sub("::.*", "", line[2:]) for line in lines] == [
        "error title=rule-0%3A a",
        "notice title=lora-forensics",
        "notice title=a",
        "notice title=rule-2%3A a",
    ]
    assert not any("rule-1" in line for line in lines)
    for line in GitHubReport().render(hostile).splitlines():
        assert re.fullmatch(r"::(error|warning|notice) (file=[^:,]*,)?title=[^:,]*::.*", line)


def test_annotations_escape_what_commands_are_made_of(verdict: Callable[..., Verdict]) -> None:
    """Percent signs everywhere; colons and commas in properties."""
    odd = replace(verdict("a,b::c%0A"), findings=(Finding("x", "error", "100%::stop", ""),))
    line = GitHubReport().render(Summary((odd,))).splitlines()[0]
    assert line == "::error title=x%3A a%2Cb%3A%3Ac%250A::100%25::stop"


def test_a_fleet_fits_into_a_job_summary(sample: Summary) -> None:
    """GitHub shows nothing of a page above 1 MiB: all runs stand in the table, the last ones have no section."""
    runs = tuple(replace(verdict, run=f"fleet/{n}/{verdict.run}") for n in range(300) for verdict in sample.runs)
    page = MarkdownReport().render(replace(sample, runs=runs))
    assert 800_000 < len(page.encode()) < 1 << 20
    assert page.count("\n| `fleet/") == len(runs)
    (left,) = re.findall(r"^(\d+) more runs: .*summary\.json", page, re.MULTILINE)
    assert page.count("\n## ") == len(runs) - int(left) + 1  # and the skipped files of no run
    assert "more run" not in MarkdownReport().render(sample)


def test_sarif_of_a_huge_fleet_is_one_that_code_scanning_takes(verdict: Callable[..., Verdict]) -> None:
    """No more than it shows, the worst first, and what is left out is counted in the file."""
    many = tuple(Skipped(Path(f"checkpoint-{place}/adapter_model.safetensors"), "truncated") for place in range(60))
    runs = tuple(replace(verdict(f"r{run}"), findings=(NOTE,) * 5 + (ERROR,), skipped=many) for run in range(1000))
    written = SarifReport().render(Summary(runs))
    (run,) = json.loads(written)["runs"]
    assert len(run["results"]) == 5000
    assert [result["level"] for result in run["results"][:1001]] == ["error"] * 1000 + ["note"]
    notes = run["invocations"][0]["toolExecutionNotifications"]
    assert "1000 more findings are left out" in notes[0]["message"]["text"]
    assert "55000 more skipped files are left out" in notes[1]["message"]["text"]
    assert len(gzip.compress(written.encode())) < 10_000_000
