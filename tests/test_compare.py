"""Runs side by side, tables for other programs, and what the terminal is given."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import polars as pl
import pytest
from cli_runs import project
from test_cli import LOSSES, REPOSITORY, call, said

from lora_forensics.comparison import compare_runs
from lora_forensics.comparison.text import comparison_text, letters
from lora_forensics.rows import as_csv
from lora_forensics.series import read_table, write_table


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
    assert found.same()["highest rate"] == "0.0001"
    assert list(found.differing()) == ["window"]
    assert found.same()["base"] == "base.safetensors"
    assert found.results()["checkpoints"] == ["12, steps 10-120", "20, steps 10-200"]
    assert found.results()["best held-out"] == ["1 at step 50", "-"]
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


def copied(out: Path, place: Path, *runs: str) -> Path:
    """The output of a scan, to be damaged."""
    shutil.copytree(out, place)
    document = json.loads((place / "summary.json").read_text())
    for run in runs:
        shutil.copytree(out / "second", place / run)
        document["runs"].append(document["runs"][1] | {"run": run})
    (place / "summary.json").write_text(json.dumps(document))
    return place


def test_lost_runs_are_left_out_and_named(out: Path, tmp_path: Path) -> None:
    """A damaged, a missing and a truncated table cost their own runs alone; less than two left are an error."""
    place = copied(out, tmp_path / "out", "a", "b", "c")
    (place / "a" / "layers.parquet").write_bytes((out / "first" / "layers.parquet").read_bytes()[:400])
    (place / "b" / "checkpoints.parquet").unlink()
    (place / "c" / "series.parquet").write_bytes(b"x")
    found = compare_runs([place])
    assert [run.name for run in found.runs] == ["first", "second"]
    assert [entry.path.name for entry in found.left_out] == ["a", "b", "c"]
    assert "damaged" in found.left_out[0].reason
    result = call("compare", place)
    assert result.exit_code == 0
    assert f"{place / 'a'}: its tables are missing or damaged" in " ".join(result.stdout.split())
    assert len(json.loads(call("compare", place, "--json").stdout)["left_out"]) == 3
    assert "out/a" not in call("compare", place, "--redact").stdout
    (place / "first" / "layers.parquet").unlink()
    said(call("compare", place), 2, "1 run is not enough", "first: its tables are missing")
    (place / "summary.json").write_text("{")
    said(call("compare", place, out), 2, "damaged")
    document = json.loads((out / "summary.json").read_text())
    document["runs"][0]["run"] = "../../elsewhere"
    (place / "summary.json").write_text(json.dumps(document))
    said(call("compare", place), 2, "outside of its folder")


def test_an_unfinished_run_does_not_cut_the_others(out: Path, tmp_path: Path) -> None:
    """The table goes on where most runs go on; the short one has no values there."""
    place = copied(out, tmp_path / "out", "short")
    for table in ("checkpoints", "series"):
        path = place / "short" / f"{table}.parquet"
        write_table(read_table(path).filter(pl.col("step") <= 30), path, [])
    found = compare_runs([place])
    assert found.places()[-1] == 120
    assert [found.at(run, "path_length", 120.0) is None for run in found.runs] == [False, False, True]


def test_runs_of_one_checkpoint_and_of_none(out: Path, tmp_path: Path) -> None:
    """One has a place and no course; none has neither; both stand beside the others in every form."""
    pytest.importorskip("vl_convert")
    place = copied(out, tmp_path / "out", "one", "none")
    for run, steps in (("one", 10), ("none", 0)):
        for table in ("checkpoints", "series"):
            path = place / run / f"{table}.parquet"
            write_table(read_table(path).filter(pl.col("step") <= steps), path, [])
    found = compare_runs([place])
    assert [found.at(run, "path_length", 10.0) is None for run in found.runs] == [False, False, False, True]
    assert found.at(found.runs[2], "path_length", 11.0) is None
    assert found.results()["checkpoints"][2:] == ["1, steps 10-10", "0"]
    page, figures = tmp_path / "page.html", tmp_path / "figures"
    assert call("compare", place, "--html", page, "--figure", figures).exit_code == 0
    alone = call("compare", place / "none", place / "none" / ".." / "one", "--html", page, "--align", "dose")
    assert alone.exit_code == 0
    for table in ("checkpoints", "series"):
        path = place / "one" / f"{table}.parquet"
        write_table(read_table(path).clear(), path, [])
    nothing = call("compare", place / "none", place / "one", "--html", page, "--figure", figures)
    assert nothing.exit_code == 0
    assert "No course is known" in page.read_text("utf-8")


def test_epochs_are_no_steps(out: Path, tmp_path: Path) -> None:
    """A run of which only epochs are known has no place beside the steps of another."""
    place = copied(out, tmp_path / "out", "epochs")
    path = place / "epochs" / "checkpoints.parquet"
    write_table(read_table(path).with_columns(epoch=pl.lit(None, pl.Float64), step=pl.col("step") // 10), path, [])
    document = json.loads((place / "summary.json").read_text())
    document["runs"][2]["step_unit"] = "epoch"
    (place / "summary.json").write_text(json.dumps(document))
    found = compare_runs([place])
    assert found.without() == [2]
    assert "no step is known of C" in comparison_text(found, 80)
    assert found.at(found.runs[2], "path_length", 10.0) is None
    along = compare_runs([place], "epoch")
    assert along.without() == []
    assert along.runs[2].course["epoch"].drop_nulls().to_list()[:3] == [1, 2, 3]


def test_base_models_of_one_name_are_told_apart(out: Path, tmp_path: Path) -> None:
    """The same file under two ways to it is one base; two files of one name are two, also where nobody may see them."""
    project(tmp_path / "runs", ["third"])
    assert call("scan", tmp_path / "runs", "--out", tmp_path / "out", "--no-plots", "-q").exit_code == 0
    found = compare_runs([out, tmp_path / "out"])
    first, second, third = found.settings()["base"]
    assert first == second != third
    assert third == (tmp_path / "runs" / "base.safetensors").as_posix()
    assert found.notes["cosine"].startswith("different base:")
    first, second, third = compare_runs([out, tmp_path / "out"], redact=True).settings()["base"]
    assert first == second != third
    assert third.startswith("base-")


def test_long_values_are_whole(out: Path) -> None:
    """What is longer than its column goes on in the next line: two names that begin alike stay different."""
    found = compare_runs([out])
    names = [f"{'x' * 40}-{place}.safetensors" for place in range(2)]
    runs = tuple(replace(run, settings={"base": name}) for run, name in zip(found.runs, names, strict=True))
    text = comparison_text(replace(found, runs=runs), 80)
    block = text.partition("settings that differ")[2].partition("what came")[0].splitlines()
    columns = [[line[16 + 32 * place : 48 + 32 * place].strip() for line in block[2:]] for place in range(2)]
    assert ["".join(column) for column in columns] == names


def test_the_html_option(out: Path, tmp_path: Path) -> None:
    """The page comes beside what is printed; a folder is refused."""
    pytest.importorskip("vl_convert")
    result = call("compare", out, "--html", tmp_path / "new" / "page.html", "--align", "epoch")
    assert result.exit_code == 0
    assert "what came of it" in result.stdout
    assert '"align":"epoch"' in (tmp_path / "new" / "page.html").read_text("utf-8")
    said(call("compare", out, "--html", tmp_path), 2, "is a folder")


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
