"""LoHa (Hyeon-Woo et al. 2022, FedPara): two low-rank matrices multiplied elementwise, in LyCORIS' and PEFT's files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, alpha_scale, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import DenseHadamardChange, HadamardChange

_PLAIN = {"w1_a", "w1_b", "w2_a", "w2_b"}


class LoHa(AdapterKind):
    """Two pairs of factors, each with a kernel of its own for Tucker convolutions."""

    name = "loha"
    about = KindDoc("LoHa", "s (B1 A1) * (B2 A2)", "Hyeon-Woo et al. 2022; LyCORIS, PEFT")
    suffixes: Mapping[str, str] = {
        **{f"w{n}_{side}": rf"\.hada_w{n}_{side}(?:\.[^.]+)?" for n in (1, 2) for side in "ab"},
        **{f"t{n}": rf"\.hada_t{n}(?:\.[^.]+)?" for n in (1, 2)},
        "alpha": r"\.alpha",
    }
    scalars = frozenset({"alpha"})
    scaled = True
    peft_types = frozenset({"LOHA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Both products have one shape; with a kernel the factors are (rank, out) and (rank, in)."""
        roles = set(shapes) - self.scalars
        if roles not in (_PLAIN, _PLAIN | {"t1", "t2"}) or any(
            0 in shape for role, shape in shapes.items() if role in roles
        ):
            return None
        found = [_product_shape(shapes, n) for n in "12"]
        if found[0] is None or found[1] is None or found[0][1:] != found[1][1:]:
            return None
        return Layout(*found[0])

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank, once: LyCORIS' own merge applies it twice, its training once."""
        return alpha_scale(values, config, module, rank or 1)

    def change(self, stack: Stack) -> HadamardChange | DenseHadamardChange:
        """Of both pairs."""
        from lora_forensics.moments import hadamard_change

        stored = tuple(tensor for role, tensor in stack.tensors.items())
        return hadamard_change(_pair(stack, "1"), _pair(stack, "2"), stack.scale, stack.lead, stored)


def _product_shape(shapes: Shapes, n: str) -> tuple[int, int, int] | None:
    """Rank, rows and columns of one product, or None if its factors do not fit."""
    a, b, kernel = shapes[f"w{n}_a"], shapes[f"w{n}_b"], shapes.get(f"t{n}")
    if len(a) != 2 or len(b) < 2:
        return None
    if kernel is None:
        return (b[0], a[0], product(b[1:])) if a[1] == b[0] else None
    if len(b) != 2 or len(kernel) < 3 or kernel[:2] != (a[0], b[0]):
        return None
    return a[0], a[1], b[1] * product(kernel[2:])


def _pair(stack: Stack, n: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A (count, rank, columns) and B (count, rows, rank) of one product."""
    a, b = stack.tensors[f"w{n}_a"], stack.tensors[f"w{n}_b"]
    if f"t{n}" not in stack.tensors:
        return b.flatten(2), a
    from lora_forensics.moments import tucker_down

    return tucker_down(stack.tensors[f"t{n}"], b), a.mT
