"""AdaLoRA (Zhang et al. 2023): singular values of their own, and a rank that training pruned. D = s B diag(E) A."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    from lora_forensics.moments import LowRankChange


class AdaLoRA(AdapterKind):
    """PEFT's; the rank is that of the file, not of the configuration."""

    name = "adalora"
    about = KindDoc("AdaLoRA", "s B diag(E) A, s = alpha / (r + 1e-5)", "Zhang et al. 2023; PEFT")
    suffixes: Mapping[str, str] = {
        "down": r"\.lora_A(?:\.[^.]+)?",
        "up": r"\.lora_B(?:\.[^.]+)?",
        "values": r"\.lora_E(?:\.[^.]+)?",
        "number": r"\.ranknum(?:\.[^.]+)?",
    }
    aside = frozenset({"number"})
    scaled = True
    peft_types = frozenset({"ADALORA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Three factors of one rank."""
        if set(shapes) - self.aside != {"down", "up", "values"}:
            return None
        down, up, values = (shapes[role] for role in ("down", "up", "values"))
        if not len(down) == len(up) == len(values) == 2 or not down[0] == up[1] == values[0] > 0:
            return None
        return Layout(down[0], up[0], down[1])

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """PEFT guards against a rank of 0; an alpha of 0 stands for the rank."""
        if config.alpha is None or rank is None:
            return None
        return (config.alpha if config.alpha > 0 else rank) / (rank + 1e-5)

    def change(self, stack: Stack) -> LowRankChange:
        """The singular values go into A."""
        from lora_forensics.moments import LowRankChange, widened

        stored = down, up, values = tuple(stack.tensors[role] for role in ("down", "up", "values"))
        down = widened(down).double() * widened(values).double()
        return LowRankChange(down, up, stack.scale, stack.lead, stored=stored)
