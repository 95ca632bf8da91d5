"""Language-model trainers whose saving code is in no package here: their exact layouts, by the commit that was read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from factories import library, mlx_run, peft_adapter, tensorboard_log, trainer_state

from lora_forensics.discovery import discover_runs
from lora_forensics.records import Run, Skipped


def search(path: Path) -> tuple[list[Run], list[Skipped]]:
    """Runs, and everything that is skipped."""
    found = list(discover_runs(path))
    runs = [entry for entry in found if isinstance(entry, Run)]
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    return runs, [*skipped, *(entry for run in runs for entry in run.skipped)]


def only(path: Path) -> Run:
    """The one run of a folder."""
    ((run,), _) = search(path)
    return run


def hf_run(folder: Path, steps: list[int], states: bool = True) -> Path:
    """The layout of the Hugging Face Trainer."""
    for step in steps:
        peft_adapter(folder / f"checkpoint-{step}", step)
        if states:
            trainer_state(folder / f"checkpoint-{step}", [s for s in steps if s <= step], lambda s: s / 100)
    return folder


def lines(path: Path, entries: list[dict[str, Any]]) -> None:
    """A log of one object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))


# LLaMA-Factory, ff6d4d1: src/llamafactory/train/callbacks.py


def factory_lines(steps: list[int], loss: float = 0.0) -> list[dict[str, Any]]:
    """What LogCallback appends."""
    return [
        {"current_steps": s, "total_steps": 30, "loss": loss + s, "lr": 1e-4, "epoch": s / 10, "percentage": s / 0.3}
        for s in steps
    ] + [{"current_steps": steps[-1], "total_steps": 30, "eval_loss": 0.5, "epoch": steps[-1] / 10}]


def test_llama_factory_is_told_by_its_log(tmp_path: Path) -> None:
    """The histories of the checkpoints count, where they are there."""
    lines(hf_run(tmp_path, [10, 20]) / "trainer_log.jsonl", factory_lines([10, 20]))
    run = only(tmp_path)
    assert run.trainer == "llama-factory"
    assert [c.held_out_loss for c in run.checkpoints] == [0.1, 0.2]


def test_the_log_of_llama_factory_tells_without_histories(tmp_path: Path) -> None:
    """TRAP: it is appended to by a rerun; what the last start logged counts."""
    log = hf_run(tmp_path, [10, 20], states=False) / "trainer_log.jsonl"
    lines(log, [*factory_lines([10, 20, 30], loss=100.0), *factory_lines([10, 20])])
    run = only(tmp_path)
    assert [c.train_loss for c in run.checkpoints] == [10, 20]
    assert [c.learning_rate for c in run.checkpoints] == [1e-4, 1e-4]
    assert [c.epoch for c in run.checkpoints] == [1, 2]
    assert run.checkpoints[1].held_out_loss == 0.5
    assert run.steps_per_epoch == 10


def test_a_log_of_llama_factory_that_goes_on_is_kept(tmp_path: Path) -> None:
    """A resumed training goes back to the step of its checkpoint, not to the start."""
    log = hf_run(tmp_path, [10, 20, 30], states=False) / "trainer_log.jsonl"
    lines(log, [*factory_lines([10, 20, 25], loss=100.0), *factory_lines([21, 30])])
    assert [c.train_loss for c in only(tmp_path).checkpoints] == [110, 120, 30]


@pytest.mark.parametrize(
    ("text", "rules"), [('{"current_steps": 10, "lo', []), ("\x00\n[1]\n{}\n", ["log-unreadable"])]
)
def test_a_damaged_log_of_llama_factory_is_said(text: str, rules: list[str], tmp_path: Path) -> None:
    """A torn last line is none: the training may be running."""
    log = hf_run(tmp_path, [10, 20], states=False) / "trainer_log.jsonl"
    log.write_text("".join(json.dumps(entry) + "\n" for entry in factory_lines([10])) + text)
    run = only(tmp_path)
    assert run.checkpoints[0].train_loss == 10
    assert [finding.rule for finding in run.findings] == rules


