"""Failures as people report them, in runs that move as real ones do: each told once, and by name; healthy ones too."""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tables import layers_of, wavy
from walks import LANGUAGE, STEPS, UNET, ai_toolkit_walk, kohya_walk, peft_walk

from lora_forensics.assess import assess
from lora_forensics.checkpoints import TRAINERS, Trainer
from lora_forensics.errors import UsageError
from lora_forensics.records import Finding
from lora_forensics.scan import ScanOptions, scan
from lora_forensics.similarity import AssessOptions

HARMLESS = {"weak-evidence", "last-is-past", "without-base", "no-base-model"}
"""What a run without a fault may have: a verdict, and no base beside it."""
TIME = 1_700_000_000


def found(path: Path) -> dict[str, Finding]:
    """The findings of the one run below a folder, by rule; each rule at most once."""
    done = scan([path], ScanOptions(out=path.parent / "out", plots=False)).summary
    told = [*done.findings, *(finding for verdict in done.runs for finding in verdict.findings)]
    by_rule = {finding.rule: finding for finding in told}
    assert len(by_rule) == len(told), [finding.rule for finding in told]
    return by_rule


def rewrite(file: Path, change: Callable[[str, torch.Tensor], torch.Tensor]) -> None:
    """Change the tensors of a file and leave its metadata."""
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    save_file({name: change(name, tensor).clone() for name, tensor in load_file(file).items()}, file, metadata)


def with_last(tensor: torch.Tensor, factor: float) -> torch.Tensor:
    """The same but for its last number."""
    tensor.view(-1)[-1] *= factor
    return tensor


def saved(run: Path, step: int) -> Path:
    """The weights of a step: PEFT's, kohya's or its last."""
    for name in (f"checkpoint-{step}/adapter_model.safetensors", f"name-step{step:08d}.safetensors"):
        if (run / name).exists():
            return run / name
    return run / "name.safetensors"


def timed(run: Path, order: Callable[[Path], Any], seconds: float) -> Path:
    """The same with the times of a copy that was made file by file in this order."""
    for place, file in enumerate(sorted(run.glob("checkpoint-*/adapter_model.safetensors"), key=order)):
        os.utime(file, (TIME, TIME + place * seconds))
    return run


HEALTHY: dict[str, Callable[[Path], Path]] = {
    "kohya": kohya_walk,
    "kohya float16": lambda folder: kohya_walk(folder, dtype=torch.float16),
    "kohya bfloat16": lambda folder: kohya_walk(folder, dtype=torch.bfloat16),
    "float16 at a tiny rate": lambda folder: kohya_walk(folder, dtype=torch.float16, rate=lambda _: 1e-6),
    "ai-toolkit": lambda folder: ai_toolkit_walk(folder / "run"),
    "peft": peft_walk,
    "warm-up and cosine": lambda folder: peft_walk(
        folder, rate=lambda step: 1e-4 * min(1, step / 100) * (1 + math.cos(math.pi * step / 600)) / 2
    ),
    "restarts of the rate": lambda folder: peft_walk(
        folder, rate=lambda step: 1e-4 * (1 + math.cos(math.pi * (step % 200) / 200)) / 2
    ),
    "LoRA+": lambda folder: peft_walk(folder, ratio=16),
    "rsLoRA": lambda folder: peft_walk(folder, config={"use_rslora": True}),
    "a rate ten times too high": lambda folder: peft_walk(folder, rate=lambda _: 1e-3),
    "equal times": lambda folder: timed(peft_walk(folder), str, 0),
    "copied backwards": lambda folder: timed(peft_walk(folder), lambda file: -int(file.parent.name[11:]), 90),
    "copied by name": lambda folder: timed(peft_walk(folder, range(200, 2000, 200)), str, 90),
}


@pytest.mark.parametrize("kind", HEALTHY)
def test_a_healthy_run_has_no_fault(kind: str, tmp_path: Path) -> None:
    """Whatever its type, rate, schedule and way of copying."""
    assert set(found(HEALTHY[kind](tmp_path))) <= HARMLESS


def test_a_checkpoint_of_step_0_is_a_note_and_a_lone_dead_one_is_not(tmp_path: Path) -> None:
    """B is 0 before the first step; an adapter that is all there is and changes nothing is an error."""
    first = found(peft_walk(tmp_path / "a", (0, *STEPS)))["zero-change"]
    assert first.severity == "info"
    run = peft_walk(tmp_path / "b", (600,))
    rewrite(saved(run, 600), lambda name, tensor: tensor * ("lora_B" not in name))
    assert found(run)["zero-change"].severity == "error"


