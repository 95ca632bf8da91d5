"""What is said before a long scan."""

from collections.abc import Callable
from pathlib import Path

import pytest
from factories import peft_run

import lora_forensics as lf
from lora_forensics import measure
from lora_forensics.console import console_progress
from lora_forensics.estimate import Estimate
from lora_forensics.measure import MeasureOptions, Progress, measure_run


class Listener(Progress):
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.told: list[tuple[str, Estimate]] = []

    def expect(self, run: str, estimate: Callable[[], Estimate]) -> None:
        """Ask at once."""
        self.told.append((run, estimate()))


def test_large_runs_are_estimated_from_what_is_to_be_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Modules, checkpoints and bytes are those that the scan then measures; a small run is not worth a word."""
    written = peft_run(tmp_path)
    run = next(found for found in lf.discover_runs(written.path) if isinstance(found, lf.Run))
    quiet, told = Listener(), Listener()
    measure_run(run, written.base, options=MeasureOptions(progress=quiet))
    assert not quiet.told
    monkeypatch.setattr(measure, "_LARGE", 0)
    known = measure_run(run, written.base, options=MeasureOptions(progress=told))
    ((name, found),) = told.told
    assert name == run.name
    assert found.checkpoints == len(run.checkpoints)
    assert found.modules == known.layers["module"].n_unique()
    entries = sum(
        rows * columns for _, rows, columns in known.layers.select("module", "rows", "columns").unique().rows()
    )
    assert found.to_read == sum(checkpoint.size for checkpoint in run.checkpoints) + 2 * entries
    assert 0 < found.seconds < 600
    assert found.memory > 1e8
    measure_run(run, written.base, known=known, options=MeasureOptions(progress=told))
    assert len(told.told) == 1


def test_only_long_scans_are_announced_and_only_if_anything_may_be_said(capsys: pytest.CaptureFixture[str]) -> None:
    """One line in a log or above the bar."""
    with console_progress(enabled=True) as progress:
        progress.expect("short", lambda: Estimate(30, 1 << 30, 4, 10, 10**9))
        progress.expect("long", lambda: Estimate(600, 1_300_000_000, 224, 100, 16 * 10**9))
    with console_progress(enabled=False) as progress:
        progress.expect("quiet", lambda: Estimate(600, 1 << 30, 4, 10, 10**9))
    out, err = capsys.readouterr()
    line = "long: about 10 minutes and 1.3 GB of memory for 224 modules at 100 checkpoints (16.0 GB to read)\n"
    assert (out, err) == ("", line)
