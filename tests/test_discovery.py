"""A tree to runs: grouping, order, duplicates, what is skipped, names."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from factories import kohya_file, kohya_metadata, kohya_run, lora_factors, trainer_state
from image_layouts import LAYOUTS
from safetensors.torch import save_file

from lora_forensics.checkpoints import TRAINERS
from lora_forensics.discovery import discover_runs, safe_name
from lora_forensics.errors import UsageError
from lora_forensics.records import Run, Skipped

DAMAGED = Path(__file__).parent / "data" / "damaged"


def search(path: Path, **options: object) -> tuple[list[Run], list[Skipped]]:
    """Runs and skipped files below a folder."""
    found = list(discover_runs(path, **options))  # type: ignore[arg-type]
    return [f for f in found if isinstance(f, Run)], [f for f in found if isinstance(f, Skipped)]


def peft_folder(folder: Path, steps: range = range(10, 40, 10), final: int | None = None) -> Path:
    """A folder in the Trainer's layout, with factors that differ from step to step."""
    modules = {"base_model.model.layers.0.q_proj": (8, 8)}
    for step in steps:
        peft_checkpoint(folder / f"checkpoint-{step}", modules, step)
        trainer_state(folder / f"checkpoint-{step}", [s for s in steps if s <= step], None)
    if final is not None:
        peft_checkpoint(folder, modules, final)
    return folder


def peft_checkpoint(folder: Path, modules: dict[str, tuple[int, int]], step: int) -> None:
    """adapter_model.safetensors and adapter_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    factors = lora_factors(modules, step, alpha=None)
    renamed = {k.replace("lora_down", "lora_A").replace("lora_up", "lora_B"): v for k, v in factors.items()}
    save_file(renamed, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "base_model_name_or_path": "org/base"}')


def test_the_sample_runs_are_found_once(sample_runs: Path) -> None:
    """Both runs, all their checkpoints in order; bases are no runs."""
    runs, skipped = search(sample_runs)
    assert [(run.name, run.trainer) for run in runs] == [
        ("digits_kohya/output/digit-lora", "kohya"),
        ("text_peft/output", "peft"),
    ]
    for run in runs:
        steps = [checkpoint.step for checkpoint in run.checkpoints]
        assert len(steps) >= 40
        assert steps == sorted(set(steps))
        assert run.base.name
        assert run.steps_per_epoch
        assert all(checkpoint.learning_rate is not None for checkpoint in run.checkpoints)
    assert all(entry.expected for entry in skipped)


def test_one_folder_with_runs_of_several_trainers(tmp_path: Path) -> None:
    """Two trainers' runs in one folder are two runs; neither takes the other's files."""
    peft_folder(tmp_path / "mixed")
    kohya_run(tmp_path / "mixed", "style", steps=[10, 20])
    kohya_run(tmp_path / "mixed", "face", steps=[10, 20, 30])
    runs, skipped = search(tmp_path)
    assert {(run.name, len(run.checkpoints)) for run in runs} == {("mixed", 3), ("mixed/style", 2), ("mixed/face", 3)}
    assert not skipped


def test_two_sessions_of_one_stem_are_two_runs(tmp_path: Path) -> None:
    """A rerun under the old name, after which some of the old files are left."""
    for step, session in ((10, "1"), (20, "2"), (30, "2")):
        kohya_file(tmp_path / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, 0, "a", session))
    runs, _ = search(tmp_path)
    assert [(run.name.removeprefix(tmp_path.name + "/"), [c.step for c in run.checkpoints]) for run in runs] == [
        ("a", [10]),
        ("a-2", [20, 30]),
    ]


def test_files_without_a_session_join_the_only_one(tmp_path: Path) -> None:
    """Metadata may be lost in some files of a run."""
    kohya_file(tmp_path / "a-step00000010.safetensors", 10, kohya_metadata(10, 0, "a"))
    kohya_file(tmp_path / "a-step00000020.safetensors", 20, None)
    (run,), _ = search(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20]


def test_identical_copies_count_once(tmp_path: Path) -> None:
    """The final adapter of the Trainer is the last checkpoint again: dropped by content, and said."""
    (run,), skipped = search(peft_folder(tmp_path / "out", final=30))
    assert [c.step for c in run.checkpoints] == [10, 20, 30]
    assert [finding.rule for finding in run.findings] == ["duplicate"]
    assert not run.unplaced
    assert not skipped


def test_a_file_without_a_step_is_listed_and_left_out(tmp_path: Path) -> None:
    """A final adapter that equals no checkpoint, in a folder that does not tell its step."""
    (run,), _ = search(peft_folder(tmp_path / "out", final=100))
    assert [c.name for c in run.unplaced] == ["adapter_model.safetensors"]
    assert [c.step for c in run.checkpoints] == [10, 20, 30]
    assert [finding.rule for finding in run.findings] == ["step-unknown"]


def test_a_final_adapter_with_a_step_belongs_to_the_run(tmp_path: Path) -> None:
    """trainer_state.json in the run's own folder tells it."""
    folder = peft_folder(tmp_path / "out", final=100)
    trainer_state(folder, [10, 20, 30, 100], None)
    (run,), _ = search(folder)
    assert [c.step for c in run.checkpoints] == [10, 20, 30, 100]
    assert run.name == "out"


