"""Intruder dimensions: leading singular vectors of W + D that are far from every one of W."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.analyses.interface import Analysis
from lora_forensics.series import Column

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.analyses.frozen import Frozen

LEADING = 10
"""k of the paper: how many singular vectors of W + D are looked at."""
FAR = 0.5
"""Epsilon of the paper: no cosine with a singular vector of W reaches it."""
_PAPER = "Shuttleworth et al., LoRA vs Full Fine-tuning: An Illusion of Equivalence, 2024, Algorithm 1"


def _compute(frozen: Frozen, delta: Tensor, _rank: int | None) -> tuple[float, ...]:
    from lora_forensics.analyses.frozen import leading_triples

    moved, _, _ = leading_triples(frozen.matrix + delta, LEADING)
    nearest = (frozen.decomposition.left.mT @ moved).abs().amax(dim=0)
    return int((nearest < FAR).sum()), float(nearest.min())


intruders = Analysis(
    "intruders",
    "intruder dimensions: leading singular vectors of W + D that W does not have",
    (
        Column(
            "intruder_dimensions",
            "Int64",
            f"how many of the {LEADING} leading left singular vectors y of W + D have no cosine of {FAR} or more with "
            "any of W; with --analysis intruders",
            "vectors",
            f"|{{j <= {LEADING}: max_i |cos(u_i, y_j)| < {FAR}}}|",
            _PAPER,
        ),
        Column(
            "intruder_cosine",
            "Float64",
            "of these leading vectors, the largest cosine with one of W, of the one for which it is lowest",
            "",
            "min_j max_i |cos(u_i, y_j)|",
            _PAPER,
        ),
    ),
    _compute,
)
