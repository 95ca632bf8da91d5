"""OneTrainer's traps."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factories import Tensors, tensorboard_log
from image_layouts import LOSSES, RANK, RATES, STEPS, factors, kohya_keys, onetrainer, peft_keys, write
from runs import only, rules, search

from lora_forensics.measure import measure_run


def original_keys(step: int) -> Tensors:
    """ORIGINAL_LORA: native names without a prefix, lora_A and lora_B, alpha kept."""
    tensors = {key: value for key, value in factors(step).items() if key.endswith(".alpha")}
    return {**peft_keys(step, ""), **tensors}


def legacy_keys(step: int) -> Tensors:
    """LEGACY_LORA of a transformer: diffusers' names in kohya's manner."""
    return {key.replace("lora_unet", "lora_transformer"): value for key, value in kohya_keys(step).items()}


def test_steps_are_numbers_not_text(tmp_path: Path) -> None:
    """TRAP: no zeros before them: 100 comes after 20."""
    run = only(onetrainer(tmp_path))
    assert [c.step for c in run.checkpoints] == list(STEPS)
    for step in (100, 1000):
        name = f"2026-05-01_10-30-{step // 100:02d}-save-{step}-{step // 20}-0.safetensors"
        write(kohya_keys(step), tmp_path / "save" / name, {"ot_branch": "master"})
    assert [c.step for c in only(tmp_path).checkpoints] == [*STEPS, 100, 1000]


def test_steps_count_batches(tmp_path: Path) -> None:
    """TRAP: with accumulation, several for one step of the optimizer; the log counts from 0."""
    run = only(onetrainer(tmp_path, accumulated=4))
    assert [c.step for c in run.checkpoints] == list(STEPS)
    assert run.steps_per_epoch == 20
    assert [c.epoch for c in run.checkpoints] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert [c.train_loss for c in run.checkpoints] == pytest.approx([LOSSES[step] for step in STEPS])
    assert [c.learning_rate for c in run.checkpoints] == pytest.approx([RATES[step] for step in STEPS])
    assert run.batch_size == 8


@pytest.mark.parametrize(
    "keys", [kohya_keys, legacy_keys, original_keys, peft_keys, lambda step: peft_keys(step, "transformer.")]
)
def test_every_key_style_is_one_run_of_known_scale(keys: Callable[[int], Tensors], tmp_path: Path) -> None:
    """TRAP: a setting; diffusers' style has the scale folded in, the others keep alpha. All are OneTrainer's."""
    run = only(onetrainer(tmp_path, keys=keys))
    assert run.trainer == "onetrainer"
    assert len(run.checkpoints) == len(STEPS)
    layers = measure_run(run).layers
    assert set(layers["scale"]) == {1.0}
    assert set(layers["rank"]) == {RANK}


def test_a_save_that_failed_stays_half_written(tmp_path: Path) -> None:
    """TRAP: it is not removed, and neither are later ones spoiled."""
    onetrainer(tmp_path)
    broken = max((tmp_path / "save").iterdir())
    broken.write_bytes(broken.read_bytes()[:100])
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == list(STEPS[:-1])
    assert [entry.path for entry in run.skipped] == [broken]


def backup(space: Path, step: int, time: str) -> Path:
    """A backup with LoRA, progress, optimizer and EMA."""
    folder = space / "backup" / f"{time}-backup-{step}-{step // 20}-{step % 20}"
    write(kohya_keys(step), folder / "lora" / "lora.safetensors", {"ot_branch": "master"})
    progress = {"epoch": step // 20, "epoch_step": step % 20, "epoch_sample": step % 20, "global_step": step}
    (folder / "meta.json").write_text(json.dumps({"train_progress": progress}))
    for part in ("optimizer", "ema"):
        (folder / part).mkdir()
        torch.save({}, folder / part / f"{part}.pt")
    return folder


def test_backups_are_states_beside_saves(tmp_path: Path) -> None:
    """TRAP: they hold a LoRA, an optimizer and averaged weights, and are no further checkpoints."""
    onetrainer(tmp_path)
    backup(tmp_path, 30, "2026-05-01_10-00-31")
    runs, skipped = search(tmp_path)
    assert [len(run.checkpoints) for run in runs] == [len(STEPS)]
    assert not skipped
    assert [(entry.path.name, entry.expected) for entry in runs[0].skipped] == [("backup", True)]


def test_backups_are_the_checkpoints_where_nothing_was_saved(tmp_path: Path) -> None:
    """TRAP: people keep only those."""
    for step in (9, 20, 100):
        backup(tmp_path, step, f"2026-05-01_10-00-{step % 60:02d}" if step < 60 else "2026-05-01_10-01-40")
    runs, skipped = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[9, 20, 100]]
    assert all(entry.expected for entry in skipped)


def test_the_final_file_lies_where_the_settings_say(tmp_path: Path) -> None:
    """TRAP: outside of the workspace; its step is that of the log's end."""
    space = tmp_path / "workspace" / "run"
    onetrainer(space, output_model_destination="models/mine.safetensors")
    last = max((space / "save").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    final = write(kohya_keys(70), tmp_path / "models" / "mine.safetensors", {"ot_branch": "master"})
    os.utime(final, ns=(last.stat().st_mtime_ns + 10**9,) * 2)
    tensorboard_log(space / "tensorboard" / "2026-05-01_10-00-00", {"loss/train_step": {69: 0.5}}, stamp=1_900_000_000)
    runs, skipped = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[*STEPS, 70]]
    assert not skipped
    assert (runs[0].path / runs[0].checkpoints[-1].name).resolve() == final.resolve()