def test_two_different_files_of_one_step(tmp_path: Path) -> None:
    """One is in the series, the other is listed with a finding."""
    kohya_file(tmp_path / "a-step00000020.safetensors", 20, kohya_metadata(20, 1, "a"))
    kohya_file(tmp_path / "a-000001.safetensors", 30, kohya_metadata(20, 1, "a"))
    (run,), _ = search(tmp_path)
    assert [c.name for c in run.checkpoints] == ["a-step00000020.safetensors"]
    assert [c.name for c in run.unplaced] == ["a-000001.safetensors"]
    assert [finding.rule for finding in run.findings] == ["same-step"]


def test_states_and_foreign_files_are_no_runs(tmp_path: Path) -> None:
    """Optimizer states beside a run, a textual inversion, a full model, text: skipped with a reason."""
    kohya_run(tmp_path, steps=[10, 20])
    (tmp_path / "name-state").mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / "name-state" / "model.safetensors")
    torch.save({}, tmp_path / "optimizer.pt")
    save_file({"emb_params": torch.ones(2, 768)}, tmp_path / "token.safetensors")
    (tmp_path / "notes.txt").write_text("hello")
    runs, skipped = search(tmp_path)
    assert len(runs) == 1
    assert {(s.path.name, s.expected) for s in skipped} == {
        ("name-state", True),
        ("optimizer.pt", True),
        ("token.safetensors", True),
    }
    assert all(s.reason for s in skipped)


@pytest.mark.parametrize("case", sorted(p.name for p in DAMAGED.iterdir() if p.is_dir()))
def test_damaged_things_are_skipped_or_found_and_never_raise(case: str) -> None:
    """The corpus of damaged runs: discovery of each ends, and what is skipped has a reason."""
    runs, skipped = search(DAMAGED / case)
    for entry in (*skipped, *(s for run in runs for s in run.skipped)):
        assert entry.reason
        assert "Traceback" not in entry.reason


@pytest.mark.parametrize(
    ("case", "word"),
    [
        ("truncated", "truncated"),
        ("empty", "empty"),
        ("cut_header", "header"),
        ("huge_header", "header"),
        ("text_file", "header"),
    ],
)
def test_the_reason_names_the_damage(case: str, word: str) -> None:
    """A person reads what is wrong with the file."""
    runs, skipped = search(DAMAGED / case)
    reasons = [s.reason for s in (*skipped, *(s for run in runs for s in run.skipped))]
    assert any(word in reason for reason in reasons), reasons


def test_a_damaged_file_named_like_a_run_belongs_to_it(tmp_path: Path) -> None:
    """So that the run's report can say that a checkpoint was lost."""
    kohya_run(tmp_path, steps=[10, 20, 30])
    broken = tmp_path / "name-step00000020.safetensors"
    broken.write_bytes(broken.read_bytes()[:-8])
    (tmp_path / "name-000001.safetensors").unlink()
    (run,), skipped = search(tmp_path)
    assert [s.path for s in run.skipped] == [broken]
    assert not run.skipped[0].expected
    assert not skipped
    assert [c.step for c in run.checkpoints] == [10, 30]


def test_symlink_loops_end(tmp_path: Path) -> None:
    """A link to a parent is not followed twice."""
    kohya_run(tmp_path / "runs" / "a", steps=[10, 20])
    (tmp_path / "runs" / "a" / "loop").symlink_to(tmp_path / "runs", target_is_directory=True)
    runs, _ = search(tmp_path / "runs")
    assert len(runs) == 1


def test_linked_folders_are_searched(tmp_path: Path) -> None:
    """People keep runs on another disk."""
    kohya_run(tmp_path / "disk" / "a", steps=[10, 20])
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "link").symlink_to(tmp_path / "disk" / "a", target_is_directory=True)
    (run,), _ = search(tmp_path / "runs")
    assert run.name == "link/name"


@pytest.mark.parametrize("layout", [*LAYOUTS.values(), peft_folder])
def test_links_to_checkpoints_are_no_runs(layout: Callable[[Path], Path], tmp_path: Path) -> None:
    """`best` beside them, `picked` elsewhere, `current` to the whole run: every checkpoint is found once."""
    layout(tmp_path / "run")
    (run,), before = search(tmp_path)
    first = run.checkpoints[0].path
    inner = first.parent if first.parent != tmp_path / "run" else first
    (tmp_path / "run" / f"best{inner.suffix}").symlink_to(inner)
    if inner.is_dir():
        (tmp_path / "picked").symlink_to(inner, target_is_directory=True)
    (tmp_path / "current").symlink_to(tmp_path / "run", target_is_directory=True)
    (again,), after = search(tmp_path)
    assert again == run
    assert after == before


