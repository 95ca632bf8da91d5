"""How a change lies to the leading singular subspace of its weight, and what it does to the singular values."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.analyses.interface import Analysis
from lora_forensics.series import Column

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.analyses.frozen import Frozen

_NO_RANK = 16
"""k for kinds without a rank."""
_SOURCE = "Sun et al., SVFit, 2024; Meng et al., PiSSA, 2024"


def _compute(frozen: Frozen, delta: Tensor, rank: int | None) -> tuple[float, ...]:
    from lora_forensics.analyses.frozen import leading_triples

    known = frozen.decomposition
    size = min(rank or _NO_RANK, len(known.right))
    left, right, before = (part[:size] for part in (known.left.mT, known.right, known.values))
    inside = left @ delta @ right.mT
    _, after, _ = leading_triples(frozen.matrix + delta, size)
    return float((inside.norm() / delta.norm()).square()), float((after - before).norm() / before.norm())


subspace = Analysis(
    "subspace",
    "share of the change inside the leading singular subspace of W, and how far its singular values move",
    (
        Column(
            "subspace_share",
            "Float64",
            "share of the change's energy between the k leading left and right singular vectors of W, k the rank (16 "
            "where there is none); with --analysis subspace",
            formula="|U_k^T D V_k|^2 / |D|^2",
            source=_SOURCE,
        ),
        Column(
            "singular_value_change",
            "Float64",
            "relative change of the k leading singular values; with --analysis subspace",
            formula="|s_k(W + D) - s_k(W)| / |s_k(W)|",
            source=_SOURCE,
        ),
    ),
    _compute,
)
