"""Folders that the Hugging Face Trainer and TRL themselves wrote."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

import pytest
from factories import library, peft_adapter, tensorboard_log, tiny_llama, tiny_tokenizer, touch_later, trained_run
from safetensors.torch import load_file, save_file

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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs of 20 samples in batches of 2, three batches a step, evaluated at every save, saved at the end."""
    output = tmp_path_factory.mktemp("trained") / "out"
    trainer = trained_run(output, gradient_accumulation_steps=3, eval_strategy="steps", eval_steps=2)
    trainer.save_model()
    trainer.save_state()
    return output


@pytest.fixture
def copied(trained: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(trained, tmp_path / "out"))


def test_what_the_trainer_wrote_is_one_run(trained: Path) -> None:
    """Steps, epochs, rates, losses of both sorts; the final save repeats the last checkpoint."""
    run = only(trained)
    log = json.loads((trained / "trainer_state.json").read_text())["log_history"]
    assert run.trainer == "peft"
    assert [c.step for c in run.checkpoints] == [2, 4, 6, 8]
    for checkpoint in run.checkpoints:
        logged = {key: value for entry in log if entry["step"] == checkpoint.step for key, value in entry.items()}
        assert checkpoint.train_loss == logged["loss"]
        assert checkpoint.held_out_loss == logged["eval_loss"]
        assert checkpoint.learning_rate == logged["learning_rate"]
        assert checkpoint.epoch == logged["epoch"]
    assert [finding.rule for finding in run.findings] == ["duplicate"]


def test_steps_are_optimizer_steps(trained: Path) -> None:
    """TRAP: ten batches with three for a step are four steps an epoch, the last of one batch; all logs agree."""
    run = only(trained)
    assert run.steps_per_epoch == 4
    assert run.checkpoints[-1].epoch == 2
    assert run.batch_size == 2


def test_without_a_history_tensorboard_tells(copied: Path) -> None:
    """runs/<time>_<host>/ holds the same scalars under train/ and eval/."""
    for state in copied.rglob("trainer_state.json"):
        state.unlink()
    scalars = {
        "train/loss": {2: 2.0, 4: 1.5}, "train/learning_rate": {2: 1e-4, 4: 5e-5}, "train/epoch": {2: 0.5, 4: 1.0},
        "eval/loss": {2: 3.0, 4: 2.5}, "eval/runtime": {2: 1.0},
    }  # fmt: skip
    tensorboard_log(copied / "runs" / "Jan01_host", scalars)
    run = only(copied)
    assert [c.train_loss for c in run.checkpoints[:2]] == [2.0, 1.5]
    assert [c.held_out_loss for c in run.checkpoints[:2]] == [3.0, 2.5]
    assert [c.epoch for c in run.checkpoints[:2]] == [0.5, 1.0]
    assert run.checkpoints[1].learning_rate == pytest.approx(5e-5)


def test_a_resumed_training_is_one_run(copied: Path) -> None:
    """The history goes on: what was saved before and after is one series."""
    shutil.rmtree(copied / "checkpoint-8")
    shutil.rmtree(copied / "checkpoint-6")
    for file in copied.glob("*.*"):
        file.unlink()
    trained_run(copied, resume=True, gradient_accumulation_steps=3, num_train_epochs=3)
    run = only(copied)
    assert [c.step for c in run.checkpoints] == [2, 4, 6, 8, 10, 12]
    assert not run.findings
    assert run.checkpoints[0].held_out_loss is not None


def test_a_rerun_into_the_same_folder_is_two_runs(copied: Path) -> None:
    """TRAP: a shorter training overwrites the first checkpoints and leaves the others; histories contradict."""
    for file in copied.glob("*.*"):
        file.unlink()
    for state in copied.rglob("adapter_model.safetensors"):
        touch_later(state, -1000)
    trained_run(copied, gradient_accumulation_steps=3, max_steps=4, learning_rate=1e-3, seed=5)
    runs, _ = search(copied)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[2, 4], [6, 8]]
    assert [run.name for run in runs] == ["out", "out-2"]
    assert all(run.findings[-1].rule == "several-trainings" for run in runs)
    assert {c.held_out_loss for c in runs[0].checkpoints} == {None}
    assert runs[1].checkpoints[0].held_out_loss is not None


def test_of_two_trainings_what_has_no_history_belongs_to_neither(copied: Path) -> None:
    """Nothing is guessed."""
    state = json.loads((copied / "checkpoint-2" / "trainer_state.json").read_text())
    for entry in state["log_history"]:
        entry.update({key: 99.0 for key in ("loss", "eval_loss", "grad_norm") if key in entry})
    (copied / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state))
    (copied / "checkpoint-4" / "trainer_state.json").unlink()
    runs, skipped = search(copied)
    assert sorted([c.step for c in run.checkpoints] for run in runs) == [[2], [6, 8]]
    assert [(entry.path.name, "unknown of which" in entry.reason) for entry in skipped] == [("checkpoint-4", True)]


def test_adapters_in_sub_folders_are_runs_of_their_own(tmp_path: Path) -> None:
    """TRAP: PEFT saves an adapter that is not `default` into a folder named after it."""
    trainer = trained_run(tmp_path / "out", adapters=("default", "ref"), max_steps=4)
    trainer.save_model()
    runs, skipped = search(tmp_path / "out")
    assert [run.name for run in runs] == ["out", "ref"]
    assert [[c.step for c in run.checkpoints] for run in runs] == [[2, 4]] * 2
    assert runs[1].checkpoints[0].name == "checkpoint-2/ref/adapter_model.safetensors"
    assert {c.train_loss for c in runs[0].checkpoints} == {c.train_loss for c in runs[1].checkpoints}
    assert not skipped


