"""GLoRA (Chavan et al. 2023) as PEFT has it: the weight is scaled entry by entry, D = W * A + B."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange, Weight

_PARTS = ("a", "b")
_BIAS_PARTS = ("c", "d", "e")


class PeftGLoRA(AdapterKind):
    """A and B are products of two factors, vectors over the outputs, one number, or zero; C, D and E are the bias's."""

    name = "glora-peft"
    about = KindDoc("GLoRA of PEFT", "W * A + B", "Chavan et al. 2023; PEFT")
    suffixes: Mapping[str, str] = {
        f"{part}_{name.lower()}": rf"\.glora_{part.upper()}(?:\.[^.]+)?\.{name}"
        for part in (*_PARTS, *_BIAS_PARTS)
        for name in ("Xd", "Xu", "X", "zeros")
    }
    aside = frozenset(f"{part}_{name}" for part in _BIAS_PARTS for name in ("xd", "xu", "x", "zeros"))
    peft_types = frozenset({"GLORA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """What A and B tell of the shape."""
        found = [_part(shapes, part) for part in _PARTS]
        layouts = [layout for layout in found if layout is not None]
        if len(layouts) < len(found):
            return None
        return Layout(*(next((n for n in sizes if n is not None), None) for sizes in zip(*layouts, strict=True)))

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix."""
        from lora_forensics.moments import FormedChange, widened

        tensors = stack.tensors

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            held = {role: widened(tensor[index]).to(weight) for role, tensor in tensors.items()}
            a, b = (_formed(part, held) for part in _PARTS)
            return (weight * a + b).expand_as(weight)

        return FormedChange(form, tuple(tensors.values()), stack.lead)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """With a bias b: b * D + E + W C."""
        import torch

        from lora_forensics.moments import times

        frozen = stack.bias()
        if weight is None or frozen is None or {role[0] for role in stack.aside} != set(_BIAS_PARTS):
            return None
        wide = {role: tensor.double() for role, tensor in stack.aside.items()}
        c, d, e = (_formed(part, wide) for part in _BIAS_PARTS)
        moved = times(weight, c.reshape(len(c), -1).expand(-1, weight.columns), torch.device("cpu")).mT
        return frozen * d.flatten(1) + e.flatten(1) + moved


def _formed(part: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """One part, of its factors if it has any."""
    held = {role[2:]: tensor for role, tensor in tensors.items() if role.startswith(part)}
    return held["xd"] @ held["xu"] if "xu" in held else next(iter(held.values()))


def _part(shapes: Shapes, part: str) -> tuple[int | None, int | None, int | None] | None:
    """Rank, rows and columns that one part tells; None if it is none."""
    held = {role[2:]: shape for role, shape in shapes.items() if role.startswith(part)}
    if set(held) == {"xd", "xu"}:
        xd, xu = held["xd"], held["xu"]
        return (xd[1], xd[0], xu[1]) if len(xd) == len(xu) == 2 and xd[1] == xu[0] > 0 else None
    if set(held) == {"zeros"} and len(held["zeros"]) == 2:
        return None, held["zeros"][0], held["zeros"][1]
    if set(held) == {"x"}:
        return None, held["x"][0] if len(held["x"]) == 2 else None, None
    return None
