"""musubi-tuner's traps."""

from __future__ import annotations

from pathlib import Path

from factories import kohya_metadata, tensorboard_log
from image_layouts import STEPS, kohya_keys, musubi, write
from runs import only, search


def test_items_instead_of_images_tell_it_from_sd_scripts(tmp_path: Path) -> None:
    """Both in one folder, under two names: each finds its own."""
    musubi(tmp_path)
    for step in (10, 20):
        write(kohya_keys(step), tmp_path / f"other-step{step:08d}.safetensors", kohya_metadata(step, 0, "other"))
    runs, _ = search(tmp_path)
    assert [(run.trainer, len(run.checkpoints)) for run in runs] == [("musubi", len(STEPS)), ("kohya", 2)]
    assert runs[0].train_samples == 40


def test_the_base_has_a_name_and_no_hash(tmp_path: Path) -> None:
    """TRAP: what cannot be compared is not."""
    base = only(musubi(tmp_path)).base
    assert (base.name, base.sha256, base.short_hash) == ("org/base", None, None)


def test_epochs_follow_from_the_step(tmp_path: Path) -> None:
    """TRAP: ss_epoch of step files counts finished epochs, as in sd-scripts."""
    assert [c.epoch for c in only(musubi(tmp_path)).checkpoints] == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_a_damaged_file_of_sd_scripts_is_left_to_it(tmp_path: Path) -> None:
    """Names alone do not say whose it is."""
    for step in (10, 20):
        write(kohya_keys(step), tmp_path / f"a-step{step:08d}.safetensors", kohya_metadata(step, 0, "a"))
    (tmp_path / "a-step00000030.safetensors").write_bytes(b"broken")
    (run,), skipped = search(tmp_path)
    assert (run.trainer, len(run.skipped), skipped) == ("kohya", 1, [])


def test_without_metadata_it_is_listed_as_kohya_unless_it_is_asked_for(tmp_path: Path) -> None:
    """TRAP: --no_metadata leaves nothing that tells them apart; --trainer overrules."""
    for step in (10, 20):
        write(kohya_keys(step), tmp_path / f"a-step{step:08d}.safetensors")
    assert only(tmp_path).trainer == "kohya"
    (run,), _ = search(tmp_path, "musubi")
    assert (run.trainer, len(run.checkpoints)) == ("musubi", 2)


def test_losses_of_epochs_are_not_mixed_into_those_of_steps(tmp_path: Path) -> None:
    """loss/epoch is logged over epochs by the same tracker: another name, another axis."""
    musubi(tmp_path)
    log = tmp_path / "logs" / "20240102030405" / "network_train"
    tensorboard_log(log, {"loss/epoch": {1: 99.0, 2: 99.0, 3: 99.0}}, stamp=1_900_000_000)
    assert max(c.train_loss or 0 for c in only(tmp_path).checkpoints) < 1


def test_a_resumed_training_counts_from_zero_and_is_another_run(tmp_path: Path) -> None:
    """TRAP: steps and epochs begin again, so that nothing tells it from a rerun."""
    musubi(tmp_path)
    for step in (10, 20):
        metadata = kohya_metadata(step, 0, session="2", ss_num_train_items="40")
        write(kohya_keys(step), tmp_path / f"name-step{step:08d}.safetensors", metadata)
    runs, _ = search(tmp_path)
    assert sorted([c.step for c in run.checkpoints] for run in runs) == [[10, 20], [30, 40, 50, 60]]
