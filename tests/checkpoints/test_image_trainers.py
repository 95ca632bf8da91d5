"""What all image trainers have in common: the same training in every dialect, alone and side by side."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest
import torch
from image_layouts import (
    BASE,
    LAYOUTS,
    LOSSES,
    RATES,
    STEPS,
    base_model,
    guarded_checkpoint,
    kohya_keys,
    onetrainer,
    peft_keys,
    simpletuner,
    write,
)
from polars.testing import assert_frame_equal
from runs import rules, search

from lora_forensics.checkpoints import TRAINERS
from lora_forensics.measure import measure_run

LAYOUT = pytest.mark.parametrize(("trainer", "layout"), LAYOUTS.items(), ids=LAYOUTS)
Layout = Callable[[Path], Path]


@LAYOUT
def test_a_run_is_found_once_in_order_and_dated(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """Steps, the rate and the loss at each, batch size and base, from wherever the trainer leaves them."""
    (run,), skipped = search(layout(tmp_path / "runs"))
    assert run.trainer == trainer
    assert [checkpoint.step for checkpoint in run.checkpoints] == list(STEPS)
    assert all(entry.expected for entry in (*skipped, *run.skipped))
    assert not run.unplaced
    constant = trainer in ("diffsynth", "diffusion-pipe")  # those log no rate: it is that of the settings
    for checkpoint in run.checkpoints:
        rate = 1e-4 if constant else RATES[checkpoint.step or 0]
        assert checkpoint.learning_rate == pytest.approx(rate, rel=1e-5)
        assert checkpoint.train_loss == pytest.approx(LOSSES[checkpoint.step or 0], rel=1e-5)
    assert run.base.name in (BASE, "base.safetensors")
    assert run.batch_size == (1 if trainer == "diffsynth" else 2)


@LAYOUT
def test_the_same_factors_give_the_same_measures(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """layers.parquet of every dialect equals kohya's, but for names; cosines included, and every scale is known."""
    base = base_model(tmp_path / "base" / "model.safetensors")
    tables = []
    for name, writer in (("kohya", LAYOUTS["kohya"]), (trainer, layout)):
        (run,), _ = search(writer(tmp_path / f"{name}-run"))
        measured = measure_run(run, base)
        assert not [finding for finding in measured.notes.findings if finding.rule == "scale-unknown"]
        named = ["run", "checkpoint", "module", "component", "epoch", "tensor"]
        order = measured.layers.sort("step", "tensor").with_columns(pl.col("tensor").str.replace(r"^.*/", ""))
        tables.append((order["tensor"].to_list(), order.drop(named)))
    assert tables[0][0] == tables[1][0]
    assert_frame_equal(tables[0][1], tables[1][1], check_exact=True)
    assert tables[1][1]["cosine"].null_count() == 0


