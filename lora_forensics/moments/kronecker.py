"""Kronecker products: D = s (P kron Q) with P (a, c), Q (b, d); W is read as (a, b, c, d).

<W, D> by rows takes two operations for an entry of W and checkpoint, norms and movement follow from those of the rows
of P and Q, and the singular values are all products of theirs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import (
    WORKING_BYTES,
    core_singular_values,
    count_nonfinite,
    grams,
    mask,
    one_thread,
    operand,
    rounding,
    wide_device,
    widened,
)
from lora_forensics.moments.dense import FormedChange
from lora_forensics.moments.interface import Moments, RowTerms, Weight, assemble
from lora_forensics.moments.spectra import largest_singular_values

_SMALL_SIDE = 96
"""Up to this smaller side all singular values of a matrix are cheap."""

Side = Tensor | tuple[Tensor, Tensor]
"""A matrix (count, rows, columns), or the factors of one, (count, rows, r) and (count, r, columns)."""


class KroneckerChange:
    """D_t = s_t P_t kron Q_t."""

    def __init__(self, left: Side, right: Side, scale: Tensor, lead: int, stored: tuple[Tensor, ...]) -> None:
        """`stored` are the tensors of the file that both sides were made of."""
        self.lead = lead
        self.nonfinite = count_nonfinite(*stored, scale[:, None]).cpu()
        self._scale = torch.where(self.nonfinite > 0, 0.0, scale.cpu())
        self._sides = tuple(
            tuple(mask(widened(t).double(), self.nonfinite.to(t.device)) for t in (s if isinstance(s, tuple) else (s,)))
            for s in (left, right)
        )
        self._wide = any(tensor.dtype == torch.float64 for tensor in stored)
        self._noise = max(map(rounding, stored)) ** 2 * len(stored)

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors."""
        terms = self.row_terms(weight, device)
        wide = wide_device(device)
        values, complete = zip(*(_singular_values(side, wide, spectra) for side in self._sides), strict=True)
        both = (values[0][:, :, None] * values[1][:, None]).flatten(1) * self._scale.abs().to(wide)[:, None]
        singular = both.sort(dim=-1, descending=True).values if all(complete) else both.amax(dim=-1, keepdim=True)
        return assemble(terms, self.lead, self.nonfinite, singular, all(complete), weight=weight is not None)

    @torch.no_grad()
    def row_terms(self, weight: Weight | None, device: torch.device) -> RowTerms:
        """Inner products by rows of all checkpoints."""
        wide = wide_device(device)
        left, right = self.matrices(wide)
        scale = self._scale.to(wide)[:, None]
        d2 = _outer(left.square().sum(dim=-1), right.square().sum(dim=-1)) * scale.square()
        cross = torch.full_like(d2, torch.nan)
        inner = [(side[1:] * side[:-1]).sum(dim=-1) for side in (left, right)]
        cross[1:] = _outer(*inner) * (scale[1:] * scale[:-1])
        if weight is None:
            nothing = torch.full_like(d2, torch.nan)
            return RowTerms(nothing[0], nothing, d2, cross, nothing[:, 0])
        w2, dot, terms2 = self._with_weight(weight, left, right, device)
        return RowTerms(w2, dot * scale, d2, cross, self._noise * terms2 * scale[:, 0].square())

    def apply(self, vectors: Tensor, transposed: bool = False) -> Tensor:
        """D_t v_t (count, rows), or D_t^T v_t (count, columns)."""
        left, right = (side.to(vectors.dtype) for side in self.matrices(vectors.device))
        if transposed:
            left, right = left.mT, right.mT
        scale = self._scale.to(vectors.device, vectors.dtype)[:, None]
        grid = vectors.reshape(len(vectors), left.shape[2], right.shape[2])
        result: Tensor = (left @ grid @ right.mT).flatten(1) * scale
        return result

    def factor_norms(self) -> None:
        """It is no product of two thin factors."""

    def factor_moves(self) -> dict[str, Tensor]:
        """Nor has it any that move."""
        return {}

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:  # noqa: ARG002 (needs none)
        """S P kron Q in float64."""
        left, right = (side[index] for side in self.matrices(device))
        return torch.kron(left, right) * float(self._scale[index])

    def dense(self) -> FormedChange:
        """The same change, formed as a matrix."""

        def form(index: int, weight: Tensor) -> Tensor:
            left, right = (side[index].to(weight) for side in self.matrices(weight.device))
            return torch.kron(left, right) * float(self._scale[index])

        formed = FormedChange(form, (self._scale[:, None],), self.lead)
        formed.nonfinite = self.nonfinite
        return formed

    def matrices(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """P (count, a, c) and Q (count, b, d) in float64, without the scale."""
        first, second = (side[0] if len(side) == 1 else side[0] @ side[1] for side in self._sides)
        return first.to(device), second.to(device)

    def _with_weight(
        self, weight: Weight, left: Tensor, right: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor]:
        """w2 (rows,), dot (count, rows) and the sum of squares (count,) of its terms; unscaled."""
        (count, a, c), (_, b, d) = left.shape, right.shape
        wide = left.device
        w2 = torch.empty(a, b, dtype=torch.float64, device=wide)
        dot = torch.empty(count, a, b, dtype=torch.float64, device=wide)
        terms2 = torch.zeros(count, dtype=torch.float64, device=wide)
        stack = right.permute(1, 2, 0).contiguous()  # (b, d, count)
        factors = operand(stack if self._wide else stack.float(), a * b * c * d, device)
        size = max(1, WORKING_BYTES // (b * c * (8 * d + 24 * count)))
        for start in range(0, a, size):
            stop = min(start + size, a)
            frozen = widened(weight.read(start * b, stop * b)).to(wide)
            w2[start:stop] = torch.linalg.vector_norm(frozen, dim=1, dtype=torch.float64).square().view(-1, b)
            grid = frozen.to(factors.device, factors.dtype).view(stop - start, b, c, d)
            found = grid.transpose(0, 1).reshape(b, -1, d) @ factors  # (b, block * c, count)
            terms = found.to(wide).double().view(b, stop - start, c, count)
            terms = terms * left[:, start:stop].permute(1, 2, 0)
            dot[:, start:stop] = terms.sum(dim=2).permute(2, 1, 0)
            terms2 += terms.square().sum(dim=(0, 1, 2))
        return w2.flatten(), dot.flatten(1), terms2


def _outer(first: Tensor, second: Tensor) -> Tensor:
    """All products (count, a * b) of values (count, a) and (count, b)."""
    return (first[:, :, None] * second[:, None]).flatten(1)


def _singular_values(side: tuple[Tensor, ...], device: torch.device, spectra: bool) -> tuple[Tensor, bool]:
    """Singular values (count, k) of one side, and whether these are all that are not 0."""
    parts = [tensor.to(device) for tensor in side]
    if len(parts) == 2 and parts[0].shape[2] <= min(parts[0].shape[1], parts[1].shape[2]):
        return core_singular_values(grams(parts[0])[0], grams(parts[1].mT)[0]), True
    matrix = parts[0] if len(parts) == 1 else parts[0] @ parts[1]
    count, rows, columns = matrix.shape
    if spectra or min(rows, columns) <= _SMALL_SIDE:
        with one_thread(device):
            return torch.linalg.svdvals(matrix), True

    def multiply(vectors: Tensor, transposed: bool) -> Tensor:
        return ((matrix.mT if transposed else matrix) @ vectors[:, :, None])[:, :, 0]

    return largest_singular_values(multiply, count, rows, columns, device)[:, None], False
