"""Several products of thin factors on top of each other: the experts of one parameter."""

from __future__ import annotations

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import core_singular_values, grams, wide_device
from lora_forensics.moments.interface import Moments, RowTerms, Weight, assemble
from lora_forensics.moments.low_rank import LowRankChange
from lora_forensics.moments.spectra import largest_singular_values

_SMALL_RANK = 256
"""Up to this sum of ranks the core is cheap."""


class StackedLowRankChange:
    """D_t = [s_t B_te A_te for every e], along the rows."""

    def __init__(self, down: Tensor, up: Tensor, scale: Tensor, lead: int = 0) -> None:
        """A (count, parts, rank, columns) and B (count, parts, rows, rank)."""
        self._lead = lead
        self._parts = [LowRankChange(a, b, scale, lead) for a, b in zip(down.unbind(1), up.unbind(1), strict=True)]
        self._rows = up.shape[2]

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors."""
        wide = wide_device(device)
        found = []
        for number, part in enumerate(self._parts):
            found.append(part.row_terms(None if weight is None else self._slice(weight, number), device))
        terms = RowTerms(
            w2=torch.cat([part.w2 for part in found]),
            dot=torch.cat([part.dot for part in found], dim=1),
            d2=torch.cat([part.d2 for part in found], dim=1),
            cross=torch.cat([part.cross for part in found], dim=1),
            noise2=torch.stack([part.noise2 for part in found]).sum(dim=0),
        )
        own = torch.stack([part.nonfinite for part in self._parts])
        pairs = [part.factors() for part in self._parts]
        unscaled = [part.factor_norms() for part in self._parts]
        norms = [torch.stack([pair[side] for pair in unscaled if pair]).norm(dim=0) for side in (0, 1)]
        singular = self._singular(pairs, wide, spectra)
        complete = singular.shape[1] > 1
        return assemble(
            terms, self._lead, own.sum(dim=0), singular, complete, (norms[0], norms[1]), weight=weight is not None
        )

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """All products on top of each other, in float64."""
        return torch.cat([part.delta(index, weight, device) for part in self._parts])

    def _slice(self, weight: Weight, number: int) -> Weight:
        first = number * self._rows
        return Weight(self._rows, weight.columns, lambda start, stop: weight.read(first + start, first + stop))

    def _singular(self, pairs: list[tuple[Tensor, Tensor]], device: torch.device, spectra: bool) -> Tensor:
        """From the core of the stacked factors if it is small or asked for, else the largest one."""
        down = torch.cat([pair[0] for pair in pairs], dim=1).to(device)
        ups = [pair[1].to(device) for pair in pairs]
        count, rank, columns = down.shape
        if spectra or 1 < rank <= _SMALL_RANK:
            gram = _block_diagonal([up.mT @ up for up in ups])
            return core_singular_values(gram, grams(down.mT)[0])

        def multiply(vectors: Tensor, transposed: bool) -> Tensor:
            if transposed:
                pieces = vectors.view(count, len(ups), -1, 1).unbind(1)
                mixed = [up.mT @ piece for up, piece in zip(ups, pieces, strict=True)]
                return (down.mT @ torch.cat(mixed, dim=1))[:, :, 0]
            inner = (down @ vectors[:, :, None]).view(count, len(ups), -1, 1).unbind(1)
            return torch.cat([up @ piece for up, piece in zip(ups, inner, strict=True)], dim=1)[:, :, 0]

        rows = self._rows * len(ups)
        return largest_singular_values(multiply, count, rows, columns, device)[:, None]


def _block_diagonal(squares: list[Tensor]) -> Tensor:
    """(count, sum, sum) of matrices (count, n, n)."""
    sizes = [square.shape[-1] for square in squares]
    whole = squares[0].new_zeros(len(squares[0]), sum(sizes), sum(sizes))
    start = 0
    for square, size in zip(squares, sizes, strict=True):
        whole[:, start : start + size, start : start + size] = square
        start += size
    return whole
