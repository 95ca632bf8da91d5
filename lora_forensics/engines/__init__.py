"""Engines: where units of work (a chunk of checkpoints of one run) are measured.

A new engine is one module here with a class that follows `interface.Engine`, and one line in `ENGINES`.
"""

from __future__ import annotations

from lora_forensics.engines.interface import Engine
from lora_forensics.engines.serial import Serial

__all__ = ["ENGINES", "Engine"]

ENGINES: dict[str, type[Engine]] = {
    "serial": Serial,
}
"""Every engine by its name in `--engine`; the first is the default."""
