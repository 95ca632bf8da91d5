"""The contract that every report keeps, and what is special about each."""

from __future__ import annotations

import json
import os
import re
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NoReturn, get_args

import pytest

from lora_forensics.records import Finding, Skipped, Status, Summary, Verdict
from lora_forensics.reports import REPORTS, JsonReport, MarkdownReport, TerminalReport, text

GOLDEN = Path(__file__).parent / "golden"
REGENERATE = "LORA_FORENSICS_REGENERATE"
"""Set this variable to write the golden files anew; then read the difference."""

RAW_MARKUP = re.compile(r"<script|\[red\]|(?<!\\)`@|@team|\]\(http|\bhttp://|www\.|\|evil|\$x\$|\*b\*", re.IGNORECASE)


@pytest.mark.parametrize("name", REPORTS)
class TestContract:
    """What a caller may expect of every line of `REPORTS`."""

    def test_empty(self, name: str) -> None:
        """A summary without runs gives a report, and it ends with one newline."""
        rendered = REPORTS[name]().render(Summary(runs=()))
        assert rendered.endswith("\n")
        assert not rendered.endswith("\n\n")

    def test_all_skipped(self, name: str) -> None:
        """A summary that only skipped files names the reason."""
        skipped = tuple(Skipped(Path(f"a/{n}.safetensors"), "truncated: 12 bytes missing") for n in range(200))
        assert "truncated: 12 bytes missing" in REPORTS[name]().render(Summary(runs=(), skipped=skipped))

    @pytest.mark.parametrize("status", get_args(Status))
    def test_every_status(
        self,
        name: str,
        status: Status,
        verdict: Callable[..., Verdict],
        without_keep: Callable[[Status, int], Verdict],
    ) -> None:
        """Every status is reported, with and without a checkpoint to keep; the sentence or the file is in it."""
        rendered = REPORTS[name]().render(Summary(runs=(verdict("kept", status), without_keep(status, 3))))
        assert "checkpoint-260/adapter_model.safetensors" in rendered
        assert without_keep(status, 3).message[:40] in rendered

    def test_bare(self, name: str, without_keep: Callable[[Status, int], Verdict]) -> None:
        """A verdict with nothing optional in it is reported."""
        bare = replace(without_keep("unhealthy", 0), run="", message="", trainer=None, adapter=None, cadence_steps=None)
        assert "unhealthy" in REPORTS[name]().render(Summary(runs=(bare,)))

    def test_hostile(self, name: str, hostile: Summary) -> None:
        """No text from a file brings terminal codes, half characters or (JSON is data) direction marks."""
        rendered = REPORTS[name]().render(hostile)
        assert not [sign for sign in rendered if unicodedata.category(sign) == "Cc" and sign != "\n"]
        assert name == "json" or "\u202e" not in rendered
        rendered.encode("utf-8")

    def test_filename(self, name: str) -> None:
        """A report is a file in OUT, or is printed."""
        filename = REPORTS[name]().filename
        assert filename is None or Path(filename).name == filename