@pytest.mark.parametrize("steps", [(400, 800, 1000), (300, 600, 900, 1000), (100, 150, 200, 300, 400, 450, 500, 600)])
def test_an_end_between_two_saves_and_two_intervals_are_no_gap(steps: tuple[int, ...], tmp_path: Path) -> None:
    """The last save comes whenever training ends; kohya saves steps and epochs side by side."""
    assert not {"missing-steps", "keep-limit"} & set(found(kohya_walk(tmp_path, steps)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_checkpoint_identical_is_told(dtype: torch.dtype, tmp_path: Path) -> None:
    """Equal tensors, exactly: no rounding of products hides it (huggingface/peft#353)."""
    run = peft_walk(tmp_path, dtype=dtype)
    for step in STEPS[1:]:
        shutil.copy(saved(run, STEPS[0]), saved(run, step))
    told = found(run)
    assert told["unchanged"].severity == "error"
    assert f"{len(STEPS) - 1} checkpoints" in told["unchanged"].message
    rewrite(saved(run, 300), lambda name, tensor: with_last(tensor, 2 if "q_proj.lora_B" in name else 1))
    assert f"{len(STEPS) - 3} checkpoints" in found(run)["unchanged"].message


def test_dead_adapters_are_told_once_and_a_narrow_type_is_named(tmp_path: Path) -> None:
    """Zero B throughout equal each other as well; in float16 they may have been rounded to it."""
    run = kohya_walk(tmp_path / "a")
    for step in STEPS:
        rewrite(saved(run, step), lambda name, tensor: tensor * (not name.endswith("up.weight")))
    told = found(run)
    assert "unchanged" not in told
    assert "F16" not in told["zero-change"].message
    flushed = found(kohya_walk(tmp_path / "b", dtype=torch.float16, rate=lambda _: 3e-10))
    assert "all B are zero" in flushed["zero-change"].message
    assert "stored as F16, which rounds small numbers to 0" in flushed["zero-change"].message
    assert "F16" in flushed["flushed-to-zero"].message


def test_nan_names_modules_and_is_no_standstill(tmp_path: Path) -> None:
    """From some step on to the end: what cannot be measured has not settled."""
    run = kohya_walk(tmp_path)
    for step in STEPS[7:]:
        rewrite(saved(run, step), lambda name, tensor: tensor * (math.nan if UNET[2] in name else 1))
    told = found(run)
    assert f"1 of {len(UNET)} modules" in told["nonfinite"].message
    assert UNET[2] in told["nonfinite"].message
    assert "settled" not in told


@pytest.mark.parametrize("part", [0.5, 0.1])
def test_another_scale_is_no_reset(part: float, tmp_path: Path) -> None:
    """The strength falls, the factors go on."""
    run = kohya_walk(tmp_path)
    for step in STEPS[6:]:
        rewrite(saved(run, step), lambda name, tensor: tensor * (part if name.endswith("alpha") else 1))
    told = found(run)
    assert f"from 1 to {part}" in told["scale-changes"].message
    assert "reset" not in told


def test_what_changes_inside_a_run_is_named(tmp_path: Path) -> None:
    """Modules that are gone and new, and a rank."""
    run = peft_walk(tmp_path)
    last = load_file(saved(run, 550))
    save_file({n: t.clone() for n, t in last.items() if ".0.self_attn" not in n}, saved(run, 550))
    gone = found(run)["mixed-runs"].message
    assert f"steps 550, 600: 3 of {len(LANGUAGE)} modules are gone, base_model.model.model.layers.0." in gone
    save_file({n: torch.cat([t, t], dim=int("lora_B" in n)) for n, t in last.items()}, saved(run, 550))
    config = saved(run, 550).parent / "adapter_config.json"
    config.write_text(config.read_text().replace('"r": 4', '"r": 8'))
    assert (
        "the rank of base_model.model.model.layers.0.self_attn.k_proj is 8, it was 4"
        in found(run)["mixed-runs"].message
    )


def test_a_wrong_base_is_told_once(tmp_path: Path) -> None:
    """That none fits says it of each."""
    run = peft_walk(tmp_path)
    save_file({f"{name}.weight": torch.ones(48, 48) for name in LANGUAGE}, tmp_path / "base.safetensors")
    told = found(run)
    assert "32 x 32" in told["base-mismatch"].message
    assert "module-unresolved" not in told


def test_the_final_file_of_a_shorter_rerun_is_left_out(tmp_path: Path) -> None:
    """ai-toolkit writes its own step into it; where that was never numbered it would stand in the middle."""
    run = ai_toolkit_walk(tmp_path / "run")
    shutil.copy(ai_toolkit_walk(tmp_path / "other", (50, 120), seed=9) / "name.safetensors", run)
    done = scan([run], ScanOptions(out=tmp_path / "out", plots=False)).summary
    (verdict,) = done.runs
    (told,) = [finding for finding in verdict.findings if finding.rule == "final-overwritten"]
    assert told.message.startswith("name.safetensors")
    assert "config.name" in told.hint
    assert verdict.checkpoints == len(STEPS) - 1
    shutil.copy(run / "name_000000100.safetensors", run / "name.safetensors")  # an early save that was taken for good
    assert "final-overwritten" not in found(run)


def test_a_last_file_whose_factors_were_drawn_anew_is_another_trainings(tmp_path: Path) -> None:
    """Of the same step, without a session: its A tells; it is left out of the series."""
    run = ai_toolkit_walk(tmp_path / "run")
    shutil.copy(ai_toolkit_walk(tmp_path / "other", seed=9) / "name.safetensors", run)
    told = found(run)["final-overwritten"]
    assert "name.safetensors (step 600)" in told.message
    assert "reset" not in found(run)


def test_a_last_file_that_was_only_factored_anew_stays(tmp_path: Path) -> None:
    """A resized or merged copy has other A and B, and the same product."""
    run = ai_toolkit_walk(tmp_path / "run")
    turn = torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(1)))[0]
    rewrite(saved(run, 600), lambda name, tensor: turn @ tensor if "lora_A" in name else tensor @ turn.T)
    assert set(found(run)) <= HARMLESS


