"""Largest singular values of matrices that are only multiplied with."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import one_thread

_TOLERANCE = 1e-7
_STEPS = 160
_EVERY = 4

Product = Callable[[Tensor, bool], Tensor]
"""Vectors (count, columns) to D_t v_t (count, rows), or with True (count, rows) to D_t^T v_t (count, columns)."""


def largest_singular_values(
    product: Product, count: int, rows: int, columns: int, device: torch.device, dtype: torch.dtype = torch.float64
) -> Tensor:
    """The largest singular value (count,) of every D_t, to about 1e-7 of it, by Lanczos steps on the smaller Gram.

    All D_t advance together, each from the same seeded start, with every vector orthogonal to all before it.
    """
    wide = columns <= rows
    size = min(rows, columns)
    start = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    vector = (start / start.norm()).to(device).expand(count, size).contiguous()
    basis = torch.empty(count, 0, size, dtype=torch.float64, device=device)
    diagonal: list[Tensor] = []
    beside: list[Tensor] = []
    steps = min(_STEPS, size)
    found = torch.zeros(count, dtype=torch.float64, device=device)
    for step in range(steps):
        basis = torch.cat([basis, vector[:, None]], dim=1)
        image = product(product(vector.to(dtype), not wide), wide).double()
        diagonal.append((image * vector).sum(dim=-1))
        for _ in range(2):  # once is not enough to stay orthogonal
            image = image - ((basis @ image[:, :, None]).mT @ basis)[:, 0]
        norm = image.norm(dim=-1)
        if step % _EVERY == _EVERY - 1 or step == steps - 1:
            values, error = _ritz(torch.stack(diagonal, dim=-1), beside, norm)
            found = values
            if bool((error <= _TOLERANCE * values).all()):
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