class TestTerminal:
    """The report in the terminal."""

    @pytest.mark.parametrize(
        ("golden", "report"),
        [
            ("terminal.txt", TerminalReport()),
            ("terminal_verbose.txt", TerminalReport(verbose=True)),
            ("terminal_narrow.txt", TerminalReport(width=60)),
            ("terminal_wide.txt", TerminalReport(width=200)),
            ("terminal_color.txt", TerminalReport(color=True)),
        ],
    )
    def test_golden(self, golden: str, report: TerminalReport, sample: Summary) -> None:
        """The page is the one that was looked at."""
        _compare(GOLDEN / golden, report.render(sample))

    @pytest.mark.parametrize("width", [60, 80, 120])
    def test_width(self, width: int, sample: Summary) -> None:
        """No line is longer than the terminal is wide."""
        lines = TerminalReport(width=width, verbose=True).render(sample).splitlines()
        assert max(map(len, lines)) <= width

    def test_kept_path_is_whole(self, verdict: Callable[..., Verdict]) -> None:
        """The file to keep stands on a line of its own where it is too long, and is never broken or shortened."""
        full = verdict()
        assert full.keep is not None
        path = "a folder with spaces/" * 6 + "adapter_model.safetensors"
        kept = replace(full, keep=replace(full.keep, checkpoint=path))
        assert f"  {path}" in TerminalReport().render(Summary(runs=(kept,))).splitlines()

    def test_skipped_paths_are_shortened(self) -> None:
        """A long path that was skipped loses its middle, not its name."""
        skipped = (Skipped(Path("very/" * 30 + "long.safetensors"), "empty file"),)
        lines = TerminalReport(verbose=True).render(Summary(runs=(), skipped=skipped)).splitlines()
        assert any("..." in line and line.endswith("long.safetensors") and len(line) <= 80 for line in lines)

    def test_wide_signs(self, verdict: Callable[..., Verdict]) -> None:
        """Signs that take two cells count as two."""
        wide = replace(verdict(), findings=(Finding("wide", "info", "層 " * 60),))
        lines = TerminalReport().render(Summary(runs=(wide,))).splitlines()
        assert max(len(line) + line.count("層") for line in lines) <= 80

    def test_markup_in_names_is_text(self, hostile: Summary) -> None:
        """Square brackets in a name are shown, not obeyed, also in colour."""
        assert "[red]" in TerminalReport(color=True).render(hostile)

    def test_without_color(self, sample: Summary) -> None:
        """Without colour there are no terminal codes, whatever the environment says."""
        assert "\x1b" not in TerminalReport().render(sample)

    def test_the_spread_is_said(self, verdict: Callable[..., Verdict]) -> None:
        """Where other windows and other modules put the turning point; odd evidence says nothing."""
        sweep = [{"window": 5, "step": 280}, {"window": 8, "step": None}]
        evidence = {"window_sweep": sweep, "layer_interval": {"low_step": 200, "high_step": 320}}
        shown = TerminalReport().render(Summary(runs=(replace(verdict(), evidence=evidence),)))
        assert "other windows none; resampled modules 200-320" in " ".join(shown.split())
        odd = replace(verdict(), evidence={"window_sweep": [3, None], "layer_interval": 7})
        assert "resampled" not in TerminalReport().render(Summary(runs=(odd,)))

    def test_foreign_files_are_only_counted(self) -> None:
        """A file that is no checkpoint anyway is counted, and listed when asked for."""
        summary = Summary(runs=(), skipped=(Skipped(Path("optimizer.pt"), "training state", expected=True),))
        assert TerminalReport().render(summary) == "0 runs; 1 other file is no checkpoint\n"
        assert "optimizer.pt" in TerminalReport(verbose=True).render(summary)

    def test_nothing_is_said_twice(self, verdict: Callable[..., Verdict]) -> None:
        """A finding about the last checkpoint takes the place of the line about it."""
        message = "the last checkpoint (step 1000) is past the turning point (step 280)"
        told = replace(verdict(), findings=(Finding("last-is-past", "warning", message),))
        assert TerminalReport().render(Summary(runs=(told,))).count("the last checkpoint") == 1

    def test_many_runs(self, verdict: Callable[..., Verdict]) -> None:
        """A thousand runs are a thousand compact blocks and one line of totals."""
        rendered = TerminalReport().render(Summary(runs=tuple(verdict(f"run-{n}") for n in range(1000))))
        assert rendered.endswith("1000 runs: 1000 with a checkpoint to keep, 0 without\n")
        assert len(rendered.splitlines()) < 13_000


