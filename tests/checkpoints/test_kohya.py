"""kohya sd-scripts: names, metadata and their traps."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from factories import KOHYA_MODULES, kohya_file, kohya_metadata, kohya_run, lora_factors, tensorboard_log
from runs import only, rules, search

from lora_forensics.measure import measure_run


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


@pytest.mark.parametrize("suffix", [".pt", ".ckpt"])
def test_pickles_are_recognised_unopened_and_measured(suffix: str, tmp_path: Path) -> None:
    """--save_model_as: no metadata, steps by the name; the last file is a copy; a full model beside is no LoRA."""
    for step in (10, 20):
        torch.save(lora_factors(KOHYA_MODULES, step), tmp_path / f"a-step{step:08d}{suffix}")
    torch.save(lora_factors(KOHYA_MODULES, 20), tmp_path / f"a{suffix}")
    torch.save({"model.diffusion_model.weight": torch.ones(2)}, tmp_path / f"full-000001{suffix}")
    (run,), skipped = search(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20]
    assert rules(run) == ["duplicate"]
    assert [entry.path.name for entry in skipped] == [f"full-000001{suffix}"]
    assert measure_run(run).layers["delta_norm"].is_not_null().all()


def test_a_damaged_pickle_is_skipped(tmp_path: Path) -> None:
    """Truncated, named like the others."""
    for step in (10, 20, 30):
        torch.save(lora_factors(KOHYA_MODULES, step), tmp_path / f"a-step{step:08d}.pt")
    broken = tmp_path / "a-step00000020.pt"
    broken.write_bytes(broken.read_bytes()[:-200])
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 30]
    assert [entry.path for entry in run.skipped] == [broken]


def test_a_malicious_pickle_is_not_executed(tmp_path: Path) -> None:
    """Neither when it is found nor when it is measured."""

    class Evil:
        def __reduce__(self) -> tuple[object, tuple[str]]:
            return (Path.touch, (str(tmp_path / "lora_unet_pwned"),))  # type: ignore[return-value]

    for step in (10, 20):
        torch.save({"lora_unet_a.lora_up.weight": Evil()}, tmp_path / f"a-step{step:08d}.pt")
    measured = measure_run(only(tmp_path))
    assert measured.layers.is_empty()
    assert not (tmp_path / "lora_unet_pwned").exists()


def resumed(folder: Path, first: Sequence[int], second: Sequence[int], **extra: str) -> Path:
    """Two sessions of one stem, whose steps go on."""
    for session, steps in (("1", first), ("2", second)):
        for step in steps:
            path = folder / f"a-step{step:08d}.safetensors"
            kohya_file(path, step, kohya_metadata(step, (step - 1) // 20, "a", session, **extra))
    return folder


def test_a_resumed_training_is_one_run(tmp_path: Path) -> None:
    """Steps that go on under a new session, at the old interval."""
    run = only(resumed(tmp_path, range(10, 60, 10), range(60, 110, 10)))
    assert [c.step for c in run.checkpoints] == list(range(10, 110, 10))
    assert rules(run) == ["resumed"]


def test_a_resumed_training_that_saves_steps_and_epochs_is_one_run(tmp_path: Path) -> None:
    """Intervals of two sorts: 50 steps, and epochs of 37."""
    run = only(resumed(tmp_path, [37, 50, 74, 100], [111, 148, 150]))
    assert [c.step for c in run.checkpoints] == [37, 50, 74, 100, 111, 148, 150]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (range(60, 110, 10), range(10, 60, 10)),  # the rerun has overwritten the first half
        (range(10, 60, 10), range(500, 550, 10)),
        (range(10, 60, 10), range(65, 130, 65)),
    ],
)
def test_a_rerun_is_another_run(first: Sequence[int], second: Sequence[int], tmp_path: Path) -> None:
    """A session that starts at its first interval, or far away, did not go on from what is there."""
    runs, _ = search(resumed(tmp_path, first, second))
    assert sorted([c.step for c in run.checkpoints] for run in runs) == sorted([list(first), list(second)])


def test_another_network_is_another_run(tmp_path: Path) -> None:
    """Whatever its steps: a resumed training keeps rank, alpha and base."""
    resumed(tmp_path, range(10, 60, 10), ())
    resumed(tmp_path, (), range(60, 110, 10), ss_network_dim="16")
    assert len(search(tmp_path)[0]) == 2


def test_a_resumed_session_counts_from_its_epochs_start(tmp_path: Path) -> None:
    """TRAP: sd-scripts restarts its steps and goes on with epochs: earlier step files are overwritten."""
    for step in (10, 20, 30, 40, 50):
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, (step - 1) // 20, "a", "1"))
    for epoch in (1, 2):
        kohya_file(tmp_path / f"a-{epoch:06d}.safetensors", epoch * 20, kohya_metadata(epoch * 20, epoch, "a", "1"))
    # resumed from the state of epoch 2: its steps 10, 20, 30 are the 50th, 60th and 70th
    for step in (10, 20, 30):
        metadata = kohya_metadata(step, 2 + (step - 1) // 20, "a", "2")
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step + 40, metadata)
    kohya_file(tmp_path / "a-000003.safetensors", 60, kohya_metadata(20, 3, "a", "2"))
    run = only(tmp_path)
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(20, 1.0), (40, 2.0), (50, 2.5), (60, 3.0), (70, 3.5)]
    assert [c.name for c in run.checkpoints][:3] == [
        "a-000001.safetensors",
        "a-step00000040.safetensors",
        "a-step00000010.safetensors",
    ]
    assert {"resumed", "superseded"} <= set(rules(run))


LOG = {"lr/unet": {s: 1e-4 - s * 1e-6 for s in range(1, 61)}, "loss/average": {s: 1 / s for s in range(1, 61)}}


@pytest.mark.parametrize("place", ["out/logs", "logs", "log", "elsewhere"])
def test_logs_are_found_beside_and_below(place: str, tmp_path: Path) -> None:
    """Below the output folder, beside it, or where a settings file says; rates and losses of every step."""
    kohya_run(tmp_path / "out", "a", range(10, 70, 10), ss_lr_scheduler="polynomial")
    tensorboard_log(tmp_path / place / "20260101000000" / "network_train", LOG)
    if place == "elsewhere":
        (tmp_path / "out" / "a_20260101-000000.json").write_text(json.dumps({"logging_dir": str(tmp_path / place)}))
    run = only(tmp_path / "out")
    assert [c.learning_rate for c in run.checkpoints] == pytest.approx([1e-4 - c.step * 1e-6 for c in run.checkpoints])
    assert [c.train_loss for c in run.checkpoints] == pytest.approx([1 / c.step for c in run.checkpoints])


@pytest.mark.parametrize(
    ("tags", "rate"),
    [
        ({"lr/unet": 1.0, "lr/d*lr/unet": 2e-4, "lr/d*lr/textencoder": 5e-5}, 2e-4),
        ({"lr/unet": 1.0, "lr/d*lr": 2e-4}, 2e-4),
        ({"lr/textencoder": 1.0, "lr/group1": 1.0, "lr/d*lr/group1": 2e-4}, 2e-4),
        ({"lr/unet": 1.0}, None),
    ],
)
def test_adaptive_optimizers_have_d_times_the_rate(tags: dict[str, float], rate: float | None, tmp_path: Path) -> None:
    """TRAP: Prodigy, D-Adaptation: the rate that is asked for is 1; without d it is unknown."""
    kohya_run(tmp_path / "out", "a", (10, 20), ss_optimizer="prodigyopt.prodigy.Prodigy(weight_decay=0.01)")
    curves = {tag: dict.fromkeys(range(1, 21), value) for tag, value in tags.items()}
    tensorboard_log(tmp_path / "logs" / "20260101000000" / "network_train", curves)
    for checkpoint in only(tmp_path / "out").checkpoints:
        assert checkpoint.learning_rate == (rate if rate is None else pytest.approx(rate))


def test_validation_of_epochs_is_moved_to_their_last_steps(tmp_path: Path) -> None:
    """TRAP: losses of epochs are logged over epochs."""
    kohya_run(tmp_path, "a", range(10, 70, 10))
    curves = {"loss/validation/epoch_average": {1: 3.0, 2: 1.0, 3: 2.0}, "loss/epoch_average": {3: 9.0}, **LOG}
    tensorboard_log(tmp_path / "logs" / "20260101000000" / "network_train", curves)
    assert [c.held_out_loss for c in only(tmp_path).checkpoints] == [None, 3.0, None, 1.0, None, 2.0]


def test_each_session_has_its_own_log(tmp_path: Path) -> None:
    """By the time at which it was begun; one that fits none is nobody's, and two that fit are none."""
    for name, session in (("a", "1"), ("b", "2")):
        begun = 1_700_000_000 + 10_000 * int(session)
        times = {"ss_training_started_at": str(begun), "ss_training_finished_at": str(begun + 5000)}
        kohya_run(tmp_path, name, (10, 20), session, ss_lr_scheduler="polynomial", **times)
        log = {"lr/unet": {10: int(session) * 1e-4, 20: int(session) * 1e-4}}
        tensorboard_log(tmp_path / "logs" / f"2026010100000{session}" / "network_train", log, begun + 60)
    runs, _ = search(tmp_path)
    assert [run.checkpoints[0].learning_rate for run in runs] == pytest.approx([1e-4, 2e-4])
    tensorboard_log(tmp_path / "logs" / "20260101000009" / "network_train", {"lr/unet": {10: 9.0}}, 1_700_010_070)
    runs, _ = search(tmp_path)
    assert [run.checkpoints[0].learning_rate for run in runs] == [None, pytest.approx(2e-4)]
    assert "log-unreadable" in rules(runs[0])


