"""Pruning: what stays, what is refused, what is never touched, and what later scans still know."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import checkpoint, project
from click.testing import CliRunner, Result
from factories import kohya_base, kohya_run, touch_later, trained_run
from polars.testing import assert_frame_equal

from lora_forensics import discover_runs, prune
from lora_forensics.cli import main
from lora_forensics.errors import CheckpointError, SeriesError
from lora_forensics.pipeline import ScanOptions
from lora_forensics.prune import PruneOptions, delete, plan_pruning
from lora_forensics.series import read_table

LOSSES = [abs(place - 5) + 1.0 for place in range(12)]
"""Lowest at step 60."""
OLD = PruneOptions(min_age=0)


def call(*arguments: str | Path) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def scan(runs: Path, out: Path, *more: str) -> str:
    """A scan's last line."""
    result = call("scan", runs, "--out", out, "--no-plots", *more)
    assert result.exit_code == 0, result.output
    return result.stdout.strip().splitlines()[-1]


def tree(folder: Path) -> set[str]:
    """All files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()}


def verdict(out: Path) -> dict[str, object]:
    """The stored verdict."""
    found: dict[str, object] = json.loads((out / "run" / "verdict.json").read_text())
    return found


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A scanned run of twelve checkpoints whose held-out loss is lowest at step 60, its tables in tmp_path/out."""
    runs = project(tmp_path / "runs", losses=LOSSES)
    scan(runs, tmp_path / "out")
    return runs / "run"


def pruned(run: Path, *more: str) -> Result:
    """`prune` of a run that is old enough."""
    return call("prune", run, "--out", run.parent.parent / "out", "--min-age", "0", *more)


def left(run: Path) -> list[int]:
    """Steps whose adapter is there."""
    return sorted(
        int(path.parent.name.rpartition("-")[2]) for path in run.glob("checkpoint-*/adapter_model.safetensors")
    )


def test_a_pick_by_weights_alone_deletes_nothing_unless_that_is_said(tmp_path: Path) -> None:
    """No rule on weights was shown to beat the middle checkpoint; a deletion is for ever."""
    run = project(tmp_path / "runs", count=12) / "run"
    scan(tmp_path / "runs", tmp_path / "out")
    keep = verdict(tmp_path / "out")["keep"]
    assert isinstance(keep, dict)
    assert keep["rests_on"] == "weights"
    assert "--by-weights" in pruned(run).stdout
    result = pruned(run, "--delete")
    assert result.exit_code == 1
    assert "rests on the weights alone" in result.stderr
    assert len(left(run)) == 12
    assert pruned(run, "--delete", "--by-weights").exit_code == 0
    assert 0 < len(left(run)) < 12


def test_a_dry_run_touches_nothing(run: Path, tmp_path: Path) -> None:
    """It lists what stays and why, and the bytes of the rest."""
    before = tree(tmp_path)
    result = pruned(run)
    assert result.exit_code == 0
    assert tree(tmp_path) == before
    assert "nothing was deleted: --delete does it" in result.stdout
    told = json.loads(pruned(run, "--json").stdout)
    keep = {name.split("/")[0]: why for name, why in told["keep"].items()}
    assert keep["checkpoint-60"] == "the pick (held_out_loss)"
    assert "checkpoint-50" in keep
    assert keep["checkpoint-70"] == "neighbour of the pick"
    assert "last" in keep["checkpoint-120"]
    assert told["bytes"] == sum((run / name).stat().st_size for name in told["files"])
    assert told["done"] is None


def test_deleting_leaves_what_was_named(run: Path, tmp_path: Path) -> None:
    """Names, multiples, and a log with the hashes of what is gone."""
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in run.rglob("adapter_*")}
    result = pruned(run, "--delete", "--keep", "checkpoint-20", "--keep-every", "40")
    assert result.exit_code == 0, result.output
    assert {20, 40, 50, 60, 70, 80, 120} <= set(left(run))
    assert not {10, 30} & set(left(run))
    log = json.loads((tmp_path / "out" / "run" / "pruned.json").read_text())
    assert {entry["state"] for entry in log["files"]} == {"deleted"}
    for entry in log["files"]:
        path = run / entry["file"]
        assert not path.exists()
        assert entry["sha256"] == hashes[path]
    assert {path for path in hashes if not path.exists()} == {run / entry["file"] for entry in log["files"]}
    assert log["verdict"] == verdict(tmp_path / "out")
    assert (run / "checkpoint-10" / "trainer_state.json").exists()