class TestMarkdown:
    """summary.md."""

    def test_golden(self, sample: Summary) -> None:
        """The page is the one that was looked at."""
        _compare(GOLDEN / "summary.md", MarkdownReport().render(sample))

    def test_hostile_text_is_no_markup(self, hostile: Summary) -> None:
        """Text from files makes no tag, cell, link, mention, formula or emphasis."""
        assert not RAW_MARKUP.findall(MarkdownReport().render(hostile))

    def test_table_has_one_row_a_run(self, hostile: Summary) -> None:
        """A hostile name cannot add cells or rows to the table."""
        rows = [line for line in MarkdownReport().render(hostile).splitlines() if line.startswith("|")]
        assert [row.count("|") for row in rows] == [6, 6, 6]

    def test_pictures(self, tmp_path: Path, verdict: Callable[..., Verdict]) -> None:
        """Pictures that exist are linked relative to the page, with names that links can hold."""
        plots = tmp_path / "a (b) c" / "plots"
        plots.mkdir(parents=True)
        (plots / "similarity.png").touch()
        rendered = MarkdownReport().render(Summary(runs=(verdict("a (b) c"),), folder=tmp_path))
        assert "](a%20%28b%29%20c/plots/similarity.png)" in rendered
        assert "modules.png" not in rendered


class TestJson:
    """summary.json."""

    def test_document(self, sample: Summary) -> None:
        """The document is the summary's, in its order."""
        document = json.loads(JsonReport().render(sample))
        assert document == json.loads(json.dumps(sample.to_dict()))
        assert list(document) == list(sample.to_dict())

    def test_undefined_numbers_are_null(self, hostile: Summary) -> None:
        """NaN and infinity are null, as JSON has no word for them."""
        document = json.loads(JsonReport().render(hostile), parse_constant=_no_constant)
        assert document["runs"][0]["evidence"]["held_out"]["loss"] is None

    def test_text_comes_back(self, hostile: Summary) -> None:
        """Every name comes back as it was, also one that is no valid Unicode."""
        document = json.loads(JsonReport().render(hostile))
        assert document["runs"][0]["run"] == hostile.runs[0].run

    def test_unicode_is_readable(self, verdict: Callable[..., Verdict]) -> None:
        """Signs outside of ASCII are written as themselves."""
        assert "層" in JsonReport().render(Summary(runs=(verdict("層"),)))


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        ("a\x1b[31mb\x1b[0m", "ab"),
        ("a\x1b]0;title\x07b", "ab"),
        ("a\x1b]8;;http://x\x1b\\b", "ab"),
        ("two\r\nlines\tand a tab", "two lines and a tab"),
        ("\u202eabc\u200b\x00\x9b", "abc"),
        ("\udcff", "\N{REPLACEMENT CHARACTER}"),
        ("層 ß é", "層 ß é"),
        (None, "None"),
    ],
)
def test_plain(raw: object, expected: str) -> None:
    """Text from files becomes one printable line."""
    assert text.plain(raw) == expected


@pytest.mark.parametrize(
    ("step", "epoch", "expected"),
    [
        (5, None, "step 5"),
        (5, float("nan"), "step 5"),
        (5, 0.123, "step 5, epoch 0.12"),
        (5, 8.0, "step 5, epoch 8"),
        (5, 12.34, "step 5, epoch 12.3"),
        (5, 1e6, "step 5, epoch 1e+06"),
    ],
)
def test_place(step: int, epoch: float | None, expected: str, verdict: Callable[..., Verdict]) -> None:
    """A step is given with its epoch where that is known, as short as people say it."""
    run = verdict()
    assert text.place(run, step, epoch) == expected
    assert text.place(replace(run, step_unit="epoch"), step, epoch) == "epoch 5"


def _compare(golden: Path, rendered: str) -> None:
    if os.environ.get(REGENERATE):
        golden.write_bytes(rendered.encode())
    assert rendered == golden.read_bytes().decode(), f"set {REGENERATE}=1 to accept the new page"


def _no_constant(name: str) -> NoReturn:
    raise AssertionError(f"{name} is no JSON")
