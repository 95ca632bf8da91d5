"""How a metric declares itself: one function over a batch, with its column's description."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_forensics.series import Column

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments


@dataclass(frozen=True, slots=True)
class Metric:
    """A documented column of layers.parquet and the function that fills it."""

    column: Column
    compute: Callable[[Moments], Tensor]
    """Moments of c checkpoints to (c,) values; NaN where undefined."""
    needs: frozenset[str]
    """What of the moments must be known; null else."""


def metric(
    meaning: str,
    *,
    unit: str = "",
    formula: str = "",
    source: str = "",
    needs: Collection[str] = ("change",),
) -> Callable[[Callable[[Moments], Tensor]], Metric]:
    """Turn a function into a metric; its column is called as the function is."""

    def declare(function: Callable[[Moments], Tensor]) -> Metric:
        dtype = "Int64" if unit == "entries" else "Float64"
        column = Column(function.__name__, dtype, meaning, unit, formula, source)
        return Metric(column, function, frozenset(needs))

    return declare