def test_a_link_to_a_file_that_is_not_read_counts(tmp_path: Path) -> None:
    """Stores of content keep the files under names of their own, without the suffix."""
    path = kohya_run(tmp_path, steps=[10, 20, 30]) / "name-step00000010.safetensors"
    path.rename(tmp_path / "0123abcd")
    path.symlink_to("0123abcd")
    ((run,), _) = search(tmp_path)
    assert [c.step for c in run.checkpoints] == [10, 20, 30]


def test_excluded_and_hidden_folders_are_not_entered(tmp_path: Path) -> None:
    """The output of an earlier scan, and what version control or editors hide."""
    for folder in ("a", "out", ".cache"):
        kohya_run(tmp_path / folder, steps=[10, 20])
    runs, _ = search(tmp_path, exclude=[tmp_path / "out"])
    assert [run.name for run in runs] == ["a/name"]


def test_names_are_safe_and_unique(tmp_path: Path) -> None:
    """Names become folders on every system: no reserved characters, no two that differ in case only."""
    kohya_run(tmp_path / "a", 'we:ird"*?', steps=[10])
    kohya_run(tmp_path / "a", "Name", steps=[10])
    kohya_run(tmp_path / "a", "name", steps=[10])
    runs, _ = search(tmp_path)
    names = [run.name for run in runs]
    assert len({name.lower() for name in names}) == 3
    assert not any(set(name) & set('<>:"|?*\\') for name in names)


def test_a_missing_path_names_its_neighbour(tmp_path: Path) -> None:
    """A typing error is answered with what was meant."""
    (tmp_path / "my_runs").mkdir()
    with pytest.raises(UsageError) as caught:
        list(discover_runs(tmp_path / "my_run"))
    assert "does not exist" in caught.value.message
    assert "my_runs" in caught.value.hint


def test_one_file_and_one_checkpoint_are_no_run(tmp_path: Path) -> None:
    """The hint gives the command that was meant."""
    path = kohya_file(tmp_path / "a-000001.safetensors", 10, None)
    peft_folder(tmp_path / "out")
    for given in (path, tmp_path / "out" / "checkpoint-10"):
        with pytest.raises(UsageError) as caught:
            list(discover_runs(given))
        assert f"scan {given.parent}" in caught.value.hint


def test_a_trainer_can_be_asked_for(tmp_path: Path) -> None:
    """Only its runs are found, and an unknown one is refused with the list of known ones."""
    peft_folder(tmp_path / "one")
    kohya_run(tmp_path / "two", steps=[10])
    for trainer in ("peft", "kohya"):
        runs, _ = search(tmp_path, trainer=trainer)
        assert [run.trainer for run in runs] == [trainer]
    with pytest.raises(UsageError, match="nobody"):
        search(tmp_path, trainer="nobody")


def test_every_trainer_says_how_to_save_more_often() -> None:
    """Too few checkpoints is a verdict with a way out, whatever the trainer."""
    for trainer in TRAINERS.values():
        assert "sav" in trainer.save_more_often or "checkpoint" in trainer.save_more_often


def test_an_unfinished_save_is_skipped(tmp_path: Path) -> None:
    """A configuration without weights: the trainer was killed between the two."""
    folder = peft_folder(tmp_path / "out")
    (folder / "checkpoint-20" / "adapter_model.safetensors").unlink()
    (run,), _ = search(folder)
    assert [c.step for c in run.checkpoints] == [10, 30]
    assert "not finished" in run.skipped[0].reason


def test_older_pickled_adapters_are_found(tmp_path: Path) -> None:
    """adapter_model.bin of older peft: named, not opened."""
    folder = peft_folder(tmp_path / "out")
    for path in folder.rglob("adapter_model.safetensors"):
        torch.save({}, path.with_suffix(".bin"))
        path.unlink()
    (run,), _ = search(folder)
    assert len(run.checkpoints) == 3


def test_a_moved_run_is_the_same_run(tmp_path: Path) -> None:
    """Nothing but names inside the folder counts."""
    kohya_run(tmp_path / "a", steps=[10, 20, 30])
    before = search(tmp_path / "a")[0][0]
    shutil.move(tmp_path / "a", tmp_path / "b")
    after = search(tmp_path / "b")[0][0]
    assert [c.name for c in before.checkpoints] == [c.name for c in after.checkpoints]
    assert [c.fingerprint for c in before.checkpoints] == [c.fingerprint for c in after.checkpoints]


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        ("plain", "plain"),
        ("a:b|c?", "a_b_c_"),
        ("ends. ", "ends_"),
        ("CON", "_CON"),
        ("nul.v2", "_nul.v2"),
        ("com1", "_com1"),
        ("console", "console"),
        ("\udcff", "_"),
        ("...", "_"),
    ],
)
def test_names_of_folders_are_names_on_every_system(part: str, expected: str) -> None:
    """Also on Windows: no signs of paths, no dots at the end, no devices."""
    assert safe_name(part) == expected
