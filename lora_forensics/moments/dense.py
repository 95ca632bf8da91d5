"""Changes that are formed as a matrix, one checkpoint at a time: for everything that no factors are known for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lora_forensics.errors import CheckpointError
from lora_forensics.moments.arithmetic import blocks, count_nonfinite, fitting, wide_device, widened
from lora_forensics.moments.interface import WIDE_MATRIX, Moments, RowTerms, Weight, assemble, unknown
from lora_forensics.moments.spectra import largest_singular_values


class DenseChange(ABC):
    """The base of such kinds: `delta` is all that one has to write."""

    needs_weight = True
    """Whether the change cannot be told without W; then `delta` is only called with one."""

    def __init__(self, stored: tuple[Tensor, ...], lead: int = 0) -> None:
        """`stored` are the module's tensors (count, ...); `lead` leading ones only serve as predecessors."""
        self.lead = lead
        self.count = len(stored[0])
        self.nonfinite = count_nonfinite(*stored).cpu()

    @abstractmethod
    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """D at one checkpoint (rows, columns) on `device`, in the type of `weight` (rows, columns) or wider."""

    @torch.no_grad()
    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors."""
        if weight is None and self.needs_weight:
            return unknown(self.lead, self.nonfinite)
        wide = wide_device(device)
        frozen = None if weight is None else weight.matrix(wide)
        w2 = None if frozen is None else _inner(frozen, frozen)
        dots, squares, crosses, singular, changed = [], [], [], [], []
        previous: Tensor | None = None
        for index in range(self.count):
            broken = bool(self.nonfinite[index])
            with fitting():
                delta = None if broken else self.delta(index, frozen, wide)
            nothing = torch.full((1,), torch.nan, dtype=torch.float64, device=wide)
            squares.append(nothing if delta is None else _inner(delta, delta))
            dots.append(nothing if delta is None or frozen is None else _inner(delta, frozen))
            crosses.append(nothing if delta is None or previous is None else _inner(delta, previous))
            changed.append(math.nan if delta is None else int(torch.count_nonzero(delta)) / delta.numel())
            if index >= self.lead:
                singular.append(None if delta is None else _singular(delta, spectra))
            previous = delta
        d2, dot, cross = (_stacked(rows) for rows in (squares, dots, crosses))
        if w2 is None:
            w2 = torch.full((d2.shape[1],), torch.nan, dtype=torch.float64, device=wide)
        values = _stacked([torch.full((1,), torch.nan, dtype=torch.float64) if s is None else s for s in singular])
        values = torch.cat([torch.full((self.lead, values.shape[1]), torch.nan, dtype=torch.float64), values])
        noise2 = torch.full((self.count,), torch.nan, dtype=torch.float64, device=wide)
        terms = RowTerms(w2, dot, d2, cross, noise2)
        more = {"changed": torch.tensor(changed, dtype=torch.float64)}
        return assemble(terms, self.lead, self.nonfinite, values, spectra, weight=weight is not None, more=more)


class FormedChange(DenseChange):
    """By a function of the index and W (rows, columns), in whose type and on whose device it answers."""

    def __init__(self, form: Callable[[int, Tensor], Tensor], stored: tuple[Tensor, ...], lead: int = 0) -> None:
        super().__init__(stored, lead)
        self._form = form

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:  # noqa: ARG002 (that of W)
        """What the function says."""
        assert weight is not None  # noqa: S101 (`moments` sees to it)
        return self._form(index, weight)


class GivenChange(DenseChange):
    """A saved tensor: the change itself, or the new weight, of all rows or of some."""

    def __init__(
        self, saved: Tensor, lead: int = 0, less_weight: bool = False, rows: Sequence[int] | None = None
    ) -> None:
        """`less_weight`: `saved` (count, ...) is the new weight; `rows` are those that it holds."""
        super().__init__((saved,), lead)
        self._saved = saved
        self._chosen = rows
        self.needs_weight = less_weight

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """Saved, less the weight."""
        saved = widened(self._saved[index]).to(device)
        saved = saved.reshape(len(saved), -1)
        if weight is None:
            return saved.double() if saved.numel() <= WIDE_MATRIX else saved.float()
        saved = saved.to(weight.dtype)
        if not self.needs_weight:
            return _fitting(saved, weight)
        if self._chosen is None:
            return _fitting(saved, weight) - weight
        if max(self._chosen, default=0) >= len(weight):
            raise CheckpointError(f"row {max(self._chosen)} of a weight with {len(weight)} rows")
        changed = torch.zeros_like(weight)
        changed[self._chosen] = saved - weight[self._chosen]
        return changed


def _fitting(saved: Tensor, weight: Tensor) -> Tensor:
    if saved.shape == weight.shape:
        return saved
    shapes = [" x ".join(map(str, tensor.shape)) for tensor in (saved, weight)]
    raise CheckpointError(f"a saved weight of {shapes[0]} on one of {shapes[1]}")


def _inner(first: Tensor, second: Tensor) -> Tensor:
    """Inner products (rows,) of the rows of two matrices, summed in float64."""
    parts = [
        (first[start:stop].double() * second[start:stop].double()).sum(dim=-1)
        for start, stop in blocks(len(first), 48 * first.shape[1])
    ]
    return torch.cat(parts)


def _singular(delta: Tensor, spectra: bool) -> Tensor:
    """All singular values, or the largest, (k,) float64 on the CPU."""
    if spectra:
        found: Tensor = torch.linalg.svdvals(delta)
        return found.double().cpu()
    rows, columns = delta.shape

    def multiply(vectors: Tensor, transposed: bool) -> Tensor:
        return vectors @ (delta if transposed else delta.mT)

    return largest_singular_values(multiply, 1, rows, columns, delta.device, delta.dtype).cpu()


def _stacked(rows: list[Tensor]) -> Tensor:
    """Rows of one length on top of each other; single NaNs are repeated."""
    length = max((len(row) for row in rows), default=0)
    return torch.stack([row.expand(length) if len(row) == 1 else row for row in rows]) if rows else torch.empty(0, 0)
