"""`pick`: the path of the checkpoint to keep."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import click

from lora_forensics.commands.configured import configured, selecting
from lora_forensics.commands.parameters import PLACE
from lora_forensics.commands.printing import complain
from lora_forensics.commands.scanning import assessing, measuring, scan_options


@click.command()
@click.argument("run", type=PLACE)
@measuring
@assessing
@selecting
@configured
def pick(run: Path, **settings: Any) -> int:
    """Print the path of the checkpoint to keep, and nothing else; exit 1 with the reason if there is none.

    RUN is a folder with one run, or FOLDER/NAME where several share a folder. Measures what is new first.
    On a terminal, a path with control characters is quoted as $'...'; in a pipe it is the path's own bytes.
    Example: lora-forensics pick sample_runs/text_peft
    """
    from lora_forensics.measure import Progress
    from lora_forensics.scan import pick_checkpoint

    path, reason = pick_checkpoint(run, scan_options(settings, (), Progress()))
    if path is None:
        complain(reason)
        return 1
    terminal = sys.stdout.isatty()
    click.echo(_spelt(str(path)) if terminal else path if os.name == "nt" else os.fsencode(str(path)))
    return 0


def _spelt(path: str) -> str:
    """A path as a shell reads it: what no terminal should be sent is spelt in octal."""
    if path.isprintable():
        return path
    safe = (c if c.isprintable() and c not in "'\\" else _octal(c) for c in path)
    return f"$'{''.join(safe)}'"


def _octal(character: str) -> str:
    return "".join(f"\\{byte:03o}" for byte in os.fsencode(character))