def test_copies_of_pissa_are_no_checkpoints(tmp_path: Path) -> None:
    """TRAP: LLaMA-Factory keeps the first adapter, a backup and a converted one beside the checkpoints."""
    lines(hf_run(tmp_path, [10, 20]) / "trainer_log.jsonl", factory_lines([10, 20]))
    for name in ("pissa_init", "pissa_backup", "pissa_converted"):
        peft_adapter(tmp_path / name, 1)
    runs, skipped = search(tmp_path)
    assert len(runs) == 1
    assert len([entry for entry in skipped if "PiSSA" in entry.reason and entry.expected]) == 3


# ms-swift, 3602360: swift/trainers/patcher.py, swift/pipelines/train/sft.py, swift/megatron/callbacks/print.py


def swift_lines(steps: list[int], key: str = "global_step/max_steps") -> list[dict[str, Any]]:
    """What ms-swift appends to logging.jsonl, rounded."""
    return [
        {
            "loss": float(s),
            "learning_rate": round(1.23456789e-7, 8),
            "epoch": s / 10,
            key: f"{s}/30",
            "elapsed_time": "1s",
        }
        for s in steps
    ] + [{"eval_loss": 0.25, key: f"{steps[-1]}/30", "epoch": steps[-1] / 10}]


def test_every_start_of_swift_is_a_run(tmp_path: Path) -> None:
    """TRAP: v0-<time>, v1-<time>; the name in args.json counts where the path of the base is not here."""
    for version, steps in (("v0-20240101-120000", [10, 20]), ("v1-20240102-080000", [10, 20, 30])):
        run = hf_run(tmp_path / version, steps, states=False)
        arguments = {"model": "Qwen/Qwen2.5-0.5B", "per_device_train_batch_size": 2, "gradient_accumulation_steps": 8}
        (run / "args.json").write_text(json.dumps(arguments))
        lines(run / "logging.jsonl", swift_lines(steps))
        for config in run.glob("*/adapter_config.json"):
            config.write_text('{"base_model_name_or_path": "/root/.cache/modelscope/Qwen"}')
    runs, skipped = search(tmp_path)
    assert [run.name for run in runs] == ["v0-20240101-120000", "v1-20240102-080000"]
    assert {run.trainer for run in runs} == {"ms-swift"}
    assert [c.train_loss for c in runs[1].checkpoints] == [10, 20, 30]
    assert runs[1].checkpoints[2].held_out_loss == 0.25
    assert (runs[0].base.name, runs[0].batch_size, runs[0].steps_per_epoch) == ("Qwen/Qwen2.5-0.5B", 2, 10)
    assert not skipped


def test_rounded_rates_of_swift_give_way_to_its_last_line(tmp_path: Path) -> None:
    """TRAP: eight decimals make 1.2e-7 of 1.23456789e-7; the summary at the end has the whole history."""
    log = hf_run(tmp_path, [10, 20], states=False) / "logging.jsonl"
    lines(log, swift_lines([10, 20]))
    assert only(tmp_path).checkpoints[0].learning_rate == 1.2e-7
    whole = [{"step": s, "loss": float(s), "learning_rate": 1.23456789e-7, "epoch": s / 10} for s in (10, 20)]
    lines(log, [*swift_lines([10, 20]), {"global_step": 20, "best_metric": None, "log_history": whole}])
    assert only(tmp_path).checkpoints[0].learning_rate == 1.23456789e-7


def test_links_and_merged_models_of_swift_are_no_runs(tmp_path: Path) -> None:
    """TRAP: `last` and `best` point to checkpoints, -merged is a whole model."""
    torch = library("torch")
    from safetensors.torch import save_file

    run = hf_run(tmp_path, [10, 20])
    (run / "args.json").write_text('{"swift_version": "4.0.0"}')
    (run / "best").symlink_to(run / "checkpoint-10", target_is_directory=True)
    (run / "checkpoint-20-merged").mkdir()
    save_file(
        {"model.layers.0.self_attn.q_proj.weight": torch.ones(2, 2)}, run / "checkpoint-20-merged" / "model.safetensors"
    )
    runs, skipped = search(tmp_path)
    assert [(run.trainer, [c.step for c in run.checkpoints]) for run in runs] == [("ms-swift", [10, 20])]
    assert [entry.expected for entry in skipped] == [True]


