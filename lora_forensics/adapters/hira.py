"""HiRA (Huang et al. 2025): the weight times a low-rank matrix, entry by entry. D = W * (B A)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange


class HiRA(AdapterKind):
    """Factors in the spellings of linear, convolution and embedding layers."""

    name = "hira"
    about = KindDoc("HiRA", "W * (B A)", "Huang et al. 2025; PEFT")
    suffixes: Mapping[str, str] = {
        "down": r"\.hira_A(?:\.[^.]+)?",
        "up": r"\.hira_B(?:\.[^.]+)?",
        "embedding_down": r"\.hira_embedding_A(?:\.[^.]+)?",
        "embedding_up": r"\.hira_embedding_B(?:\.[^.]+)?",
    }
    peft_types = frozenset({"HIRA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """As of LoRA's factors."""
        roles = set(shapes)
        if roles == {"down", "up"}:
            down, up = shapes["down"], shapes["up"]
        elif roles == {"embedding_down", "embedding_up"}:
            up, down = shapes["embedding_down"][::-1], shapes["embedding_up"][::-1]
        else:
            return None
        if len(down) < 2 or len(up) < 2 or down[0] != up[1] or 0 in (*down, *up):
            return None
        return Layout(down[0], up[0], product(down[1:]))

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix."""
        from lora_forensics.moments import FormedChange, widened

        tensors = stack.tensors
        if "down" in tensors:
            down, up = tensors["down"].flatten(2), tensors["up"].flatten(2)
        else:
            down, up = tensors["embedding_up"].mT, tensors["embedding_down"].mT

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            return weight * (widened(up[index]).to(weight) @ widened(down[index]).to(weight))

        return FormedChange(form, tuple(tensors.values()), stack.lead)
