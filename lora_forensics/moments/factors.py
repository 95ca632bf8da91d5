"""How a pair of factors moves from checkpoint to checkpoint, from Grams that are there anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import blocks, trace

Grams = tuple[Tensor, Tensor]
"""X_t^T X_t (count, r, r) and X_t^T X_(t-1) (count - 1, r, r)."""


def moves(down: Tensor, of_down: Grams, of_up: Grams) -> dict[str, Tensor]:
    """Fields of Moments (count,), all checkpoints; NaN where a factor is zero and at the first.

    Args:
        down: A (count, ...); 0 where a checkpoint is broken.
        of_down: Grams of A.
        of_up: Grams of B.
    """
    norm2 = trace(of_down[0])
    moved = torch.empty_like(norm2)
    first = _wide(down[:1])
    for start, stop in blocks(len(down), 8 * first.numel()):
        way = (_wide(down[start:stop]) - first).flatten(1)
        moved[start:stop] = torch.linalg.vector_norm(way, dim=1, dtype=torch.float64)
    there = (norm2 > 0) & (norm2[:1] > 0)
    return {
        "down_cosine": _cosine(*of_down),
        "up_cosine": _cosine(*of_up),
        "down_moved": (moved / norm2[:1].sqrt()).where(there, torch.nan),
    }


def _wide(tensor: Tensor) -> Tensor:
    """A difference of 16-bit numbers is none."""
    return tensor if tensor.element_size() > 2 else tensor.float()


def _cosine(gram: Tensor, cross: Tensor) -> Tensor:
    norm2 = trace(gram)
    cosine = torch.full_like(norm2, torch.nan)
    cosine[1:] = trace(cross) / (norm2[1:] * norm2[:-1]).sqrt()
    return cosine
