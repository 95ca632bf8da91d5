"""Row moments: what nearly every metric follows from, for many checkpoints at once.

For one module with frozen weight W (rows x columns) and changes D_t: `w2_n = |W_n|^2`, `dot_n = <W_n, D_n>`,
`d2_n = |D_n|^2` over the output rows n. Each module here computes them for one algebraic form of D.
"""

from __future__ import annotations

from lora_forensics.moments.arithmetic import count_nonfinite, full_precision, times, widened
from lora_forensics.moments.dense import DenseChange
from lora_forensics.moments.interface import SMALL_WEIGHT, Change, Moments, Weight
from lora_forensics.moments.low_rank import LowRankChange, WeightedLowRankChange

__all__ = [
    "SMALL_WEIGHT",
    "Change",
    "DenseChange",
    "LowRankChange",
    "Moments",
    "Weight",
    "WeightedLowRankChange",
    "count_nonfinite",
    "full_precision",
    "times",
    "widened",
]
