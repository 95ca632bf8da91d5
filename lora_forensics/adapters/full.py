"""Changes that are saved as they are: LyCORIS' full and norm modules, and weights extracted as differences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import GivenChange, Weight


class Full(AdapterKind):
    """D itself; the change of a bias is no part of it."""

    name = "full"
    about = KindDoc("full and norm differences", "the saved tensor", "LyCORIS (diff, w_norm), ComfyUI")
    suffixes: Mapping[str, str] = {
        "diff": r"\.diff",
        "norm": r"\.w_norm",
        "bias": r"\.(?:diff_b|b_norm)",
        "alpha": r"\.alpha",
    }
    scalars = frozenset({"alpha"})
    aside = frozenset({"bias"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """A vector is one column."""
        found = [shapes[role] for role in ("diff", "norm") if role in shapes]
        return plain_layout(found[0]) if len(found) == 1 else None

    def change(self, stack: Stack) -> GivenChange:
        """The tensor."""
        from lora_forensics.moments import GivenChange

        return GivenChange(next(iter(stack.tensors.values())), stack.lead)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """The tensor."""
        bias = stack.aside.get("bias")
        return None if bias is None else bias.double()


def plain_layout(shape: tuple[int, ...]) -> Layout | None:
    """Of a tensor that has the weight's own shape."""
    if not shape or 0 in shape:
        return None
    return Layout(None, shape[0], product(shape[1:]))