def test_whole_folders_go_except_for_foreign_files(run: Path) -> None:
    """Optimizer, tokenizer and logs go with them; a note, a picture and a sub-folder stay, in their folder."""
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "tokenizer.json", "README.md"):
        (run / "checkpoint-10" / name).write_text("state")
        (run / "checkpoint-20" / name).write_text("state")
    (run / "checkpoint-20" / "notes.txt").write_text("mine")
    (run / "checkpoint-20" / "samples").mkdir()
    (run / "checkpoint-20" / "samples" / "README.md").write_text("mine")
    (run / "checkpoint-30" / "other.safetensors").write_text("mine")
    assert pruned(run, "--delete", "--whole-folders").exit_code == 0
    assert not (run / "checkpoint-10").exists()
    assert tree(run / "checkpoint-20") == {"notes.txt", "samples/README.md"}
    assert tree(run / "checkpoint-30") == {"other.safetensors", "trainer_state.json"}
    assert (run / "checkpoint-60" / "trainer_state.json").exists()


def test_another_adapter_in_the_folder_keeps_its_training_state(tmp_path: Path) -> None:
    """Of a model with two adapters, each of which is a run."""
    runs = project(tmp_path / "runs", losses=LOSSES)
    for step in range(10, 130, 10):
        place = runs / "run" / f"checkpoint-{step}"
        checkpoint(place / "ref", step + 1, base="../base.safetensors")
        (place / "optimizer.pt").write_text("state")
    scan(runs, tmp_path / "out")
    options = PruneOptions(min_age=0, whole_folders=True)
    plan = plan_pruning(runs / "run" / "run", ScanOptions(out=tmp_path / "out"), options)
    assert {file.path.name for file in plan.files} == {"adapter_model.safetensors", "adapter_config.json"}
    assert all("ref" not in file.path.parts for file in plan.files)


def gone(run: Path) -> None:
    """A checkpoint was deleted by hand."""
    shutil.rmtree(run / "checkpoint-20")


def changed(run: Path) -> None:
    """A file was written again."""
    touch_later(run / "checkpoint-20" / "adapter_model.safetensors")


def added(run: Path) -> None:
    """Training goes on."""
    checkpoint(run / "checkpoint-130", 130)


def unpicked(run: Path) -> None:
    """The verdict has no pick."""
    path = run.parent.parent / "out" / "run" / "verdict.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "keep": None}))


def no_tables(run: Path) -> None:
    """OUT is another folder."""
    shutil.rmtree(run.parent.parent / "out")


@pytest.mark.parametrize(
    ("harm", "part"),
    [
        (gone, "is gone since the last scan"),
        (changed, "has changed since the last scan"),
        (added, "is new since the last scan"),
        (unpicked, "names no checkpoint to keep"),
        (no_tables, "no scan of it is stored"),
    ],
)
def test_it_refuses_without_evidence(run: Path, harm: Callable[[Path], None], part: str) -> None:
    """Exit 1, the reason, and nothing is touched."""
    harm(run)
    before = tree(run)
    result = pruned(run, "--delete")
    assert (result.exit_code, part in result.stderr) == (1, True), result.stderr
    assert tree(run) == before


def test_it_refuses_a_run_that_is_still_written(run: Path, tmp_path: Path) -> None:
    """By the time of the last save."""
    result = call("prune", run, "--out", tmp_path / "out", "--delete")
    assert (result.exit_code, "may still be in training" in result.stderr) == (1, True)
    planned = call("prune", run, "--out", tmp_path / "out")
    assert planned.exit_code == 0
    assert "  delete  " in planned.stdout
    assert "--delete would refuse: it was written to" in planned.stdout
    assert len(left(run)) == 12


