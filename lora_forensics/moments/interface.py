"""What metrics see of a module (moments), and what an adapter kind gives for it (a change)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
from torch import Tensor

SMALL_WEIGHT = 1 << 18
"""Up to this many entries of W the product runs in float64: rounding of few terms does not average out."""
WIDE_MATRIX = 1 << 22
"""Up to this many entries a dense change is formed in float64, beyond in float32."""

WEIGHT, CHANGE, FACTORS = "weight", "change", "factors"
LARGEST, SPECTRUM, NOISE = "largest", "spectrum", "noise"
"""What can be known of a module: W and <D,W>; D; its factors; its largest singular value; all of them; the noise."""
TURNS, SCALES, ENTRIES = "turns", "scales", "entries"
"""And: how the factors move; what rows or columns are scaled by; how many entries of W are changed."""


def _unknown() -> Tensor:
    return torch.full((1,), torch.nan, dtype=torch.float64)


@dataclass(frozen=True, slots=True)
class Weight:
    """A frozen weight that is read by blocks of rows."""

    rows: int
    columns: int
    read: Callable[[int, int], Tensor]
    """Rows [start, stop) as a 2-D CPU tensor in the stored type."""
    memo: dict[str, tuple[Tensor, ...]] = field(default_factory=dict, compare=False)
    """What was computed of it once and is needed for every checkpoint, a decomposition for example."""

    def matrix(self, device: torch.device) -> Tensor:
        """All of it, float64 if it is small and float32 else (float64 too where that is the stored type)."""
        stored = self.read(0, self.rows)
        wide = stored.dtype == torch.float64 or self.rows * self.columns <= WIDE_MATRIX
        return stored.to(device).to(torch.float64 if wide else torch.float32)

    def remember(self, name: str, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The result of an earlier call under this name, else of `compute`."""
        if name not in self.memo:
            self.memo[name] = compute()
        return self.memo[name]


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
    """(c, k) singular values of D, descending: all that are not 0, only the largest, or none (see `known`)."""
    inner_previous: Tensor
    """(c,) <D_t, D_previous>; NaN where there is no previous checkpoint, or it cannot be compared."""
    previous_norm2: Tensor
    """(c,) |D_previous|^2; NaN where there is none."""
    nonfinite: Tensor
    """(c,) number of NaN or Inf entries in the module's tensors."""
    dot_noise: Tensor
    """(c,) standard deviation of cos(D,W) |D| |W| from rounding the stored tensors; NaN where that is not known."""
    known: frozenset[str]
    """Which of these are known at all: a subset of WEIGHT, CHANGE, FACTORS, LARGEST, SPECTRUM, NOISE, TURNS, ..."""
    down_cosine: Tensor = field(default_factory=_unknown)
    """(c,) cosine of A_t and A_previous."""
    up_cosine: Tensor = field(default_factory=_unknown)
    """(c,) cosine of B_t and B_previous."""
    down_moved: Tensor = field(default_factory=_unknown)
    """(c,) |A_t - A_first| / |A_first|, where the first of all checkpoints is that of the run."""
    scales: Tensor = field(default_factory=_unknown)
    """(c, n) what rows or columns of W (or of W + D) are multiplied by."""
    changed: Tensor = field(default_factory=_unknown)
    """(c,) share of the entries of D that are not 0."""

    @property
    def norm2(self) -> Tensor:
        """(c,) squared Frobenius norm of D."""
        return self.d2.sum(dim=-1)


def begun_anew(moments: Moments) -> Moments:
    """The same, but what came before the first checkpoint is not known."""

    def unknown_first(tensor: Tensor) -> Tensor:
        return torch.cat([torch.full_like(tensor[:1], torch.nan), tensor[1:]])

    names = ("inner_previous", "previous_norm2", "down_cosine", "up_cosine")
    anew: dict[str, Any] = {name: unknown_first(getattr(moments, name)) for name in names}
    return replace(moments, **anew)


@dataclass(frozen=True, slots=True)
class RowTerms:
    """One module at all `count` checkpoints, predecessors included; float64, on the computing device."""

    w2: Tensor
    """(rows,) squared row norms of W."""
    dot: Tensor
    """(count, rows) inner products of the rows of W and D."""
    d2: Tensor
    """(count, rows) squared row norms of D."""
    cross: Tensor
    """(count, rows) inner products of the rows of D_t and D_(t-1); NaN at the first."""
    noise2: Tensor
    """(count,) variance of <D,W> from rounding the stored tensors."""


