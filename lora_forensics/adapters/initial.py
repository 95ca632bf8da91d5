"""Adapters that start at a part of the weight: LoRA files whose B @ A is not the change of the stock base.

peft takes the first adapter out of the weight before it trains, so the change is `s B A - s B0 A0`. Two methods make
B0 A0 from the weight alone, so it is made again: PiSSA (Meng et al. 2024) from its leading singular vectors, OLoRA
(Büyükakyüz 2024) from the leading columns of its QR decomposition. Others drew, looked at data or quantised
on the way: their first adapter has to be at hand. An adapter that peft converted while saving holds the difference,
says `init_lora_weights: true`, and is plain LoRA.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

_DENSE = 1024
"""Sides up to which all eigenvectors are as fast as the leading ones alone."""


def principal(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """PiSSA's first factors, up (rows x rank) and down (rank x columns): up @ down is the best rank-r part of W.

    They hold the scale already, whatever it is. In float64; what peft trained on was rounded as its own SVD, which for
    a weight without gaps in its spectrum moves that part by some 1e-5 of its norm.
    """
    del scale  # peft divides by it, and multiplies by it in every forward pass
    import numpy as np
    import torch
    from scipy.linalg import eigh
    from scipy.sparse.linalg import eigsh

    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    gram = (wide @ wide.mT).cpu().numpy()
    size = len(gram)
    if size > _DENSE:
        _, vectors = eigsh(gram, k=rank, v0=np.ones(size))
    else:
        _, vectors = eigh(gram, subset_by_index=(max(size - rank, 0), size - 1))
    basis = torch.from_numpy(vectors).to(weight.device)
    return (basis, basis.mT @ wide) if wide.shape == weight.shape else ((basis.mT @ wide).mT, basis.mT)


def leading(weight: torch.Tensor, rank: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """OLoRA's first factors, times the scale: Q_r and R_r of W = Q R, where only r columns of W determine Q_r."""
    import torch

    wide = weight.double()
    basis, _ = torch.linalg.qr(wide[:, :rank])
    return scale * basis, basis.mT @ wide


MADE_FROM_WEIGHT: dict[str, Callable[[torch.Tensor, int, float], tuple[torch.Tensor, torch.Tensor]]] = {
    "olora": leading,
    "pissa": principal,
}
"""`init_lora_weights` to its first factors, up and down, from the weight as out x in."""

_NOT_REPRODUCIBLE = ("corda", "lora_ga", "loftq", "pissa_niter")
"""Begin of `init_lora_weights` where the weight was changed by a first adapter that nothing in the file tells."""


def needs_first_adapter(initialisation: str) -> bool:
    """Whether the change can only be known from the adapter as it was before the first step."""
    return initialisation.lower().startswith(_NOT_REPRODUCIBLE)


def difference(
    up: torch.Tensor, down: torch.Tensor, scale: torch.Tensor, first: tuple[torch.Tensor, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of `scale * up @ down - first_up @ first_down` for many checkpoints: twice the rank, the scale in them.

    Args:
        up: (count, rows, rank).
        down: (count, rank, columns).
        scale: (count,).
        first: up (rows, rank) and down (rank, columns), scale included.
    """
    import torch

    count = len(up)
    first_up, first_down = (factor.to(up.device).expand(count, *factor.shape) for factor in first)
    ups = torch.cat([scale[:, None, None].to(up.device) * up.double(), -first_up], dim=2)
    return ups, torch.cat([down.double(), first_down], dim=1)
