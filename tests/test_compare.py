"""Runs side by side, tables for other programs, and what the terminal is given."""

from __future__ import annotations

import csv
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest
from cli_runs import project
from test_cli import LOSSES, REPOSITORY, call, said

from lora_forensics.comparison import compare_runs
from lora_forensics.comparison.text import comparison_text, letters
from lora_forensics.rows import as_csv


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of a scan of a run of 12 and one of 20 checkpoints; only the first has held-out losses. Read only."""
    folder = tmp_path_factory.mktemp("compared")
    project(folder / "runs", ["first"], losses=LOSSES)
    project(folder / "runs", ["second"], count=20)
    assert call("scan", folder / "runs", "--out", folder / "out", "--no-plots", "-q").exit_code == 0
    return folder / "out"


def test_runs_stand_side_by_side(out: Path) -> None:
    """Settings that differ, those that do not, results, and the courses where both runs are."""
    found = compare_runs([out])
    assert [run.name for run in found.runs] == ["first", "second"]
    assert found.same()["alpha"] == "4"
    assert found.same()["learning rate"] == "0.0001"
    assert found.differing() == {}
    assert found.results()["checkpoints"] == ["12, steps 10-120", "20, steps 10-200"]
    assert found.results()["best held-out"] == ["1 at 50", "-"]
    assert (found.places()[0], found.places()[-1]) == (10, 120)
    series = pl.read_parquet(out / "second" / "series.parquet")
    at = series.filter(pl.col("step") == 120)["cosine"][0]
    assert found.at(found.runs[1], "cosine", 118.0) == pytest.approx(at, rel=1e-12)
    assert found.at(found.runs[0], "cosine", 200.0) is None
    assert found.at(found.runs[1], "held_out_loss", 50.0) is None


@pytest.mark.parametrize(("align", "last"), [("step", 120), ("epoch", 3.0), ("dose", 0.012)])
def test_runs_are_aligned_as_asked(out: Path, align: str, last: float) -> None:
    """By step, by epoch, or by the sum of the learning rates: up to where the shorter one ends."""
    found = compare_runs([out], align)
    assert found.places()[-1] == pytest.approx(last, rel=0.15)
    assert f"{align} {found.places()[0]:.4g}" in comparison_text(found, 80)


def test_many_runs_fit_80_columns(out: Path) -> None:
    """Columns go on below each other; no line is wider than the terminal."""
    found = compare_runs([out, *[out / name for name in ("first", "second")]])
    many = type(found)(found.runs * 15, found.align, found.measures)
    for width in (80, 200):
        lines = comparison_text(many, width, verbose=True).splitlines()
        assert max(map(len, lines)) <= width
    assert letters(28)[-2:] == ["AA", "AB"]


def test_a_run_is_named_once(out: Path) -> None:
    """OUT and OUT/RUN may name the same run; one run alone is nothing to compare."""
    assert len(compare_runs([out, out / "first"]).runs) == 2
    said(call("compare", out / "first"), 2, "1 run is not enough", "OUT/RUN")
    said(call("compare", out / "first", out / "none"), 2, "no readable summary.json")


def test_compare_in_json_and_as_figures(out: Path, tmp_path: Path) -> None:
    """One document; PNG and SVG; --redact names nobody."""
    result = call("compare", out, "--json", "--figure", tmp_path / "figures", "--align", "epoch")
    document = json.loads(result.stdout)
    assert [run["name"] for run in document["runs"]] == ["first", "second"]
    assert len(document["runs"][1]["course"]) == 20
    assert len(document["table"]["cosine"]) == 6
    assert (tmp_path / "figures" / "comparison.png").read_bytes().startswith(b"\x89PNG")
    assert b'id="cosine-B"' in (tmp_path / "figures" / "comparison.svg").read_bytes()
    hidden = call("compare", out, "--redact")
    assert hidden.exit_code == 0
    assert "first" not in hidden.stdout


def test_tables_come_as_csv_and_json(out: Path) -> None:
    """Of all runs or of one; columns and conditions in SQL; what cannot be is said."""
    rows = list(csv.DictReader(io.StringIO(call("table", out, "checkpoints", "--where", "step > 100").stdout)))
    assert [(row["run"], row["step"]) for row in rows][:3] == [("first", "110"), ("first", "120"), ("second", "110")]
    one = call("table", out / "first", "layers", "--json", "--columns", "step,cosine").stdout.splitlines()
    assert list(json.loads(one[0])) == ["step", "cosine"]
    assert len(one) == 36
    for arguments, parts in (
        (["--where", "nothing > 1"], ["nothing", "columns: run"]),
        (["--where", "("], ["--where"]),
        (["--columns", "x"], ["no column 'x'", "choose from run"]),
    ):
        said(call("table", out, "runs", *arguments), 2, *parts)
    said(call("table", out / "nowhere", "runs"), 2, "no runs.parquet")


def test_cells_are_harmless() -> None:
    """A spreadsheet computes nothing and a terminal obeys nothing; commas, quotes and numbers stay what they are."""
    frame = pl.DataFrame(
        {"a": ["=1+1", "@x", "\x1b[31mred", 'say "a, b"', None], "b": [1.5, None, -2.0, float("nan"), 0.0]}
    )
    read = list(csv.reader(io.StringIO(as_csv(frame))))
    assert [row[0] for row in read] == ["a", "'=1+1", "'@x", "red", 'say "a, b"', ""]
    assert [row[1] for row in read] == ["b", "1.5", "", "-2.0", "NaN", "0.0"]


def on_terminal(command: list[str], columns: int, **variables: str) -> str:
    """What a command prints on a terminal of so many columns."""
    import fcntl
    import pty
    import struct
    import termios

    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment = {**known, "PYTHONPATH": str(REPOSITORY), "TERM": "xterm-256color", **variables}
    with subprocess.Popen(
        [sys.executable, "-m", "lora_forensics", *command], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        said = b""
        while True:
            try:
                part = os.read(ours, 65536)
            except OSError:  # Linux says so when the other end is closed
                break
            if not part:
                break
            said += part
    os.close(ours)
    assert process.returncode == 0, said
    return said.decode().replace("\r\n", "\n")


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo-terminal")
@pytest.mark.parametrize(
    ("columns", "variables", "color"),
    [
        (80, {}, True),
        (200, {}, True),
        (80, {"NO_COLOR": "1"}, False),
        (80, {"NO_COLOR": "1", "FORCE_COLOR": "1"}, False),
        (80, {"NO_COLOR": ""}, True),
        (80, {"TERM": "dumb"}, False),
        (80, {"TERM": "dumb", "FORCE_COLOR": "1"}, True),
        (80, {"FORCE_COLOR": "0"}, False),
    ],
)
def test_the_terminal_gets_what_it_wants(out: Path, columns: int, variables: dict[str, str], color: bool) -> None:
    """Colour and width follow the terminal, and the variables that people set."""
    shown = on_terminal(["compare", str(out)], columns, **variables)
    assert ("\x1b[" in shown) == color
    if not color:
        assert shown == comparison_text(compare_runs([out]), columns)


@pytest.mark.parametrize("forced", [False, True])
def test_a_pipe_gets_80_columns_without_colour(out: Path, forced: bool) -> None:
    """Unless colour is forced, as CI servers do whose logs show it."""
    known = {k: v for k, v in os.environ.items() if k not in ("COLUMNS", "NO_COLOR", "FORCE_COLOR")}
    environment = {**known, "PYTHONPATH": str(REPOSITORY)} | ({"FORCE_COLOR": "1"} if forced else {})
    command = [sys.executable, "-m", "lora_forensics", "compare", str(out)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, encoding="utf-8")
    assert ("\x1b[" in done.stdout) == forced
    assert forced or done.stdout == comparison_text(compare_runs([out]), 80)
