"""Row moments: what nearly every metric follows from, for many checkpoints at once.

For one module with frozen weight W (rows x columns) and changes D_t: `w2_n = |W_n|^2`, `dot_n = <W_n, D_n>`,
`d2_n = |D_n|^2` over the output rows n. Each module here computes them for one algebraic form of D.
"""

from __future__ import annotations

from lora_forensics.moments.arithmetic import (
    count_nonfinite,
    fitting,
    full_precision,
    mask_nonfinite,
    singular_triples,
    times,
    tucker_down,
    wide_device,
    widened,
)
from lora_forensics.moments.dense import DenseChange, FormedChange, GivenChange
from lora_forensics.moments.hadamard import DenseHadamardChange, HadamardChange, hadamard_change
from lora_forensics.moments.interface import SMALL_WEIGHT, Change, Moments, Weight, begun_anew
from lora_forensics.moments.kronecker import KroneckerChange
from lora_forensics.moments.low_rank import LowRankChange, WeightedLowRankChange
from lora_forensics.moments.scaled import DenseScaledChange, ScaledChange, decomposed
from lora_forensics.moments.stacked import StackedLowRankChange

__all__ = [
    "SMALL_WEIGHT",
    "Change",
    "DenseChange",
    "DenseHadamardChange",
    "DenseScaledChange",
    "FormedChange",
    "GivenChange",
    "HadamardChange",
    "KroneckerChange",
    "LowRankChange",
    "Moments",
    "ScaledChange",
    "StackedLowRankChange",
    "Weight",
    "WeightedLowRankChange",
    "begun_anew",
    "count_nonfinite",
    "decomposed",
    "fitting",
    "full_precision",
    "hadamard_change",
    "mask_nonfinite",
    "singular_triples",
    "times",
    "tucker_down",
    "wide_device",
    "widened",
]
