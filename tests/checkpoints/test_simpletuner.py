"""SimpleTuner's traps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_layouts import HEADER, RATES, guarded_checkpoint, peft_keys, simpletuner, tracked, write
from runs import only, rules, search


def test_temporary_folders_are_unfinished(tmp_path: Path) -> None:
    """TRAP: `-tmp` is renamed when all is written."""
    simpletuner(tmp_path, (10, 20))
    guarded_checkpoint(tmp_path / "checkpoint-30-tmp", 30)
    runs, skipped = search(tmp_path)
    assert [c.step for c in runs[0].checkpoints] == [10, 20]
    assert not skipped
    assert ["temporary" in entry.reason for entry in runs[0].skipped] == [True]


def test_a_checkpoint_without_guard_is_unfinished(tmp_path: Path) -> None:
    """TRAP: `.guard` is written last. Older versions write none, and then nothing follows from that."""
    simpletuner(tmp_path / "new", (10, 20))
    guarded_checkpoint(tmp_path / "new" / "checkpoint-30", 30, guard=False)
    run = only(tmp_path / "new")
    assert [c.step for c in run.checkpoints] == [10, 20]
    assert "no .guard" in run.skipped[0].reason
    for step in (10, 20):
        guarded_checkpoint(tmp_path / "old" / f"checkpoint-{step}", step, guard=False)
    assert [c.step for c in only(tmp_path / "old").checkpoints] == [10, 20]


def test_rolling_checkpoints_are_checkpoints(tmp_path: Path) -> None:
    """TRAP: `-rolling`, mostly between the others; at one step with another it is its copy."""
    simpletuner(tmp_path, (10, 20))
    guarded_checkpoint(tmp_path / "checkpoint-25-rolling", 25)
    guarded_checkpoint(tmp_path / "checkpoint-20-rolling", 20)
    run = only(tmp_path)
    assert [c.name.partition("/")[0] for c in run.checkpoints] == [
        "checkpoint-10",
        "checkpoint-20",
        "checkpoint-25-rolling",
    ]
    assert "duplicate" in rules(run)


def test_averaged_weights_are_apart(tmp_path: Path) -> None:
    """TRAP: ema/ in every checkpoint and in the run's folder, with a LoRA of the usual name or of its own."""
    simpletuner(tmp_path, (10, 20))
    for folder in (tmp_path / "checkpoint-10", tmp_path):
        write(peft_keys(10, "transformer."), folder / "ema" / "pytorch_lora_weights.safetensors", HEADER)
    write(peft_keys(10, "transformer."), tmp_path / "checkpoint-20" / "ema" / "ema_model.safetensors", HEADER)
    runs, skipped = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[10, 20]]
    assert sorted(entry.path.relative_to(tmp_path).as_posix() for entry in runs[0].skipped) == [
        "checkpoint-10/ema",
        "checkpoint-20/ema",
        "ema",
    ]
    assert all(entry.expected and "EMA" in entry.reason for entry in (*runs[0].skipped, *skipped))


def test_a_torn_last_line_of_the_metrics_is_left_out(tmp_path: Path) -> None:
    """TRAP: the trainer was killed while it wrote."""
    simpletuner(tmp_path, (10, 20))
    metrics = tmp_path / "training_metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-30])
    assert [c.learning_rate for c in only(tmp_path).checkpoints] == pytest.approx([RATES[10], RATES[19]])


def test_with_prodigy_the_effective_rate_counts(tmp_path: Path) -> None:
    """TRAP: its learning_rate is d alone."""
    simpletuner(tmp_path, (10, 20), optimizer="prodigy")
    lines = [
        {"step": s, "metrics": {"learning_rate": 9.0, "prodigy_d": 9.0, "prodigy_effective_lr": 2e-4}} for s in (10, 20)
    ]
    (tmp_path / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {c.learning_rate for c in only(tmp_path).checkpoints} == {2e-4}
    lines = [{"step": s, "metrics": {"learning_rate": 9.0}} for s in (10, 20)]
    (tmp_path / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert {c.learning_rate for c in only(tmp_path).checkpoints} == {None}


def test_repeated_steps_count_once(tmp_path: Path) -> None:
    """TRAP: a restart appends to the same file."""
    simpletuner(tmp_path, (10, 20))
    with (tmp_path / "training_metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "metrics": {"learning_rate": 5e-5, "loss/val/pooled": 0.5}}) + "\n")
    last = only(tmp_path).checkpoints[-1]
    assert (last.learning_rate, last.held_out_loss) == (5e-5, 0.5)


def test_evaluation_sets_are_averaged(tmp_path: Path) -> None:
    """Unless there is the loss of all together."""
    simpletuner(tmp_path, (10, 20))
    with (tmp_path / "training_metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 20, "metrics": {"loss/val/a": 1.0, "loss/val/b": 2.0}}) + "\n")
    assert only(tmp_path).checkpoints[-1].held_out_loss == 1.5


def test_without_its_own_metrics_a_tensorboard_log_is_read(tmp_path: Path) -> None:
    """report_to tensorboard, in logs/."""
    simpletuner(tmp_path, (10, 20))
    (tmp_path / "training_metrics.jsonl").unlink()
    (tmp_path / "training_metrics.json").unlink()
    tracked(tmp_path / "logs", {"learning_rate": RATES}, 20)
    run = only(tmp_path)
    assert [c.learning_rate for c in run.checkpoints] == pytest.approx([RATES[10], RATES[20]])
    assert run.base.name == "org/base"


def test_a_checkpoint_without_a_lora_is_said(tmp_path: Path) -> None:
    """Killed before the weights, or a full model."""
    simpletuner(tmp_path, (10, 20))
    (tmp_path / "checkpoint-10" / "pytorch_lora_weights.safetensors").unlink()
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [20]
    assert [entry.path.name for entry in run.skipped] == ["checkpoint-10"]


def test_epochs_count_from_one(tmp_path: Path) -> None:
    """TRAP: the logged epoch is the one that is going on; epochs of unequal length tell none."""
    run = only(simpletuner(tmp_path))
    assert run.steps_per_epoch == 20
    assert [c.epoch for c in run.checkpoints] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    with (tmp_path / "training_metrics.jsonl").open("a") as file:
        for step in (61, 62, 63):
            file.write(json.dumps({"step": step, "metrics": {"epoch": step - 57}}) + "\n")
    assert only(tmp_path).steps_per_epoch is None