@pytest.mark.parametrize(
    ("text", "trainer"), [('{"template": "qwen"}', "ms-swift"), ('{"lr": 1}', "peft"), ("[", "peft")]
)
def test_arguments_of_others_are_not_swifts(text: str, trainer: str, tmp_path: Path) -> None:
    """Many a script writes an args.json."""
    (hf_run(tmp_path, [10, 20]) / "args.json").write_text(text)
    assert only(tmp_path).trainer == trainer
    (tmp_path / "args.json").rename(tmp_path / "checkpoint-10" / "args.json")
    assert only(tmp_path).trainer == trainer


def test_swift_on_megatron_counts_iterations(tmp_path: Path) -> None:
    """TRAP: no trainer_state.json, the counter is called iteration, distributed state lies in iter_0000010/."""
    run = hf_run(tmp_path, [10, 20], states=False)
    lines(run / "logging.jsonl", swift_lines([10, 20], key="iteration"))
    for step in (10, 20):
        (run / f"checkpoint-{step}" / f"iter_{step:07d}").mkdir()
        (run / f"checkpoint-{step}" / "args.json").write_text("{}")
    assert [c.train_loss for c in only(tmp_path).checkpoints] == [10, 20]


# torchtune, bd2a0fc: training/checkpointing/_checkpointer.py, training/metric_logging.py


def tune_run(folder: Path, epochs: int, configured: int | None = None, log: str = "txt", steps: int = 5) -> Path:
    """epoch_<N> folders, the pickle in torchtune's own names, the configuration and the log of DiskLogger."""
    torch = library("torch")
    for epoch in range(epochs):
        save = peft_adapter(folder / f"epoch_{epoch}", epoch)
        torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 8)}, save / "adapter_model.pt")
    settings = (
        f"epochs: {configured or epochs}\nbatch_size: 4\ngradient_accumulation_steps: 8\noptimizer: {{lr: 3e-4}}\n"
    )
    (folder / "torchtune_config.yaml").write_text(settings)
    logged = [{"step": s, "loss": float(s), "lr": 3e-4, "grad_norm": 1.0} for s in range(1, epochs * steps + 1)]
    if log == "jsonl":
        lines(folder / "logs" / "log_1700000000.jsonl", logged)
    elif log:
        (folder / "logs").mkdir()
        text = "".join(f"Step {e['step']} | loss:{e['loss']} lr:{e['lr']} grad_norm:1.0 \n" for e in logged)
        (folder / "logs" / "log_1700000000.txt").write_text(text)
    return folder


@pytest.mark.parametrize("log", ["txt", "jsonl"])
def test_epochs_of_torchtune_count_from_zero(log: str, tmp_path: Path) -> None:
    """TRAP: epoch_0 is the end of the first; the log tells how many steps that is."""
    run = only(tune_run(tmp_path, 3, log=log))
    assert run.trainer == "torchtune"
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(5, 1), (10, 2), (15, 3)]
    assert [c.train_loss for c in run.checkpoints] == [5, 10, 15]
    assert [c.learning_rate for c in run.checkpoints] == [3e-4] * 3
    assert (run.steps_per_epoch, run.batch_size, run.base.name) == (5, 4, "org/model")


@pytest.mark.parametrize("log", ["", "txt"])
def test_without_a_whole_log_torchtune_counts_epochs(log: str, tmp_path: Path) -> None:
    """TRAP: where the training still runs, or keeps no log, an epoch's steps are unknown."""
    run = only(tune_run(tmp_path, 3, configured=5, log=log))
    assert [(c.step, c.epoch) for c in run.checkpoints] == [(1, 1), (2, 2), (3, 3)]
    assert run.step_unit == "epoch"
    assert [finding.rule for finding in run.findings] == ["epochs-only"]
    assert run.checkpoints[0].learning_rate is None


def test_names_of_torchtune_alone_are_a_checkpoint(tmp_path: Path) -> None:
    """TRAP: Phi, Llama 3.2 Vision and Llama 4 have adapter_model.pt only; beside the other it is a repetition."""
    assert [c.path.name for c in only(tune_run(tmp_path, 2)).checkpoints] == ["adapter_model.safetensors"] * 2
    for path in tmp_path.rglob("adapter_model.safetensors"):
        path.unlink()
    assert [c.path.name for c in only(tmp_path).checkpoints] == ["adapter_model.pt"] * 2


