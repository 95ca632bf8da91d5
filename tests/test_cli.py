"""The command line: exit codes, what is said on which stream, and what is imported."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import polars as pl
import pytest
import torch
from cli_runs import MODULES, base_model, checkpoint, peft_run, project
from click.testing import CliRunner, Result
from safetensors.torch import save_file

import lora_forensics
from lora_forensics.cli import main
from lora_forensics.commands.scanning import parse_size
from lora_forensics.errors import UsageError

REPOSITORY = Path(__file__).parent.parent
LOSSES = [abs(place - 4) + 1.0 for place in range(12)]
"""Lowest at the fifth of twelve checkpoints: step 50."""

POSIX = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files")
NOT_ROOT = pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")


def call(*arguments: str | Path) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def shell(*arguments: str | Path, cwd: Path, path: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with `path` first on its module path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([*path, str(REPOSITORY)]), "NO_COLOR": "1"}
    command = [sys.executable, "-m", "lora_forensics", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment, encoding="utf-8")


def tree(folder: Path) -> set[str]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def said(result: Result, code: int, *parts: str) -> None:
    """The command ended with this code and said each part, as a pattern, on stderr; no traceback anywhere."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    for part in parts:
        assert re.search(part, result.stderr), (part, result.stderr)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Result]:
    """A project of two runs, the output of a scan of it, and what the scan said. Read only."""
    folder = tmp_path_factory.mktemp("scanned")
    project(folder / "runs", ["a", "b"], losses=LOSSES)
    return folder / "runs", folder / "out", call("scan", folder / "runs", "--out", folder / "out")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A project of one run with held-out losses."""
    return project(tmp_path / "runs", losses=LOSSES)


def test_a_scan_answers_and_exits_with_0(scanned: tuple[Path, Path, Result]) -> None:
    """The terminal names the checkpoint to keep, what that rests on, and how much was measured; stderr is silent."""
    _, out, result = scanned
    assert result.exit_code == 0, result.output
    assert result.stderr == ""
    assert result.stdout.count("checkpoint-50/adapter_model.safetensors") == 2
    assert "lowest held-out loss" in result.stdout
    assert "measured 24 checkpoints" in result.stdout
    promised = ["layers.parquet", "checkpoints.parquet", "series.parquet", "verdict.json"]
    files = tree(out)
    assert {f"{run}/{name}" for run in "ab" for name in promised} <= files
    assert {"runs.parquet", "summary.md", "summary.json"} <= files
    assert {path.rpartition(".")[2] for path in files if "/plots/" in path} == {"png", "svg"}
    assert not [name for name in files if "/." in f"/{name}"]


def test_keep_is_a_file_on_disk(scanned: tuple[Path, Path, Result]) -> None:
    """`path` and `keep.checkpoint` of every verdict lead to a file."""
    _, out, _ = scanned
    for verdict in json.loads((out / "summary.json").read_text("utf-8"))["runs"]:
        assert (Path(verdict["path"]) / verdict["keep"]["checkpoint"]).is_file()
        assert json.loads((out / verdict["run"] / "verdict.json").read_text("utf-8")) == verdict


def test_a_second_scan_measures_nothing_and_changes_nothing(scanned: tuple[Path, Path, Result]) -> None:
    """Everything is known: the same answer, the same files, and it says so."""
    runs, out, first = scanned
    before = {name: (out / name).read_bytes() for name in tree(out) if name.endswith((".parquet", ".json", ".md"))}
    result = call("scan", runs, "--out", out)
    assert result.exit_code == 0
    assert "nothing new: 24 known before" in result.stdout
    assert result.stdout.splitlines()[:-1] == first.stdout.splitlines()[:-1]
    assert {name: (out / name).read_bytes() for name in before} == before


def test_only_new_checkpoints_are_measured(runs: Path, tmp_path: Path) -> None:
    """A checkpoint that was added is measured alone; --rescan measures all."""
    out = tmp_path / "out"
    call("scan", runs, "--out", out, "-q")
    checkpoint(runs / "run" / "checkpoint-130", 130, "../base.safetensors")
    assert "measured 1 new checkpoint; 12 known before" in call("scan", runs, "--out", out).stdout
    assert "measured 13 checkpoints" in call("scan", runs, "--out", out, "--rescan").stdout


def test_analyses_are_asked_for_by_name(runs: Path, tmp_path: Path) -> None:
    """Their columns are filled, the decompositions lie in OUT, and a later scan without them keeps both."""
    out = tmp_path / "out"
    assert call("scan", runs, "--out", out, "--analysis", "intruders", "--no-plots", "-q").exit_code == 0
    (table,) = out.rglob("layers.parquet")
    assert pl.read_parquet(table)["intruder_dimensions"].null_count() == 0
    assert len(list((out / ".decompositions").iterdir())) == len(MODULES)
    assert "nothing new" in call("scan", runs, "--out", out, "--no-plots").stdout
    assert pl.read_parquet(table)["intruder_dimensions"].null_count() == 0
    said(call("scan", runs, "--out", out, "--analysis", "svd"), 2, "no analysis is called 'svd'", "intruders")


def test_json_is_one_document_and_nothing_else(scanned: tuple[Path, Path, Result]) -> None:
    """`--json` of scan and report print summary.json's document; `runs --json` prints one as well."""
    runs, out, _ = scanned
    stored = json.loads((out / "summary.json").read_text("utf-8"))
    for arguments in (("scan", runs, "--out", out, "--json"), ("report", out, "--json", "--report", "json")):
        result = call(*arguments)
        assert result.exit_code == 0, result.output
        assert json.loads(result.stdout) == stored
        assert result.stderr == ""
    assert {"schema", "runs", "skipped", "versions"} <= set(stored)
    listing = json.loads(call("runs", runs, "--json").stdout)
    assert [run["name"] for run in listing["runs"]] == ["a", "b"]


