"""Elementwise products of two low-rank matrices: D = s (B1 A1) * (B2 A2).

Row n of D is a combination of the elementwise products of the rows of A1 with those of A2: a product of thin factors of
rank r1 r2. For a large r1 r2 it is cheaper to form the matrix.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lora_forensics.moments.arithmetic import mask, widened
from lora_forensics.moments.dense import DenseChange
from lora_forensics.moments.interface import WIDE_MATRIX
from lora_forensics.moments.low_rank import LowRankChange

_LARGE_RANK = 100
"""From this r1 r2 on the matrix is formed (measured at 4096 x 4096)."""

Pair = tuple[Tensor, Tensor]
"""A (count, r, columns) and B (count, rows, r)."""


def hadamard_change(
    first: Pair, second: Pair, scale: Tensor, lead: int, stored: tuple[Tensor, ...]
) -> HadamardChange | DenseHadamardChange:
    """The cheaper of the two ways; `stored` are the tensors of the file."""
    small = first[0].shape[1] * second[0].shape[1] <= _LARGE_RANK
    return (HadamardChange if small else DenseHadamardChange)(first, second, scale, lead, stored)


class HadamardChange(LowRankChange):
    """By factors of rank r1 r2."""

    def __init__(self, first: Pair, second: Pair, scale: Tensor, lead: int, stored: tuple[Tensor, ...]) -> None:
        (down1, up1), (down2, up2) = ((widened(a).double(), widened(b).double()) for a, b in (first, second))
        self._ranks = down1.shape[1], down2.shape[1]
        down = (down1[:, :, None] * down2[:, None]).flatten(1, 2)
        up = (up1[:, :, :, None] * up2[:, :, None]).flatten(2, 3)
        super().__init__(down, up, scale, lead, stored=stored)

    def _squares(self, terms: Tensor) -> Tensor:
        """An entry of B1 stands in r2 of the terms, one of B2 in r1: the mean of both sums of squares."""
        pairs = terms.reshape(*terms.shape[:2], *self._ranks)
        sums = [pairs.sum(dim=axis).square().sum(dim=(-2, -1)) for axis in (-1, -2)]
        return (sums[0] + sums[1]) / 2


class DenseHadamardChange(DenseChange):
    """As a matrix."""

    needs_weight = False

    def __init__(self, first: Pair, second: Pair, scale: Tensor, lead: int, stored: tuple[Tensor, ...]) -> None:
        super().__init__((*stored, scale[:, None]), lead)
        self._pairs = first, second
        self._scale = scale

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:  # noqa: ARG002 (needs none)
        """The product of the two products."""
        products = []
        for down, up in self._pairs:
            small = up.shape[1] * down.shape[2] <= WIDE_MATRIX or down.dtype == torch.float64
            wide = torch.float64 if small else torch.float32
            a, b = (mask(t, self.nonfinite)[index].to(device, wide) for t in (down, up))
            products.append(b @ a)
        return products[0].mul_(products[1]).mul_(float(self._scale[index]))
