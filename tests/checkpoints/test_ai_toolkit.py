"""ai-toolkit's traps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from factories import kohya_run
from image_layouts import RATES, STEPS, ai_toolkit, kohya_keys, loss_log, peft_keys, write
from runs import only, search

from lora_forensics.checkpoints.logs.sqlite import sqlite_metrics


def test_max_step_saves_to_keep_deletes_history(tmp_path: Path) -> None:
    """TRAP: the setting is 5 if nobody raises it; that early checkpoints are gone is said, with the setting."""
    ai_toolkit(tmp_path, keep=3)
    for step in STEPS[:3]:
        (tmp_path / f"name_{step:09d}.safetensors").unlink()
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [40, 50, 60]
    (finding,) = [f for f in run.findings if f.rule == "pruned"]
    assert "max_step_saves_to_keep is 3" in finding.message
    assert "max_step_saves_to_keep" in run.save_more_often


def test_the_unnumbered_final_has_its_step_in_the_metadata_only(tmp_path: Path) -> None:
    """TRAP: it is overwritten by a resumed training."""
    run = only(ai_toolkit(tmp_path))
    assert run.checkpoints[-1].name == "name.safetensors"
    assert run.checkpoints[-1].step == 60
    write(peft_keys(90), tmp_path / "name.safetensors", {"training_info": json.dumps({"step": 90, "epoch": 4})})
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 30, 40, 50, 90]
    assert run.checkpoints[-1].epoch == 4


def test_alpha_is_forced_to_the_rank(tmp_path: Path) -> None:
    """TRAP: no alpha is saved, which elsewhere means that the scale is unknown. Kohya's keys have their own."""
    assert {c.scale for c in only(ai_toolkit(tmp_path / "a")).checkpoints} == {1.0}
    write(kohya_keys(10), tmp_path / "b" / "x_000000010.safetensors", {"training_info": '{"step": 10, "epoch": 0}'})
    run = only(tmp_path / "b")
    assert (run.trainer, run.checkpoints[0].scale) == ("ai-toolkit", None)


def test_accumulation_over_steps_divides_them(tmp_path: Path) -> None:
    """TRAP: gradient_accumulation_steps; gradient_accumulation happens inside of a step."""
    run = only(ai_toolkit(tmp_path / "a", gradient_accumulation_steps=2))
    assert [c.step for c in run.checkpoints] == [5, 10, 15, 20, 25, 30]
    assert run.checkpoints[1].learning_rate == pytest.approx(RATES[20], rel=0.02)
    assert run.batch_size == 4
    run = only(ai_toolkit(tmp_path / "b", gradient_accumulation=2))
    assert [c.step for c in run.checkpoints] == list(STEPS)
    assert run.batch_size == 4


def test_with_an_embedding_the_lora_has_another_name(tmp_path: Path) -> None:
    """TRAP: `<name>_LoRA_...`; the embedding beside it is no checkpoint."""
    for step in (10, 20):
        info = {"training_info": json.dumps({"step": step, "epoch": 0})}
        write(peft_keys(step), tmp_path / f"name_LoRA_{step:09d}.safetensors", info)
        write({"clip_l": torch.ones(2, 8)}, tmp_path / f"trigger_{step:09d}.safetensors", info)
    runs, skipped = search(tmp_path)
    assert [(run.name, len(run.checkpoints)) for run in runs] == [(f"{tmp_path.name}/name_LoRA".split("/")[-1], 2)]
    assert len(skipped) == 2
    assert all(entry.expected for entry in skipped)


def test_two_experts_are_two_runs(tmp_path: Path) -> None:
    """TRAP: Wan 2.2 trains two transformers; their files differ in a suffix."""
    for step in (10, 20):
        for expert in ("high", "low"):
            info = {"training_info": json.dumps({"step": step, "epoch": 0})}
            write(peft_keys(step), tmp_path / f"wan_{step:09d}_{expert}_noise.safetensors", info)
    runs, _ = search(tmp_path)
    assert [run.name for run in runs] == ["wan_high_noise", "wan_low_noise"]
    assert [[c.step for c in run.checkpoints] for run in runs] == [[10, 20], [10, 20]]


def test_rows_of_the_write_ahead_log_are_read_and_nothing_is_written(tmp_path: Path) -> None:
    """TRAP: while it trains, all rows may be in the second file; reading leaves the folder as it was."""
    connection = loss_log(tmp_path / "loss_log.db", {"loss/loss": {1: 0.5, 2: 0.25}})
    assert (tmp_path / "loss_log.db-wal").stat().st_size
    before = {name: (tmp_path / name).stat().st_mtime_ns for name in os.listdir(tmp_path)}
    assert sqlite_metrics(tmp_path / "loss_log.db").curves["loss/loss"].values == (0.5, 0.25)
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in os.listdir(tmp_path)} == before
    connection.close()
    assert os.listdir(tmp_path) == ["loss_log.db"]
    assert sqlite_metrics(tmp_path / "loss_log.db").curves["loss/loss"].values == (0.5, 0.25)
    assert os.listdir(tmp_path) == ["loss_log.db"]


def test_without_a_log_the_rate_is_that_of_the_settings_if_it_is_constant(tmp_path: Path) -> None:
    """And unknown under a schedule, or where the optimizer finds its own."""
    for number, (train, rate) in enumerate(
        [({}, 1e-4), ({"lr_scheduler": "cosine"}, None), ({"optimizer": "prodigy", "lr": 1.0}, None)]
    ):
        folder = ai_toolkit(tmp_path / str(number), **train)
        (folder / "loss_log.db").unlink()
        assert {c.learning_rate for c in only(folder).checkpoints} == {rate}


def test_validation_losses_are_held_out(tmp_path: Path) -> None:
    """`val/loss` of the log."""
    ai_toolkit(tmp_path)
    (tmp_path / "loss_log.db").unlink()
    loss_log(tmp_path / "loss_log.db", {"val/loss": {step: step / 100 for step in STEPS}}).close()
    assert [c.held_out_loss for c in only(tmp_path).checkpoints] == [step / 100 for step in STEPS]


def test_a_damaged_database_is_a_finding(tmp_path: Path) -> None:
    """And no error."""
    ai_toolkit(tmp_path)
    (tmp_path / "loss_log.db").write_bytes(b"no database" * 100)
    assert "log-unreadable" in [finding.rule for finding in only(tmp_path).findings]


def test_a_final_file_of_kohya_that_ends_in_nine_digits_is_kohyas(tmp_path: Path) -> None:
    """A time in the output name is no step."""
    kohya_run(tmp_path, "char_1700000000", [10, 20, 30])
    run = only(tmp_path)
    assert (run.trainer, [c.step for c in run.checkpoints]) == ("kohya", [10, 20, 30])
