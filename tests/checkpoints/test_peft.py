"""PEFT with the Hugging Face Trainer: what trainer_state.json tells, and its traps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from factories import kohya_metadata, trainer_state
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_forensics.checkpoints.history import Curve
from lora_forensics.discovery import discover_runs
from lora_forensics.records import Run


def only(path: Path) -> Run:
    """The one run of a folder."""
    (run,) = [found for found in discover_runs(path) if isinstance(found, Run)]
    return run


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    """Five checkpoints, each with the history so far."""
    import torch

    for step in range(10, 60, 10):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        tensors = {
            "base_model.model.q.lora_A.weight": torch.full((1, 2), step),
            "base_model.model.q.lora_B.weight": torch.ones(2, 1),
        }
        save_file(tensors, folder / "adapter_model.safetensors")
        (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "org/model", "revision": "main"}')
        trainer_state(folder, list(range(10, step + 1, 10)), lambda s: s / 100)
    return tmp_path


def test_the_newest_history_tells_all(run_folder: Path) -> None:
    """Rates, losses, epochs, data and base."""
    run = only(run_folder)
    assert [c.step for c in run.checkpoints] == [10, 20, 30, 40, 50]
    assert [c.held_out_loss for c in run.checkpoints] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert [c.epoch for c in run.checkpoints] == [0.5, 1.0, 1.5, 2.0, 2.5]
    assert {c.learning_rate for c in run.checkpoints} == {1e-3}
    assert run.checkpoints[-1].dose == pytest.approx(0.05)
    assert (run.steps_per_epoch, run.batch_size, run.train_samples) == (20, 2, None)
    assert (run.base.name, run.base.revision) == ("org/model", "main")


def test_several_evaluation_sets_count_by_their_mean(run_folder: Path) -> None:
    """eval_dataset={...} logs eval_<name>_loss; only steps where all were evaluated count."""
    log = [{"step": s, "eval_a_loss": s / 100} for s in (10, 20, 30)] + [
        {"step": s, "eval_b_loss": 1.0} for s in (10, 20)
    ]
    (run_folder / "checkpoint-50" / "trainer_state.json").write_text(
        json.dumps({"global_step": 50, "log_history": log})
    )
    assert [c.held_out_loss for c in only(run_folder).checkpoints] == [0.55, 0.6, None, None, None]


def test_a_best_loss_between_checkpoints_is_said(run_folder: Path) -> None:
    """The lowest evaluation was not saved: the person should know that keep is the best of the rest."""
    log = [{"step": s, "eval_loss": abs(s - 25) / 10} for s in (5, 10, 15, 20, 25, 30)]
    for state in run_folder.glob("*/trainer_state.json"):
        state.unlink()
    (run_folder / "checkpoint-50" / "trainer_state.json").write_text(
        json.dumps({"global_step": 50, "log_history": log})
    )
    (finding,) = only(run_folder).findings
    assert finding.rule == "held-out-elsewhere"
    assert "step 25" in finding.message
    assert "3 of 6" in finding.message


def test_bare_nan_tokens_are_tolerated(run_folder: Path) -> None:
    """TRAP: Python writes NaN and Infinity, which are no JSON; they count as not logged."""
    path = run_folder / "checkpoint-50" / "trainer_state.json"
    path.write_text(
        path.read_text().replace('"eval_loss": 0.3', '"eval_loss": NaN').replace('"loss": 2.98', '"loss": Infinity')
    )
    run = only(run_folder)
    assert [c.held_out_loss for c in run.checkpoints] == [0.1, 0.2, None, 0.4, 0.5]
    assert run.checkpoints[1].train_loss == 2.99


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "null", '{"log_history": 3}', '{"log_history": [1, null, {"step": "x"}]}']
)
def test_a_broken_newest_history_costs_nothing_but_itself(content: str, run_folder: Path) -> None:
    """The one before is read where the newest is no JSON object; odd entries are left out."""
    (run_folder / "checkpoint-50" / "trainer_state.json").write_text(content)
    run = only(run_folder)
    assert len(run.checkpoints) == 5
    if not content.startswith('{"'):
        assert run.checkpoints[0].held_out_loss == 0.1


def test_rates_between_logged_steps_are_interpolated(run_folder: Path) -> None:
    """logging_steps need not divide save_steps; beyond the ends the nearest counts."""
    log = [{"step": 15, "learning_rate": 1.5}, {"step": 45, "learning_rate": 4.5}]
    (run_folder / "checkpoint-50" / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    assert [c.learning_rate for c in only(run_folder).checkpoints] == pytest.approx([1.5, 2.0, 3.0, 4.0, 4.5])


def test_a_best_model_loaded_at_the_end_has_no_step(run_folder: Path) -> None:
    """TRAP: load_best_model_at_end writes the best, not the last, into the run's folder: content decides."""
    source = run_folder / "checkpoint-20"
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (run_folder / name).write_bytes((source / name).read_bytes())
    trainer_state(run_folder, [10, 20, 30, 40, 50], None, best_model_checkpoint="out/checkpoint-20")
    run = only(run_folder)
    assert len(run.checkpoints) == 5
    assert "checkpoint-20/adapter_model.safetensors" in run.findings[0].message


