"""Sums of products of thin factors, decomposed again without forming a matrix of the weight's size; all in float64.

sum_t c_t B_t A_t = [c_1 B_1 ... c_n B_n] [A_1; ...; A_n] = B A. With B = Q_b R_b and A^T = Q_a R_a the singular values
of B A are those of the small core R_b R_a^T, whose first r triples give the nearest product of rank r (Eckart-Young).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Factors = tuple[Tensor, Tensor]
"""B (rows x rank) and A (rank x columns)."""


def weighted_sum(pairs: Sequence[Factors], weights: Sequence[float]) -> Factors:
    """The weighted sum of products as one product; its rank is the sum of ranks."""
    ups = [weight * up.double() for weight, (up, _) in zip(weights, pairs, strict=True)]
    return torch.cat(ups, dim=1), torch.cat([down.double() for _, down in pairs], dim=0)


def truncated(factors: Factors, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """U (rows x rank), s (rank,) and V^T (rank x columns) of a product, with zeros behind its last singular value."""
    up, down = factors
    left, upper = torch.linalg.qr(up)
    right, lower = torch.linalg.qr(down.mT)
    u, values, v = torch.linalg.svd(upper @ lower.mT, full_matrices=False)
    u, values, v = left @ u[:, :rank], values[:rank], v[:rank] @ right.mT
    missing = rank - len(values)
    pad = torch.nn.functional.pad
    return pad(u, (0, missing)), pad(values, (0, missing)), pad(v, (0, 0, 0, missing))


def balanced(factors: Factors, rank: int) -> Factors:
    """The nearest product of rank `rank`, singular values shared evenly between both factors."""
    u, values, v = truncated(factors, rank)
    root = values.sqrt()
    return u * root, root[:, None] * v


def norm(factors: Factors) -> float:
    """Frobenius norm of a product; exact also where parts of it cancel, which the trace of Grams is not."""
    up, down = factors
    upper, lower = torch.linalg.qr(up, mode="r").R, torch.linalg.qr(down.mT, mode="r").R
    return float(torch.linalg.matrix_norm(upper @ lower.mT))


def distance(one: Factors, two: Factors) -> float:
    """Frobenius norm of the difference of two products."""
    return norm(weighted_sum([one, two], [1.0, -1.0]))
