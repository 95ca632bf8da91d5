"""kill -9 at random moments of scans, then to the end: what is stored, what is measured twice, what differs.

`python benchmarks/kills.py FOLDER [--kills 20] [--engine processes]`: half of the kills in one long run of small units
of work, half in a fleet. Ends with an error where something is lost, measured twice, or different.
"""

from __future__ import annotations

import argparse
import random
import re
import shutil
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests")]

from cli_runs import project  # noqa: E402
from wholes import contents, killed_scan, measured, scan  # noqa: E402


def main() -> None:
    """Both cases, one after the other."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--engine", default="serial")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    for name, names, count, memory in (("long", ["one"], 200, 30_000), ("fleet", fleet(100), 4, 1 << 30)):
        runs = given.folder / name
        shutil.rmtree(runs, ignore_errors=True)
        project(runs / "runs", names, count=count)
        work = [runs / "runs", "--no-plots", "--engine", given.engine, "--memory", str(memory)]
        suffer(runs, work, len(names) * count, given.kills // 2, given.seed)


def fleet(count: int) -> list[str]:
    """Names of runs."""
    return [f"r{number:03}" for number in range(count)]


def suffer(folder: Path, work: list[str | Path], total: int, kills: int, seed: int) -> None:
    """Kill so many scans of a folder, let one end, and compare with one that was never killed."""
    chance = random.Random(seed)  # noqa: S311 (no secret)
    out = folder / "out"
    scan(*work, "--out", folder / "calm")
    done = 0
    while done < kills:
        before = measured(out)
        if len(before) == total:  # it got to its end in spite of all: once more from the start
            finish(out, work, total)
            shutil.rmtree(out)
            before = set()
        done += killed_scan(out, [*work, "--out", out], chance, total // kills)
        after = measured(out)
        assert before <= after, sorted(before - after)
        print(f"{folder.name}: kill {done:2}: {len(before):4} of {total} before, {len(after):4} after", flush=True)
    finish(out, work, total)
    print(f"{folder.name}: {done} kills, and all as in a scan without one", flush=True)


def finish(out: Path, work: list[str | Path], total: int) -> None:
    """A scan to the end measures what is not stored, and that alone; every file is as if none had been killed."""
    known = len(measured(out))
    said = scan(*work, "--out", out)
    assert [int(number) for number in re.findall(r"\d+", said)] in ([total - known, known], [known]), said
    one, other = contents(out), contents(out.parent / "calm")
    assert one == other, sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))


if __name__ == "__main__":
    main()
