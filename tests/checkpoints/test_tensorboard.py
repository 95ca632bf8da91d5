"""Scalars of TensorBoard logs that the real SummaryWriter wrote."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from factories import library, tensorboard_log

from lora_forensics.checkpoints.logs.tensorboard import event_files, started, tensorboard_scalars


def test_scalars_come_back_with_their_steps(tmp_path: Path) -> None:
    """Every tag is a curve."""
    tensorboard_log(tmp_path, {"loss/current": {10: 0.5, 20: 0.25}, "lr/unet": {10: 1e-4}})
    log = tensorboard_scalars(tmp_path)
    assert log.curves["loss/current"].steps == (10, 20)
    assert log.curves["loss/current"].values == (0.5, 0.25)
    assert log.first("lr/unet").values == (pytest.approx(1e-4),)
    assert log.first("nobody").steps == ()
    assert not log.findings


def test_images_histograms_and_texts_are_passed_over(tmp_path: Path) -> None:
    """Large records are skipped without reading them, small ones that are no numbers too."""
    torch = library("torch")
    writer = library("torch.utils.tensorboard").SummaryWriter(tmp_path)
    writer.add_scalar("loss", 1.0, 1)
    writer.add_histogram("h", torch.arange(1000.0), 1)
    writer.add_image("sample", torch.rand(3, 300, 300), 1)
    writer.add_text("prompt", "a cat", 1)
    writer.add_scalar("loss", 2.0, 2)
    writer.add_scalar("loss", 3.0, 3, new_style=True)
    writer.close()
    assert event_files(tmp_path)[0].stat().st_size > 1 << 17
    log = tensorboard_scalars(tmp_path)
    assert {tag: curve.values for tag, curve in log.curves.items()} == {"loss": (1.0, 2.0, 3.0)}


def test_after_a_restart_the_last_value_of_a_step_counts(tmp_path: Path) -> None:
    """Two event files in one folder are one log."""
    tensorboard_log(tmp_path, {"loss": {10: 1.0, 20: 2.0}}, stamp=1_700_000_000)
    tensorboard_log(tmp_path, {"loss": {20: 5.0, 30: 6.0}}, stamp=1_700_009_999)
    assert [started(file) for file in event_files(tmp_path)] == [1_700_000_000.0, 1_700_009_999.0]
    assert tensorboard_scalars(tmp_path).curves["loss"].values == (1.0, 5.0, 6.0)


@pytest.mark.parametrize("kept", [10, 5])
def test_a_log_that_is_being_written_is_read_as_far_as_it_goes(kept: int, tmp_path: Path) -> None:
    """A torn last record is no damage."""
    (file,) = tensorboard_log(tmp_path, {"loss": {step: float(step) for step in range(100)}})
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) * kept // 10 - (kept < 10)])
    log = tensorboard_scalars(tmp_path)
    values = log.curves["loss"].values
    assert values == tuple(map(float, range(len(values))))
    assert len(values) == pytest.approx(10 * kept, abs=5)
    assert not log.findings


def test_a_damaged_log_gives_a_finding(tmp_path: Path) -> None:
    """Bytes that are no records: what stands before them is read."""
    (file,) = tensorboard_log(tmp_path, {"loss": {1: 1.0, 2: 2.0}})
    file.write_bytes(file.read_bytes() + b"\xff" * 64)
    log = tensorboard_scalars(tmp_path)
    assert log.curves["loss"].values == (1.0, 2.0)
    assert [finding.rule for finding in log.findings] == ["log-unreadable"]


def test_text_instead_of_a_log_gives_a_finding(tmp_path: Path) -> None:
    """Foreign content under the right name."""
    (tmp_path / "events.out.tfevents.1.host").write_text("nothing of the kind " * 10)
    log = tensorboard_scalars(tmp_path)
    assert not log.curves
    assert log.findings


def test_without_logs_there_is_nothing_and_no_finding(tmp_path: Path) -> None:
    """Nor where there is no folder."""
    assert tensorboard_scalars(tmp_path) == tensorboard_scalars(tmp_path / "none")
    assert not tensorboard_scalars(tmp_path).findings


def test_without_the_library_the_finding_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logs are there and cannot be read: it is said how."""
    tensorboard_log(tmp_path, {"loss": {1: 1.0}})
    monkeypatch.setitem(sys.modules, "tensorboard.compat.proto.event_pb2", None)
    (finding,) = tensorboard_scalars(tmp_path).findings
    assert "lora-forensics[logs]" in finding.hint
