"""IA3 (Liu et al. 2022): rows or columns of the weight scaled. PEFT stores the factor, LyCORIS the factor less 1."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import ScaledChange, Weight


class IA3(AdapterKind):
    """One factor for each output, or for each input of feed-forward layers."""

    name = "ia3"
    about = KindDoc("IA3", "(g - 1) W by rows or columns", "Liu et al. 2022; PEFT, LyCORIS")
    suffixes: Mapping[str, str] = {
        "factor": r"\.ia3_l(?:\.[^.]+)?",
        "weight": r"\.weight",
        "on_input": r"\.on_input",
    }
    telling = frozenset({"factor", "on_input"})
    peft_types = frozenset({"IA3"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The axis that is scaled is known, the other one is not; LyCORIS' flag is read with the tensors."""
        if set(shapes) == {"weight", "on_input"}:
            return Layout(None, None, None) if product(shapes["on_input"]) == 1 else None
        if set(shapes) != {"factor"}:
            return None
        shape = shapes["factor"]
        number = product(shape)
        if not number or number != max(shape, default=0):
            return None
        if not _by_column(shape, config, module):
            return Layout(None, number, None)
        return Layout(None, None, number if len(shape) == 2 else None)

    def change(self, stack: Stack) -> ScaledChange:
        """The factors themselves."""
        from lora_forensics.moments import ScaledChange, widened

        if "factor" in stack.tensors:
            values = stack.tensors["factor"]
            by_column = _by_column(tuple(values.shape[1:]), stack.config, stack.module)
            return ScaledChange(values.flatten(1), by_column, False, stack.lead)
        values = stack.tensors["weight"].flatten(1)
        by_column = bool(stack.tensors["on_input"].flatten()[0] > 0)
        return ScaledChange(widened(values).double() + 1, by_column, False, stack.lead, stored=values)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """PEFT scales outputs with their bias, LyCORIS the weight alone."""
        values, frozen = stack.tensors.get("factor"), stack.bias()
        if values is None or frozen is None or _by_column(tuple(values.shape[1:]), stack.config, stack.module):
            return None
        return (values.flatten(1).double() - 1) * frozen


def _by_column(shape: tuple[int, ...], config: AdapterConfig, module: str) -> bool:
    """PEFT: (out, 1) or (1, in); (1, n, 1, 1) for convolutions, of which only the configuration tells."""
    if len(shape) <= 2:
        return shape[0] == 1 and product(shape) > 1
    wanted = config.values.get("feedforward_modules")
    if isinstance(wanted, str):
        return len(wanted) < 200 and re.fullmatch(re.escape(wanted).replace(r"\.\*", ".*"), module) is not None
    return isinstance(wanted, list) and any(module == name or module.endswith(f".{name}") for name in wanted)