def test_json_stays_alone_on_stdout_when_something_is_wrong(runs: Path, tmp_path: Path) -> None:
    """The reason for another exit code goes to stderr; the document stays whole."""
    result = call("scan", runs, "--out", tmp_path / "out", "--json", "--fail-on", "last-is-past")
    assert json.loads(result.stdout)["runs"][0]["run"] == "run"
    said(result, 1, "last-is-past")


def test_quiet_says_nothing(runs: Path, tmp_path: Path) -> None:
    """-q prints nothing where nothing is wrong."""
    result = call("scan", runs, "--out", tmp_path / "out", "-q")
    assert (result.exit_code, result.output) == (0, "")


@pytest.mark.parametrize(
    ("fail_on", "code"), [("last-is-past", 1), ("warning", 1), ("error", 0), ("uneven-cadence", 0)]
)
def test_findings_decide_the_exit_code_only_where_they_are_named(
    scanned: tuple[Path, Path, Result], fail_on: str, code: int
) -> None:
    """--fail-on with a rule or a severity gives 1 if there is such a finding, and names it even with -q."""
    runs, out, _ = scanned
    result = call("scan", runs, "--out", out, "-q", "--fail-on", fail_on)
    assert result.exit_code == code
    assert (fail_on in result.stderr) == bool(code)


def test_some_runs_without_a_base_model_exit_with_3(tmp_path: Path) -> None:
    """The others are measured; stderr names the run that was not, and where its base was looked for."""
    folder = project(tmp_path / "runs", ["good"])
    peft_run(folder / "bad", base="../missing.safetensors")
    result = call("scan", folder, "--out", tmp_path / "out", "-q")
    said(result, 3, "1 of 2 runs could not be measured: bad", r"missing\.safetensors", "--base PATH", "looked at")
    assert (tmp_path / "out" / "good" / "series.parquet").is_file()


def test_nothing_measured_exits_with_2(tmp_path: Path) -> None:
    """No base model for any run."""
    peft_run(tmp_path / "runs" / "bad", base="../missing.safetensors")
    result = call("scan", tmp_path / "runs", "--out", tmp_path / "out")
    said(result, 2, "1 of 1 run could not be measured", "--base PATH")


def test_a_base_that_does_not_fit_exits_with_2(runs: Path, tmp_path: Path) -> None:
    """Shapes that differ are no match: what was expected and where is said; nothing is measured against it."""
    wide = base_model(tmp_path / "wide.safetensors", width=16)
    result = call("scan", runs, "--out", tmp_path / "out", "--base", wide)
    said(result, 2, "does not fit", r"wide\.safetensors", "width 8, .* width 16")
    verdict = json.loads((tmp_path / "out" / "run" / "verdict.json").read_text("utf-8"))
    assert verdict["status"] == "no_base_model"
    assert verdict["keep"]["rests_on"] == "held_out_loss"