def test_named_adapters_without_a_default_one(tmp_path: Path) -> None:
    """Nothing lies in the checkpoint's own folder."""
    trained_run(tmp_path / "out", adapters=("policy", "reference"), max_steps=2)
    assert [run.name for run in search(tmp_path / "out")[0]] == ["policy", "reference"]


def test_the_best_model_at_the_end_is_found_by_content(tmp_path: Path) -> None:
    """TRAP: load_best_model_at_end writes an earlier checkpoint into the run's folder."""
    trainer = trained_run(
        tmp_path / "out",
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        learning_rate=10.0,
        max_steps=8,
    )
    trainer.save_model()
    trainer.save_state()
    run = only(tmp_path / "out")
    best = trainer.state.best_global_step
    assert best < 8
    assert [c.step for c in run.checkpoints] == [2, 4, 6, 8]
    assert f"checkpoint-{best}/" in run.findings[0].message


def test_unfinished_saves_are_told(copied: Path) -> None:
    """TRAP: weights are missing or cut off, the folder of transformers 4.36 is left, shards were not gathered."""
    (copied / "checkpoint-2" / "adapter_model.safetensors").unlink()
    weights = copied / "checkpoint-4" / "adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    peft_adapter(copied / "tmp-checkpoint-10", 1)
    (copied / "checkpoint-12").mkdir()
    (copied / "checkpoint-14" / "global_step14").mkdir(parents=True)
    (copied / "checkpoint-16" / "pytorch_model_fsdp_0").mkdir(parents=True)
    runs, skipped = search(copied)
    assert [c.step for c in runs[0].checkpoints] == [6, 8]
    reasons = {entry.path.relative_to(copied).parts[0]: entry.reason for entry in skipped}
    assert "not finished" in reasons["checkpoint-2"]
    assert "truncated" in reasons["checkpoint-4"]
    assert "interrupted" in reasons["tmp-checkpoint-10"]
    assert "no adapter_model.safetensors" in reasons["checkpoint-12"]
    assert "DeepSpeed" in reasons["checkpoint-14"]
    assert "FSDP" in reasons["checkpoint-16"]


def test_empty_tensors_of_zero3_are_told(copied: Path) -> None:
    """TRAP: saved without gathering, every tensor is of no size."""
    path = copied / "checkpoint-4" / "adapter_model.safetensors"
    save_file({name: tensor[:0] for name, tensor in load_file(path).items()}, path)
    runs, skipped = search(copied)
    assert [c.step for c in runs[0].checkpoints] == [2, 6, 8]
    assert "ZeRO-3" in skipped[0].reason


def test_a_configuration_without_weights_beside_checkpoints_is_no_save(copied: Path) -> None:
    """TRAP of axolotl: it writes adapter_config.json into the run's folder when training starts."""
    (copied / "adapter_model.safetensors").unlink()
    _, skipped = search(copied)
    assert not skipped


def test_a_damaged_history_is_said(copied: Path) -> None:
    """The one before is read."""
    (copied / "trainer_state.json").unlink()
    (copied / "checkpoint-8" / "trainer_state.json").write_text("{")
    run = only(copied)
    assert run.checkpoints[0].held_out_loss is not None
    assert [finding.rule for finding in run.findings] == ["duplicate", "log-unreadable"]


def test_pickles_are_listed_unopened(copied: Path) -> None:
    """adapter_model.bin of older versions; measuring opens it with weights_only."""
    torch = library("torch")
    for path in copied.rglob("adapter_model.safetensors"):
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    run = only(copied)
    assert [c.path.name for c in run.checkpoints] == ["adapter_model.bin"] * 4


def test_trl_writes_the_same(tmp_path: Path) -> None:
    """SFTTrainer and DPOTrainer themselves; the copy that DPO compares with is a run that stands still."""
    trl, datasets, peft = library("trl"), library("datasets"), library("peft")
    common = {
        "max_steps": 4, "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "report_to": "none",
        "use_cpu": True, "bf16": False, "disable_tqdm": True,
    }  # fmt: skip
    texts = datasets.Dataset.from_dict({"text": ["w1 w2 w3 w4"] * 8})
    pairs = datasets.Dataset.from_dict({"prompt": ["w1"] * 8, "chosen": ["w2 w3"] * 8, "rejected": ["w4 w5"] * 8})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trl.SFTTrainer(
            tiny_llama(),
            trl.SFTConfig(str(tmp_path / "sft"), **common),
            train_dataset=texts,
            processing_class=tiny_tokenizer(),
            peft_config=peft.LoraConfig(r=2, target_modules=["q_proj"]),
        ).train()
        model = peft.PeftModel.from_pretrained(tiny_llama(), tmp_path / "sft" / "checkpoint-4", is_trainable=True)
        trl.DPOTrainer(
            model,
            args=trl.DPOConfig(str(tmp_path / "dpo"), **common),
            train_dataset=pairs,
            processing_class=tiny_tokenizer(),
        ).train()
    runs, skipped = search(tmp_path)
    assert [run.name for run in runs] == ["dpo", "dpo/ref", "sft"]
    assert all([c.step for c in run.checkpoints] == [2, 4] for run in runs)
    assert all(c.train_loss is not None and c.learning_rate is not None for run in runs for c in run.checkpoints)
    assert not skipped