def test_old_names_of_torchtune(tmp_path: Path) -> None:
    """adapter_<N>.pt beside merged models."""
    torch = library("torch")
    for epoch in range(2):
        torch.save({"layers.0.attn.q_proj.lora_a.weight": torch.ones(2, 8)}, tmp_path / f"adapter_{epoch}.pt")
    run = only(tmp_path)
    assert [(c.name, c.step) for c in run.checkpoints] == [("adapter_0.pt", 1), ("adapter_1.pt", 2)]


def test_steps_of_torchtune_are_steps(tmp_path: Path) -> None:
    """step_<N> folders of recipes that save within epochs."""
    for step in (10, 20, 100):
        peft_adapter(tmp_path / f"step_{step}", step)
    (tmp_path / "torchtune_config.yaml").write_text("epochs: 3\n")
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 100]
    assert (run.step_unit, run.steps_per_epoch) == ("step", None)


def test_folders_beyond_the_epochs_of_torchtune_are_another_run(tmp_path: Path) -> None:
    """TRAP: a shorter training overwrote the first of a longer one."""
    runs, _ = search(tune_run(tmp_path, 5, configured=3, log=""))
    assert [[c.epoch for c in run.checkpoints] for run in runs] == [[1, 2, 3], [4, 5]]
    assert runs[1].batch_size is None


def test_a_resumed_torchtune_goes_on_in_another_log(tmp_path: Path) -> None:
    """TRAP: every start begins a file; the later goes on where it was resumed."""
    tune_run(tmp_path, 4, log="")
    for start, first, last in ((1, 1, 12), (2, 11, 20)):
        lines(
            tmp_path / "logs" / f"log_{start}.jsonl",
            [{"step": s, "loss": start, "lr": 1e-4} for s in range(first, last + 1)],
        )
    run = only(tmp_path)
    assert [(c.step, c.train_loss) for c in run.checkpoints] == [(5, 1), (10, 1), (15, 2), (20, 2)]


@pytest.mark.parametrize("text", ["{", "- 1", "epochs: [", "epochs: !!python/object:os.system {}"])
def test_a_damaged_configuration_of_torchtune_costs_only_itself(text: str, tmp_path: Path) -> None:
    """Never a traceback."""
    tune_run(tmp_path, 2)
    (tmp_path / "torchtune_config.yaml").write_text(text)
    assert only(tmp_path).step_unit == "epoch"


# NeMo 2, 8cfedd7: lightning/io/hf.py, callbacks/model_checkpoint.py; Automodel, 36044ad: recipes/base_recipe.py


def test_nemo_keeps_adapters_in_hugging_face_form(tmp_path: Path) -> None:
    """TRAP: the -last copy repeats a step, and a marker beside a checkpoint says that it was not finished."""
    for step in (10, 20, 30):
        name = f"default--val_loss={2 - step / 100:.2f}-step={step}-consumed_samples={step * 8}.0"
        peft_adapter(tmp_path / name / "hf_adapter", step)
    peft_adapter(tmp_path / "default--val_loss=1.80-step=20-consumed_samples=160.0-last" / "hf_adapter", 20)
    (tmp_path / "default--val_loss=1.70-step=30-consumed_samples=240.0-unfinished").touch()
    runs, skipped = search(tmp_path)
    assert [(run.trainer, [c.step for c in run.checkpoints]) for run in runs] == [("nemo", [10, 20])]
    assert runs[0].findings[0].rule == "duplicate"
    assert "not finished" in skipped[0].reason


def test_distributed_checkpoints_of_nemo_are_told(tmp_path: Path) -> None:
    """TRAP: Megatron's format is not read, and said to be there."""
    weights = tmp_path / "m--val_loss=1.00-step=10-consumed_samples=80" / "weights"
    weights.mkdir(parents=True)
    (weights / "adapter_metadata.json").write_text("{}")
    (weights / "__0_0.distcp").touch()
    runs, skipped = search(tmp_path)
    assert not runs
    assert "Megatron" in skipped[0].reason


def test_the_loss_in_a_name_of_nemo_is_not_held_out(tmp_path: Path) -> None:
    """TRAP: rounded to two decimals, and perhaps of an earlier evaluation."""
    for step in (10, 20):
        peft_adapter(tmp_path / f"m--reduced_train_loss=0.0112-epoch=2-step={step}" / "hf_adapter", step)
    assert {c.held_out_loss for c in only(tmp_path).checkpoints} == {None}


