"""How far and where the change moved since the checkpoint before."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric

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


@metric("how far the change moved since the checkpoint before; NaN at the first", formula="|D_t - D_previous|")
def step_size(batch: Moments) -> Tensor:
    """Frobenius distance, (c,)."""
    return (batch.norm2 + batch.previous_norm2 - 2 * batch.inner_previous).clamp(min=0).sqrt()
