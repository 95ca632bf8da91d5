"""Singular values of the change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments


@metric("largest singular value of the change", formula="s_1", needs=("largest",))
def spectral_norm(batch: Moments) -> Tensor:
    """s_1, (c,)."""
    return batch.singular[:, 0]


@metric(
    "how many directions carry the change, by energy; NaN for a zero change",
    formula="|D|^2 / s_1^2",
    source="Rudelson and Vershynin, Sampling from large matrices, 2007",
    needs=("change", "largest"),
)
def stable_rank(batch: Moments) -> Tensor:
    """Between 1 and the rank, (c,)."""
    return batch.norm2 / batch.singular[:, 0].square()


@metric(
    "how many directions carry the change, by entropy; NaN for a zero change, null where only --spectra tells",
    formula="exp(-sum p log p), p = s / sum(s)",
    source="Roy and Vetterli, The effective rank, 2007",
    needs=("spectrum",),
)
def effective_rank(batch: Moments) -> Tensor:
    """Between 1 and the rank, (c,)."""
    share = batch.singular / batch.singular.sum(dim=-1, keepdim=True)
    return (-(share * share.log()).where(share != 0, 0.0).sum(dim=-1)).exp()
