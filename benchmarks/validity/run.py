"""The whole study: trains, measures, scores, and writes docs/validity.md with its figures.

python benchmarks/validity/run.py [--small] [--work DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import multiprocessing
import os
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

HERE = Path(__file__).parent
FIXED = (
    "candidates.py",
    "score.py",
    "settings.py",
    "families.py",
    "data.py",
    "train.py",
    "columns.py",
    "replication.py",
)
"""Files that decide what is trained and how it is scored: fixed before the fresh sets were trained."""


PRIMARY = """Compared on the confirmation set, decided now:
1. "half of the path" (no constant, from the files; best of the main set within error, with "half of B's path") against
   "middle"; every save and 40, 20, 10 checkpoints.
2. "algorithm1, auto window" against "middle" and against "random walk, auto window".
3. "dose * sqrt(rank) / samples" against "fixed step, tuned" and "middle"; its counterpart "B moved per row / samples".
4. "training loss against its start" and "share of the whole path" (best of the tuned) against "middle"."""
"""What the confirmation set is asked."""


def work_on(work: Path, setting: object) -> str:
    """Train and measure one run."""
    import torch
    from columns import measure
    from holdout import group_losses
    from train import train

    torch.set_num_threads(1)
    train(setting, work)  # type: ignore[arg-type]
    path = work / "runs" / f"{setting.group}-{setting.name}.safetensors"  # type: ignore[attr-defined]
    measure(path)
    group_losses(path, work)
    return path.as_posix()


def train_all(settings: Sequence[object], work: Path, jobs: int) -> list[Path]:
    """Train what is not there yet, several at a time."""
    start = time.perf_counter()
    paths = []
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        for number, path in enumerate(pool.map(partial(work_on, work), settings), start=1):
            paths.append(Path(path))
            print(f"{number:3d}/{len(settings)} {Path(path).stem}  {time.perf_counter() - start:.0f} s", flush=True)
    return paths


def hashes() -> dict[str, str]:
    """sha256 of the files that are fixed beforehand."""
    return {name: hashlib.sha256((HERE / name).read_bytes()).hexdigest() for name in FIXED}


def preregister() -> None:
    """Write the hashes with the time; nothing is overwritten."""
    path = HERE / "PREREGISTERED.txt"
    assert not path.exists(), "already written"
    lines = [f"{digest}  {name}" for name, digest in hashes().items()]
    stamp = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    head = f"Fixed at {stamp}, before the confirmation set was trained."
    path.write_text("\n".join([head, "", PRIMARY, "", *lines, ""]), "utf-8")


def unchanged() -> bool:
    """Whether the files are those that were fixed."""
    path = HERE / "PREREGISTERED.txt"
    return path.exists() and all(f"{digest}  {name}" in path.read_text("utf-8") for name, digest in hashes().items())


def main() -> None:
    """Parse the arguments and run everything."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--small", action="store_true", help="one run a domain; writes its page into the work folder")
    parser.add_argument("--work", type=Path, help="folder for runs and base models; kept, and used again")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default 2)")
    parser.add_argument("--external", type=Path, help="folder with runs of an earlier study (runs.parquet)")
    parser.add_argument("--main-only", action="store_true", help="stop before the confirmation set")
    parser.add_argument("--preregister", action="store_true", help="write PREREGISTERED.txt and stop")
    arguments = parser.parse_args()
    if arguments.preregister:
        preregister()
        return
    work = arguments.work or Path(tempfile.mkdtemp(prefix="validity-"))
    start = time.perf_counter()
    from replication import replication_settings
    from results import evaluate
    from settings import confirmation_settings, main_settings

    paths = {"main": train_all(main_settings(arguments.small), work, arguments.jobs)}
    if arguments.main_only:
        return
    paths["confirmation"] = train_all(confirmation_settings(arguments.small), work, arguments.jobs)
    paths["replication"] = train_all(replication_settings(arguments.small), work, arguments.jobs)
    results = evaluate(paths, work, arguments.external)
    from figures import draw
    from page import write

    docs = work if arguments.small else HERE.parents[1] / "docs"
    images = docs / "images" / "validity"
    images.mkdir(parents=True, exist_ok=True)
    draw(results, images)
    seconds = time.perf_counter() - start
    write(results, docs / "validity.md", unchanged(), arguments.small)
    summary = {"seconds": round(seconds), "unchanged": unchanged(), "work": work.as_posix()}
    print(json.dumps(summary), docs / "validity.md")


if __name__ == "__main__":
    main()