def test_the_state_of_the_final_adapter_is_the_newest(run_folder: Path) -> None:
    """trainer.save_state() after the last checkpoint: its evaluation counts."""
    import torch

    tensors = {
        "base_model.model.q.lora_A.weight": torch.zeros(1, 2),
        "base_model.model.q.lora_B.weight": torch.ones(2, 1),
    }
    save_file(tensors, run_folder / "adapter_model.safetensors")
    (run_folder / "adapter_config.json").write_text("{}")
    trainer_state(run_folder, [10, 20, 30, 40, 50, 55], lambda s: s / 100)
    run = only(run_folder)
    assert run.checkpoints[-1].step == 55
    assert run.checkpoints[-1].held_out_loss == 0.55


@pytest.mark.parametrize(
    "state",
    [
        {"global_step": 10**400, "epoch": 1},
        {"global_step": 50, "epoch": 1e-320},
        {"global_step": -5, "epoch": 1, "train_batch_size": 10**30},
        {"global_step": 50, "epoch": 1, "log_history": [{"step": 10**30, "loss": 10**400}]},
    ],
)
def test_absurd_numbers_are_nothing(state: dict[str, object], run_folder: Path) -> None:
    """No table could hold them; the run is listed without."""
    (run_folder / "checkpoint-50" / "trainer_state.json").write_text(json.dumps(state))
    assert len(only(run_folder).checkpoints) == 5


def test_metadata_of_kohya_in_a_peft_folder_changes_nothing(run_folder: Path) -> None:
    """The layout decides, not the header."""
    import torch

    tensors = {
        "base_model.model.q.lora_A.weight": torch.ones(1, 2),
        "base_model.model.q.lora_B.weight": torch.ones(2, 1),
    }
    save_file(tensors, run_folder / "checkpoint-10" / "adapter_model.safetensors", kohya_metadata(999, 1))
    assert only(run_folder).checkpoints[0].step == 10


@given(
    st.dictionaries(st.integers(1, 60), st.floats(0, 1), min_size=1, max_size=8),
    st.lists(st.integers(0, 80), max_size=6),
)
def test_sums_equal_the_sum_over_every_step(points: dict[int, float], steps: list[int]) -> None:
    """The closed form over segments is the plain sum of interpolated values."""
    curve = Curve.of(points.items())
    ascending = sorted(steps)
    for step, found in zip(ascending, curve.sums(ascending), strict=True):
        assert found == pytest.approx(sum(curve.between(s) or 0.0 for s in range(1, step + 1)), abs=1e-9)


def test_an_empty_curve_knows_nothing() -> None:
    """Unknown is None, never 0."""
    empty = Curve()
    assert (empty.at(1), empty.last(1), empty.between(1), empty.sums([1, 2])) == (None, None, None, [None, None])
