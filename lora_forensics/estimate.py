"""How long a run will take and how much memory, told before the work starts: from headers and two small products."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import torch

from lora_forensics.adapters import read_layout, read_settings
from lora_forensics.records import Checkpoint
from lora_forensics.stacking import BATCHES
from lora_forensics.tensors import open_tensors

_READING = 1.5e9
"""Bytes a second that are read and taken in, where nothing better is known: an SSD."""
_OTHER_KINDS = 4
"""A change that is no product of two thin factors takes about so many times what LoRA of its rank takes
(benchmarks/adapters.py)."""
_EACH = 5e-3
"""Seconds that a module takes however small it is, for all checkpoints that are worked on together."""
_INTERPRETER = 400e6
"""Bytes of Python, torch and its own buffers."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """What measuring some checkpoints of a run will take, to within a factor of about two."""

    seconds: float
    memory: int
    """Bytes of the process at its largest."""
    modules: int
    checkpoints: int
    to_read: int
    """Bytes of checkpoints and base."""


def estimate(checkpoints: list[Checkpoint], together: int, memory: int, device: str, base: bool) -> Estimate:
    """From the header of the last checkpoint; `together` of them are worked on at once.

    Raises:
        CheckpointError: that file is damaged.
    """
    last = checkpoints[-1]
    file = open_tensors(last.path)
    modules = read_layout(file.infos, read_settings(last.config, file.metadata)).modules.values()
    products = grams = entries = largest = 0
    for module in modules:
        rows, columns = module.layout.rows or 1024, module.layout.columns or 1024
        rank = module.layout.rank or 16
        times = 1 if module.kind == "lora" else _OTHER_KINDS
        products += times * 2 * rows * columns * rank
        grams += times * 2 * 3 * (rows + columns) * rank**2
        entries += rows * columns
        largest = max(largest, 4 * (rows + columns) * rank)
    count = len(checkpoints)
    width = min(count, together)
    units = -(-count // together)
    to_read = sum(checkpoint.size for checkpoint in checkpoints) + (2 * entries * units if base else 0)
    computing = count * (products * base / _rate(torch.float32, device) + grams / _rate(torch.float64, device))
    held = 2 * max(memory // BATCHES, width * largest) + 4 * width * largest
    seconds = max(computing * 1.2, to_read / _READING) + _EACH * len(modules) * units
    return Estimate(seconds, int(_INTERPRETER + held), len(modules), count, to_read)


def _rate(dtype: torch.dtype, device: str) -> float:
    """Operations a second of a product of some width, measured."""
    wide = torch.device(device)
    first = torch.ones(1024, 1024, dtype=dtype, device=wide)
    second = torch.ones(1024, 256, dtype=dtype, device=wide)
    best = math.inf
    for _ in range(3):
        begin = time.perf_counter()
        float((first @ second)[0, 0])  # also waits for the device
        best = min(best, time.perf_counter() - begin)
    return 2 * 1024 * 1024 * 256 / best
