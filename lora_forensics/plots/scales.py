"""When the axis of values is logarithmic, and where it ends."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

_LOG_FROM = 100.0
"""Ratio of largest to smallest value from which a logarithmic scale is easier to read."""
_LEAST = 1e-6
"""Of the median: what is smaller is what arithmetic leaves where nothing moves (1e-17 beside 1e-6)."""


def log_floor(values: Sequence[float]) -> float | None:
    """The lower end of a logarithmic axis; None where a linear one shows the values as well, or one is not positive."""
    if not values or not 0 < min(values) * _LOG_FROM <= max(values):
        return None
    return max(min(values), _LEAST * median(values))


def below(values: Sequence[float]) -> str:
    """That some values lie on the lower edge of the axis; '' where none does."""
    floor = log_floor(values)
    many = sum(value < floor for value in values) if floor is not None else 0
    if not many:
        return ""
    said = "1 value is smaller and stands" if many == 1 else f"{many} values are smaller and stand"
    return f" The axis ends at a millionth of the median, {floor:.0e}: {said} on its edge."
