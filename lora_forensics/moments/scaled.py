"""Weights whose rows or columns are scaled: D' = g (W + D) - W with one g for each row or column.

g is what the file holds (IA3), or a magnitude divided by the norm of that row or column of W + D (weight
decomposition). Rows: all follows from the row terms of D. Columns: from W * W and the factors of D, see `_columns`.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import torch
from torch import Tensor

from lora_forensics.errors import CheckpointError
from lora_forensics.moments.arithmetic import (
    count_nonfinite,
    derived_operand,
    mask,
    product,
    rounding,
    weight_blocks,
    wide_device,
    widened,
)
from lora_forensics.moments.dense import DenseChange
from lora_forensics.moments.interface import SCALES, FactoredChange, Moments, RowTerms, Weight, assemble, unknown
from lora_forensics.moments.kronecker import KroneckerChange
from lora_forensics.moments.low_rank import LowRankChange
from lora_forensics.moments.spectra import largest_singular_values


class ScaledChange:
    """Rows scaled, or columns; of W alone or of W + D."""

    def __init__(
        self,
        values: Tensor,
        by_column: bool,
        magnitude: bool,
        lead: int,
        inner: FactoredChange | None = None,
        stored: Tensor | None = None,
    ) -> None:
        """`values` (count, n) are magnitudes or factors, one for n-th parts of the rows or columns.

        `stored` is what the file holds if that is something else: factors less 1.

        An inner change whose columns are scaled has to be a LowRankChange.
        """
        self._values = widened(values).double()
        self._noise = rounding(values if stored is None else stored)
        self._offset = 0.0 if stored is None else 1.0
        self._by_column = by_column
        self._magnitude = magnitude
        self._inner = inner
        self._lead = lead
        self._nonfinite = count_nonfinite(values).cpu() + (0 if inner is None else inner.nonfinite)
        self._values = mask(self._values, self._nonfinite)

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors; unknown without a weight."""
        norms = None if self._inner is None else self._inner.factor_norms()
        if weight is None:
            return unknown(self._lead, self._nonfinite, norms)
        size, parts = (weight.columns if self._by_column else weight.rows), self._values.shape[1]
        if size % parts or (parts != size and not self._by_column):
            raise CheckpointError(f"{parts} factors for {size} {'columns' if self._by_column else 'rows'}")
        wide = wide_device(device)
        terms, factor = (self._columns if self._by_column else self._rows)(weight, wide, device)
        singular = self._singular(weight, factor, wide, spectra)
        more = {"scales": factor, **({} if self._inner is None else self._inner.factor_moves())}
        return assemble(terms, self._lead, self._nonfinite, singular, spectra, norms, more=more)

    def delta(self, index: int, weight: Tensor, device: torch.device) -> Tensor:
        """G (W + D) - W, in float64."""
        frozen = weight.double()
        moved = frozen if self._inner is None else frozen + self._inner.delta(index, frozen, device)
        axis = 0 if self._by_column else 1
        parts, size = self._values.shape[1], frozen.shape[1 - axis]
        norm2 = moved.square().sum(dim=axis)
        norm2 = norm2.view(parts, -1).sum(dim=-1) if self._by_column else norm2
        g = self._factor(norm2[None], len(norm2))[index]
        return moved * g.repeat_interleave(size // len(g)).unsqueeze(axis) - frozen

    def _rows(self, weight: Weight, wide: torch.device, device: torch.device) -> tuple[RowTerms, Tensor]:
        """Row terms of D', and g (count, rows)."""
        inner = (
            _row_norms(weight, len(self._values), wide)
            if self._inner is None
            else self._inner.row_terms(weight, device)
        )
        w2, dot, d2 = inner.w2, inner.dot, inner.d2
        kept = w2 + dot  # <W, W + D>
        norm2 = kept + dot + d2
        g = self._factor(norm2, weight.rows)
        h = g - 1
        new_dot = h * w2 + g * dot
        new_d2 = h.square() * w2 + 2 * h * g * dot + g.square() * d2
        cross = torch.full_like(dot, torch.nan)
        cross[1:] = h[1:] * h[:-1] * w2 + h[1:] * g[:-1] * dot[:-1] + g[1:] * h[:-1] * dot[1:]
        cross[1:] += g[1:] * g[:-1] * inner.cross[1:].nan_to_num()
        slope = new_dot.sum(dim=-1) / new_d2.sum(dim=-1)
        noise2 = self._own_noise2(g, kept, norm2, slope)
        if self._magnitude:  # of the inner noise only what is orthogonal to W + D is left
            turned = (1 - kept.square() / (w2 * norm2)).clamp(min=0).nan_to_num()
            noise2 = noise2 + inner.noise2 * (g.square() * turned).mean(dim=-1)
        return RowTerms(w2, new_dot, new_d2, cross, noise2), g

    def _columns(self, weight: Weight, wide: torch.device, device: torch.device) -> tuple[RowTerms, Tensor]:
        """Row terms of D' = W h + D g with h = g - 1 by columns, D = B A, and g (count, columns).

        <W, D'> = (W W) h + rowsum((W (A g)^T) B), and |D'|^2 and <D'_t, D'_u> in the same way.
        """
        count = len(self._values)
        if self._inner is None:
            down = torch.zeros(count, 0, weight.columns, dtype=torch.float64, device=wide)
            up = torch.zeros(count, weight.rows, 0, dtype=torch.float64, device=wide)
        else:
            if not isinstance(self._inner, LowRankChange):
                raise TypeError("columns of a change without two factors are scaled by DenseScaledChange")
            down, up = (tensor.to(wide) for tensor in self._inner.factors())
        c2, cdot = _column_norms(weight, down, up, wide, device)
        cd2 = ((up.mT @ up) @ down * down).sum(dim=1)
        kept = c2 + cdot
        norm2 = kept + cdot + cd2
        kept, norm2 = (t.reshape(count, self._values.shape[1], -1).sum(dim=-1) for t in (kept, norm2))
        parts = self._factor(norm2, self._values.shape[1])
        g = parts.repeat_interleave(weight.columns // parts.shape[1], dim=1)
        h = g - 1
        terms = _column_terms(weight, down, up, g, h, wide, device)
        slope = terms.dot.sum(dim=-1) / terms.d2.sum(dim=-1)
        noise2 = self._own_noise2(parts, kept, norm2, slope)
        return RowTerms(terms.w2, terms.dot, terms.d2, terms.cross, noise2), g

    def _factor(self, norm2: Tensor, parts: int) -> Tensor:
        """G (count, parts): magnitudes over norms, 1 where a row is zero."""
        values = self._values.to(norm2.device)
        values = values.repeat_interleave(parts // values.shape[1], dim=1)
        return torch.where(norm2 > 0, values / norm2.clamp(min=0).sqrt(), 1.0) if self._magnitude else values

    def _own_noise2(self, g: Tensor, kept: Tensor, norm2: Tensor, slope: Tensor) -> Tensor:
        """Variance (count,) of cos(D', W) |D'| |W| from rounding the values, each by itself."""
        by_value = kept - slope[:, None] * (g * norm2 - kept)
        return (self._noise * (g - self._offset) * by_value).square().sum(dim=-1)

    def _singular(self, weight: Weight, g: Tensor, device: torch.device, spectra: bool) -> Tensor:
        """The largest singular value (count, 1) of D', or all of them."""
        frozen = widened(weight.read(0, weight.rows)).to(device)
        frozen = frozen if frozen.dtype == torch.float64 else frozen.float()
        if spectra:
            return torch.stack([torch.linalg.svdvals(self._dense(frozen.double(), g, t)) for t in range(len(g))])
        h = (g - 1).to(frozen.dtype)
        g = g.to(frozen.dtype)

        def multiply(vectors: Tensor, transposed: bool) -> Tensor:
            before = self._by_column != transposed
            first, second = (vectors * h, vectors * g) if before else (vectors, vectors)
            kept = first @ frozen if transposed else (frozen @ first.mT).mT
            changed = 0 if self._inner is None else self._inner.apply(second, transposed)
            return kept + changed if before else kept * h + changed * g

        count = len(g)
        return largest_singular_values(multiply, count, weight.rows, weight.columns, device, frozen.dtype)[:, None]

    def _dense(self, frozen: Tensor, g: Tensor, index: int) -> Tensor:
        """D' as a matrix."""
        moved = frozen
        if self._inner is not None:
            count = len(g)
            columns = torch.eye(frozen.shape[1], dtype=frozen.dtype, device=frozen.device)
            found = [self._inner.apply(column.expand(count, -1))[index] for column in columns]
            moved = frozen + torch.stack(found, dim=1)
        factor = g[index] if self._by_column else g[index][:, None]
        return factor * moved - frozen


class DenseScaledChange(DenseChange):
    """The same for an inner change that is formed as a matrix."""

    def __init__(self, values: Tensor, by_column: bool, lead: int, inner: DenseChange) -> None:
        """`values` (count, n) are magnitudes."""
        super().__init__((values,), lead)
        self.nonfinite = self.nonfinite + inner.nonfinite
        self._values = values
        self._by_column = by_column
        self._inner = inner
        self._factors: dict[int, Tensor] = {}

    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Those of the matrices, with g."""
        found = super().moments(weight, device, spectra)
        if weight is None or not self._factors:
            return found
        nothing = torch.full_like(next(iter(self._factors.values())), torch.nan)
        scales = torch.stack([self._factors.get(index, nothing) for index in range(self.lead, self.count)])
        return replace(found, scales=scales, known=found.known | {SCALES})

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """G (W + D) - W."""
        assert weight is not None  # noqa: S101 (DenseChange sees to it)
        inner = self._inner.delta(index, weight, device)
        moved = (weight + inner).double()
        axis = 0 if self._by_column else 1
        values = widened(self._values)[index].double().to(device)
        norm2 = moved.square().sum(dim=axis).view(len(values), -1).sum(dim=-1)
        g = torch.where(norm2 > 0, values / norm2.sqrt(), 1.0).repeat_interleave(moved.shape[1 - axis] // len(values))
        self._factors[index] = g.cpu()
        return moved * g.unsqueeze(axis) - weight


def decomposed(
    values: Tensor, by_column: bool, inner: LowRankChange | KroneckerChange | DenseChange, lead: int
) -> ScaledChange | DenseScaledChange:
    """Magnitudes `values` (count, n) around an inner change, in the cheapest form that there is for it."""
    if isinstance(inner, DenseChange):
        return DenseScaledChange(values, by_column, lead, inner)
    if by_column and isinstance(inner, KroneckerChange):
        return DenseScaledChange(values, by_column, lead, inner.dense())
    return ScaledChange(values, by_column, True, lead, inner)


def _row_norms(weight: Weight, count: int, device: torch.device) -> RowTerms:
    """Row terms of no change at all."""
    w2 = torch.empty(weight.rows, dtype=torch.float64, device=device)
    for start, stop, frozen in weight_blocks(weight, 12 * weight.columns, device):
        w2[start:stop] = torch.linalg.vector_norm(frozen, dim=1, dtype=torch.float64).square()
    nothing = torch.zeros(count, weight.rows, dtype=torch.float64, device=device)
    return RowTerms(w2, nothing, nothing, nothing, nothing[:, 0])


def _column_norms(
    weight: Weight, down: Tensor, up: Tensor, wide: torch.device, device: torch.device
) -> tuple[Tensor, Tensor]:
    """|W_j|^2 (columns,) and <W_j, D_j> (count, columns) for the columns of W and of D = B A."""
    count, _, rank = up.shape
    c2 = torch.zeros(weight.columns, dtype=torch.float64, device=wide)
    mixed = torch.zeros(count * rank, weight.columns, dtype=torch.float64, device=wide)
    stacked = up.transpose(1, 2).reshape(count * rank, weight.rows)
    ready = derived_operand(stacked, weight.rows * weight.columns, device)
    for start, stop, frozen in weight_blocks(weight, 20 * weight.columns, wide):
        c2 += frozen.double().square().sum(dim=0)
        if rank:
            mixed += product(frozen.mT, ready[:, start:stop]).mT.to(wide).double()
    return c2, (mixed.view(count, rank, weight.columns) * down).sum(dim=1)


def _column_terms(
    weight: Weight, down: Tensor, up: Tensor, g: Tensor, h: Tensor, wide: torch.device, device: torch.device
) -> RowTerms:
    """Row terms of W h + (B A) g; `noise2` is left 0."""
    count, rows, rank = up.shape
    entries = weight.rows * weight.columns
    own, before, last = slice(1, None), slice(None, -1), max(count - 1, 0)
    scaled = [down * g[:, None], down * (g * h)[:, None]]
    scaled += [down[before] * (g[before] * h[own])[:, None], down[own] * (g[own] * h[before])[:, None]]
    factors = derived_operand(torch.cat([part.reshape(-1, weight.columns) for part in scaled]), entries, device)
    squares = derived_operand(torch.cat([h, h.square(), h[own] * h[before]]), entries, device)
    gram = (down * g.square()[:, None]) @ down.mT
    gram_cross = (down[own] * (g[own] * g[before])[:, None]) @ down[before].mT
    w2 = torch.empty(rows, dtype=torch.float64, device=wide)
    dot, d2 = (torch.empty(count, rows, dtype=torch.float64, device=wide) for _ in range(2))
    cross = torch.full_like(dot, torch.nan)
    for start, stop, stored in weight_blocks(weight, 16 * weight.columns + 24 * count * (4 * rank + 3), wide):
        w2[start:stop] = torch.linalg.vector_norm(stored, dim=1, dtype=torch.float64).square()
        frozen = stored.to(squares.dtype)
        plain = product(frozen.square(), squares).to(wide).double().mT
        block = up[:, start:stop]
        found = product(frozen, factors).to(wide).double().view(stop - start, 2 * (count + last), rank).transpose(0, 1)
        places = (0, count, 2 * count, 2 * count + last, 2 * (count + last))
        mixed = [found[first:stop_at] for first, stop_at in pairwise(places)]
        dot[:, start:stop] = plain[:count] + (mixed[0] * block).sum(dim=-1)
        d2[:, start:stop] = plain[count : 2 * count] + 2 * (mixed[1] * block).sum(dim=-1)
        d2[:, start:stop] += ((block @ gram) * block).sum(dim=-1)
        moved = plain[2 * count :] + (mixed[2] * block[before]).sum(dim=-1) + (mixed[3] * block[own]).sum(dim=-1)
        cross[1:, start:stop] = moved + ((block[own] @ gram_cross) * block[before]).sum(dim=-1)
    return RowTerms(w2, dot, d2, cross, torch.zeros(count, dtype=torch.float64, device=wide))
