"""diffusion-pipe's traps."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from factories import library
from image_layouts import LOSSES, STEPS, TOML, diffusion_pipe, kohya_keys, pipe_save, write
from runs import only, rules, search


def epochs(folder: Path, toml: str = TOML, per_epoch: int = 20, axis: int = 1) -> Path:
    """Epoch folders, and a log in which each epoch ends after its last step."""
    for epoch in (1, 2, 3):
        pipe_save(folder / f"epoch{epoch}", epoch * per_epoch, toml)
    library("tensorboard")
    writer = library("torch.utils.tensorboard").SummaryWriter(folder)
    for step in range(1, 3 * per_epoch + 1):
        writer.add_scalar("train/loss", LOSSES[step], step * axis, walltime=1e9 + step)
        if step % per_epoch == 0:
            writer.add_scalar("train/epoch_loss", 1.0, step // per_epoch, walltime=1e9 + step + 0.5)
    writer.close()
    return folder


def test_steps_of_epochs_follow_from_the_log(tmp_path: Path) -> None:
    """TRAP: train/epoch_loss is over epochs; when it was logged tells the step at which an epoch ended."""
    run = only(epochs(tmp_path))
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(20, 1.0), (40, 2.0), (60, 3.0)]
    assert run.steps_per_epoch == 20
    assert [c.train_loss for c in run.checkpoints] == pytest.approx([LOSSES[20], LOSSES[40], LOSSES[60]])


def test_without_the_times_of_the_training_the_planned_epochs_tell_their_steps(tmp_path: Path) -> None:
    """A log that was copied together later: all of one moment; where all epochs were saved, the last step tells."""
    diffusion_pipe(
        tmp_path,
        (),
        log={"train/loss": {s: LOSSES[s] for s in range(1, 61)}, "train/epoch_loss": {1: 1.0, 2: 1.0, 3: 1.0}},
    )
    for epoch in (1, 2, 3):
        pipe_save(tmp_path / f"epoch{epoch}", epoch * 20)
    assert [(c.step, c.epoch) for c in only(tmp_path).checkpoints] == [(20, 1.0), (40, 2.0), (60, 3.0)]


def test_epochs_without_a_log_are_counted_in_epochs(tmp_path: Path) -> None:
    """TRAP: nothing in the files tells a step."""
    epochs(tmp_path)
    for path in tmp_path.glob("events*"):
        path.unlink()
    run = only(tmp_path)
    assert run.step_unit == "epoch"
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(1, 1.0), (2, 2.0), (3, 3.0)]
    assert "epochs-only" in rules(run)


def test_an_epoch_that_ends_on_a_saved_step_counts_once(tmp_path: Path) -> None:
    """TRAP: equal tensors under two names."""
    epochs(tmp_path)
    for step in STEPS:
        pipe_save(tmp_path / f"step{step}", step)
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == list(STEPS)
    assert "duplicate" in rules(run)


def test_a_folder_tmp_means_an_interrupted_save(tmp_path: Path) -> None:
    """TRAP: whether or not an adapter lies beside it."""
    diffusion_pipe(tmp_path)
    (tmp_path / "step30" / "tmp").mkdir()
    torch.save({}, tmp_path / "step30" / "tmp" / "state_dict_0.bin")
    (tmp_path / "step70" / "tmp").mkdir(parents=True)
    runs, skipped = search(tmp_path)
    assert [c.step for c in runs[0].checkpoints] == [10, 20, 40, 50, 60]
    assert not skipped
    assert sorted(entry.path.name for entry in runs[0].skipped) == ["step30", "step70"]
    assert all("not finished" in entry.reason for entry in runs[0].skipped)


def test_deepspeed_states_are_no_checkpoints(tmp_path: Path) -> None:
    """TRAP: global_step<N> holds pickles of gigabytes."""
    diffusion_pipe(tmp_path)
    (tmp_path / "global_step60").mkdir()
    torch.save({}, tmp_path / "global_step60" / "mp_rank_00_model_states.pt")
    (tmp_path / "latest").write_text("global_step60")
    runs, skipped = search(tmp_path)
    assert len(runs) == 1
    assert not skipped
    assert [(s.path.name, s.expected) for s in runs[0].skipped] == [("global_step60", True)]


def test_examples_on_the_axis_are_divided(tmp_path: Path) -> None:
    """TRAP: x_axis_examples; the samples of one step follow from the log, whatever the number of processes."""
    run = only(epochs(tmp_path, "x_axis_examples = true\n" + TOML, axis=8))
    assert [c.train_loss for c in run.checkpoints] == pytest.approx([LOSSES[20], LOSSES[40], LOSSES[60]])
    assert [c.step for c in run.checkpoints] == [20, 40, 60]


@pytest.mark.parametrize(
    ("toml", "log", "rate"),
    [
        (TOML, {}, 1e-4),
        ("warmup_steps = 40\n" + TOML, {}, 5.125e-5),
        (TOML.replace("'adamw_optimi'", "'Prodigy'").replace("1e-4", "1.0"), {"train/prodigy_d": {20: 3e-4}}, 3e-4),
        (TOML.replace("'adamw_optimi'", "'Prodigy'"), {}, None),
        (TOML.replace("'adamw_optimi'", "'automagic'"), {"train/automagic_avg_lr": {20: 4e-5}}, 4e-5),
        ("force_constant_lr = 1e-5\n" + TOML, {}, None),
        ("lr_scheduler = 'linear'\n" + TOML, {}, None),
    ],
)
def test_rates_are_those_of_settings_and_log(
    toml: str, log: dict[str, dict[int, float]], rate: float | None, tmp_path: Path
) -> None:
    """TRAP: Prodigy's is d times lr; what settings alone do not determine is unknown."""
    run = only(diffusion_pipe(tmp_path, toml=toml, log={"train/loss": LOSSES, **log}))
    found = run.checkpoints[1].learning_rate
    assert found == (None if rate is None else pytest.approx(rate, rel=1e-2))


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_schedules_are_torchs(name: str, tmp_path: Path) -> None:
    """After warm-up, over all epochs, where the log tells their length."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1e-4)
    library_ = torch.optim.lr_scheduler
    warm = library_.LinearLR(optimizer, start_factor=0.1, total_iters=10)
    after = {
        "linear": library_.LinearLR(optimizer, start_factor=1.0, end_factor=0.0, total_iters=60),
        "cosine": library_.CosineAnnealingLR(optimizer, T_max=60, eta_min=1e-6),
    }[name]
    scheduler = library_.SequentialLR(optimizer, schedulers=[warm, after], milestones=[10])
    real = []
    for _ in range(60):
        optimizer.step()
        scheduler.step()
        real.append(scheduler.get_last_lr()[0])
    run = only(epochs(tmp_path, f"lr_scheduler = '{name}'\nwarmup_steps = 10\n" + TOML))
    for checkpoint in run.checkpoints:
        assert checkpoint.learning_rate == pytest.approx(real[(checkpoint.step or 0) - 1], rel=1e-3)


def test_evaluation_sets_are_held_out(tmp_path: Path) -> None:
    """Named ones and unnamed ones; the mean of both."""
    toml = "eval_datasets = ['a.toml', {name = 'other', config = 'b.toml'}]\n" + TOML
    log = {
        "train/loss": LOSSES,
        "eval0/loss": {20: 1.0, 40: 3.0},
        "other/loss": {20: 2.0},
        "eval0/loss_quantile_0.10": {20: 9.0},
    }
    run = only(diffusion_pipe(tmp_path, toml=toml, log=log))
    assert [c.held_out_loss for c in run.checkpoints] == [None, 1.5, None, None, None, None]


def test_sdxl_is_saved_in_kohyas_keys(tmp_path: Path) -> None:
    """TRAP: lora.safetensors instead of adapter_model.safetensors."""
    for step in (10, 20):
        write(kohya_keys(step), tmp_path / f"epoch{step}" / "lora.safetensors", {"format": "pt"})
        (tmp_path / f"epoch{step}" / "sdxl.toml").write_text(TOML)
    run = only(tmp_path)
    assert run.trainer == "diffusion-pipe"
    assert [c.name for c in run.checkpoints] == ["epoch10/lora.safetensors", "epoch20/lora.safetensors"]
