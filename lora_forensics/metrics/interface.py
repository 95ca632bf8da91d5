"""How a metric declares itself: one function over a batch, with its column's description."""

from __future__ import annotations

from collections.abc import Callable
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
    needs_base: bool = False
    """Null without a base model."""
    needs_core: bool = False
    """Null where the change has no low-rank core."""


def metric(
    meaning: str,
    *,
    unit: str = "",
    formula: str = "",
    source: str = "",
    needs_base: bool = False,
    needs_core: bool = False,
) -> Callable[[Callable[[Moments], Tensor]], Metric]:
    """Turn a function into a metric; its column is called as the function is."""

    def declare(function: Callable[[Moments], Tensor]) -> Metric:
        dtype = "Int64" if unit == "entries" else "Float64"
        column = Column(function.__name__, dtype, meaning, unit, formula, source)
        return Metric(column, function, needs_base, needs_core)

    return declare
