"""Whole weights that were trained and saved: PEFT's `modules_to_save`, task heads, LN tuning. D = saved - W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.full import plain_layout
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    from lora_forensics.moments import GivenChange

_COPY = r"(?<!\.base_layer)"
"""PEFT stores a frozen embedding beside its adapter: a copy, not trained."""


class Weights(AdapterKind):
    """The new weight; read only beside an adapter, for any model's file looks like this."""

    name = "weights"
    about = KindDoc("whole weights (modules_to_save, LN tuning)", "saved - W", "PEFT")
    suffixes: Mapping[str, str] = {
        "weight": rf"{_COPY}(?:\.ln_tuning_layers(?:\.[^.]+)?|\.modules_to_save(?:\.[^.]+)?)?\.weight",
        "bias": rf"{_COPY}(?:\.ln_tuning_layers(?:\.[^.]+)?|\.modules_to_save(?:\.[^.]+)?)?\.bias",
    }
    aside = frozenset({"bias"})
    companion = True
    telling = frozenset()
    peft_types = frozenset({"LN_TUNING"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """As stored; where a linear weight may be stored in x out, only the base tells."""
        if "weight" not in shapes:
            return None
        if config.flag("fan_in_fan_out") and len(shapes["weight"]) == 2:
            return Layout(None, None, None)
        return plain_layout(shapes["weight"])

    def change(self, stack: Stack) -> GivenChange:
        """The difference to the base."""
        from lora_forensics.moments import GivenChange

        return GivenChange(stack.tensors["weight"], stack.lead, less_weight=True)
