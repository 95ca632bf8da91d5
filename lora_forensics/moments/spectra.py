"""Largest singular values of matrices that are only multiplied with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import one_thread
from lora_forensics.moments.interface import SMALL_WEIGHT

_TOLERANCE = 1e-6
"""Bound on the error of a squared singular value."""
_GROWTH = 1e-3
"""By how much the square of a large matrix's value may still have grown: near-equal values are costly to tell apart."""
_STEPS = 160
_FEW_STEPS = 6
"""For a large matrix: each step reads W twice, and more of them would cost more than everything else together."""
_EVERY = 3

Product = Callable[[Tensor, bool], Tensor]
"""Vectors (count, columns) to D_t v_t (count, rows), or with True (count, rows) to D_t^T v_t (count, columns)."""


def largest_singular_values(
    product: Product, count: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The largest singular value (count,) of every D_t by Lanczos steps on the smaller Gram, to 5e-7.

    Of a large D it is a lower bound from a few steps: within 1e-3 where the values decay, some percent below it where
    they hardly do, as in a random matrix.

    All D_t advance together, each from the same seeded start, with every vector orthogonal to all before it.
    """
    tall = columns <= rows
    size = min(rows, columns)
    large = rows * columns > SMALL_WEIGHT
    steps = min(_FEW_STEPS if large else _STEPS, size)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(device).expand(count, size).contiguous()
    basis: list[Tensor] = []  # in float32 where the products are: they are no more exact
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    found = torch.zeros(count, dtype=torch.float64, device=device)
    done = torch.zeros(count, dtype=torch.bool, device=device)
    for step in range(steps):
        basis.append(vector.to(dtype))
        image = product(product(basis[-1], not tall), tall).double()
        diagonal.append((image * vector).sum(dim=-1))
        known = torch.stack(basis, dim=1)
        image -= diagonal[-1][:, None] * vector
        for _ in range(2):  # once is not enough to stay orthogonal
            share = known @ image.to(dtype)[:, :, None]
            image -= (known.mT @ share)[:, :, 0]
        norm = image.norm(dim=-1)
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            value, error = _ritz(torch.stack(diagonal, dim=-1), beside, norm)
            enough = (error <= _TOLERANCE * value) | (large & (value - found <= _GROWTH * value))
            found = torch.where(done, found, value)  # a checkpoint's value must not depend on its neighbours
            done |= enough
            if bool(done.all()):
                break
        beside.append(norm)
        vector = image / norm.clamp(min=torch.finfo(torch.float64).tiny)[:, None]
    return found.clamp(min=0).sqrt()


def _ritz(diagonal: Tensor, beside: list[Tensor], norm: Tensor) -> tuple[Tensor, Tensor]:
    """Largest eigenvalue (count,) of the tridiagonal matrices so far, and how far the Gram's own may be above it."""
    matrix = torch.diag_embed(diagonal)
    if beside:
        off = torch.stack(beside, dim=-1)
        matrix = matrix + torch.diag_embed(off, 1) + torch.diag_embed(off, -1)
    with one_thread(matrix.device):
        values, vectors = torch.linalg.eigh(matrix)
    residual = norm * vectors[:, -1, -1].abs()
    if values.shape[1] < 2:
        return values[:, -1], residual
    gap = (values[:, -1] - values[:, -2]).clamp(min=torch.finfo(torch.float64).tiny)
    return values[:, -1], torch.minimum(residual, residual.square() / gap)
