"""kohya sd-scripts: names, metadata and their traps."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import kohya_file, kohya_metadata, kohya_run

from lora_forensics.discovery import discover_runs
from lora_forensics.records import Run


def only(path: Path) -> Run:
    """The one run of a folder."""
    (run,) = [found for found in discover_runs(path) if isinstance(found, Run)]
    return run


def test_step_epoch_and_final_files_are_one_run(tmp_path: Path) -> None:
    """Ordered by the step in the header; the unnumbered last file is placed by its metadata."""
    run = only(kohya_run(tmp_path, steps=range(10, 70, 10)))
    assert [c.step for c in run.checkpoints] == [10, 20, 30, 40, 50, 60]
    assert run.checkpoints[-1].name == "name.safetensors"
    assert [finding.rule for finding in run.findings] == ["duplicate"]


def test_epochs_count_what_was_trained(tmp_path: Path) -> None:
    """TRAP: step files store the epochs finished so far, epoch files count from 1; the step tells both."""
    run = only(kohya_run(tmp_path, steps=range(10, 70, 10)))
    assert run.steps_per_epoch == 20
    assert [c.epoch for c in run.checkpoints] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_steps_per_epoch_follow_the_files_rather_than_the_batches(tmp_path: Path) -> None:
    """With two processes an epoch has half the steps that the batches say."""
    kohya_file(tmp_path / "a-000001.safetensors", 10, kohya_metadata(10, 1, "a"))
    kohya_file(tmp_path / "a-000002.safetensors", 20, kohya_metadata(20, 2, "a"))
    assert only(tmp_path).steps_per_epoch == 10


def test_steps_per_epoch_count_accumulated_batches(tmp_path: Path) -> None:
    """ceil(batches / accumulation), where only step files are left."""
    extra = {"ss_gradient_accumulation_steps": "3"}
    kohya_file(tmp_path / "a-step00000010.safetensors", 10, kohya_metadata(10, 1, "a", **extra))
    assert only(tmp_path).steps_per_epoch == 7


def test_without_metadata_steps_come_from_the_name(tmp_path: Path) -> None:
    """TRAP: --no_metadata. A final file has neither; it is listed."""
    for step in (10, 20, 30):
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step, None)
    kohya_file(tmp_path / "a.safetensors", 40, None)
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 30]
    assert [c.name for c in run.unplaced] == ["a.safetensors"]
    assert all(c.learning_rate is None for c in run.checkpoints)


def test_epoch_files_without_metadata_are_counted_in_epochs(tmp_path: Path) -> None:
    """Their order is known and their steps are not: nothing is invented, and it is said."""
    for epoch in range(1, 5):
        kohya_file(tmp_path / f"a-{epoch:06d}.safetensors", 10 * epoch, None)
    run = only(tmp_path)
    assert run.step_unit == "epoch"
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert [finding.rule for finding in run.findings] == ["epochs-only"]


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("epoch-000001", ""),
        ("at-step00000100", ""),
        ("last", ""),
        ("my-lora_v2-000010", "my-lora_v2"),
        ("x-step00000005", "x"),
    ],
)
def test_default_names_have_an_empty_stem(name: str, stem: str, tmp_path: Path) -> None:
    """Kohya's names without --output_name take the folder's name."""
    kohya_file(tmp_path / "runs" / f"{name}.safetensors", 10, kohya_metadata(10, 1))
    run = only(tmp_path)
    assert run.name == "/".join(["runs", *([stem] if stem else [])])


@pytest.mark.parametrize(
    ("extra", "rates"),
    [
        ({}, [2e-4, 2e-4, 2e-4]),
        ({"ss_unet_lr": "None"}, [1e-4, 1e-4, 1e-4]),
        ({"ss_unet_lr": "[0.0003, 0.0004]"}, [3e-4, 3e-4, 3e-4]),
        ({"ss_lr_scheduler": "linear", "ss_max_train_steps": "40"}, [1.5e-4, 1e-4, 5e-5]),
        ({"ss_lr_scheduler": "cosine", "ss_max_train_steps": "40"}, [1.7071068e-4, 1e-4, 2.928932e-5]),
        ({"ss_lr_scheduler": "constant_with_warmup", "ss_lr_warmup_steps": "20"}, [1e-4, 2e-4, 2e-4]),
        ({"ss_lr_scheduler": "cosine_with_restarts"}, [None, None, None]),
        ({"ss_optimizer": "prodigyopt.prodigy.Prodigy"}, [None, None, None]),
        ({"ss_max_train_steps": "nonsense"}, [None, None, None]),
    ],
)
def test_learning_rates_follow_the_recorded_schedule(
    extra: dict[str, str], rates: list[float | None], tmp_path: Path
) -> None:
    """Where name, warm-up and length determine it; unknown otherwise, and never guessed for adaptive optimizers."""
    run = only(kohya_run(tmp_path, steps=[10, 20, 30], **extra))
    for checkpoint, rate in zip(run.checkpoints, rates, strict=True):
        assert checkpoint.learning_rate == (None if rate is None else pytest.approx(rate, rel=1e-6))


@pytest.mark.parametrize("name", ["linear", "cosine", "constant", "constant_with_warmup"])
@pytest.mark.parametrize("warmup", [0, 7])
def test_schedules_are_those_of_diffusers(name: str, warmup: int) -> None:
    """Rate after every step, and the sum of all, against the scheduler that the trainers use."""
    import torch
    from diffusers.optimization import get_scheduler

    from lora_forensics.checkpoints.history import schedule

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.5)
    scheduler = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=50)
    curve = schedule(name, 0.5, warmup, 50)
    total = 0.0
    for step in range(1, 51):
        optimizer.step()
        scheduler.step()
        rate = scheduler.get_last_lr()[0]
        total += rate
        assert curve.between(step) == pytest.approx(rate, abs=1e-12)
        assert curve.sums([step])[0] == pytest.approx(total, rel=1e-9)


def test_data_and_base_are_those_of_the_header(tmp_path: Path) -> None:
    """Samples, batch size, base name and hashes."""
    extra = {"ss_sd_model_hash": "abcd1234", "ss_new_sd_model_hash": "f" * 64}
    run = only(kohya_run(tmp_path, steps=[10], **extra))
    assert (run.train_samples, run.batch_size) == (40, 2)
    assert (run.base.name, run.base.short_hash, run.base.sha256) == ("base.safetensors", "abcd1234", "f" * 64)


def test_an_output_name_that_ends_in_digits_is_no_epoch(tmp_path: Path) -> None:
    """`char-20240101.safetensors` is the final file of that run."""
    for step in (10, 20):
        kohya_file(tmp_path / f"char-20240101-step{step:08d}.safetensors", step, None)
    kohya_file(tmp_path / "char-20240101.safetensors", 30, kohya_metadata(30, 1, "char-20240101"))
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 30]


def test_a_damaged_final_file_belongs_to_its_run(tmp_path: Path) -> None:
    """Whatever the order in which names are read."""
    kohya_run(tmp_path, "a", steps=[10, 20, 30])
    (tmp_path / "a.safetensors").write_bytes(b"broken")
    assert [s.path.name for s in only(tmp_path).skipped] == ["a.safetensors"]


def test_hostile_metadata_is_only_text(tmp_path: Path) -> None:
    """Numbers that are none, absurd ones, and lists that are empty give nothing instead of an error."""
    extra = {"ss_steps": "1e400", "ss_unet_lr": "[]", "ss_learning_rate": "NaN", "ss_num_batches_per_epoch": "{}"}
    kohya_file(tmp_path / "a-step00000010.safetensors", 10, kohya_metadata(10, 1, "a", **extra))
    (checkpoint,) = only(tmp_path).checkpoints
    assert (checkpoint.step, checkpoint.learning_rate, checkpoint.epoch) == (10, None, None)
