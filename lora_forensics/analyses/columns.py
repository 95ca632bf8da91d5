"""Magnitude and direction by columns: the convention of kohya's and LyCORIS' `dora_scale` of shape [1, in]."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.analyses.interface import Analysis
from lora_forensics.metrics.norms import DORA, growth_of, turn_of
from lora_forensics.series import Column

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.analyses.frozen import Frozen


def _compute(frozen: Frozen, delta: Tensor, _rank: int | None) -> tuple[float, ...]:
    pairs = ((frozen.matrix, frozen.matrix), (frozen.matrix, delta), (delta, delta))
    terms = [(first * second).double().sum(dim=0) for first, second in pairs]
    return float(growth_of(*terms)), float(turn_of(*terms))


columns = Analysis(
    "columns",
    "magnitude and direction change by columns",
    (
        Column(
            "magnitude_change_columns",
            "Float64",
            "mean over columns of how much the column's length changes; with --analysis columns",
            formula="mean_j | |W_j + D_j| - |W_j| |",
            source=DORA,
        ),
        Column(
            "direction_change_columns",
            "Float64",
            "mean over columns of how much the column turns, zero columns left out; with --analysis columns",
            formula="mean_j 1 - cos(W_j, W_j + D_j)",
            source=DORA,
        ),
    ),
    _compute,
)
