"""Products of two thin factors: D_t = s_t B_t A_t.

One product `W @ [A_1^T ... A_c^T]` serves a whole chunk of checkpoints, movement and singular values follow from Grams,
and no rows x columns matrix is formed for a change.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lora_forensics.errors import CheckpointError
from lora_forensics.moments.arithmetic import (
    blocks,
    core_singular_values,
    count_nonfinite,
    fitting,
    grams,
    mask,
    operand,
    product,
    rounding,
    trace,
    weight_blocks,
    wide_device,
    widened,
)
from lora_forensics.moments.factors import Grams, moves
from lora_forensics.moments.interface import (
    CHANGE,
    FACTORS,
    LARGEST,
    NOISE,
    SMALL_WEIGHT,
    SPECTRUM,
    TURNS,
    WEIGHT,
    Moments,
    RowTerms,
    Weight,
    unknown,
)

_ROW_NORMS = "squared row norms"


class LowRankChange:
    """D_t = s_t B_t A_t with A (count, rank, columns) and B (count, rows, rank)."""

    def __init__(
        self,
        down: Tensor,
        up: Tensor,
        scale: Tensor,
        lead: int = 0,
        swapped: bool = False,
        stored: tuple[Tensor, ...] | None = None,
    ) -> None:
        """`lead` leading entries only serve as predecessors; `swapped` says that A and B changed places.

        Where A and B are not what the file holds, `stored` is: its entries are counted and its type rounds.
        """
        self.lead = lead
        self._scale = scale.cpu()
        self._swapped = swapped
        self._derived = stored is not None
        source = (down, up) if stored is None else stored
        self._rounding = max(map(rounding, source), default=0.0)
        self._stored = len(source)
        self._wide = any(t.dtype == torch.float64 for t in source)
        down, up = widened(down), widened(up)
        self.nonfinite = count_nonfinite(*source, self._scale[:, None]).cpu()
        self._down = mask(down, self.nonfinite.to(down.device))
        self._up = mask(up, self.nonfinite.to(up.device))

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:  # noqa: ARG002 (all are known)
        """Moments of all checkpoints but the leading predecessors."""
        wide = wide_device(device)
        down, up = self._down.to(wide), self._up.to(wide)
        scale = torch.where(self.nonfinite > 0, torch.nan, self._scale).to(wide)
        gram_down, cross_down = grams(down.mT)
        gram_up, cross_up = grams(up)
        lead = self.lead
        w2, dot, d2, terms2 = self._row_moments(weight, down[lead:], up[lead:], gram_down[lead:], device)
        inner, previous = self._movement(gram_up, gram_down, cross_up, cross_down, scale)
        scale = scale[lead:]
        norms = [trace(gram)[lead:].sqrt().where(~scale.isnan(), torch.nan) for gram in (gram_down, gram_up)]
        down_norm, up_norm = reversed(norms) if self._swapped else norms
        known = {
            CHANGE,
            LARGEST,
            SPECTRUM,
            *(() if self._derived else (FACTORS, TURNS)),
            *((WEIGHT, NOISE) if weight else ()),
        }
        return Moments(
            w2=w2.cpu(),
            dot=(dot * scale[:, None]).cpu(),
            d2=(d2 * scale[:, None].square()).cpu(),
            down_norm=down_norm.cpu(),
            up_norm=up_norm.cpu(),
            singular=(core_singular_values(gram_up[lead:], gram_down[lead:]) * scale[:, None].abs()).cpu(),
            inner_previous=inner[lead:].cpu(),
            previous_norm2=previous[lead:].cpu(),
            nonfinite=self.nonfinite[lead:],
            dot_noise=(self._noise2(terms2).sqrt() * scale.abs()).cpu(),
            known=frozenset(known),
            **self._moves((gram_down, cross_down), (gram_up, cross_up), lead),
        )

    @torch.no_grad()
    def row_terms(self, weight: Weight | None, device: torch.device) -> RowTerms:
        """Inner products by rows of all checkpoints."""
        wide = wide_device(device)
        down, up, scale = self._down.to(wide), self._up.to(wide), self._finite_scale().to(wide)
        gram, gram_cross = grams(down.mT)
        w2, dot, d2, terms2 = self._row_moments(weight, down, up, gram, device)
        cross = torch.full_like(d2, torch.nan)
        for start, stop in blocks(up.shape[1], 24 * up.shape[0] * up.shape[2]):
            block = up[:, start:stop].double()
            cross[1:, start:stop] = ((block[1:] @ gram_cross) * block[:-1]).sum(dim=-1)
        cross[1:] *= (scale[1:] * scale[:-1])[:, None]
        return RowTerms(
            w2, dot * scale[:, None], d2 * scale[:, None].square(), cross, self._noise2(terms2) * scale.square()
        )

    def apply(self, vectors: Tensor, transposed: bool = False) -> Tensor:
        """D_t v_t (count, rows), or D_t^T v_t (count, columns)."""
        down, up = (tensor.to(vectors.device, vectors.dtype) for tensor in (self._down, self._up))
        first, second = (up.mT, down.mT) if transposed else (down, up)
        scale = self._finite_scale().to(vectors.device, vectors.dtype)
        result: Tensor = (second @ (first @ vectors[:, :, None]))[:, :, 0] * scale[:, None]
        return result

    def factors(self) -> tuple[Tensor, Tensor]:
        """A (count, rank, columns) and s B (count, rows, rank) in float64; 0 where a checkpoint is broken."""
        return self._down.double(), self._up.double() * self._finite_scale()[:, None, None]

    def factor_norms(self) -> tuple[Tensor, Tensor] | None:
        """|A| and |B|, (count,) each."""
        down, up = (torch.linalg.vector_norm(t, dim=(1, 2), dtype=torch.float64) for t in (self._down, self._up))
        return None if self._derived else (up, down) if self._swapped else (down, up)

    def factor_moves(self) -> dict[str, Tensor]:
        """How A and B move, (count,) each."""
        return self._moves(grams(self._down.mT), grams(self._up))

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:  # noqa: ARG002 (needs none)
        """S B A in float64."""
        down, up = self._down[index].to(device).double(), self._up[index].to(device).double()
        return (up @ down).mul_(float(self._finite_scale()[index]))

    def _moves(self, of_down: Grams, of_up: Grams, lead: int = 0) -> dict[str, Tensor]:
        if self._derived:
            return {}
        down, *both = (self._up, of_up, of_down) if self._swapped else (self._down, of_down, of_up)
        found = moves(down.to(of_down[0].device), *both)
        return {name: value[lead:].cpu() for name, value in found.items()}

    def _finite_scale(self) -> Tensor:
        return torch.where(self.nonfinite > 0, 0.0, self._scale)

    def _noise2(self, terms2: Tensor) -> Tensor:
        """<D,W> is a sum over the entries of every stored factor, with terms of the same size on average."""
        return self._rounding**2 * self._stored * terms2

    def _row_moments(
        self, weight: Weight | None, down: Tensor, up: Tensor, gram: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w2 (rows,), dot and d2 (c, rows), and the sum of squares (c,) of the terms of dot; unscaled, by blocks."""
        count, rows, rank = up.shape
        columns, wide = down.shape[2], down.device
        stacked = down.reshape(count * rank, columns)
        narrow = self._derived and not self._wide and rows * columns > SMALL_WEIGHT
        factors = operand(stacked.float() if narrow else stacked, rows * columns, device)
        d2 = torch.empty(count, rows, dtype=torch.float64, device=wide)
        dot = torch.full_like(d2, torch.nan)
        terms2 = torch.full((count,), torch.nan if weight is None else 0.0, dtype=torch.float64, device=wide)
        known = None if weight is None else weight.memo.get(_ROW_NORMS)
        w2 = torch.full((rows,), torch.nan, dtype=torch.float64, device=wide) if known is None else known[0].to(wide)
        bytes_each = 5 * columns + 4 * count * rank
        unread = ((start, stop, None) for start, stop in blocks(rows, bytes_each))
        for start, stop, frozen in unread if weight is None else weight_blocks(weight, bytes_each, wide):
            if frozen is not None:
                if known is None:
                    w2[start:stop] = torch.linalg.vector_norm(frozen, dim=1, dtype=torch.float64).square()
                found = product(frozen, factors).to(wide).view(stop - start, count, rank).transpose(0, 1)
            for first, last in blocks(count, 64 * (stop - start) * rank):  # what is worked on stays in the cache
                block = up[first:last, start:stop].double()
                d2[first:last, start:stop] = (block @ gram[first:last]).mul_(block).sum(dim=-1)
                if frozen is not None:
                    terms = found[first:last].double().mul_(block)
                    dot[first:last, start:stop] = terms.sum(dim=-1)
                    terms2[first:last] += self._squares(terms)
        if weight is not None:
            weight.memo[_ROW_NORMS] = (w2.cpu(),)
        return w2, dot, d2, terms2

    def _squares(self, terms: Tensor) -> Tensor:
        """Sum of squares (count,) of the terms (count, n, rank) of <D,W>."""
        total: Tensor = torch.linalg.vector_norm(terms, dim=(-2, -1)).square()
        return total

    @staticmethod
    def _movement(
        gram_up: Tensor, gram_down: Tensor, cross_up: Tensor, cross_down: Tensor, scale: Tensor
    ) -> tuple[Tensor, Tensor]:
        """<D_t, D_(t-1)> = tr((B_t^T B_(t-1)) (A_(t-1) A_t^T)) and |D_(t-1)|^2, each (count,), NaN at the first."""
        inner = torch.full_like(scale, torch.nan)
        previous = torch.full_like(scale, torch.nan)
        inner[1:] = (cross_up * cross_down).sum(dim=(-2, -1)) * scale[1:] * scale[:-1]
        norm2 = (gram_up * gram_down).sum(dim=(-2, -1)) * scale.square()
        previous[1:] = norm2[:-1]
        return inner, previous


