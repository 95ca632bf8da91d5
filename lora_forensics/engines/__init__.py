"""Engines: where units of work (a chunk of checkpoints of one run) are measured.

A new engine is one module here with a class that follows `interface.Engine`, and one line in `ENGINES`.
"""

from __future__ import annotations

from lora_forensics.engines.interface import Engine, EngineSettings
from lora_forensics.engines.processes import Processes
from lora_forensics.engines.ray import Ray
from lora_forensics.engines.serial import Serial

__all__ = ["ENGINES", "Engine", "EngineSettings"]

ENGINES: dict[str, type[Engine]] = {
    "serial": Serial,
    "processes": Processes,
    "ray": Ray,
}
"""Every engine by its name in `--engine`; the first is the default."""