def test_it_refuses_a_short_run_without_held_out_loss(tmp_path: Path) -> None:
    """Five checkpoints and no loss: nothing is kept, so nothing is deleted; with a loss there is evidence."""
    for name, losses in (("a", None), ("b", LOSSES[:5])):
        runs = project(tmp_path / name / "runs", count=5, losses=losses)
        scan(runs, tmp_path / name / "out")
    assert pruned(tmp_path / "a" / "runs" / "run", "--delete").exit_code == 1
    assert len(left(tmp_path / "a" / "runs" / "run")) == 5
    assert pruned(tmp_path / "b" / "runs" / "run").exit_code == 0


def test_an_unknown_name_to_keep_is_bad_usage(run: Path) -> None:
    """Before anything is deleted."""
    result = pruned(run, "--delete", "--keep", "checkpoint-21")
    assert (result.exit_code, "no checkpoint of this run" in result.stderr) == (2, True)
    assert len(left(run)) == 12


def test_links_and_protected_files_are_left(run: Path, tmp_path: Path) -> None:
    """A link, a second name of the same data, a folder that is a link, and a file without write permission."""
    away = tmp_path / "away"
    away.mkdir()
    linked = run / "checkpoint-10" / "adapter_model.safetensors"
    shutil.move(linked, away / "a.safetensors")
    linked.symlink_to(away / "a.safetensors")
    os.link(run / "checkpoint-20" / "adapter_model.safetensors", away / "b.safetensors")
    shutil.move(run / "checkpoint-30", away / "checkpoint-30")
    (run / "checkpoint-30").symlink_to(away / "checkpoint-30", target_is_directory=True)
    (run / "checkpoint-40" / "adapter_model.safetensors").chmod(0o444)
    scan(run.parent, tmp_path / "out")
    keep = [f"--keep={step}" for step in (50, 80, 90, 100)]
    told = json.loads(pruned(run, "--json", "--delete", "--whole-folders", *keep).stdout)
    reasons = {name.split("/")[0]: why for name, why in told["left"].items()}
    assert "is a link" in reasons["checkpoint-10"]
    assert "hard link" in reasons["checkpoint-20"]
    assert "outside of the run's folder" in reasons["checkpoint-30"]
    assert reasons["checkpoint-40"] == "is write-protected"
    assert {10, 20, 30, 40} <= set(left(run))
    assert tree(away) >= {"a.safetensors", "b.safetensors", "checkpoint-30/adapter_model.safetensors"}
    assert (run / "checkpoint-10" / "trainer_state.json").exists()


