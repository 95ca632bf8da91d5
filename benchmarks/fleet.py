"""Many tiny runs: written, scanned, killed and resumed, read back. `python benchmarks/fleet.py FOLDER [--runs 1000]`.

Each step runs in a process of its own; printed are its wall time, its processor time with its workers', and the
largest resident memory of one of its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

QUERIES = {
    "runs.parquet, past their turning point": (
        "pl.scan_parquet(out + '/runs.parquet').filter('last_is_past_turning_point').select(pl.len())"
    ),
    "layers.parquet, mean cosine of a role": (
        "pl.scan_parquet(out + '/**/layers.parquet').filter(pl.col('role') == 'q').group_by('step')"
        ".agg(pl.col('cosine').mean()).sort('step')"
    ),
    "layers.parquet, one run": (
        "pl.scan_parquet(out + '/**/layers.parquet').filter(pl.col('run') == 'r00500').select(pl.len())"
    ),
}


def main() -> None:
    """Print a table; write its numbers beside the folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--checkpoints", type=int, default=20)
    parser.add_argument("--engine", action="append", help="serial, processes, ray; repeatable")
    parser.add_argument("--plots", action="store_true", help="draw figures, too")
    parser.add_argument("--pages", action="store_true", help="also render HTML pages of all runs")
    given = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    runs = given.folder / "runs"
    if not runs.exists():
        code = f"import fleet; fleet.write_fleet({str(runs)!r}, {given.runs}, {given.checkpoints})"
        subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=True)  # torch stays out of here
    flags = [] if given.plots else ["--no-plots"]
    for engine in given.engine or ["serial", "processes"]:
        out = given.folder / f"out-{engine}"
        shutil.rmtree(out, ignore_errors=True)
        scan = [sys.executable, "-m", "lora_forensics", "scan", runs, "--out", out, "-q", "--engine", engine, *flags]
        after = random.Random(0).uniform(5, 15)  # noqa: S311 (no secret)
        step(found, f"scan, {engine}, killed", scan, kill_after=after)
        stored = len(list(out.rglob("layers.parquet")))
        print(f"  {stored} runs are stored")
        step(found, f"scan, {engine}, the rest", scan)
        step(found, f"scan, {engine}, nothing new", scan)
    for name, query in QUERIES.items():
        code = f"import polars as pl; out = {str(out)!r}; print({query}.collect().shape)"
        step(found, name, [sys.executable, "-c", code])
    if given.pages:
        step(found, "the same again, with pages", [*scan, "--report", "html"])
        size = sum(page.stat().st_size for page in out.rglob("*.html"))
        print(f"  {size / 1e6:.0f} MB of pages, {(out / 'index.html').stat().st_size / 1e6:.2f} MB of them the index")
    (given.folder / "fleet.json").write_text(json.dumps(found, indent=1))


def write_fleet(folder: str | Path, runs: int, checkpoints: int) -> None:
    """Runs of PEFT's layout; the files of a run are those of the first, under other times."""
    from cli_runs import project

    folder = Path(folder)
    project(folder, ["r00000"], count=checkpoints)
    for number in range(1, runs):
        shutil.copytree(folder / "r00000", folder / f"r{number:05}", copy_function=shutil.copyfile)


def step(
    found: dict[str, dict[str, float]], name: str, command: list[str | Path], kill_after: float | None = None
) -> None:
    """Run a command, killed after so many seconds, and print what it took."""
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    started = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], env=environment, stdout=subprocess.DEVNULL)
    killer = threading.Timer(kill_after or 0, process.kill)
    if kill_after is not None:
        killer.start()
    _, _, usage = os.wait4(process.pid, 0)
    killer.cancel()
    wall = time.monotonic() - started
    taken = {"seconds": wall, "processor_seconds": usage.ru_utime + usage.ru_stime, "megabytes": usage.ru_maxrss / 1024}
    found[name] = taken
    print(f"{name:44} {wall:8.1f} s {taken['processor_seconds']:8.1f} s {taken['megabytes']:8.0f} MB", flush=True)


if __name__ == "__main__":
    main()