def test_a_log_that_ends_before_the_files_do_is_another_trainings(tmp_path: Path) -> None:
    """The only log beside the only run, but not long enough."""
    kohya_run(tmp_path, "a", range(10, 130, 10), ss_lr_scheduler="polynomial")
    tensorboard_log(tmp_path / "logs" / "20260101000000" / "network_train", LOG)
    assert {c.learning_rate for c in only(tmp_path).checkpoints} == {None}


def test_16_bit_saves_are_read(tmp_path: Path) -> None:
    """TRAP: --save_precision; what it rounds away is said by the findings of the measures."""
    for step in (10, 20):
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step, None, dtype=torch.float16)
    assert measure_run(only(tmp_path)).checkpoints["dtype"].to_list() == ["F16", "F16"]


def test_a_resumed_session_whose_predecessor_is_gone_is_put_right(tmp_path: Path) -> None:
    """Its epochs tell that two had been trained before its first step."""
    for epoch in (3, 4, 5):
        step = (epoch - 2) * 20
        kohya_file(tmp_path / f"a-{epoch:06d}.safetensors", step, kohya_metadata(step, epoch, "a"))
    run = only(tmp_path)
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(60, 3.0), (80, 4.0), (100, 5.0)]
    assert run.steps_per_epoch == 20
    assert rules(run) == ["resumed"]