class Change(Protocol):
    """The change of one module at many checkpoints, whatever the kind of adapter."""

    def moments(self, weight: Weight | None, device: torch.device, spectra: bool = False) -> Moments:
        """Moments of all checkpoints but the leading predecessors; `spectra` asks for all singular values of any D."""
        ...

    def delta(self, index: int, weight: Tensor, device: torch.device) -> Tensor:
        """D at one checkpoint (rows, columns), leading ones counted: what it costs is of no account here."""
        ...


class FactoredChange(Protocol):
    """A change whose rows' terms and products with vectors need no rows x columns matrix."""

    lead: int
    """How many of the first checkpoints only serve as predecessors."""
    nonfinite: Tensor
    """(count,) NaN or Inf entries; the terms of such a checkpoint are those of a zero change."""

    def row_terms(self, weight: Weight | None, device: torch.device) -> RowTerms:
        """Inner products by rows; those with W are NaN without it."""
        ...

    def apply(self, vectors: Tensor, transposed: bool = False) -> Tensor:
        """D_t v_t (count, rows), or D_t^T v_t (count, columns), for vectors (count, ...)."""
        ...

    def factor_norms(self) -> tuple[Tensor, Tensor] | None:
        """|A| and |B|, (count,) each, if it is a product of two factors that the file holds."""
        ...

    def factor_moves(self) -> dict[str, Tensor]:
        """How these two move, by fields of Moments (count,); empty where there are none."""
        ...

    def delta(self, index: int, weight: Tensor | None, device: torch.device) -> Tensor:
        """D at one checkpoint (rows, columns) in float64."""
        ...


def unknown(lead: int, nonfinite: Tensor, norms: tuple[Tensor, Tensor] | None = None) -> Moments:
    """Moments of a change that cannot be told without its weight."""
    counts = nonfinite[lead:].cpu()
    nothing = torch.full((len(counts),), torch.nan, dtype=torch.float64)
    rows = nothing[:, None]
    down, up = (nothing, nothing) if norms is None else (norm[lead:].cpu() for norm in norms)
    known = frozenset({FACTORS} if norms else ())
    return Moments(nothing[:1], rows, rows, down, up, rows[:, :0], nothing, nothing, counts, nothing, known)


def assemble(
    terms: RowTerms, lead: int, nonfinite: Tensor, singular: Tensor, complete: bool,
    norms: tuple[Tensor, Tensor] | None = None, weight: bool = True, more: Mapping[str, Tensor] | None = None,
) -> Moments:  # fmt: skip
    """Moments from row terms of all checkpoints; what a broken checkpoint touches becomes NaN.

    `more` are fields of Moments by name that not every change has, (count, ...).
    """
    broken = (nonfinite > 0).to(terms.d2.device)
    gap = broken.clone()
    gap[1:] |= broken[:-1]
    previous = torch.full_like(terms.noise2, torch.nan)
    previous[1:] = terms.d2[:-1].sum(dim=-1).masked_fill(broken[:-1], torch.nan)
    nothing = torch.full_like(previous, torch.nan)
    down, up = norms or (nothing, nothing)
    known = {CHANGE, *([WEIGHT] if weight else []), *([FACTORS] if norms else [])}
    known |= {LARGEST} if singular.shape[1] else set()
    known |= {SPECTRUM} if singular.shape[1] and complete else set()
    known |= {NOISE} if weight and not bool(terms.noise2[~broken].isnan().any()) else set()
    known |= {_KNOWN_BY[name] for name in more or ()}

    def tell(tensor: Tensor, unknown_at: Tensor = broken) -> Tensor:
        mask = unknown_at if tensor.dim() == 1 else unknown_at[:, None]
        return tensor.masked_fill(mask.to(tensor.device), torch.nan)[lead:].double().cpu()

    return Moments(
        w2=terms.w2.cpu(),
        dot=tell(terms.dot),
        d2=tell(terms.d2),
        down_norm=tell(down),
        up_norm=tell(up),
        singular=tell(singular),
        inner_previous=tell(terms.cross.sum(dim=-1), gap),
        previous_norm2=tell(previous),
        nonfinite=nonfinite[lead:].cpu(),
        dot_noise=tell(terms.noise2.sqrt()),
        known=frozenset(known),
        **{name: tell(tensor) for name, tensor in (more or {}).items()},
    )


_KNOWN_BY = {"down_cosine": TURNS, "up_cosine": TURNS, "down_moved": TURNS, "scales": SCALES, "changed": ENTRIES}
"""Field of Moments to what it stands for in `known`."""