def test_steps_of_automodel_count_from_zero(tmp_path: Path) -> None:
    """TRAP: step_9 is saved after ten; LATEST is a link."""
    for epoch, step in ((0, 9), (1, 19)):
        save = tmp_path / f"epoch_{epoch}_step_{step}"
        peft_adapter(save / "model", step)
        (save / "losses.json").write_text(json.dumps({"train_loss": 1.0 + step, "val_loss": 0.5 + step}))
    (tmp_path / "LATEST").symlink_to(tmp_path / "epoch_1_step_19", target_is_directory=True)
    lines(tmp_path / "training.jsonl", [{"step": s, "epoch": s // 10, "loss": float(s), "lr": 1e-4} for s in range(20)])
    run = only(tmp_path)
    assert (run.trainer, run.steps_per_epoch) == ("nemo-automodel", 10)
    assert [(c.step, c.epoch, c.held_out_loss) for c in run.checkpoints] == [(10, 1, 9.5), (20, 2, 19.5)]
    assert [c.learning_rate for c in run.checkpoints] == [1e-4, 1e-4]


# mlx-lm, d78bf58: tuner/trainer.py, lora.py, tuner/utils.py; mlx, 846d176: optimizers/schedulers.py


def test_the_unnumbered_file_of_mlx_counts_once(tmp_path: Path) -> None:
    """TRAP: adapters.safetensors is a copy of the last numbered file."""
    run = only(mlx_run(tmp_path, [100, 200, 300]))
    assert run.trainer == "mlx-lm"
    assert [c.step for c in run.checkpoints] == [100, 200, 300]
    assert [finding.rule for finding in run.findings] == ["duplicate"]
    assert (run.base.name, run.batch_size, run.steps_per_epoch) == ("mlx-community/tiny", 4, None)
    assert {c.learning_rate for c in run.checkpoints} == {1e-5}
    assert run.checkpoints[-1].dose == pytest.approx(3e-3)
    assert {(c.train_loss, c.held_out_loss) for c in run.checkpoints} == {(None, None)}


def test_the_last_iterations_of_mlx_have_no_number(tmp_path: Path) -> None:
    """The end of 250 iterations is in adapters.safetensors only."""
    mlx_run(tmp_path, [100, 200, 250], save_every=100)
    (tmp_path / "0000250_adapters.safetensors").unlink()
    assert [(c.step, c.name) for c in only(tmp_path).checkpoints][-1] == (250, "adapters.safetensors")


def test_numbers_of_mlx_count_batches(tmp_path: Path) -> None:
    """TRAP: with gradient accumulation several iterations are one optimizer step."""
    run = only(mlx_run(tmp_path, [100, 200, 300], grad_accumulation_steps=8))
    assert [c.step for c in run.checkpoints] == [12, 25, 37]


def test_files_that_do_not_fit_the_arguments_of_mlx_are_another_run(tmp_path: Path) -> None:
    """TRAP: a longer training, or one that saved more often, was here before."""
    mlx_run(tmp_path, [100, 150, 200, 300], iters=200, save_every=100)
    shutil.copy(tmp_path / "0000200_adapters.safetensors", tmp_path / "adapters.safetensors")
    runs, _ = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[100, 200], [150, 300]]
    assert (runs[1].base.name, runs[1].checkpoints[0].learning_rate, runs[1].checkpoints[0].config) == (
        None,
        None,
        None,
    )


def test_a_resumed_mlx_is_said(tmp_path: Path) -> None:
    """TRAP: its numbers restart from 1."""
    run = only(mlx_run(tmp_path, [100, 200], resume_adapter_file="adapters/0000200_adapters.safetensors"))
    assert "resumed" in {finding.rule for finding in run.findings}


@pytest.mark.parametrize(
    ("planned", "expected"),
    [
        ({"name": "cosine_decay", "arguments": [1e-1, 200]}, {1: 1e-1, 101: 5e-2, 201: 0.0}),
        ({"name": "linear_schedule", "arguments": [0.0, 1e-1, 100]}, {1: 0.0, 51: 5e-2, 201: 1e-1}),
        ({"name": "exponential_decay", "arguments": [1e-1, 0.9]}, {1: 1e-1, 6: 0.1 * 0.9**5}),
        ({"name": "step_decay", "arguments": [1e-1, 0.9, 10]}, {10: 1e-1, 21: 0.081}),
        ({"name": "cosine_decay", "arguments": [1e-1, 200], "warmup": 10}, {1: 0.0, 6: 5e-2, 12: 1e-1, 112: 5e-2}),
        ({"name": "unheard_of", "arguments": [1.0]}, {1: None}),
        ({"name": "cosine_decay", "arguments": "x"}, {1: None}),
        ({"name": "cosine_decay", "arguments": [1.0, 0]}, {1: None}),
        ("cosine", {1: None}),
    ],
)
def test_schedules_are_those_of_mlx(planned: object, expected: dict[int, float | None], tmp_path: Path) -> None:
    """Values of its documentation's examples, and of the formulas; the n-th step has the value at n - 1."""
    for step in expected:
        run = only(mlx_run(tmp_path / str(step), [step, 300], iters=300, save_every=1, lr_schedule=planned))
        assert run.checkpoints[0].learning_rate == pytest.approx(expected[step], abs=1e-9), step


def test_no_rate_where_mlx_sets_its_own(tmp_path: Path) -> None:
    """Adafactor."""
    run = only(mlx_run(tmp_path, [100, 200], optimizer="adafactor"))
    assert {c.learning_rate for c in run.checkpoints} == {None}


@pytest.mark.parametrize(
    "text", ["", "[]", '{"iters": "x", "save_every": -1, "model": 3, "grad_accumulation_steps": 0}']
)
def test_damaged_arguments_of_mlx_cost_only_themselves(text: str, tmp_path: Path) -> None:
    """Never a traceback."""
    mlx_run(tmp_path, [100, 200])
    (tmp_path / "adapter_config.json").write_text(text)
    assert [c.step for c in only(tmp_path).checkpoints] == [100, 200]


def test_a_cut_file_of_mlx_is_skipped(tmp_path: Path) -> None:
    """The rest is a run."""
    path = mlx_run(tmp_path, [100, 200, 300]) / "0000200_adapters.safetensors"
    os.truncate(path, 200)
    runs, skipped = search(tmp_path)
    assert [c.step for c in runs[0].checkpoints] == [100, 300]
    assert [entry.path.name for entry in skipped] == [path.name]


# all together


def test_a_tree_of_all_is_told_apart(tmp_path: Path) -> None:
    """Every run once, each of its own trainer, also where two lie in one folder."""
    hf_run(tmp_path / "peft", [10, 20])
    lines(hf_run(tmp_path / "factory", [10, 20]) / "trainer_log.jsonl", factory_lines([10, 20]))
    lines(hf_run(tmp_path / "swift" / "v0-20240101-120000", [10, 20]) / "logging.jsonl", swift_lines([10, 20]))
    tune_run(tmp_path / "tune", 2)
    peft_adapter(tmp_path / "nemo" / "checkpoints" / "m--val_loss=1.00-step=10" / "hf_adapter", 1)
    peft_adapter(tmp_path / "automodel" / "epoch_0_step_9" / "model", 1)
    mlx_run(tmp_path / "mlx", [100, 200])
    mlx_run(tmp_path / "mixed", [100, 200])
    hf_run(tmp_path / "mixed", [10, 20])
    runs, skipped = search(tmp_path)
    found = {(run.path.relative_to(tmp_path).parts[0], run.trainer) for run in runs}
    assert found == {
        ("peft", "peft"), ("factory", "llama-factory"), ("swift", "ms-swift"), ("tune", "torchtune"), ("nemo", "nemo"),
        ("automodel", "nemo-automodel"), ("mlx", "mlx-lm"), ("mixed", "mlx-lm"), ("mixed", "peft"),
    }  # fmt: skip
    assert len(runs) == len(found)
    assert not [entry for entry in skipped if not entry.expected]


def test_an_unknown_log_does_not_stop_tensorboard(tmp_path: Path) -> None:
    """An empty trainer_log.jsonl tells nothing."""
    (hf_run(tmp_path, [10, 20], states=False) / "trainer_log.jsonl").touch()
    tensorboard_log(tmp_path / "runs" / "a", {"train/loss": {10: 1.0}})
    assert only(tmp_path).checkpoints[0].train_loss == 1.0
