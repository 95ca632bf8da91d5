"""How a pair of factors moves from checkpoint to checkpoint, from Grams that are there anyway."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import trace

Grams = tuple[Tensor, Tensor]
"""X_t^T X_t (count, r, r) and X_t^T X_(t-1) (count - 1, r, r)."""


def moves(down: Tensor, of_down: Grams, of_up: Grams) -> dict[str, Tensor]:
    """Fields of Moments (count,), all checkpoints; NaN where a factor is zero and at the first.

    Args:
        down: A (count, ...); 0 where a checkpoint is broken.
        of_down: Grams of A.
        of_up: Grams of B.
    """
    first = torch.linalg.vector_norm(down[:1].flatten(1), dim=1, dtype=torch.float64)
    moved = torch.linalg.vector_norm((down - down[:1]).flatten(1), dim=1, dtype=torch.float64)
    there = (trace(of_down[0]) > 0) & (first > 0)
    return {
        "down_cosine": _cosine(*of_down),
        "up_cosine": _cosine(*of_up),
        "down_moved": (moved / first).where(there, torch.nan),
    }


def _cosine(gram: Tensor, cross: Tensor) -> Tensor:
    norm2 = trace(gram)
    cosine = torch.full_like(norm2, torch.nan)
    cosine[1:] = trace(cross) / (norm2[1:] * norm2[:-1]).sqrt()
    return cosine