@LAYOUT
def test_one_trainer_can_be_asked_for(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """It finds its run, by its layout alone where its marks are shared or missing."""
    layout(tmp_path / "a")
    assert [run.trainer for run in search(tmp_path, trainer)[0]] == [trainer]


@LAYOUT
def test_a_damaged_file_is_skipped_and_the_rest_found(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """A half-written checkpoint in the middle costs that checkpoint, with its reason, and no other."""
    (run,), _ = search(layout(tmp_path / "runs"))
    broken = run.checkpoints[2].path
    broken.write_bytes(broken.read_bytes()[:-16])
    (run,), skipped = search(tmp_path / "runs")
    assert [checkpoint.step for checkpoint in run.checkpoints] == [step for step in STEPS if step != STEPS[2]]
    damaged = [entry for entry in (*skipped, *run.skipped) if not entry.expected]
    assert [entry.path for entry in damaged] == [broken]
    assert "truncated" in damaged[0].reason


@LAYOUT
def test_a_moved_run_is_the_same_run(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """Copied elsewhere, with new times, it tells the same."""
    layout(tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b" / "c", copy_function=shutil.copyfile)
    (first,), (second,) = search(tmp_path / "a")[0], search(tmp_path / "b" / "c")[0]
    told = [
        [(c.name, c.step, c.epoch, c.learning_rate, c.train_loss) for c in run.checkpoints] for run in (first, second)
    ]
    assert told[0] == told[1]


@LAYOUT
def test_logs_of_noise_are_no_obstacle(trainer: str, layout: Layout, tmp_path: Path) -> None:
    """Every file that is no checkpoint becomes bytes of nothing: the run is found all the same, without a traceback."""
    layout(tmp_path)
    for path in tmp_path.rglob("*"):
        if path.is_file() and path.suffix != ".safetensors" and path.name != ".guard":
            path.write_bytes(b"\x00\xff{[" * 50)
    (run,), _ = search(tmp_path)
    assert run.trainer == trainer
    assert len(run.checkpoints) >= len(STEPS) - 1


def test_one_tree_with_a_run_of_each(tmp_path: Path) -> None:
    """Mixed, and two trainers in one folder: every run exactly once."""
    for name, layout in LAYOUTS.items():
        layout(tmp_path / "tree" / name)
    LAYOUTS["kohya"](tmp_path / "tree" / "shared")
    LAYOUTS["diffsynth"](tmp_path / "tree" / "shared")
    LAYOUTS["diffusers"](tmp_path / "tree" / "shared")
    runs, skipped = search(tmp_path / "tree")
    assert sorted((run.path.name, run.trainer) for run in runs) == sorted(
        [*((name, name) for name in LAYOUTS), *(("shared", name) for name in ("kohya", "diffsynth", "diffusers"))]
    )
    assert {len(run.checkpoints) for run in runs} == {len(STEPS)}
    assert all(entry.expected for entry in skipped)


def test_a_mixed_damaged_and_interrupted_tree(tmp_path: Path) -> None:
    """Every run is found exactly once, and every file that is none has its reason."""
    for name, layout in LAYOUTS.items():
        layout(tmp_path / "deep" / name)
    tree = tmp_path / "deep"
    # interrupted: half of a file, a folder that was being written, a save without its end, a backup, states
    broken = {
        tree / "kohya" / "name-step00000020.safetensors": 100,
        tree / "ai-toolkit" / "name_000000020.safetensors": 0,
        tree / "diffusers" / "checkpoint-20" / "pytorch_lora_weights.safetensors": 8,
        tree / "diffsynth" / "step-20.safetensors": 50,
    }
    for path, length in broken.items():
        path.write_bytes(path.read_bytes()[:length])
    guarded_checkpoint(tree / "simpletuner" / "checkpoint-80-tmp", 80)
    guarded_checkpoint(tree / "simpletuner" / "checkpoint-80", 80, guard=False)
    (tree / "diffusion-pipe" / "step80" / "tmp").mkdir(parents=True)
    (tree / "diffusion-pipe" / "global_step80").mkdir()
    (tree / "kohya" / "name-step00000060-state").mkdir()
    write(kohya_keys(60), tree / "kohya" / "name-step00000060-state" / "model.safetensors")
    torch.save({}, tree / "ai-toolkit" / "optimizer.pt")
    # beside them: averaged weights, a full model, a merged one, an adapter of nobody, an empty file
    write(peft_keys(60), tree / "simpletuner" / "ema" / "pytorch_lora_weights.safetensors")
    base_model(tree / "models" / "merged.safetensors")
    write(peft_keys(60), tree / "models" / "downloaded.safetensors")
    (tree / "models" / "empty.safetensors").touch()
    # resumed and rerun
    onetrainer(tree / "onetrainer", (70, 80), start="2026-05-02_11-00-00")
    onetrainer(tree / "onetrainer", STEPS, start="2026-05-03_12-00-00")
    runs, skipped = search(tmp_path)
    assert sorted((run.trainer, len(run.checkpoints)) for run in runs) == sorted(
        [
            *((name, 5) for name in ("kohya", "ai-toolkit", "diffusers", "diffsynth")),
            *((name, 6) for name in ("simpletuner", "diffusion-pipe", "musubi", "onetrainer")),
            ("onetrainer", 8),
        ]
    )
    assert len({run.name for run in runs}) == 9
    assert [rules(run) for run in runs if len(run.checkpoints) == 8] == [["resumed"]]
    reasons = {entry.path.name: entry for entry in (*skipped, *(entry for run in runs for entry in run.skipped))}
    damaged = {path.name for path in broken} | {"checkpoint-80-tmp", "checkpoint-80", "step80", "empty.safetensors"}
    assert {name for name, entry in reasons.items() if not entry.expected} == {*damaged, "downloaded.safetensors"}
    expected = {"ema", "merged.safetensors", "global_step80", "name-step00000060-state", "optimizer.pt"}
    assert {name for name, entry in reasons.items() if entry.expected} == expected


@LAYOUT
def test_without_the_library_of_the_logs_a_finding_names_the_extra(
    trainer: str, layout: Layout, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are logs of TensorBoard that would be read, and nowhere else."""
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    (run,), _ = search(layout(tmp_path))
    assert len(run.checkpoints) == len(STEPS)
    hints = [finding.hint for finding in run.findings if finding.rule == "log-unreadable"]
    expected = [] if trainer in ("ai-toolkit", "simpletuner", "diffsynth") else ["install lora-forensics[logs]"]
    assert hints == expected


def test_a_log_that_ends_early_tells_nothing_of_what_follows(tmp_path: Path) -> None:
    """Rates and losses beyond it are unknown, not those of its end."""
    simpletuner(tmp_path)
    metrics = tmp_path / "training_metrics.jsonl"
    metrics.write_text("".join(metrics.read_text().splitlines(keepends=True)[:30]))
    (run,), _ = search(tmp_path)
    assert [checkpoint.learning_rate is None for checkpoint in run.checkpoints] == [False] * 3 + [True] * 3
    assert [checkpoint.train_loss is None for checkpoint in run.checkpoints] == [False] * 3 + [True] * 3


def test_every_trainer_is_documented() -> None:
    """For `formats`: what it is, how it is recognised, what misleads in its files; and a layout that is tested."""
    for name, trainer in TRAINERS.items():
        assert trainer.about
        assert trainer.recognised
        assert trainer.traps
        assert "sav" in trainer.save_more_often or "checkpoint" in trainer.save_more_often, name
