"""What rows or columns are scaled by (IA3, SSF, DoRA), and how many entries a sparse change touches."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.metrics.interface import metric

if TYPE_CHECKING:
    from torch import Tensor

    from lora_forensics.moments import Moments

_SSF = "Lian et al., Scaling and Shifting Your Features, 2022"
_SAN = "Dai et al., Discovering Long-Term Effects on Parameter Efficient Fine-tuning, 2024"


@metric(
    "mean of what rows or columns are multiplied by (IA3, SSF; magnitude over norm for DoRA); 1 changes nothing",
    formula="mean_n g_n",
    source=_SSF,
    needs=("scales",),
)
def scale_mean(batch: Moments) -> Tensor:
    """Mean factor, (c,)."""
    return batch.scales.mean(dim=-1).expand(len(batch.d2))


@metric(
    "standard deviation over rows or columns of what these are multiplied by",
    formula="std_n g_n",
    source=_SSF,
    needs=("scales",),
)
def scale_spread(batch: Moments) -> Tensor:
    """Population deviation, (c,)."""
    return batch.scales.std(dim=-1, correction=0).expand(len(batch.d2))


@metric(
    "relative change of the next layer's weight if it took these factors over on its inputs, for columns of one norm",
    formula="sqrt(mean_n (g_n - 1)^2)",
    source=_SAN,
    needs=("scales",),
)
def scale_carried(batch: Moments) -> Tensor:
    """Root mean square, (c,)."""
    return (batch.scales - 1).square().mean(dim=-1).sqrt().expand(len(batch.d2))


@metric(
    "share of the weight's entries that are changed; null for products of factors, which change all of them",
    formula="|{ij: D_ij != 0}| / (rows columns)",
    source="Hu et al., SaRA, 2024; Bhardwaj et al., SHiRA, 2024",
    needs=("entries",),
)
def changed_share(batch: Moments) -> Tensor:
    """Between 0 and 1, (c,)."""
    return batch.changed.expand(len(batch.d2))
