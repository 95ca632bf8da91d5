"""Whole weights that were trained and saved: PEFT's `modules_to_save`, task heads, LN tuning. D = saved - W."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.full import plain_layout
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, less_bias

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import GivenChange, Weight

_COPY = r"(?<!\.base_layer)"
"""PEFT stores a frozen embedding beside its adapter: a copy, not trained."""

_CONV1D = re.compile(r"(^|\.)(c_(attn|fc|proj)|q_attn)$")
"""Layers that transformers may store in x out."""


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
        if len(shapes["weight"]) == 2 and (config.flag("fan_in_fan_out") or _CONV1D.search(module)):
            return Layout(None, None, None)
        return plain_layout(shapes["weight"])

    def change(self, stack: Stack) -> GivenChange:
        """The difference to the base."""
        from lora_forensics.moments import GivenChange

        saved, layer = stack.tensors["weight"], stack.layers().get(stack.module)
        turned = layer is not None and layer.transposed and saved.dim() == 3
        return GivenChange(saved.mT if turned else saved, stack.lead, less_weight=True)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """The difference to the base."""
        return less_bias(stack.aside.get("bias"), stack)
