"""Row moments: what nearly every metric follows from, for many checkpoints at once.

For one module with frozen weight W (rows x columns) and changes D_t: `w2_n = |W_n|^2`, `dot_n = <W_n, D_n>`,
`d2_n = |D_n|^2` over the output rows n. For D = s B A one product `W @ [A_1^T ... A_c^T]` serves a whole chunk of
checkpoints, and no rows x columns matrix is formed for a change.

Precision: the product with W is float32 (never TF32), or float64 where that costs nothing; everything behind it is
float64, because the verdict rests on second-order differences of numbers near 1e-4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor

WORKING_BYTES = 128 << 20
"""Memory that the temporaries of one block of rows may take."""
_ROUNDING = 0.23
"""Rounding moves a number by up to eps / 2 of its binade: over numbers of all sizes about 0.23 eps of it (rms)."""
SMALL_WEIGHT = 1 << 18
"""Up to this many entries of W the product runs in float64: rounding of few terms does not average out."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen weight that is read by blocks of rows."""

    rows: int
    columns: int
    read: Callable[[int, int], Tensor]
    """Rows [start, stop) as a 2-D CPU tensor in the stored type."""


@dataclass(frozen=True, slots=True)
class Moments:
    """One module at c checkpoints. All tensors are float64 and on the CPU; what is not known is NaN."""

    w2: Tensor
    """(rows,) squared row norms of W; NaN without a base model."""
    dot: Tensor
    """(c, rows) inner products of the rows of W and D; NaN without a base model."""
    d2: Tensor
    """(c, rows) squared row norms of D."""
    down_norm: Tensor
    """(c,) Frobenius norm of A."""
    up_norm: Tensor
    """(c,) Frobenius norm of B."""
    singular: Tensor
    """(c, rank) singular values of D, descending; (c, 0) where the change has no low-rank core."""
    inner_previous: Tensor
    """(c,) <D_t, D_previous>; NaN where there is no previous checkpoint, or it cannot be compared."""
    previous_norm2: Tensor
    """(c,) |D_previous|^2; NaN where there is none."""
    nonfinite: Tensor
    """(c,) number of NaN or Inf entries in the module's tensors."""
    dot_noise: Tensor
    """(c,) standard deviation of <D,W> from rounding the stored tensors; NaN without a base model."""

    @property
    def norm2(self) -> Tensor:
        """(c,) squared Frobenius norm of D."""
        return self.d2.sum(dim=-1)


class Change(Protocol):
    """The change of one module at many checkpoints, whatever the kind of adapter."""

    def moments(self, weight: Weight | None, device: torch.device) -> Moments:
        """Moments of all checkpoints but the leading predecessors."""
        ...


