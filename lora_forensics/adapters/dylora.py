"""DyLoRA of LyCORIS (Valipour et al. 2023): saved as LoRA, but its scale at full rank is alpha / number of blocks."""

from __future__ import annotations

from collections.abc import Mapping

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import KindDoc, Layout, Shapes
from lora_forensics.adapters.lora import LoRA

_BLOCK = 4
"""LyCORIS' own default."""


class DyLoRA(LoRA):
    """Told by the training arguments in the header; kohya's scales as LoRA does."""

    name = "dylora"
    about = KindDoc("DyLoRA of LyCORIS", "s B A, s = alpha / blocks", "Valipour et al. 2023; LyCORIS")
    peft_types = frozenset()

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """A pair that this algorithm wrote."""
        return super().layout(shapes, config, module) if config.values.get("algo") == self.name else None

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / (rank / block size)."""
        told = str(config.values.get("block_size", _BLOCK))
        size = max(1, int(told)) if told.isdecimal() else _BLOCK
        return super().scale(values, config, module, max(1, (rank or 1) // size))