def test_a_final_file_alone_is_no_run_of_kohya(tmp_path: Path) -> None:
    """TRAP: kohya's keys; the mark in the header tells."""
    write(kohya_keys(70), tmp_path / "mine.safetensors", {"ot_branch": "master"})
    runs, skipped = search(tmp_path)
    assert not runs
    assert ["OneTrainer" in entry.reason for entry in skipped] == [True]


def test_a_training_that_goes_on_from_a_backup_is_one_run(tmp_path: Path) -> None:
    """TRAP: steps 50 and 60 are trained twice; the later saves count, and that is said."""
    onetrainer(tmp_path)
    onetrainer(tmp_path, (50, 60), start="2026-05-02_11-00-00")
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == list(STEPS)
    assert ["2026-05-02" in c.name for c in run.checkpoints] == [False] * 4 + [True] * 2
    assert {"resumed", "superseded"} <= set(rules(run))
    assert not run.unplaced


def test_a_rerun_into_one_workspace_is_two(tmp_path: Path) -> None:
    """A new start that counts from 0 again."""
    onetrainer(tmp_path, gradient_accumulation_steps=1)
    onetrainer(tmp_path, STEPS[:4], start="2026-05-02_11-00-00", base_model_name="org/other")
    runs, _ = search(tmp_path)
    assert [([c.step for c in run.checkpoints], run.base.name) for run in runs] == [
        (list(STEPS), "org/base"),
        (list(STEPS[:4]), "org/other"),
    ]


def test_a_rerun_with_accumulation_is_two(tmp_path: Path) -> None:
    """The first step of the optimizer is logged at the last of its batches: that is no later start."""
    onetrainer(tmp_path, accumulated=4)
    onetrainer(tmp_path, STEPS[:4], accumulated=4, start="2026-05-02_11-00-00")
    runs, _ = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [list(STEPS), list(STEPS[:4])]


def test_without_settings_and_log_steps_that_go_back_tell_a_rerun(tmp_path: Path) -> None:
    """Only the save folder was kept."""
    onetrainer(tmp_path)
    onetrainer(tmp_path, STEPS[:4], start="2026-05-02_11-00-00")
    runs, _ = search(tmp_path / "save")
    assert [[c.step for c in run.checkpoints] for run in runs] == [list(STEPS), list(STEPS[:4])]


def test_validation_is_held_out(tmp_path: Path) -> None:
    """The average of all concepts; logged before the step is counted."""
    onetrainer(tmp_path)
    log = {f"loss/validation_step/{name}": {19: value} for name, value in (("a", 1.0), ("total_average", 2.0))}
    tensorboard_log(tmp_path / "tensorboard" / "2026-05-01_10-00-00", log, stamp=1_900_000_000)
    assert only(tmp_path).checkpoints[1].held_out_loss == 2.0


def test_prefixes_tell_runs_apart(tmp_path: Path) -> None:
    """save_filename_prefix: two trainings in one workspace."""
    for prefix in ("cat-", "dog-"):
        for step in (10, 20):
            name = f"{prefix}2026-05-01_10-00-{step}-save-{step}-0-{step}.safetensors"
            write(kohya_keys(step), tmp_path / "save" / name, {"ot_branch": "master"})
    runs, _ = search(tmp_path)
    assert [(run.name, len(run.checkpoints)) for run in runs] == [("cat", 2), ("dog", 2)]


def test_the_final_file_of_two_trainings_is_the_newest_ones(tmp_path: Path) -> None:
    """TRAP: a rerun overwrites it; of two workspaces nothing tells whose it is, and it is listed apart."""
    for start in ("2026-05-01_10-00-00", "2026-05-02_11-00-00"):
        onetrainer(tmp_path / "ws" / "a", start=start, output_model_destination="models/mine.safetensors")
        log = {"loss/train_step": {69: 0.5}}
        tensorboard_log(tmp_path / "ws" / "a" / "tensorboard" / start, log, stamp=1_900_000_000)
    final = write(kohya_keys(70), tmp_path / "models" / "mine.safetensors", {"ot_branch": "master"})
    runs, _ = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [list(STEPS), [*STEPS, 70]]
    shutil.copytree(tmp_path / "ws" / "a", tmp_path / "ws" / "b")
    runs, skipped = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [list(STEPS)] * 4
    assert [entry.path for entry in skipped] == [final]