class LowRankChange:
    """D_t = s_t B_t A_t with A (count, rank, columns) and B (count, rows, rank)."""

    def __init__(self, down: Tensor, up: Tensor, scale: Tensor, lead: int = 0, swapped: bool = False) -> None:
        """`lead` leading entries only serve as predecessors; `swapped` says that A and B changed places."""
        self._scale = scale
        self._lead = lead
        self._swapped = swapped
        self._rounding = _ROUNDING * torch.finfo(down.dtype).eps if down.is_floating_point() else 0.0
        down, up = widened(down), widened(up)
        self._nonfinite = _count_nonfinite(down) + _count_nonfinite(up) + _count_nonfinite(scale[:, None])
        self._down = _mask(down, self._nonfinite)
        self._up = _mask(up, self._nonfinite)

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device) -> Moments:
        """Moments of all checkpoints but the leading predecessors."""
        wide = torch.device("cpu") if device.type == "mps" else device  # mps has no float64
        down, up = self._down.to(wide), self._up.to(wide)
        scale = torch.where(self._nonfinite > 0, torch.nan, self._scale).to(wide)
        gram_down, cross_down = _grams(down.mT)
        gram_up, cross_up = _grams(up)
        lead = self._lead
        w2, dot, d2, terms2 = self._row_moments(weight, down[lead:], up[lead:], gram_down[lead:], device)
        inner, previous = self._movement(gram_up, gram_down, cross_up, cross_down, scale)
        scale = scale[lead:]
        norms = [_trace(gram)[lead:].sqrt().where(~scale.isnan(), torch.nan) for gram in (gram_down, gram_up)]
        down_norm, up_norm = reversed(norms) if self._swapped else norms
        return Moments(
            w2=w2.cpu(),
            dot=(dot * scale[:, None]).cpu(),
            d2=(d2 * scale[:, None].square()).cpu(),
            down_norm=down_norm.cpu(),
            up_norm=up_norm.cpu(),
            singular=(_singular_values(gram_up[lead:], gram_down[lead:]) * scale[:, None].abs()).cpu(),
            inner_previous=inner[lead:].cpu(),
            previous_norm2=previous[lead:].cpu(),
            nonfinite=self._nonfinite[lead:],
            # <D,W> is a sum over the entries of B, and one over those of A with terms of the same size on average
            dot_noise=(self._rounding * (2 * terms2).sqrt() * scale.abs()).cpu(),
        )

    def _row_moments(
        self, weight: Weight | None, down: Tensor, up: Tensor, gram: Tensor, device: torch.device
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """w2 (rows,), dot and d2 (c, rows), and the sum of squares (c,) of the terms of dot; unscaled, by blocks."""
        count, rows, rank = up.shape
        columns, wide = down.shape[2], down.device
        factors = _operand(down.reshape(count * rank, columns), rows * columns, device)
        d2 = torch.empty(count, rows, dtype=torch.float64, device=wide)
        w2 = torch.full((rows,), torch.nan, dtype=torch.float64, device=wide)
        dot = torch.full_like(d2, torch.nan)
        terms2 = torch.full((count,), torch.nan if weight is None else 0.0, dtype=torch.float64, device=wide)
        for start, stop in _blocks(rows, 8 * columns + 24 * count * rank):
            block = up[:, start:stop].double()
            d2[:, start:stop] = ((block @ gram) * block).sum(dim=-1)
            if weight is None:
                continue
            frozen = widened(weight.read(start, stop)).to(wide)
            w2[start:stop] = torch.linalg.vector_norm(frozen, dim=1, dtype=torch.float64).square()
            product = _product(frozen, factors).to(wide).double().view(stop - start, count, rank)
            terms = product.transpose(0, 1) * block
            dot[:, start:stop] = terms.sum(dim=-1)
            terms2 += terms.square().sum(dim=(-2, -1))
        return w2, dot, d2, terms2

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


@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off TF32 and bfloat16 shortcuts in float32 products, whatever the calling program has set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def widened(tensor: Tensor) -> Tensor:
    """Numbers that torch hardly computes with (fp8; whole numbers) in a type that holds them."""
    if tensor.is_floating_point():
        return tensor.float() if tensor.element_size() == 1 else tensor
    return tensor.real.double()


def _operand(factors: Tensor, entries: int, device: torch.device) -> Tensor:
    """The factors in the type and on the device of the product with a weight of so many entries."""
    if device.type != "mps" and (entries <= SMALL_WEIGHT or factors.dtype == torch.float64):
        return factors.double()
    if factors.is_cuda and factors.element_size() == 2:
        return factors
    return factors.float().to(device)


def _product(frozen: Tensor, factors: Tensor) -> Tensor:
    """W @ factors^T in the factors' type, sums in float32 or wider."""
    if frozen.dtype == factors.dtype and factors.element_size() == 2 and _sums_in_float32(factors.device):
        return torch.mm(frozen, factors.mT, out_dtype=torch.float32)
    if factors.element_size() == 2:
        factors = factors.float()
    return frozen.to(factors.device, factors.dtype) @ factors.mT


@lru_cache(maxsize=8)
def _sums_in_float32(device: torch.device) -> bool:
    """Whether 16-bit products with float32 sums (tensor cores) are to be had: newer torch, on CUDA."""
    if device.type != "cuda":
        return False
    tiny = torch.ones(8, 8, dtype=torch.bfloat16, device=device)
    try:
        torch.mm(tiny, tiny, out_dtype=torch.float32)
    except (TypeError, RuntimeError):
        return False
    return True


def _grams(factor: Tensor) -> tuple[Tensor, Tensor]:
    """X_t^T X_t (count, r, r) and X_t^T X_(t-1) (count - 1, r, r) in float64, for X (count, n, r), by blocks of n."""
    count, length, rank = factor.shape
    gram = torch.zeros(count, rank, rank, dtype=torch.float64, device=factor.device)
    cross = torch.zeros(max(count - 1, 0), rank, rank, dtype=torch.float64, device=factor.device)
    for start, stop in _blocks(length, 16 * count * rank):
        block = factor[:, start:stop].double()
        gram += block.mT @ block
        cross += block[1:].mT @ block[:-1]
    return gram, cross


def _singular_values(gram_up: Tensor, gram_down: Tensor) -> Tensor:
    """Singular values (count, rank) of B A, descending, from B^T B and A A^T.

    With B^T B = V diag(e) V^T they are the square roots of the eigenvalues of E A A^T E^T, E = diag(sqrt e) V^T.
    """
    with _one_thread(gram_up.device):
        values, vectors = torch.linalg.eigh(gram_up)
        root = values.clamp(min=0).sqrt()[:, :, None] * vectors.mT
        squares: Tensor = torch.linalg.eigvalsh(root @ gram_down @ root.mT)
    return squares.clamp(min=0).sqrt().flip(-1)


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """Eigenvalues of small matrices on the CPU: threads that wait for each other cost far more than they share."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _blocks(length: int, bytes_each: int) -> Iterator[tuple[int, int]]:
    size = max(1, WORKING_BYTES // max(bytes_each, 1))
    for start in range(0, length, size):
        yield start, min(start + size, length)


def _trace(gram: Tensor) -> Tensor:
    total: Tensor = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1)
    return total


def _count_nonfinite(tensor: Tensor) -> Tensor:
    count: Tensor = (~torch.isfinite(tensor)).flatten(1).sum(dim=1)
    return count


def _mask(tensor: Tensor, nonfinite: Tensor) -> Tensor:
    """Zero where a checkpoint holds NaN or Inf, so that eigenvalue routines do not fail; its scale becomes NaN."""
    if not bool(nonfinite.any()):
        return tensor
    return torch.where((nonfinite > 0).view(-1, 1, 1), torch.zeros((), dtype=tensor.dtype), tensor)
