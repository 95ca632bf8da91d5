"""Tables of synthetic runs, for the tests of the reading half."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl


def layers_of(cosines: Mapping[str, Sequence[float | None]], every: int = 10, **columns: Any) -> pl.DataFrame:
    """A layers table: the cosines of each module at steps `every`, 2 `every`, ...; `columns` are the same for all."""
    rows = [
        {"run": "r", "step": every * place, "module": module, "cosine": value}
        for module, values in cosines.items()
        for place, value in enumerate(values, start=1)
    ]
    types = {"run": pl.String, "step": pl.Int64, "module": pl.String, "cosine": pl.Float64}
    return pl.DataFrame(rows, schema=types).with_columns(**{name: pl.lit(value) for name, value in columns.items()})


def checkpoints_of(count: int, every: int = 10, **columns: Any) -> pl.DataFrame:
    """A checkpoints table for steps `every`, 2 `every`, ...; values of `columns` are lists, or the same for all."""
    steps = [every * place for place in range(1, count + 1)]
    frame = pl.DataFrame({"run": ["r"] * count, "step": steps, "checkpoint": [f"c{step}" for step in steps]})
    listed = {name: pl.Series(v, strict=False) if isinstance(v, list) else pl.lit(v) for name, v in columns.items()}
    return frame.with_columns(**listed)


def wavy(count: int, period: float = 12.0) -> list[float]:
    """A cosine whose fluctuation has a valley about every half period: what a turning point needs."""
    return [1e-3 + 1e-4 * math.sin(2 * math.pi * (t + 0.3) / period) for t in range(count)]


def noisy(count: int, seed: int = 0) -> list[float]:
    """A random walk of the size of real cosines."""
    return np.cumsum(np.random.default_rng(seed).normal(0, 1e-5, count)).tolist()


def straight(count: int) -> list[float]:
    """A cosine that saturates: no valley at all."""
    return [1e-3 * (1 - math.exp(-t / (count / 3))) for t in range(count)]
