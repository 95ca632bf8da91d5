"""Whole output folders, for tests that compare them; and scans that are killed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from lora_forensics.series import read_notes

REPOSITORY = Path(__file__).parent.parent


def contents(out: Path) -> dict[str, bytes]:
    """Every file of an output folder that counts; what a killed scan was writing does not."""
    files = (path for path in sorted(out.rglob("*")) if path.is_file() and path.suffix != ".tmp")
    return {path.relative_to(out).as_posix(): path.read_bytes() for path in files}


def measured(out: Path) -> set[tuple[str, str]]:
    """Run and checkpoint of all that an output folder knows as measured."""
    found = set()
    for path in out.rglob("layers.parquet"):
        notes = json.loads(read_notes(path)["lora_forensics.run"])
        found |= {(path.parent.relative_to(out).as_posix(), name) for name in notes["measured"]}
    return found


def scan(*arguments: str | Path) -> str:
    """A scan in a process of its own, to its end; the last line that it prints."""
    found = subprocess.run(_command(arguments), capture_output=True, text=True, env=_environment(), check=True)
    return found.stdout.strip().splitlines()[-1]


def killed_scan(out: Path, arguments: Sequence[str | Path], chance: random.Random, most: int) -> bool:
    """A scan that is killed a moment after it stored some more, up to `most`, checkpoints; whether it was."""
    wanted = len(measured(out)) + chance.randrange(0, most + 1)
    process = subprocess.Popen(
        _command(arguments), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=_environment()
    )
    while process.poll() is None and len(measured(out)) < wanted:
        time.sleep(0.01)
    try:
        process.wait(chance.uniform(0, 0.5))
    except subprocess.TimeoutExpired:
        process.kill()
    return process.wait() < 0


def _command(arguments: Sequence[str | Path]) -> list[str]:
    return [sys.executable, "-m", "lora_forensics", "scan", *map(str, arguments)]


def _environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1"}
