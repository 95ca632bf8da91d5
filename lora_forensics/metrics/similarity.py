"""Cosine similarity between a change and the frozen weight below it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric
from lora_forensics.series import PAPER

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments


@metric(
    "cosine of the change and the frozen weight, both flattened; NaN for a zero or non-finite change",
    formula="<D,W> / (|D| |W|)",
    source=f"{PAPER}, Eq. 2",
    needs=("weight", "change"),
)
def cosine(batch: Moments) -> Tensor:
    """Flat cosine, (c,)."""
    return batch.dot.sum(dim=-1) / (batch.norm2 * batch.w2.sum()).sqrt()


@metric(
    "standard deviation of the cosine that comes from rounding the stored adapter to its type; null where not known",
    formula="for B A: 0.23 eps sqrt(2 sum (B * (W A^T))^2) s / (|D| |W|)",
    source="docs/method.md",
    needs=("weight", "change", "noise"),
)
def cosine_noise(batch: Moments) -> Tensor:
    """Storage noise of the flat cosine, (c,)."""
    return batch.dot_noise / (batch.norm2 * batch.w2.sum()).sqrt()


@metric(
    "mean over output rows of the rows' cosines, rows with a zero norm left out; NaN if none is left",
    formula="mean_n <D_n,W_n> / (|D_n| |W_n|)",
    source=f"{PAPER}, the released language-model code",
    needs=("weight", "change"),
)
def cosine_rowwise(batch: Moments) -> Tensor:
    """Row-wise cosine, (c,)."""
    product = batch.d2 * batch.w2
    rows = (batch.dot / product.sqrt()).where(product != 0, 0.0)  # a NaN row stays NaN
    return rows.sum(dim=-1) / (product != 0).sum(dim=-1)
