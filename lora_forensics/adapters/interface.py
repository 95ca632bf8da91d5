"""What an adapter kind is to the rest of the package."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Change, Weight

PEFT_PREFIX = "base_model.model."
"""What peft writes before the path of a module."""

Shapes = Mapping[str, tuple[int, ...]]
"""Role of a tensor in its module to its shape."""


@dataclass(frozen=True, slots=True)
class KindDoc:
    """One line of the table of kinds."""

    title: str
    """Its common names."""
    formula: str
    """The change D of the weight W."""
    source: str
    """Paper, and the libraries whose files are read."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Rank of a module's change, and the shape of the weight that it changes; None is what the file does not tell."""

    rank: int | None
    rows: int | None
    columns: int | None


@dataclass(frozen=True, slots=True)
class Layer:
    """A layer below a module, as the base stores its weight."""

    shape: tuple[int, ...]
    """One number for a norm, two for a linear layer or an embedding, three to five for a convolution."""
    transposed: bool = False
    """Stored in x out (transformers' Conv1D)."""
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class Stack:
    """One module at many checkpoints, of which a kind makes a `Change`."""

    module: str
    layout: Layout
    tensors: Mapping[str, torch.Tensor]
    """Role to tensors stacked over checkpoints, (count, ...), in their stored type; without scalars and those aside."""
    scale: torch.Tensor
    """(count,) multipliers, float64."""
    lead: int
    """How many of the first checkpoints only serve to compare the others with."""
    config: AdapterConfig
    layers: Callable[[], Mapping[str, Layer | None]] = dict
    """All modules of this kind in the checkpoint, and what lies below each; None where nothing was found."""
    bias: Callable[[], torch.Tensor | None] = lambda: None
    """The bias beside the weight, where the base has one."""
    aside: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """Those aside, stacked alike."""


class AdapterKind(ABC):
    """One kind of adapter, for example LoRA. The defaults here are those of a kind without any extra."""

    name: str
    """As in the `adapter` column."""
    about: KindDoc
    suffixes: Mapping[str, str]
    """Role to a regular expression (verbose) of what follows the module's name in that tensor's, from its first dot."""
    telling: frozenset[str] | None = None
    """Roles whose tensors show by their name that they are an adapter's; None is all but those of one number."""
    shared: Mapping[str, str] = {}
    """Role to a regular expression of tensors that belong to no module and to all of this kind."""
    scalars: frozenset[str] = frozenset()
    """Roles of tensors that are one number: they enter `scale`, not `change`."""
    aside: frozenset[str] = frozenset()
    """Roles of tensors that are no part of the weight's change, biases: only their NaN and Inf are counted."""
    scaled: bool = False
    """Whether a multiplier (alpha / rank) stands before the change."""
    peft_types: frozenset[str] = frozenset()
    """`peft_type` in the configuration that this kind reads: then it is asked before the others."""
    corrected: bool = False
    """Whether the change is that of the stock weight though training started from another."""
    companion: bool = False
    """Only beside other adapters, or where a configuration names its type: looks like any model's weight."""

    keys: re.Pattern[str]
    """Made of `suffixes`: group `module` is the module, every other group that matched is the role."""

    def __init__(self) -> None:
        options = " | ".join(f"(?P<{role}> {suffix} )" for role, suffix in self.suffixes.items())
        self.keys = re.compile(rf"(?P<module>.+?)(?=\.)(?: {options} )", re.VERBOSE)

    def module(self, found: re.Match[str]) -> str:
        """The name of the layer that a tensor changes, from a match of `keys`."""
        return found["module"]

    @abstractmethod
    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """Rank and shape; None if these tensors are no module of this kind, Unresolved if they lack a thing."""

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Multiplier on the change, None if unknown; `values` holds the module's tensors of one number."""
        return 1.0

    @abstractmethod
    def change(self, stack: Stack) -> Change:
        """The change of one module at many checkpoints.

        Raises:
            CheckpointError: the tensors do not belong together; the message says why.
        """

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """The change (count, rows) of the bias beside the weight, float64; None if there is none, or it is unknown."""
        return None


def less_bias(saved: torch.Tensor | None, stack: Stack) -> torch.Tensor | None:
    """What a bias that was saved whole (count, rows) changes; None without the one in the base."""
    frozen = stack.bias() if saved is not None else None
    return None if saved is None or frozen is None or saved.shape[1:] != frozen.shape else saved.double() - frozen


def product(sizes: tuple[int, ...]) -> int:
    """Of all sizes; 1 of none."""
    total = 1
    for size in sizes:
        total *= size
    return total


def alpha_scale(values: Mapping[str, float], config: AdapterConfig, module: str, rank: int) -> float | None:
    """Alpha / rank: from the module's own tensor, else from the configuration; kohya's missing alpha means 1."""
    if "alpha" in values:
        return values["alpha"] / rank if values["alpha"] != 0 else 1.0  # sd-scripts reads 0 as the rank
    known = config.scale(module, rank)
    return 1.0 if known is None and module.startswith("lora_") else known
