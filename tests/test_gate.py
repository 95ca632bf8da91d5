"""What fails a pipeline: names, severities, and the baseline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from cli_runs import checkpoint, peft_run, project
from safetensors.torch import load_file, save_file
from test_cli import LOSSES, call, said

from lora_forensics.errors import UsageError
from lora_forensics.gate import counts, read_baseline
from lora_forensics.records import Finding

QUICK = ("--no-plots", "-q")


@pytest.mark.parametrize(
    ("fail_on", "severities"),
    [
        ({"info"}, "info warning error"),
        ({"warning"}, "warning error"),
        ({"error"}, "error"),
        ({"x"}, ""),
        ({"own"}, "info warning error"),
    ],
)
def test_a_severity_stands_for_all_above_it(fail_on: set[str], severities: str) -> None:
    """A rule counts whatever its severity is."""
    found = [s for s in ("info", "warning", "error") if counts(Finding("own", s, ""), fail_on)]  # type: ignore[arg-type]
    assert " ".join(found) == severities


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """A project of two runs whose last checkpoints are past the lowest held-out loss: a warning each."""
    return project(tmp_path / "runs", ["a", "b"], losses=LOSSES)


def spoil(path: Path) -> None:
    """Put NaN into a checkpoint."""
    tensors = load_file(path)
    next(iter(tensors.values()))[0] = torch.nan
    save_file(tensors, path)


def test_a_baseline_accepts_today_and_fails_on_what_is_new(runs: Path, tmp_path: Path) -> None:
    """New checkpoints and moved folders change nothing; NaN is new, is named, and can be accepted as well."""
    file, out = tmp_path / "baseline.json", tmp_path / "out"
    said(call("scan", runs, "--out", out, *QUICK, "--fail-on", "warning"), 1, "larger-than-weight|last-is-past")
    said(call("scan", runs, "--out", out, *QUICK, "--write-baseline", file), 0, "findings accepted in .*baseline.json")
    said(call("scan", runs, "--out", out, *QUICK, "--baseline", file), 0)
    checkpoint(runs / "a" / "checkpoint-130", 130, "../base.safetensors")
    shutil.move(runs, tmp_path / "moved")
    said(call("scan", tmp_path / "moved", "--out", tmp_path / "new", *QUICK, "--baseline", file), 0)
    result = call("scan", tmp_path / "moved", "--out", out, *QUICK, "--baseline", file)
    said(result, 0)  # though OUT knows the runs of the old place under these names
    said(call("report", out, "--baseline", file), 0)
    spoil(tmp_path / "moved" / "b" / "checkpoint-30" / "adapter_model.safetensors")
    said(call("scan", tmp_path / "moved", "--out", out, *QUICK, "--baseline", file), 1, "b.*: nonfinite")
    said(call("scan", tmp_path / "moved", "--out", out, *QUICK, "--baseline", file, "--write-baseline", file), 0)
    said(call("scan", tmp_path / "moved", "--out", out, *QUICK, "--baseline", file, "--fail-on", "info"), 0)


def test_a_baseline_holds_no_path(runs: Path, tmp_path: Path) -> None:
    """It is made to be committed: names of runs relative to RUNS, nothing of this machine; the same bytes each time."""
    file = tmp_path / "baseline.json"
    saved = runs / "a" / "checkpoint-70" / "adapter_model.safetensors"
    saved.write_bytes(saved.read_bytes()[:-9])
    (runs / "loose.safetensors").write_bytes(b"")
    peft_run(runs / "lost", base="/home/janedoe/gone/base.safetensors")
    call("scan", runs, "--out", tmp_path / "out", *QUICK, "--write-baseline", file)
    first = file.read_bytes()
    for place in (str(tmp_path), tmp_path.name, "janedoe", "loose"):
        assert place not in first.decode()
    assert {entry["run"] for entry in json.loads(first)["findings"]} == {"", "a", "b", "lost"}
    call("scan", runs, "--out", tmp_path / "other", *QUICK, "--write-baseline", file)
    assert file.read_bytes() == first


def test_stale_entries_are_said(runs: Path, tmp_path: Path) -> None:
    """What is gone is named; runs that were not scanned are counted, and stay when the baseline is written again."""
    file, out = tmp_path / "baseline.json", tmp_path / "out"
    call("scan", runs, "--out", out, *QUICK, "--write-baseline", file)
    document = json.loads(file.read_text("utf-8"))
    gone = {**document["findings"][0], "fingerprint": "0" * 16, "rule": "nonfinite"}
    file.write_text(json.dumps({**document, "findings": [*document["findings"], gone]}), "utf-8")
    shutil.rmtree(runs / "b")
    result = call("scan", runs, "--out", out, *QUICK, "--baseline", file)
    said(result, 0, "accepts what is gone: a: nonfinite", "of runs that were not scanned", "--write-baseline")
    call("scan", runs, "--out", out, *QUICK, "--baseline", file, "--write-baseline", file)
    left = read_baseline(file)
    assert {entry.run for entry in left} == {"a", "b"}
    assert "0" * 16 not in {entry.fingerprint for entry in left}


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema": 99, "findings": []}', '{"schema": 1, "findings": [{}]}'])
def test_a_damaged_baseline_is_bad_usage(text: str, tmp_path: Path) -> None:
    """Nothing that cannot be read accepts or refuses anything."""
    file = tmp_path / "baseline.json"
    file.write_text(text, "utf-8")
    with pytest.raises(UsageError, match="baseline"):
        read_baseline(file)
    with pytest.raises(UsageError, match="there is no baseline"):
        read_baseline(tmp_path / "none.json")


def test_a_report_decides_as_its_scan_does(runs: Path, tmp_path: Path) -> None:
    """`report OUT` takes the same options: where the checkpoints are no more, a pipeline can still fail."""
    file, out = tmp_path / "baseline.json", tmp_path / "out"
    said(call("scan", runs, "--out", out, *QUICK, "--report", "junit"), 0)
    shutil.rmtree(runs)
    said(call("report", out), 0)
    said(call("report", out, "--fail-on", "last-is-past"), 1, "a: last-is-past")
    assert 'failures="2"' in (out / "junit.xml").read_text("utf-8")
    said(call("report", out, "--fail-on", "last-is-past", "--ignore", "last-is-past"), 0)
    said(call("report", out, "--fail-on", "no-such-rule"), 2, "no-such-rule")
    said(call("report", out, "--write-baseline", file), 0, "findings accepted in")
    said(call("report", out, "--baseline", file), 0)
    assert 'failures="0"' in (out / "junit.xml").read_text("utf-8")
    assert "skipped" in (out / "junit.xml").read_text("utf-8")
    redacted = call("report", out, "--fail-on", "last-is-past", "--redact")
    assert redacted.exit_code == 1
    assert "a: last-is-past" not in redacted.stderr


def test_what_is_lost_is_told_once(runs: Path, tmp_path: Path) -> None:
    """A run without its tables is named at each report, and is not added to the summary again and again."""
    out = tmp_path / "out"
    call("scan", runs, "--out", out, *QUICK)
    (out / "b" / "layers.parquet").unlink()
    for _ in range(2):
        said(call("report", out, "--fail-on", "info"), 3, "1 of 2 runs .* b: its tables are missing")
        assert len(json.loads((out / "summary.json").read_text("utf-8"))["skipped"]) == 2  # and the base model