class WeightedLowRankChange:
    """A product of two thin factors that the weight is part of: a decomposition of it, or its product with a factor."""

    def __init__(
        self,
        build: Callable[[Weight, torch.device], tuple[Tensor, Tensor]],
        stored: tuple[Tensor, ...],
        scale: Tensor,
        lead: int = 0,
    ) -> None:
        """`build` gives A (count, rank, columns) and B (count, rows, rank); `stored` are the file's tensors."""
        self._build = build
        self._built: LowRankChange | None = None
        self._stored = stored
        self._scale = scale
        self._lead = lead

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors; unknown without a weight."""
        if weight is None:
            return unknown(self._lead, count_nonfinite(*self._stored, self._scale[:, None]))
        return self._change(weight, device).moments(weight, device, spectra)

    def delta(self, index: int, weight: Tensor, device: torch.device) -> Tensor:
        """S B A in float64."""
        if self._built is None:
            rows, columns = weight.shape
            self._built = self._change(Weight(rows, columns, lambda start, stop: weight[start:stop]), device)
        return self._built.delta(index, weight, device)

    def _change(self, weight: Weight, device: torch.device) -> LowRankChange:
        with fitting():
            down, up = self._build(weight, wide_device(device))
        if down.shape[2] != weight.columns or up.shape[1] != weight.rows:
            raise CheckpointError(
                f"it is made for {up.shape[1]} x {down.shape[2]}, not {weight.rows} x {weight.columns}"
            )
        self._built = LowRankChange(down, up, self._scale, self._lead, stored=self._stored)
        return self._built
