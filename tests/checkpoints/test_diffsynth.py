"""DiffSynth-Studio's traps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from image_layouts import LOSSES, diffsynth, peft_keys, write
from runs import only, rules, search


def epochs(folder: Path, count: int = 3, batches: int = 60, **arguments: int) -> Path:
    """Epoch files, saved where --save_steps is not set."""
    for number in range(count):
        write(peft_keys(10 * number + 10, "", ".default"), folder / f"epoch-{number}.safetensors")
    known = {"learning_rate": 1e-4, "num_epochs": 3, "gradient_accumulation_steps": 1, **arguments}
    (folder / "training_args.json").write_text(json.dumps(known))
    rows = [f"{step},loss,{LOSSES[step]}\n" for step in range(1, batches + 1)]
    (folder / "loss.csv").write_text("step,key,value\n" + "".join(rows))
    return folder


def test_epochs_count_from_zero(tmp_path: Path) -> None:
    """TRAP: epoch-0 is saved after the first epoch; the log of a finished training tells the steps."""
    run = only(epochs(tmp_path))
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(20, 1.0), (40, 2.0), (60, 3.0)]
    assert run.steps_per_epoch == 20
    assert run.checkpoints[0].learning_rate == pytest.approx(1e-4)


def test_epochs_of_an_unfinished_training_are_counted_in_epochs(tmp_path: Path) -> None:
    """Nothing is invented where the log ends inside of an epoch."""
    run = only(epochs(tmp_path, count=2, batches=50))
    assert run.step_unit == "epoch"
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(1, 1.0), (2, 2.0)]
    assert "epochs-only" in rules(run)
    assert {c.learning_rate for c in run.checkpoints} == {None}


def test_steps_count_batches(tmp_path: Path) -> None:
    """TRAP: with accumulation, several for one step of the optimizer."""
    run = only(diffsynth(tmp_path, accumulated=4))
    assert [c.name for c in run.checkpoints][:2] == ["step-40.safetensors", "step-80.safetensors"]
    assert [c.step for c in run.checkpoints] == [10, 20, 30, 40, 50, 60]
    assert run.checkpoints[1].train_loss == pytest.approx(LOSSES[20])


def test_the_first_steps_have_a_third_of_the_rate(tmp_path: Path) -> None:
    """TRAP: torch's ConstantLR without arguments, against the scheduler itself."""
    import torch

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    dose = 0.0
    for _ in range(10):
        optimizer.step()
        dose += scheduler.get_last_lr()[0]
        scheduler.step()
    assert only(diffsynth(tmp_path)).checkpoints[0].dose == pytest.approx(dose, rel=1e-9)


def test_numbers_with_zeros_and_foreign_tensors_are_not_its_files(tmp_path: Path) -> None:
    """`step-<N>` is a common name: only adapters without padding are taken."""
    import torch

    write({"weight": torch.ones(2)}, tmp_path / "step-10.safetensors")
    write(peft_keys(10), tmp_path / "epoch-000001.safetensors")
    runs, skipped = search(tmp_path)
    assert not runs
    assert len(skipped) == 2