def test_one_failure_does_not_stop_the_rest(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is reported and logged, and the exit code is 3."""
    unlink = Path.unlink

    def broken(path: Path, missing_ok: bool = False) -> None:
        if path.parts[-2:] == ("checkpoint-20", "adapter_model.safetensors"):
            raise PermissionError(13, "Permission denied")
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", broken)
    result = pruned(run, "--delete")
    monkeypatch.undo()
    assert (result.exit_code, "Permission denied" in result.stderr) == (3, True)
    assert 20 in left(run)
    assert 10 not in left(run)
    log = json.loads((tmp_path / "out" / "run" / "pruned.json").read_text())["files"]
    states = {entry["file"]: entry["state"] for entry in log if entry["weights"]}
    assert states.pop("checkpoint-20/adapter_model.safetensors") == "failed"
    assert (run / "checkpoint-20" / "adapter_config.json").exists()
    assert set(states.values()) == {"deleted"}


def test_a_file_that_changes_after_the_plan_is_left(run: Path, tmp_path: Path) -> None:
    """It is looked at again right before it would go."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), OLD)
    touch_later(run / "checkpoint-10" / "adapter_model.safetensors")
    done = delete(plan)
    assert done.failed == {
        "checkpoint-10/adapter_model.safetensors": "has changed since the plan was made",
        "checkpoint-10/adapter_config.json": "its adapter is still there",
    }
    assert 10 in left(run)


class Killed(BaseException):
    """Stands for a kill in the middle."""


def test_an_interrupted_pruning_is_known(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The log tells what was deleted; the next scan and the next pruning go on from there."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), OLD)
    unlink, calls = Path.unlink, []

    def dying(path: Path, missing_ok: bool = False) -> None:
        unlink(path, missing_ok)
        calls.append(path)
        if len(calls) == 3:
            raise Killed

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(Killed):
        delete(plan)
    monkeypatch.undo()
    states = [e["state"] for e in json.loads((tmp_path / "out" / "run" / "pruned.json").read_text())["files"]]
    assert states[:4] == ["deleted", "deleted", "deleting", "planned"]
    assert scan(run.parent, tmp_path / "out") == "nothing new: 12 known before"
    assert pruned(run, "--delete").exit_code == 0
    log = json.loads((tmp_path / "out" / "run" / "pruned.json").read_text())["files"]
    assert {entry["file"] for entry in log if not (run / entry["file"]).exists()} == {entry["file"] for entry in log}


def test_what_only_training_states_are_left_of_is_finished(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed when all adapters were gone: the next pruning deletes the rest and says what it was."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), PruneOptions(min_age=0, whole_folders=True))
    unlink = Path.unlink

    def dying(path: Path, missing_ok: bool = False) -> None:
        if path.name == "trainer_state.json":
            raise Killed
        unlink(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", dying)
    with pytest.raises(Killed):
        delete(plan)
    monkeypatch.undo()
    result = pruned(run, "--delete", "--whole-folders")
    assert (result.exit_code, "what an interrupted pruning left" in result.stdout) == (0, True), result.output
    assert {int(path.name.rpartition("-")[2]) for path in run.glob("checkpoint-*")} == set(left(run))


def test_without_a_log_nothing_is_deleted(run: Path, tmp_path: Path) -> None:
    """The place of the log is taken by a folder."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), OLD)
    (tmp_path / "out" / "run" / "pruned.json" / "x").mkdir(parents=True)
    with pytest.raises(SeriesError):
        delete(plan)
    assert len(left(run)) == 12


def test_a_log_that_fails_in_the_middle_stops_it(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a disk that is full: what is left is reported."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), OLD)
    write, calls = prune.write_text, []

    def full(path: Path, text: str) -> None:
        calls.append(path)
        if len(calls) > 5:
            raise SeriesError("no space")
        write(path, text)

    monkeypatch.setattr(prune, "write_text", full)
    done = delete(plan)
    assert len(done.deleted) == 2
    assert len(done.failed) == len(plan.files) - 2


def test_a_later_scan_still_knows_what_was_measured(run: Path, tmp_path: Path) -> None:
    """Verdict and rows stay, also with --rescan; the deleted ones are never named, and a finding says so."""
    before, rows = verdict(tmp_path / "out"), read_table(tmp_path / "out" / "run" / "layers.parquet")
    assert pruned(run, "--delete").exit_code == 0
    kept = len(left(run))
    assert scan(run.parent, tmp_path / "out") == "nothing new: 12 known before"
    after = verdict(tmp_path / "out")
    assert after["keep"] == before["keep"]
    assert after["turning_point"] == before["turning_point"]
    assert read_table(tmp_path / "out" / "run" / "layers.parquet").equals(rows)
    assert any(finding["rule"] == "pruned" for finding in after["findings"])  # type: ignore[attr-defined, index]
    again = scan(run.parent, tmp_path / "out", "--rescan")
    assert again.startswith("measured ")
    assert int(again.split()[1]) < kept
    now = read_table(tmp_path / "out" / "run" / "layers.parquet")
    anew = ["down_moved"]  # what the first checkpoint held is not known any more
    assert_frame_equal(now.drop(anew), rows.drop(anew), rel_tol=1e-9, abs_tol=1e-12)
    call("report", tmp_path / "out", "--detector", "algorithm1")
    there = {f"checkpoint-{step}/adapter_model.safetensors" for step in left(run)}
    assert {entry["checkpoint"] for entry in verdict(tmp_path / "out")["candidates"]} <= there  # type: ignore[attr-defined, index]


def test_training_that_goes_on_after_pruning(run: Path, tmp_path: Path) -> None:
    """New checkpoints join the old series; a second pruning and a changed file work, too."""
    assert pruned(run, "--delete").exit_code == 0
    checkpoint(run / "checkpoint-130", 130, base="../base.safetensors")
    assert scan(run.parent, tmp_path / "out") == "measured 1 new checkpoint; 12 known before"
    assert len(read_table(tmp_path / "out" / "run" / "checkpoints.parquet")) == 13
    touch_later(run / "checkpoint-50" / "adapter_model.safetensors")
    assert scan(run.parent, tmp_path / "out").startswith("measured 2 new checkpoints")
    assert not verdict(tmp_path / "out")["skipped"]
    assert pruned(run, "--delete").exit_code == 0


def test_another_base_cannot_be_compared_with_what_is_gone(run: Path, tmp_path: Path) -> None:
    """The series is what is left, and a finding says where the old verdict stands."""
    assert pruned(run, "--delete").exit_code == 0
    base = tmp_path / "runs" / "base.safetensors"
    touch_later(base)
    scan(run.parent, tmp_path / "out")
    found = verdict(tmp_path / "out")
    assert found["checkpoints"] == len(left(run))
    (finding,) = [f for f in found["findings"] if f["rule"] == "pruned"]  # type: ignore[attr-defined, index]
    assert "cannot be measured again" in finding["message"]


def test_a_new_training_in_the_folder_is_not_mixed_with_the_old(run: Path, tmp_path: Path) -> None:
    """Where no file is the one that was measured, rows of deleted ones are of another training."""
    assert pruned(run, "--delete").exit_code == 0
    shutil.rmtree(run)
    for step in range(15, 165, 15):
        checkpoint(run / f"checkpoint-{step}", step, base="../base.safetensors")
    scan(run.parent, tmp_path / "out")
    assert verdict(tmp_path / "out")["checkpoints"] == 10


def test_kohya_files_copies_and_states_stay(tmp_path: Path) -> None:
    """Numbered files go; epoch files with the same tensors were never measured, and training states are foreign."""
    kohya_run(tmp_path / "runs" / "lora", steps=range(10, 210, 10))
    kohya_base(tmp_path / "runs" / "base")
    (tmp_path / "runs" / "lora" / "name-000001-state").mkdir()
    (tmp_path / "runs" / "lora" / "name-000001-state" / "optimizer.bin").write_text("state")
    assert (
        call("scan", tmp_path / "runs", "--out", tmp_path / "out", "--base", tmp_path / "runs" / "base").exit_code == 0
    )
    (found,) = [entry for entry in discover_runs(tmp_path / "runs") if hasattr(entry, "checkpoints")]
    measured = {checkpoint.path for checkpoint in found.checkpoints}
    before = {path for path in (tmp_path / "runs").rglob("*") if path.is_file()}
    result = call(
        "prune", tmp_path / "runs" / "lora", "--out", tmp_path / "out", "--min-age", "0", "--delete", "--by-weights"
    )
    assert result.exit_code == 0, result.output
    deleted = {path for path in before if not path.exists()}
    assert deleted
    assert deleted <= measured


def test_a_damaged_plan_is_no_traceback(run: Path, tmp_path: Path) -> None:
    """A file that is replaced by another kind of thing."""
    plan = plan_pruning(run, ScanOptions(out=tmp_path / "out"), OLD)
    path = run / "checkpoint-10" / "adapter_model.safetensors"
    path.unlink()
    path.mkdir()
    assert "checkpoint-10/adapter_model.safetensors" in delete(plan).failed
    with pytest.raises(CheckpointError):
        prune._sha256_of_unchanged(plan.files[0])


def test_what_comes_back_from_a_backup_counts_again(run: Path, tmp_path: Path) -> None:
    """It may be the one to keep again, and be pruned again."""
    shutil.copytree(run / "checkpoint-10", tmp_path / "backup")
    assert pruned(run, "--delete").exit_code == 0
    shutil.copytree(tmp_path / "backup", run / "checkpoint-10", dirs_exist_ok=True)
    scan(run.parent, tmp_path / "out")
    assert 10 in left(run)
    assert pruned(run, "--delete").exit_code == 0
    assert 10 not in left(run)


def test_folders_of_the_real_trainer_go_whole(tmp_path: Path) -> None:
    """All that transformers' Trainer writes into a checkpoint is known; without a base, held-out loss is evidence."""
    trained_run(tmp_path / "run", eval_strategy="steps", eval_steps=2)
    call("scan", tmp_path / "run", "--out", tmp_path / "out", "--no-plots")
    result = call(
        "prune", tmp_path / "run", "--out", tmp_path / "out", "--min-age", "0", "--whole-folders", "--delete", "--json"
    )
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert told["delete"]
    assert {path.name for path in tmp_path.glob("run/checkpoint-*")} == {name.split("/")[0] for name in told["keep"]}
