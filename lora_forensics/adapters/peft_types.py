"""PEFT's types of adapters without a kind of their own: read through peft, or no change of a weight at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import PEFT_PREFIX, AdapterKind, KindDoc, Layout, Shapes, Stack
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import DenseChange, Weight

TYPES = (
    "adamss", "boft", "c3a", "deft", "delora", "fourierft", "frod", "glora", "gralora", "hira", "hra", "lokr", "miss",
    "oft", "osf", "peanut", "psoft", "pvera", "randlora", "road", "shira", "supertuning", "unilora", "vblora", "vera",
    "waveft",
)  # fmt: skip
"""peft's types whose tensors are named `<type>_...`; of those that have a kind of their own, what it leaves."""

WEIGHTLESS = {
    **dict.fromkeys(
        (
            "adaption_prompt",
            "cartridge",
            "cpt",
            "multitask_prompt_tuning",
            "p_tuning",
            "prefix_tuning",
            "prompt_tuning",
        ),
        "it learns what the model reads beside its input, and changes no weight",
    ),
    "beft": "it changes biases, and no weight",
    "lily": "its factors are routed by the input, so there is no one change of a weight",
    "poly": "its factors are mixed by the task, so there is no one change of a weight",
    "shadow": "it is a second path beside the layers, and changes no weight",
    "xlora": "it mixes other adapters by the input, so there is no one change of a weight",
}
"""peft's types that cannot be compared with a weight, and why."""


class ThroughPeft(AdapterKind):
    """Any type that peft merges into single layers."""

    about = KindDoc("PEFT's other types", "as peft merges it", "the papers named in PEFT's documentation; PEFT")

    def __init__(self, peft_type: str, *, second: bool) -> None:
        """`peft_type` is one of `TYPES`; `second` says that there is a kind of our own before this one."""
        tensor = rf"{peft_type}_\w+(?:\.\w+)*"
        self.name = f"{peft_type} (peft)" if second else peft_type
        self.suffixes = {"own": rf"\.(?P<role>{tensor})"}
        self.shared = {"shared": rf"(?P<role>base_model\.{tensor})"}
        self.peft_types = frozenset({peft_type.upper()})
        super().__init__()

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """Shape and rank are peft's business; nothing can be rebuilt without its configuration."""
        if not module.startswith(PEFT_PREFIX):
            return None
        if config.peft_type not in self.peft_types:
            return Unresolved(f"{self.name} is read with the settings in adapter_config.json, which is missing")
        return Layout(None, None, None)

    def change(self, stack: Stack) -> DenseChange:
        """Merged less base, one checkpoint at a time."""
        from lora_forensics.adapters.through_peft import PeftChange

        return PeftChange(stack)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """Merged less base."""
        from lora_forensics.adapters.through_peft import PeftChange

        return None if weight is None or stack.bias() is None else PeftChange(stack).bias_change(weight)


def through_peft(read: frozenset[str]) -> tuple[ThroughPeft, ...]:
    """A kind for each of `TYPES`, given those (in capitals) that kinds of our own read."""
    return tuple(ThroughPeft(name, second=name.upper() in read) for name in TYPES)
