"""kill -9 at any moment of a scan: nothing is lost, nothing stored is measured twice, the end is the same."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import polars as pl
import pytest
from cli_runs import checkpoint, project
from click.testing import CliRunner
from polars.testing import assert_frame_equal
from safetensors.torch import load_file, save_file
from wholes import contents, killed_scan, measured, scan

from lora_forensics.cli import main
from lora_forensics.discovery import discover_runs
from lora_forensics.records import Run
from lora_forensics.series import read_table

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals")


def size_of(runs: Path) -> int:
    """Bytes of one checkpoint."""
    return next(run for run in discover_runs(runs) if isinstance(run, Run)).checkpoints[0].size


def survives(arguments: list[str | Path], out: Path, calm: Path, total: int, seed: int, kills: int = 3) -> None:
    """Scans that are killed only ever add to what is stored; the last one measures the rest, and that alone."""
    scan(*arguments, "--out", calm)
    chance = random.Random(seed)  # noqa: S311 (no secret)
    for _ in range(kills):
        before = measured(out)
        killed_scan(out, [*arguments, "--out", out], chance, total // (kills + 1))
        assert before <= measured(out)
    known = len(measured(out))
    said = scan(*arguments, "--out", out)
    counts = [int(number) for number in re.findall(r"\d+", said)]
    assert counts in ([total - known, known], [known], [total]), said
    assert contents(out) == contents(calm)
    for path in out.rglob("layers.parquet"):
        layers = pl.read_parquet(path)
        assert not layers.select("checkpoint", "module").is_duplicated().any()
    assert len(measured(out)) == total


def test_one_long_run_is_killed(tmp_path: Path) -> None:
    """Rows of its first blocks are stored while the rest is measured."""
    runs = project(tmp_path / "runs", count=40)
    arguments: list[str | Path] = [runs, "--memory", str(3 * size_of(runs))]
    survives(arguments, tmp_path / "out", tmp_path / "calm", 40, seed=0)


@pytest.mark.parametrize("engine", ["serial", "processes"])
def test_a_fleet_is_killed(engine: str, tmp_path: Path) -> None:
    """Runs that were finished stay finished."""
    runs = project(tmp_path / "runs", [f"r{number}" for number in range(8)], count=10)
    survives([runs, "--engine", engine], tmp_path / "out", tmp_path / "calm", 80, seed=1, kills=2)


def test_tables_of_a_killed_scan_hold_whole_blocks(tmp_path: Path) -> None:
    """What is stored of a run is a beginning of it with all its modules; what is not has no fingerprint."""
    runs = project(tmp_path / "runs", count=60)
    arguments: list[str | Path] = [runs, "--memory", str(3 * size_of(runs)), "--out", tmp_path / "out"]
    assert killed_scan(tmp_path / "out", arguments, random.Random(3), 10)  # noqa: S311 (no secret)
    layers, known = read_table(tmp_path / "out" / "run" / "layers.parquet"), measured(tmp_path / "out")
    assert {("run", name) for name in layers["checkpoint"]} == known
    assert layers.group_by("checkpoint").len()["len"].to_list() == [3] * len(known)


def call(*arguments: str | Path) -> str:
    """A scan in this process; the last line that it prints."""
    result = CliRunner().invoke(main, ["scan", *map(str, arguments), "--no-plots"])
    assert result.exit_code == 0, result.output
    return result.stdout.strip().splitlines()[-1]


def test_a_checkpoint_that_is_put_between_renews_its_successor(tmp_path: Path) -> None:
    """All numbers, rotation and step size included, are those of a scan that saw it from the start."""
    runs, out = project(tmp_path / "runs", count=12), tmp_path / "out"
    away = (runs / "run" / "checkpoint-60").rename(tmp_path / "checkpoint-60")
    call(runs, "--out", out)
    away.rename(runs / "run" / "checkpoint-60")
    assert call(runs, "--out", out) == "measured 2 new checkpoints; 10 known before"
    call(runs, "--out", tmp_path / "calm")
    late, whole = (read_table(folder / "run" / "layers.parquet") for folder in (out, tmp_path / "calm"))
    assert_frame_equal(late, whole, rel_tol=1e-12, abs_tol=1e-15)


def test_what_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    """Another time, another size, or another header at the same size and time; `--rescan` measures all."""
    runs, out = project(tmp_path / "runs", count=12), tmp_path / "out"
    call(runs, "--out", out)
    weights = [runs / "run" / f"checkpoint-{step}" / "adapter_model.safetensors" for step in (30, 60, 120)]
    os.utime(weights[0], (1, 1))
    assert call(runs, "--out", out) == "measured 2 new checkpoints; 10 known before"
    stat = weights[1].stat()
    weights[1].write_bytes(weights[1].read_bytes().replace(b'"pt"', b'"np"', 1))
    os.utime(weights[1], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert weights[1].stat().st_size == stat.st_size
    assert call(runs, "--out", out) == "measured 2 new checkpoints; 10 known before"
    stat = weights[2].stat()
    save_file(load_file(weights[2]), weights[2], metadata={"format": "pt", "more": "yes"})
    os.utime(weights[2], ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert call(runs, "--out", out) == "measured 1 new checkpoint; 11 known before"
    assert call(runs, "--out", out, "--rescan") == "measured 12 checkpoints"


def test_a_scan_that_dies_between_two_files_is_noticed(tmp_path: Path) -> None:
    """New tables beside verdict and series of the old file: these are made again, though the verdict is the same."""
    runs, out = project(tmp_path / "runs", count=4), tmp_path / "out"
    call(runs, "--out", out)
    old = {name: (out / "run" / name).read_bytes() for name in ("series.parquet", "verdict.json")}
    checkpoint(runs / "run" / "checkpoint-20", 77, base="../base.safetensors")
    call(runs, "--out", out)
    new = contents(out)
    for name, content in old.items():
        (out / "run" / name).write_bytes(content)
    assert call(runs, "--out", out).startswith("nothing new")
    assert contents(out) == new
    assert new["run/series.parquet"] != old["series.parquet"]