def test_a_resumed_session_on_two_processes(tmp_path: Path) -> None:
    """Epochs of half the batches are no sign of an earlier session."""
    for epoch in (1, 2):
        kohya_file(tmp_path / f"a-{epoch:06d}.safetensors", epoch * 10, kohya_metadata(epoch * 10, epoch, "a"))
    for step in (5, 15):
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, (step - 1) // 10, "a"))
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [5, 10, 15, 20]
    assert not run.findings


def test_states_are_told_by_their_run_or_by_what_is_in_them(tmp_path: Path) -> None:
    """TRAP: they hold the network as model.safetensors; a folder of the user's may end in -state too."""
    kohya_run(tmp_path, steps=[10, 20])
    kohya_run(tmp_path / "solid-state", "other", [10, 20])
    kohya_file(tmp_path / "name-000001-state" / "model.safetensors", 10, None)
    kohya_file(tmp_path / "alone" / "gone-step00000010-state" / "model.safetensors", 10, None)
    (tmp_path / "alone" / "gone-step00000010-state" / "train_state.json").write_text("{}")
    runs, skipped = search(tmp_path)
    assert [run.name for run in runs] == ["name", "solid-state/other"]
    assert sorted((entry.path.name, entry.reason) for entry in skipped) == [
        ("gone-step00000010-state", "training state"),
        ("name-000001-state", "training state"),
    ]


def test_a_line_break_in_the_output_name(tmp_path: Path) -> None:
    """Linux allows it; the files are one run."""
    assert len(only(kohya_run(tmp_path, "a\nb", [10, 20, 30])).checkpoints) == 3
