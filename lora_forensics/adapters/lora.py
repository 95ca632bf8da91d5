"""LoRA (Hu et al. 2021) on linear, convolution and embedding layers; rsLoRA by its scale. D = scale * B @ A."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import Layout, Shapes

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Change

_OLD = r"(?: \.lora | \.lora_linear_layer | (?<=_lora) | (?<=_lora\d) )"
_KEYS = re.compile(
    rf"""(?P<module>.+?)(?:
        (?P<down> (?: \.lora_down | \.lora_A(?:\.[^.]+)? | {_OLD}\.down ) \.weight)
      | (?P<up> (?: \.lora_up | \.lora_B(?:\.[^.]+)? | {_OLD}\.up ) \.weight)
      | (?P<embedding_down> \.lora_embedding_A(?:\.[^.]+)? )
      | (?P<embedding_up> \.lora_embedding_B(?:\.[^.]+)? )
      | (?P<bias> \.lora_B(?:\.[^.]+)?\.bias )
      | (?P<alpha> \.alpha )
    )""",
    re.VERBOSE,
)
"""kohya's down/up, PEFT's A/B (with or without the adapter's name), diffusers' old spellings, embeddings."""


class LoRA:
    """Pairs of low-rank factors."""

    name = "lora"
    keys = _KEYS
    scalars = frozenset({"alpha"})

    def layout(self, shapes: Shapes) -> Layout | None:
        """A pair of factors whose ranks agree; kernels count as columns."""
        roles = set(shapes) - {"alpha", "bias"}  # a bias is no part of W
        if roles == {"down", "up"}:
            return _linear(shapes["down"], shapes["up"])
        if roles == {"embedding_down", "embedding_up"}:
            down, up = shapes["embedding_down"], shapes["embedding_up"]
            if len(down) == len(up) == 2 and down[0] == up[1] > 0:
                return Layout(rank=down[0], rows=down[1], columns=up[0])
        return None

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int) -> float | None:
        """Alpha / rank: from the module's own tensor, else from the configuration; kohya's missing alpha means 1."""
        if "alpha" in values:
            return values["alpha"] / rank if values["alpha"] != 0 else 1.0  # sd-scripts reads 0 as the rank
        known = config.scale(module, rank)
        return 1.0 if known is None and module.startswith("lora_") else known

    def change(self, tensors: Mapping[str, torch.Tensor], scale: torch.Tensor, lead: int) -> Change:
        """Factors in the orientation in which the base stores the weight: an embedding's are swapped."""
        from lora_forensics.moments import LowRankChange

        if "embedding_down" in tensors:
            # PEFT: A (rank, vocabulary), B (dimension, rank), while the base stores (vocabulary, dimension)
            down, up = tensors["embedding_up"].mT, tensors["embedding_down"].mT
            return LowRankChange(down, up, scale, lead, swapped=True)
        return LowRankChange(tensors["down"].flatten(2), tensors["up"].flatten(2), scale, lead)


def _linear(down: tuple[int, ...], up: tuple[int, ...]) -> Layout | None:
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] or 0 in (*down, *up) or any(n != 1 for n in up[2:]):
        return None
    columns = 1
    for n in down[1:]:
        columns *= n
    return Layout(rank=down[0], rows=up[0], columns=columns)
