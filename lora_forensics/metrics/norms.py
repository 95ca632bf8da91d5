"""Sizes of the change and of its factors, and what it does to the weight's magnitude and direction."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments

DORA = "Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, section 3"


def growth_of(w2: Tensor, dot: Tensor, d2: Tensor) -> Tensor:
    """Mean change (...,) of the norms of rows, from their moments (..., rows): nothing cancels for a small D."""
    growth = 2 * dot + d2
    total = (w2 + growth).clamp(min=0).sqrt() + w2.sqrt()
    return (growth / total).where(total != 0, 0.0).abs().mean(dim=-1)


def turn_of(w2: Tensor, dot: Tensor, d2: Tensor) -> Tensor:
    """Mean of 1 - cos (...,), by sin^2 / (1 + cos), which does not cancel for a small D."""
    product = w2 * (w2 + 2 * dot + d2)
    cosine = (w2 + dot) / product.sqrt()
    sine2 = ((w2 * d2 - dot.square()) / product).clamp(min=0)
    turned = (sine2 / (1 + cosine)).where(cosine > 0, 1 - cosine).where(product != 0, 0.0)
    return turned.sum(dim=-1) / (product != 0).sum(dim=-1)


@metric("Frobenius norm of the change", formula="|D|")
def delta_norm(batch: Moments) -> Tensor:
    """|D|, (c,)."""
    return batch.norm2.sqrt()


@metric("Frobenius norm of the frozen weight", formula="|W|", needs=("weight",))
def base_norm(batch: Moments) -> Tensor:
    """|W|, (c,), the same at every checkpoint."""
    return batch.w2.sum().sqrt().expand(len(batch.d2))


@metric("size of the change relative to the frozen weight", formula="|D| / |W|", needs=("weight", "change"))
def relative_norm(batch: Moments) -> Tensor:
    """|D| / |W|, (c,)."""
    return (batch.norm2 / batch.w2.sum()).sqrt()


@metric(
    "mean over output rows of how much the row's length changes",
    formula="mean_n | |W_n + D_n| - |W_n| |",
    source=DORA,
    needs=("weight", "change"),
)
def magnitude_change(batch: Moments) -> Tensor:
    """Mean change of the rows' norms, (c,)."""
    return growth_of(batch.w2, batch.dot, batch.d2)


@metric(
    "mean over output rows of how much the row turns; rows with a zero norm left out",
    formula="mean_n 1 - cos(W_n, W_n + D_n)",
    source=DORA,
    needs=("weight", "change"),
)
def direction_change(batch: Moments) -> Tensor:
    """Mean of 1 - cos, (c,)."""
    return turn_of(batch.w2, batch.dot, batch.d2)


@metric("Frobenius norm of the down factor", formula="|A|", needs=("factors",))
def down_norm(batch: Moments) -> Tensor:
    """|A|, (c,)."""
    return batch.down_norm


@metric("Frobenius norm of the up factor", formula="|B|", needs=("factors",))
def up_norm(batch: Moments) -> Tensor:
    """|B|, (c,)."""
    return batch.up_norm


@metric("NaN or Inf entries in the module's tensors", unit="entries", needs=())
def nonfinite(batch: Moments) -> Tensor:
    """Count, (c,)."""
    return batch.nonfinite
