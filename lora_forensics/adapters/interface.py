"""What an adapter kind is to the rest of the package."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from lora_forensics.adapters.config import AdapterConfig

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Change

Shapes = Mapping[str, tuple[int, ...]]
"""Role of a tensor in its module to its shape."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rank of a module's change, and the shape of the weight that it changes."""

    rank: int
    rows: int
    columns: int


class AdapterKind(Protocol):
    """One kind of adapter, for example LoRA."""

    name: str
    """As in the `adapter` column."""
    keys: re.Pattern[str]
    """Matches the tensors of this kind; group `module` is the module, every other group that matched is the role."""

    scalars: frozenset[str]
    """Roles of tensors that are one number: they enter `scale`, not `change`."""

    def layout(self, shapes: Shapes) -> Layout | None:
        """Rank and shape, or None if these tensors are not a module of this kind."""
        ...

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int) -> float | None:
        """Multiplier on the change, None if unknown; `values` holds the module's tensors of one number."""
        ...

    def change(self, tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, lead: int) -> Change:
        """The change of one module at many checkpoints.

        Args:
            tensors: role to tensors stacked over checkpoints, (count, ...), in their stored type.
            scale: (count,) multipliers, float64.
            lead: how many of the first checkpoints only serve as predecessors (0 or 1).
        """
        ...
