"""How far and where the change moved since the checkpoint before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric
from lora_forensics.metrics.norms import turn_of

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments


@metric(
    "how much the change turned since the checkpoint before; NaN at the first",
    formula="1 - cos(D_t, D_previous)",
    source="after Carbonnelle and De Vleeschouwer, Layer rotation, 2018",
)
def rotation(batch: Moments) -> Tensor:
    """1 - cos, (c,)."""
    return 1 - batch.inner_previous / (batch.norm2 * batch.previous_norm2).sqrt()


@metric(
    "how much the weight turned away from the frozen one",
    formula="1 - cos(W + D, W)",
    source="Carbonnelle and De Vleeschouwer, Layer rotation, 2018",
    needs=("weight", "change"),
)
def layer_rotation(batch: Moments) -> Tensor:
    """1 - cos, (c,): the weight as one row."""
    whole = (terms.sum(dim=-1, keepdim=True) for terms in (batch.w2, batch.dot, batch.d2))
    return turn_of(*whole)


@metric(
    "cosine of the last step and the change that it was added to; NaN at the first checkpoint",
    formula="cos(D_t - D_previous, D_previous)",
    source="docs/metrics.md",
)
def step_alignment(batch: Moments) -> Tensor:
    """Cosine, (c,)."""
    along = batch.inner_previous - batch.previous_norm2
    return (along / (step_size.compute(batch) * batch.previous_norm2.sqrt())).clamp(-1, 1)


@metric(
    "how much the down factor turned since the checkpoint before; NaN at the first",
    formula="1 - cos(A_t, A_previous)",
    source="Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models, 2024",
    needs=("turns",),
)
def down_rotation(batch: Moments) -> Tensor:
    """1 - cos, (c,)."""
    return (1 - batch.down_cosine).expand(len(batch.d2))


@metric(
    "how much the up factor turned since the checkpoint before; NaN at the first and after B = 0",
    formula="1 - cos(B_t, B_previous)",
    source="Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models, 2024",
    needs=("turns",),
)
def up_rotation(batch: Moments) -> Tensor:
    """1 - cos, (c,)."""
    return (1 - batch.up_cosine).expand(len(batch.d2))


@metric(
    "how far the down factor is from that of the run's first checkpoint, relative to it",
    formula="|A_t - A_first| / |A_first|",
    source="Zhu et al., Asymmetry in Low-Rank Adapters of Foundation Models, 2024",
    needs=("turns",),
)
def down_moved(batch: Moments) -> Tensor:
    """Relative distance, (c,)."""
    return batch.down_moved.expand(len(batch.d2))


@metric("how far the change moved since the checkpoint before; NaN at the first", formula="|D_t - D_previous|")
def step_size(batch: Moments) -> Tensor:
    """Frobenius distance, (c,)."""
    return (batch.norm2 + batch.previous_norm2 - 2 * batch.inner_previous).clamp(min=0).sqrt()