def test_a_damaged_checkpoint_is_skipped_and_strict_exits_with_2(runs: Path, tmp_path: Path) -> None:
    """One truncated file costs itself only: named with the reason; --strict makes it fatal."""
    path = runs / "run" / "checkpoint-70" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    result = call("scan", runs, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert re.search(r"checkpoint-70/adapter_model\.safetensors", result.stdout)
    assert "truncated" in result.stdout
    assert "measured 11 checkpoints" in result.stdout
    result = call("scan", runs, "--out", tmp_path / "out", "--strict", "-q")
    said(result, 2, "damaged", "checkpoint-70", "truncated")


BAD_USAGE: dict[str, tuple[Callable[[Path], list[str | Path]], list[str]]] = {
    "a path that is not there": (lambda p: ["scan", p / "runns"], ["runns does not exist", "did you mean .*runs"]),
    "a path nowhere near": (lambda p: ["scan", p / "x" / "y"], ["does not exist", "check the path"]),
    "an empty folder": (lambda p: ["scan", p / "empty"], ["no run found in .*empty", r"checkpoint-<step>/"]),
    "a folder without runs": (
        lambda p: ["scan", p / "foreign"],
        ["no run found", "model.safetensors: no adapter"],
    ),
    "a checkpoint itself": (
        lambda p: ["scan", p / "runs" / "run" / "checkpoint-20"],
        ["is one checkpoint of a run", r"scan the run: .*runs/run$"],
    ),
    "one file": (
        lambda p: ["scan", p / "runs" / "run" / "checkpoint-20" / "adapter_model.safetensors"],
        ["is one file", r"scan its folder: .*runs/run$"],
    ),
    "a foreign file": (lambda p: ["scan", p / "file.txt"], ["is one file", "scan its folder"]),
    "the second of two paths": (lambda p: ["scan", p / "runs", p / "none"], ["none does not exist"]),
    "OUT is RUNS": (lambda p: ["scan", p / "runs", "--out", p / "runs"], ["output", "--out"]),
    "OUT is a file": (lambda p: ["scan", p / "runs", "--out", p / "file.txt"], ["--out", "file.txt.* is a file"]),
    "OUT below a file": (
        lambda p: ["scan", p / "runs", "--out", p / "file.txt" / "x"],
        [r"file\.txt/x cannot be written", "--out"],
    ),
    "a window of one": (lambda p: ["scan", p / "runs", "--window", "1"], ["window of 1 is too small", "--window 2"]),
    "a window of text": (lambda p: ["scan", p / "runs", "--window", "wide"], ["'wide'", "--window 5"]),
    "a window below zero": (lambda p: ["scan", p / "runs", "--window", "-2"], ["'-2'", "--window 5"]),
    "a device that is none": (lambda p: ["scan", p / "runs", "--device", "tpu9"], ["'tpu9'", "--device cpu"]),
    "a graphics card too many": (lambda p: ["scan", p / "runs", "--device", "cuda:99"], ["cuda:99", "--device cpu"]),
    "a memory that is no size": (lambda p: ["scan", p / "runs", "--memory", "lots"], ["'lots' is no size", "500MB"]),
    "no memory": (lambda p: ["scan", p / "runs", "--memory", "0"], ["'0' is no size"]),
    "a learning rate of zero": (lambda p: ["scan", p / "runs", "--learning-rate", "0"], ["learning rate of 0"]),
    "an unknown detector": (lambda p: ["scan", p / "runs", "--detector", "x"], ["'x'", "algorithm1, official"]),
    "an unknown similarity": (lambda p: ["scan", p / "runs", "--similarity", "x"], ["'x'", "flat, rowwise"]),
    "an unknown report": (lambda p: ["scan", p / "runs", "--report", "x"], ["'x'", "markdown"]),
    "an unknown trainer": (lambda p: ["scan", p / "runs", "--trainer", "x"], ["'x'", "peft, kohya"]),
    "an unknown component": (lambda p: ["scan", p / "runs", "--component", "x"], ["belongs to x", "has model"]),
    "a base that is not there": (
        lambda p: ["scan", p / "runs", "--base", p / "none.safetensors"],
        ["none.safetensors"],
    ),
    "a base that is no tensor file": (lambda p: ["scan", p / "runs", "--base", p / "file.txt"], ["file.txt"]),
    "a base that is truncated": (lambda p: ["scan", p / "runs", "--base", p / "cut.safetensors"], ["cut", "truncated"]),
    "no argument": (lambda _: ["scan"], ["Missing argument 'RUNS", "--help"]),
    "an unknown option": (lambda p: ["scan", p / "runs", "--windw", "3"], ["No such option", "--window"]),
    "an unknown command": (lambda p: ["scam", p / "runs"], ["No such command", "scan"]),
    "runs: a path that is not there": (lambda p: ["runs", p / "runns"], ["does not exist", "did you mean"]),
    "runs: an empty folder": (lambda p: ["runs", p / "empty"], ["no run found in .*empty", r"checkpoint-<step>/"]),
    "runs: an unknown trainer": (lambda p: ["runs", p / "runs", "--trainer", "x"], ["'x'", "peft, kohya"]),
    "pick: a run that is not there": (lambda p: ["pick", p / "runs" / "rum"], ["rum.* does not exist", "runs/run"]),
    "pick: an empty folder": (lambda p: ["pick", p / "empty"], ["no run found", r"checkpoint-<step>/"]),
    "pick: several runs": (lambda p: ["pick", p], ["holds 2 runs", "name one of them: .*/again, .*/runs/run"]),
    "report: no folder": (lambda p: ["report", p / "none"], ["none holds no readable summary.json", "--out"]),
    "report: no output of a scan": (lambda p: ["report", p / "runs"], ["no readable summary.json", "--out"]),
    "report: no JSON": (lambda p: ["report", p / "foreign"], ["no readable summary.json", "--out"]),
}


@pytest.fixture(scope="module")
def crooked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with everything that the table of bad usage points at. Read only."""
    folder = tmp_path_factory.mktemp("crooked")
    project(folder / "runs", count=2)
    peft_run(folder / "again", count=2)
    (folder / "empty").mkdir()
    base_model(folder / "foreign" / "model.safetensors")
    (folder / "foreign" / "summary.json").write_text("[1, 2")
    (folder / "file.txt").write_text("hello")
    whole = base_model(folder / "cut.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[:-8])
    return folder


@pytest.mark.parametrize("case", BAD_USAGE)
def test_bad_usage_exits_with_2_and_says_what_to_do(
    case: str, crooked: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is wrong and what to try stand on stderr, in one or two lines; stdout stays empty."""
    monkeypatch.chdir(tmp_path)
    arguments, parts = BAD_USAGE[case]
    before = tree(crooked)
    result = call(*arguments(crooked))
    if case != "runs: an empty folder":
        assert result.stdout == ""
    said(result, 2, *parts)
    assert tree(crooked) == before
    assert not [path for path in tree(tmp_path) if not path.startswith("forensics/")]


@pytest.mark.parametrize("command", ["scan", "pick"])
def test_a_mistyped_path_leaves_nothing_behind(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No output folder is made before there is something to write."""
    monkeypatch.chdir(tmp_path)
    assert call(command, "nowhere").exit_code == 2
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_engine_is_bad_usage(runs: Path, tmp_path: Path) -> None:
    """The engines there are are named."""
    said(call("scan", runs, "--out", tmp_path / "out", "--engine", "x"), 2, "'x'", "serial")


def test_a_device_of_torch_that_cannot_work_here_is_bad_usage(runs: Path, tmp_path: Path) -> None:
    """Only auto, cpu, cuda, cuda:N and mps are devices of this tool."""
    said(call("scan", runs, "--out", tmp_path / "out", "--device", "meta"), 2, "'meta'", "--device cpu")


@POSIX
def test_a_pipe_that_is_named_like_a_checkpoint_does_not_block(runs: Path) -> None:
    """What is no regular file is not opened."""
    os.mkfifo(runs / "pipe.safetensors")
    command = [sys.executable, "-m", "lora_forensics", "runs", str(runs)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(REPOSITORY)}, timeout=3, capture_output=True)
    assert done.returncode == 0


@POSIX
def test_files_that_cannot_be_read_are_skipped_with_the_reason(runs: Path) -> None:
    """A dangling link and a file whose reading fails cost nothing but themselves."""
    (runs / "run" / "dangling.safetensors").symlink_to("nowhere")
    (runs / "run" / "checkpoint-20" / "adapter_model.safetensors").unlink()
    (runs / "run" / "checkpoint-20" / "adapter_model.safetensors").symlink_to("nowhere")
    result = call("runs", runs, "-v")
    assert result.exit_code == 0
    assert "11, steps 10 to 120" in result.stdout
    assert "No such file or directory" in " ".join(result.stdout.split())
    assert "dangling.safetensors" in result.stdout
    assert "checkpoint-20" in result.stdout


@POSIX
@NOT_ROOT
def test_files_and_folders_without_permission(runs: Path, tmp_path: Path) -> None:
    """What may not be read is skipped with the reason; an output that may not be written exits with 2."""
    path = runs / "run" / "checkpoint-20" / "adapter_model.safetensors"
    locked = runs / "locked"
    locked.mkdir()
    for place in (path, locked):
        place.chmod(0)
    result = call("runs", runs, "-v")
    assert result.exit_code == 0
    assert " ".join(result.stdout.split()).count("Permission denied") == 2
    (tmp_path / "sealed").mkdir(mode=0o500)
    for out in (tmp_path / "sealed", tmp_path / "sealed" / "out"):
        said(call("scan", runs, "--out", out), 2, "cannot be written: Permission denied", "--out")
    locked.chmod(0o700)


def test_two_runs_of_one_name_keep_apart(tmp_path: Path) -> None:
    """Both are measured into folders of their own, and keep those whatever the order of the next scan."""
    for place in ("one", "two"):
        project(tmp_path / place, count=3)
    out = tmp_path / "out"
    first, second = tmp_path / "one" / "run", tmp_path / "two" / "run"
    base = ("--base", tmp_path / "one" / "base.safetensors", "--json", "--out", out)
    named = {}
    for order in ((first, second), (second, first)):
        result = call("scan", *order, *base)
        assert result.exit_code == 0, result.output
        verdicts = json.loads(result.stdout)["runs"]
        named[order] = {Path(verdict["path"]): verdict["run"] for verdict in verdicts}
    assert named[first, second] == {first: "run", second: "run-2"} == named[second, first]


def test_one_run_given_twice_is_scanned_once(tmp_path: Path) -> None:
    """Overlapping RUNS do not count a run twice."""
    folder = project(tmp_path / "runs", count=2)
    result = call("scan", folder, folder / "run", folder, "--out", tmp_path / "out", "--json")
    assert len(json.loads(result.stdout)["runs"]) == 1


def test_out_inside_runs_is_not_scanned(tmp_path: Path) -> None:
    """Output below RUNS is no input of the next scan, not even of another OUT's."""
    folder = project(tmp_path / "runs", count=2)
    documents = [json.loads(call("scan", folder, "--out", folder / "out", "--json").stdout) for _ in range(2)]
    assert [verdict["run"] for verdict in documents[1]["runs"]] == ["run"]
    assert documents[0] == documents[1]


def test_out_above_a_run_does_not_write_into_the_run(tmp_path: Path) -> None:
    """With OUT as the parent of the run, the run's own folder stays as the trainer left it."""
    folder = project(tmp_path / "runs", count=2)
    before = tree(folder / "run")
    assert call("scan", folder / "run", "--out", folder).exit_code == 0
    assert tree(folder / "run") == before


def test_a_file_in_the_place_of_a_runs_folder(runs: Path, tmp_path: Path) -> None:
    """A half-cleaned OUT is an error in a sentence."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "run").write_text("x")
    said(call("scan", runs, "--out", tmp_path / "out"), 2, "out/run.* cannot be written", "--out")


def test_pick_prints_one_path_that_exists(scanned: tuple[Path, Path, Result]) -> None:
    """The checkpoint to keep, on one line, and nothing else; FOLDER and FOLDER/NAME both work."""
    runs, out, _ = scanned
    result = call("pick", runs / "a", "--out", out)
    assert (result.exit_code, result.stderr) == (0, "")
    (line,) = result.stdout.splitlines()
    assert Path(line) == runs / "a" / "checkpoint-50" / "adapter_model.safetensors"
    assert Path(line).is_file()


def test_pick_without_an_answer_exits_with_1(tmp_path: Path) -> None:
    """The reason is on stderr: how many checkpoints there are, how many it takes, and the trainer's setting."""
    folder = project(tmp_path / "runs", count=4)
    result = call("pick", folder / "run", "--out", tmp_path / "out")
    assert result.stdout == ""
    said(result, 1, "run: no checkpoint to name", "4 checkpoints", "9 or more", "save_steps", "save_total_limit")


def test_too_few_checkpoints_is_an_answer(tmp_path: Path) -> None:
    """A scan of a short run exits with 0 and says which setting saves more often."""
    folder = project(tmp_path / "runs", count=4)
    result = call("scan", folder, "--out", tmp_path / "out")
    assert result.exit_code == 0
    assert "save_steps" in result.stdout
    assert "9 or more" in " ".join(result.stdout.split())


def test_a_bug_exits_with_70_and_leaves_a_log(scanned: tuple[Path, Path, Result], monkeypatch: Any) -> None:
    """One line names the error, one the file with the traceback; the terminal shows no traceback."""

    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("boom\nand more")

    runs, out, _ = scanned
    monkeypatch.setattr("lora_forensics.scan.scan", broken)
    result = call("scan", runs, "--out", out)
    said(result, 70, "this is a bug", "report it")
    assert len(result.stderr.splitlines()) == 2
    assert "RuntimeError: boom" in result.stderr
    log = Path(re.search(r"\S+\.log", result.stderr)[0])  # type: ignore[index]
    text = log.read_text("utf-8")
    log.unlink()
    assert "Traceback" in text
    assert "boom" in text


def test_a_panic_below_python_exits_with_70_too(scanned: tuple[Path, Path, Result], monkeypatch: Any) -> None:
    """A panic in polars is no `Exception`; it is a bug all the same."""
    import polars as pl

    def panic(*_: Any, **__: Any) -> None:
        raise pl.exceptions.PanicException("boom")

    monkeypatch.setattr("lora_forensics.scan.scan", panic)
    runs, out, _ = scanned
    result = call("scan", runs, "--out", out)
    said(result, 70, "this is a bug", "boom")
    Path(re.search(r"\S+\.log", result.stderr)[0]).unlink()  # type: ignore[index]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        ("scan runs --out out -q --no-plots", 0),
        ("scan runs --out out -q --no-plots --fail-on last-is-past", 1),
        ("scan runs --out out -q --no-plots --fail-on warning --ignore last-is-past --ignore larger-than-weight", 0),
        ("scan runs --out out -q --no-plots --fail-on no-such-rule", 2),
        ("scan cut --out out -q --no-plots --strict --fail-on info", 2),
        ("scan cut --out out -q --no-plots", 0),
        ("scan mixed --out out -q --no-plots --fail-on info", 3),
        ("scan nowhere", 2),
        ("pick runs/run --out out", 0),
        ("pick cut/short --out out", 1),
        ("check cut/run/checkpoint-70/adapter_model.safetensors", 1),
        ("check nowhere", 2),
        ("scan bug", 70),
        ("scan interrupt", 130),
    ],
)
def test_every_exit_code_of_a_process(small: Path, tmp_path: Path, arguments: str, code: int) -> None:
    """The contract's table, by processes as a pipeline starts them; none shows a traceback."""
    folder = tmp_path / "here"
    shutil.copytree(small, folder)
    done = shell(*arguments.split(), cwd=folder, path=[str(folder / "hooks")])
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    assert bool(done.stderr) == (code != 0) or code == 1
    for log in re.findall(r"report it with (\S+\.log)", done.stderr):
        Path(log).unlink()


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs that end in each way, and a module that makes a scan of `bug` or `interrupt` raise. Read only."""
    folder = tmp_path_factory.mktemp("small")
    for name in ("runs", "cut", "mixed"):
        project(folder / name, losses=LOSSES)
    path = folder / "cut" / "run" / "checkpoint-70" / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-10])
    peft_run(folder / "cut" / "short", count=2, base="../base.safetensors")
    peft_run(folder / "mixed" / "lost", base="../missing.safetensors")
    for name in ("bug", "interrupt", "hooks"):
        (folder / name).mkdir()
    (folder / "hooks" / "sitecustomize.py").write_text(
        "import os\n"
        "listed = os.scandir\n"
        "def scandir(path='.'):\n"
        "    name = os.path.basename(os.fspath(path))\n"
        "    if name == 'bug': raise RuntimeError('boom')\n"
        "    if name == 'interrupt': raise KeyboardInterrupt\n"
        "    return listed(path)\n"
        "os.scandir = scandir\n",
        "utf-8",
    )
    return folder


def test_an_interrupt_is_no_bug(scanned: tuple[Path, Path, Result], monkeypatch: Any) -> None:
    """Ctrl-C says that files are whole and how to go on."""

    def stop(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    runs, out, _ = scanned
    monkeypatch.setattr("lora_forensics.scan.scan", stop)
    said(call("scan", runs, "--out", out), 130, "stopped", "same command")


@POSIX
def test_names_from_disk_do_not_reach_the_terminal_raw(tmp_path: Path) -> None:
    """Terminal codes in a folder's name are taken out of everything that is printed, errors included."""
    folder = project(tmp_path / "runs", ["bad\x1b[31m\nname"], count=2)
    for arguments in (("runs", folder), ("runs", folder / "nope\x1b[31m"), ("scan", folder, "--out", tmp_path / "o")):
        assert "\x1b" not in call(*arguments).output


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_names_that_are_no_utf8(tmp_path: Path) -> None:
    """They are measured like any other, and all that is written is UTF-8."""
    odd = tmp_path / "runs" / os.fsdecode(b"na\xffme")
    project(tmp_path / "runs", [odd.name], count=2)
    result = call("scan", tmp_path / "runs", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "measured 2 checkpoints" in result.stdout
    (verdict,) = json.loads((tmp_path / "out" / "summary.json").read_bytes())["runs"]
    assert verdict["run"] == "na_me"
    assert Path(verdict["path"]) == odd
    for path in (tmp_path / "out").rglob("*.json"):
        path.read_text("utf-8")
    assert call("report", tmp_path / "out").exit_code == 0


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_checkpoints_whose_names_are_no_utf8(tmp_path: Path) -> None:
    """A run whose files no table could name is left out, with what to do about it."""
    (tmp_path / "runs").mkdir()
    for epoch in (1, 2):
        path = tmp_path / f"{epoch}.safetensors"
        save_file({"lora_unet_a.lora_down.weight": torch.full((2, 4), epoch)}, path)
        path.rename(tmp_path / "runs" / os.fsdecode(b"na\xffme-00000%d.safetensors" % epoch))
    for command in (("scan", tmp_path / "runs", "--out", tmp_path / "out"), ("runs", tmp_path / "runs")):
        said(call(*command), 2, "no run found", "not UTF-8", "rename them")


def test_a_later_version_s_output_is_refused(scanned: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """A summary of a newer schema is not rendered with the wrong meaning."""
    document = json.loads((scanned[1] / "summary.json").read_text("utf-8"))
    (tmp_path / "summary.json").write_text(json.dumps({**document, "schema": 99}))
    said(call("report", tmp_path), 2, "schema 99, newer than 1", "upgrade")


def test_report_renders_again_without_runs(scanned: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """With the checkpoints gone, plots and reports come back from the tables; other options draw verdicts anew."""
    _, out, _ = scanned
    copy = shutil.copytree(out, tmp_path / "copy")
    for name in tree(copy):
        if name.endswith((".md", ".png", ".svg")):
            (copy / name).unlink()
    assert call("report", copy).exit_code == 0
    assert {name for name in tree(copy) if not name.endswith(".html")} == tree(out)
    verdict = copy / "a" / "verdict.json"
    assert verdict.read_bytes() == (out / "a" / "verdict.json").read_bytes()
    assert call("report", copy, "--window", "2").exit_code == 0
    assert json.loads(verdict.read_text("utf-8"))["window"] == 2
    assert call("report", copy).exit_code == 0
    assert json.loads(verdict.read_text("utf-8"))["window"] == 2
    assert call("report", copy, "--window", "auto").exit_code == 0
    assert verdict.read_bytes() == (out / "a" / "verdict.json").read_bytes()


def test_report_says_which_table_is_missing(scanned: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """A folder that lost a table is an error that names it."""
    copy = shutil.copytree(scanned[1], tmp_path / "copy")
    (copy / "b" / "series.parquet").write_bytes(b"garbage")
    said(call("report", copy), 2, "series.parquet", "--rescan")
    (copy / "b" / "layers.parquet").unlink()
    said(call("report", copy), 3, "b: its tables are missing", "scan again")
    (copy / "a" / "layers.parquet").unlink()
    said(call("report", copy), 2, "layers.parquet", "scan again")


def test_report_runs_where_torch_cannot_be_imported(scanned: tuple[Path, Path, Result], tmp_path: Path) -> None:
    """Neither torch nor diffusers nor safetensors is touched, drawn anew or not."""
    copy = shutil.copytree(scanned[1], tmp_path / "copy")
    for name in ("torch", "diffusers", "safetensors", "transformers"):
        (tmp_path / "blocked" / name).mkdir(parents=True)
        (tmp_path / "blocked" / name / "__init__.py").write_text(f"raise ImportError('{name} is blocked')")
    done = shell("report", copy, "--window", "3", cwd=tmp_path, path=[str(tmp_path / "blocked")])
    assert done.returncode == 0, done.stderr
    assert "checkpoint-50" in done.stdout


def test_help_imports_nothing_heavy(tmp_path: Path) -> None:
    """`--help`, of the group and of every command, leaves all big packages unimported."""
    code = (
        "import sys; from lora_forensics.cli import main\n"
        "for name in ['', *main.commands]:\n"
        "    try: main([*([name] if name else []), '--help'])\n"
        "    except SystemExit as end: assert end.code == 0\n"
        "heavy = {'torch', 'polars', 'scipy', 'matplotlib', 'diffusers', 'rich', 'numpy', 'transformers'}\n"
        "print(sorted(heavy & set(sys.modules)), file=sys.stderr)"
    )
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.strip() == "[]"


def test_the_module_is_the_command(tmp_path: Path) -> None:
    """`python -m lora_forensics` has the same exit codes: 0, and 2 with one error and one hint."""
    done = shell("--version", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert lora_forensics.__version__ in done.stdout
    done = shell("scan", "nowhere", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_piped_scan_shows_no_progress_bar(runs: Path, tmp_path: Path) -> None:
    """Nothing but the report in a pipe: no bar, no codes, no warnings of libraries."""
    done = shell("scan", runs, "--out", tmp_path / "out", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "\r" not in done.stdout
    assert "\x1b" not in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 80


@pytest.mark.parametrize("name", main.commands)
def test_every_command_helps_with_an_example(name: str) -> None:
    """Help says what the command does; where it takes an argument, it ends with a line to copy."""
    command = main.commands[name]
    result = call(name, "--help")
    assert result.exit_code == 0
    assert command.help
    if any(isinstance(parameter, click.Argument) for parameter in command.params):
        example = " ".join(command.help.split()).rpartition("Example: ")[2]
        assert example.startswith(f"lora-forensics {name} ")
        assert len(example.split()) >= 3
    for parameter in command.params:
        if isinstance(parameter, click.Option):
            assert parameter.help, parameter.name


def test_metrics_describes_every_column() -> None:
    """Every documented column is in the text and on the page."""
    from lora_forensics.reference import TABLES

    for arguments in (("metrics",), ("metrics", "--markdown")):
        result = call(*arguments)
        assert result.exit_code == 0
        for _, columns in TABLES.values():
            assert all(column.name in result.stdout for column in columns)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("500MB", 500 << 20),
        ("4gb", 4 << 30),
        (" 1.5 GiB ", 3 << 29),
        ("2k", 2048),
        ("1T", 1 << 40),
        ("9B", 9),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, size: int) -> None:
    """With or without unit, any case."""
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "0", "0.1", "1,5GB", "1e9", "nan", "1 PB", "4GB free", "9" * 400])
def test_what_is_no_size_is_bad_usage(text: str) -> None:
    """The text is repeated, with how to write it."""
    with pytest.raises(UsageError, match="is no size") as caught:
        parse_size(text)
    assert "500MB" in caught.value.hint


def test_names_with_signs_of_patterns_are_names(tmp_path: Path) -> None:
    """Brackets, stars and braces in a run's name: its tables are found again by every command."""
    name = "style [v2] {a,b} #1 100%" if os.name == "nt" else "style [v2]*? {a,b} #1 100%"
    project(tmp_path / "runs", [name, "b"], losses=LOSSES)
    out = tmp_path / "o[u]t"
    assert "measured 24" in call("scan", tmp_path / "runs", "--out", out, "--no-plots").stdout
    assert "nothing new: 24 known before" in call("scan", tmp_path / "runs", "--out", out, "--no-plots").stdout
    for command in (("report", out), ("compare", out), ("table", out, "layers", "--columns", "run")):
        result = call(*command)
        assert (result.exit_code, result.stderr) == (0, ""), result.output
        assert "style" in result.stdout


@POSIX
def test_nothing_of_a_name_reaches_the_terminal(tmp_path: Path) -> None:
    """Terminal codes, direction marks and ends of lines in names of runs and files, through every command."""
    evil = "evil\x1b[31m\x1b]0;title\x07\u202e\nname"
    runs, out = project(tmp_path / "runs", [evil, "b"], losses=LOSSES), tmp_path / f"out{evil}"
    file = runs / evil / "checkpoint-50" / "adapter_model.safetensors"
    damaged = runs / f"damaged{evil}.safetensors"
    damaged.write_bytes(b"")
    quick = ("--out", out, "--no-plots")
    for arguments in (
        ("scan", runs, *quick, "-v", "--write-baseline", tmp_path / f"{evil}.json"),
        ("scan", runs, *quick, "--fail-on", "warning", "--baseline", damaged),
        ("scan", runs, *quick, "--base", damaged),
        ("scan", tmp_path / evil),
        ("runs", runs, "-v"),
        ("pick", runs / f"{evil}x", "--out", out),
        ("inspect", file, "-v"),
        ("inspect", file, damaged),
        ("inspect", file, "--keys"),
        ("check", file, damaged),
        ("report", out, "--report", evil),
        ("report", out, "-v"),
        ("compare", out, "-v"),
        ("average", runs / evil, "--out", out, "--force"),
        ("average", runs / evil, "--out", out),
        ("prune", runs / evil, "--out", out),
        ("table", out, "runs"),
        ("table", out, evil),
        (evil,),
    ):
        result = call(*arguments)
        assert result.exit_code in (0, 1, 2, 3), result.output
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", result.output), result.output
