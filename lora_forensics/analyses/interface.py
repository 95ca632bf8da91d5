"""How an analysis declares itself: columns, and a function of one weight and one change of it, both as matrices."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_forensics.series import Column

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.analyses.frozen import Frozen


@dataclass(frozen=True, slots=True)
class Analysis:
    """Columns of layers.parquet that are only filled when asked for by name: they need W and D as matrices."""

    name: str
    """In `--analysis`."""
    about: str
    columns: tuple[Column, ...]
    compute: Callable[[Frozen, Tensor, int | None], tuple[float, ...]]
    """The weight, a finite change of it (rows, columns), and the adapter's rank to a value for each column."""
