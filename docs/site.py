"""Pages of the site that are made: the start page from the README, the quick start from the trainers' table."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))


def on_files(files: Files, config: Any) -> Files:
    """Add them; `config` is mkdocs' own."""
    for name, text in (("index.md", start()), ("quickstart.md", quickstart())):
        files.append(File.generated(config, name, content=text))
    return files


def start() -> str:
    """The README with links as seen from here."""
    text = (ROOT / "README.md").read_text("utf-8")
    text = text.replace("](docs/", "](")
    return re.sub(r"\[([^\]]*)\]\((?:sample_runs|benchmarks|tests)/[^)]*\)", r"\1", text)


def quickstart() -> str:
    """For every trainer: what it leaves, what misleads in it, and how to save more often."""
    from lora_forensics.checkpoints import TRAINERS

    lines = [
        "# Quick start by trainer",
        "",
        "    pip install lora-forensics",
        "    lora-forensics scan RUNS",
        "",
        "`RUNS` is the folder that your trainer wrote, or one above it. The answer needs at least 9 checkpoints of",
        "a run, and 30 or more are better. Nothing has to be said of the trainer: it is recognised by its files.",
        "",
    ]
    for name, trainer in sorted(TRAINERS.items(), key=lambda item: (item[0] not in ("peft", "kohya"), item[0])):
        lines += [f"## {name}", "", f"{trainer.about}. Recognised by {trainer.recognised}.", ""]
        lines += [f"To save more often: {trainer.save_more_often}.", ""]
        if trainer.traps:
            lines += ["What misleads, and is taken care of:", "", *(f"- {trap.text}" for trap in trainer.traps), ""]
    return "\n".join(line.replace("<", "&lt;") for line in lines) + "\n"
