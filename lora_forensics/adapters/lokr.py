"""LoKr (Yeh et al. 2024, LyCORIS): a Kronecker product of whole or low-rank sides, as LyCORIS and PEFT write it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, alpha_scale, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import KroneckerChange

_LEFT = ({"w1"}, {"w1_a", "w1_b"})
_RIGHT = ({"w2"}, {"w2_a", "w2_b"}, {"w2_a", "w2_b", "t2"})


class LoKr(AdapterKind):
    """Every way to decompose its sides."""

    name = "lokr"
    about = KindDoc(
        "LoKr", "s P kron Q; P, Q whole, low-rank, or Q with a Tucker kernel", "Yeh et al. 2024; LyCORIS, PEFT"
    )
    suffixes: Mapping[str, str] = {
        **{role: rf"\.lokr_{role}(?:\.[^.]+)?" for role in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")},
        "alpha": r"\.alpha",
    }
    scalars = frozenset({"alpha"})
    scaled = True
    peft_types = frozenset({"LOKR"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Sizes of both sides, multiplied; no rank if both are whole."""
        roles = set(shapes) - self.scalars
        if config.peft_type in self.peft_types and any(len(shapes[role]) == 3 for role in roles):
            return None  # beside a kernel of one axis PEFT's product takes channels for rows: as PEFT merges it
        left, right = {role for role in roles if role.startswith("w1")}, {role for role in roles if role[1] == "2"}
        if left not in _LEFT or right not in _RIGHT or any(0 in shapes[role] for role in roles):
            return None
        first, second = _side(shapes, "1"), _side(shapes, "2")
        if first is None or second is None:
            return None
        (rank1, a, c), (rank2, b, d) = first, second
        return Layout(rank1 or rank2, a * b, c * d)

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank, once; two whole sides have none in LyCORIS, whose rsLoRA then stores alpha = rank^1.5."""
        if rank is None and "alpha" in values:
            stabilised = config.flag("rs_lora") or not values["alpha"].is_integer()  # the file may have lost its text
            return abs(values["alpha"]) ** (1 / 3) if stabilised else 1.0
        rank = rank or config.rank(module)
        if rank is None:
            return 1.0 if module.startswith("lora_") else None
        return alpha_scale(values, config, module, rank)

    def change(self, stack: Stack) -> KroneckerChange:
        """Kernels belong to the right side."""
        from lora_forensics.moments import KroneckerChange

        stored = tuple(stack.tensors.values())
        return KroneckerChange(_matrix(stack, "1"), _matrix(stack, "2"), stack.scale, stack.lead, stored)


def _side(shapes: Shapes, n: str) -> tuple[int | None, int, int] | None:
    """Rank, rows and columns of one side, or None if its factors do not fit."""
    whole = shapes.get(f"w{n}")
    if whole is not None:
        return (None, whole[0], product(whole[1:])) if len(whole) >= 2 else None
    a, b, kernel = shapes[f"w{n}_a"], shapes[f"w{n}_b"], shapes.get(f"t{n}")
    if len(a) != 2 or len(b) < 2:
        return None
    if kernel is None:
        return (b[0], a[0], product(b[1:])) if a[1] == b[0] else None
    if len(b) != 2 or len(kernel) < 3 or kernel[:2] != (a[0], b[0]):
        return None
    return a[0], a[1], b[1] * math.prod(kernel[2:])


def _matrix(stack: Stack, n: str) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """One side, or its two factors."""
    tensors = stack.tensors
    if f"w{n}" in tensors:
        return tensors[f"w{n}"].flatten(2)
    if f"t{n}" not in tensors:
        return tensors[f"w{n}_a"], tensors[f"w{n}_b"].flatten(2)
    from lora_forensics.moments import tucker_down

    return tensors[f"w{n}_a"].mT, tucker_down(tensors[f"t{n}"], tensors[f"w{n}_b"])
