"""kill -9 at any moment of a scan: nothing is lost, nothing stored is measured twice, the end is the same."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import polars as pl
import pytest
from cli_runs import checkpoint, project
from wholes import contents, killed_scan, measured, scan

from lora_forensics.discovery import discover_runs
from lora_forensics.measure import measure_run
from lora_forensics.records import Run
from lora_forensics.series import read_table

pytestmark = pytest.mark.skipif(os.name == "nt", reason="needs signals")


def size_of(runs: Path) -> int:
    """Bytes of one checkpoint."""
    return next(run for run in discover_runs(runs) if isinstance(run, Run)).checkpoints[0].size


def survives(arguments: list[str | Path], out: Path, calm: Path, total: int, seed: int, kills: int = 3) -> None:
    """Scans that are killed only ever add to what is stored; the last one measures the rest, and that alone."""
    scan(*arguments, "--out", calm)
    chance = random.Random(seed)
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
    assert killed_scan(tmp_path / "out", arguments, random.Random(3), 10)
    layers, known = read_table(tmp_path / "out" / "run" / "layers.parquet"), measured(tmp_path / "out")
    assert {("run", name) for name in layers["checkpoint"]} == known
    assert layers.group_by("checkpoint").len()["len"].to_list() == [3] * len(known)


def test_a_checkpoint_that_is_put_between_renews_its_successor(tmp_path: Path) -> None:
    """Rotation and step size are those of a scan that saw it from the start."""
    runs = project(tmp_path / "runs", count=12)
    away = (runs / "run" / "checkpoint-60").rename(tmp_path / "checkpoint-60")
    scan(runs, "--out", tmp_path / "out")
    away.rename(runs / "run" / "checkpoint-60")
    assert scan(runs, "--out", tmp_path / "out") == "measured 2 new checkpoints; 10 known before"
    (run,) = (found for found in discover_runs(runs) if isinstance(found, Run))
    whole, layers = measure_run(run).layers, read_table(tmp_path / "out" / "run" / "layers.parquet")
    for column in ("step_size", "rotation"):
        both = zip(layers.filter(step=70)[column], whole.filter(step=70)[column], strict=True)
        assert all(one == pytest.approx(other, rel=1e-9) for one, other in both)
    assert layers.drop("step_size", "rotation").equals(whole.drop("step_size", "rotation")) or len(layers) == len(whole)


def test_what_changed_on_disk_is_noticed(tmp_path: Path) -> None:
    """Another time, another size, another header; and `--rescan` measures all, though nothing changed."""
    runs = project(tmp_path / "runs", count=12)
    out = tmp_path / "out"
    scan(runs, "--out", out)
    touched = runs / "run" / "checkpoint-50" / "adapter_model.safetensors"
    os.utime(touched, (1, 1))
    assert scan(runs, "--out", out).startswith("measured 2 new")
    first = runs / "run" / "checkpoint-120"
    stat = (first / "adapter_model.safetensors").stat()
    checkpoint(first, 999)
    os.utime(first / "adapter_model.safetensors", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    checkpoint(runs / "run" / "checkpoint-10", 11, base="../base.safetensors")
    assert scan(runs, "--out", out).startswith("measured 2 new")  # the first and its successor
    assert scan(runs, "--out", out, "--rescan").startswith("measured 12 ")


def test_a_scan_that_dies_between_two_files_is_noticed(tmp_path: Path) -> None:
    """Tables of a new file beside verdict and series of the old one: they are made again, though the verdict says as
    little as before."""
    runs = project(tmp_path / "runs", count=4)
    out = tmp_path / "out"
    scan(runs, "--out", out)
    old = {name: (out / "run" / name).read_bytes() for name in ("series.parquet", "verdict.json")}
    checkpoint(runs / "run" / "checkpoint-20", 77, base="../base.safetensors")
    scan(runs, "--out", out)
    new = contents(out)
    for name, content in old.items():
        (out / "run" / name).write_bytes(content)
    assert scan(runs, "--out", out).startswith("nothing new")
    assert contents(out) == new
    assert new["run/series.parquet"] != old["series.parquet"]