def test_a_second_training_over_the_first_half_is_told_by_times(tmp_path: Path) -> None:
    """Copies in the order of names are passed over, this is not."""
    run = peft_walk(tmp_path)
    half = STEPS[6]
    for place, step in enumerate([*STEPS[6:], *STEPS[:6]]):
        os.utime(saved(run, step), (TIME, TIME + 100 * place))
    assert f"steps {half} to 600 were written before" in found(run)["out-of-order"].message


def test_where_all_is_damaged_the_help_is_that_of_the_damage(tmp_path: Path) -> None:
    """Not what a run looks like."""
    run = peft_walk(tmp_path)
    for step in STEPS:
        rewrite(saved(run, step), lambda _name, _tensor: torch.empty(0))
    with pytest.raises(UsageError) as caught:
        found(run)
    assert "stage3_gather_16bit_weights_on_model_save" in caught.value.hint.lower()


def test_a_keep_limit_says_what_to_set(tmp_path: Path) -> None:
    """In that trainer, after where to look."""
    run = peft_walk(tmp_path)
    for step in STEPS[:6]:
        shutil.rmtree(run / f"checkpoint-{step}")
    told = found(run)["keep-limit"]
    assert "6 are gone" in told.message
    assert "lie elsewhere" in told.hint
    assert "save_total_limit" in told.hint


@pytest.mark.parametrize("trainer", TRAINERS.values(), ids=TRAINERS)
def test_advice_of_each_trainer_reads_on_from_the_sentences_that_hold_it(trainer: Trainer) -> None:
    """After `to save more often,` and after `look whether they lie elsewhere; else`."""
    assert trainer.save_more_often.split()[0] in ("set", "lower")
    assert "more often" not in trainer.save_more_often


def test_a_text_encoder_that_turns_a_little_earlier_is_chance() -> None:
    """Of two turning points one is always first; by a window is worth a note."""
    options = AssessOptions(window="3", detector="algorithm1")
    rules = {}
    for ahead in (2, 3):
        encoder = layers_of({"b": wavy(60 + ahead, 20.0)[ahead:]}, component="text_encoder")
        layers = pl.concat([layers_of({"a": wavy(60, 20.0)}, component="unet"), encoder])
        rules[ahead] = {finding.rule for finding in assess(layers, options=options).verdict.findings}
    assert "text-encoder-first" not in rules[2]
    assert "text-encoder-first" in rules[3]


def test_a_long_way_to_the_end_is_no_other_training(tmp_path: Path) -> None:
    """After five short intervals one in which training itself turns A away."""
    steps = (*range(50, 300, 50), 1500)
    run = peft_walk(tmp_path, steps, rate=lambda step: 1e-4 if step <= 250 else 0.1)
    before, after = (load_file(saved(run, step)) for step in steps[-2:])
    name = f"base_model.model.{LANGUAGE[0]}.lora_A.weight"
    assert torch.cosine_similarity(before[name].flatten(), after[name].flatten(), dim=0) < 0.2
    assert "final-overwritten" not in found(run)
