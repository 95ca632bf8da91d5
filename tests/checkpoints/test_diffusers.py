"""Traps of diffusers' example scripts; the files are written by diffusers' own code."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from factories import library, peft_adapter, touch_later
from image_layouts import BASE, RATES, STEPS, diffusers, peft_keys, write
from runs import only, rules, search
from safetensors import safe_open

from lora_forensics.measure import measure_run


def test_both_key_styles_in_one_run(tmp_path: Path) -> None:
    """TRAP: the final file of text_to_image spells lora.down where the checkpoints have lora_A. It counts once."""
    save = library("diffusers").StableDiffusionPipeline.save_lora_weights
    convert = library("diffusers.utils").convert_state_dict_to_diffusers
    names = {"blocks.0.self_attn.q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"}
    names |= {"blocks.0.ffn.0": "mid_block.attentions.0.transformer_blocks.0.attn1.to_k"}
    names |= {"blocks.1.self_attn.q": "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"}
    for step in (10, 20):
        state = {
            new + key[len(old) :]: t
            for key, t in peft_keys(step, "").items()
            for old, new in names.items()
            if key.startswith(old + ".")
        }
        save(tmp_path / f"checkpoint-{step}", unet_lora_layers=state)
    save(tmp_path, unet_lora_layers=convert(state))
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        assert all(".lora.down." in key or ".lora.up." in key for key in file.keys())  # noqa: SIM118 - it is no dict
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20]
    assert not run.unplaced
    assert "duplicate" in rules(run)


def test_both_key_styles_are_one_series(tmp_path: Path) -> None:
    """TRAP: where the final is no copy, its modules are those of the checkpoints all the same."""
    diffusers(tmp_path, (10, 20, 30))
    shutil.rmtree(tmp_path / "checkpoint-30")
    renamed = {
        key.replace("lora_A", "lora.down").replace("lora_B", "lora.up"): value
        for key, value in peft_keys(30, "transformer.").items()
    }
    write(renamed, tmp_path / "pytorch_lora_weights.safetensors")
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 30]
    layers = measure_run(run).layers
    assert layers.group_by("module").len()["len"].to_list() == [3, 3, 3]


def test_scales_stand_in_the_header(tmp_path: Path) -> None:
    """TRAP: lora_adapter_metadata as save_lora_weights writes it; no tensor holds alpha."""
    diffusers(tmp_path, (10, 20))
    path = tmp_path / "checkpoint-10" / "pytorch_lora_weights.safetensors"
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["lora_adapter_metadata"])["transformer.lora_alpha"] == 2
        state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - it is no dict
    write(state, path, {"lora_adapter_metadata": json.dumps({"transformer.r": 2, "transformer.lora_alpha": 8})})
    layers = measure_run(only(tmp_path)).layers
    assert set(layers["scale"]) == {4.0, 1.0}


def test_rates_losses_and_arguments_come_from_accelerates_tracker(tmp_path: Path) -> None:
    """TRAP: nothing of them is in the files."""
    run = only(diffusers(tmp_path, gradient_accumulation_steps=4, train_batch_size=3, revision="abc"))
    assert (run.batch_size, run.base.name, run.base.revision) == (12, BASE, "abc")
    assert [c.learning_rate for c in run.checkpoints] == pytest.approx([RATES[step] for step in STEPS])


def test_a_final_that_is_no_copy_has_the_planned_last_step(tmp_path: Path) -> None:
    """TRAP: it is saved when the training has ended, mostly between two intervals."""
    diffusers(tmp_path, (10, 20, 25))
    shutil.rmtree(tmp_path / "checkpoint-25")
    write(peft_keys(60, "transformer."), tmp_path / "pytorch_lora_weights.safetensors")
    assert [c.step for c in only(tmp_path).checkpoints] == [10, 20, 25]


def test_without_logs_the_final_has_no_step_and_the_base_is_that_of_the_model_card(tmp_path: Path) -> None:
    """Listed, not guessed."""
    for step in (10, 20):
        write(peft_keys(step), tmp_path / f"checkpoint-{step}" / "pytorch_lora_weights.safetensors")
    write(peft_keys(60), tmp_path / "pytorch_lora_weights.safetensors")
    (tmp_path / "README.md").write_text("---\nbase_model: org/card\nlicense: other\n---\n# LoRA\n")
    run = only(tmp_path)
    assert [c.name for c in run.unplaced] == ["pytorch_lora_weights.safetensors"]
    assert run.base.name == "org/card"
    assert {c.learning_rate for c in run.checkpoints} == {None}


def test_prodigys_logged_rate_is_not_its_own(tmp_path: Path) -> None:
    """TRAP: the factor d is not logged: unknown."""
    assert {c.learning_rate for c in only(diffusers(tmp_path, optimizer="prodigy")).checkpoints} == {None}


def test_states_in_checkpoints_are_no_adapters(tmp_path: Path) -> None:
    """TRAP: optimizer.bin and random states lie beside; none is listed as a checkpoint, nor opened."""
    runs, skipped = search(diffusers(tmp_path, (10, 20)))
    assert len(runs) == 1
    assert not skipped


def test_of_several_logs_the_newest_counts(tmp_path: Path) -> None:
    """A resumed training logs into a second file of the same folder; an older project beside it is another."""
    diffusers(tmp_path, (10, 20))
    from factories import tensorboard_log

    tensorboard_log(tmp_path / "logs" / "older", {"lr": {10: 5.0, 20: 5.0}}, stamp=1_600_000_000)
    run = only(tmp_path)
    assert run.checkpoints[0].learning_rate == pytest.approx(RATES[10])
    touch_later(run.checkpoints[0].path)


def test_a_final_file_older_than_the_log_has_no_step(tmp_path: Path) -> None:
    """TRAP: a training that was taken up again has not reached the planned end yet: the file is of the first."""
    diffusers(tmp_path, (10, 20))
    write(peft_keys(70, "transformer."), tmp_path / "pytorch_lora_weights.safetensors")
    for path in (tmp_path / "logs").rglob("hparams.yml"):
        path.write_text(path.read_text().replace("max_train_steps: 20", "max_train_steps: 60"))
    run = only(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20]
    assert [c.name for c in run.unplaced] == ["pytorch_lora_weights.safetensors"]


def test_checkpoints_beyond_the_newest_arguments_are_another_run(tmp_path: Path) -> None:
    """TRAP: a shorter training overwrote the first of a longer one; its rates are not those of the rest."""
    diffusers(tmp_path)
    for path in (tmp_path / "logs").rglob("hparams.yml"):
        path.write_text(path.read_text().replace("max_train_steps: 60", "max_train_steps: 30"))
    runs, _ = search(tmp_path)
    assert [[c.step for c in run.checkpoints] for run in runs] == [[10, 20, 30], [40, 50, 60]]
    assert [rules(run)[-1] for run in runs] == ["several-trainings"] * 2
    assert {c.learning_rate for c in runs[1].checkpoints} == {None}
    assert runs[1].base.name is None


def test_adapters_of_peft_in_the_same_folders_are_found_too(tmp_path: Path) -> None:
    """Both call them checkpoint-<step>."""
    diffusers(tmp_path, (10, 20))
    for step in (10, 20, 30):
        peft_adapter(tmp_path / f"checkpoint-{step}", step)
    runs, skipped = search(tmp_path)
    assert [(run.trainer, [c.step for c in run.checkpoints]) for run in runs] == [
        ("diffusers", [10, 20]),
        ("peft", [10, 20, 30]),
    ]
    assert not skipped
