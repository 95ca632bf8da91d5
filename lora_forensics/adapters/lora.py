"""LoRA (Hu et al. 2021) and what is saved as such: LoCon, LoRA-FA, rsLoRA, DyLoRA; Tucker convolutions.

D = scale * B @ A; a Tucker convolution has a kernel M between: D[o, i, k] = scale sum_ab B[o, a] M[a, b, k] A[b, i].
mlx-lm stores both factors transposed: a is (in, rank), b (rank, out).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters import naming
from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, alpha_scale, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import LowRankChange, Weight

_OLD = r"(?: \.lora | \.lora_linear_layer | (?<=_lora) | (?<=_lora\d) )"


class LoRA(AdapterKind):
    """Pairs of low-rank factors."""

    name = "lora"
    about = KindDoc(
        "LoRA, LoCon, LoRA-FA, rsLoRA, DyLoRA",
        "s B A; s B M A with a Tucker kernel M",
        "Hu et al. 2021; kohya, LyCORIS, PEFT, diffusers and trainers with their spellings",
    )
    suffixes: Mapping[str, str] = {
        "down": rf"(?: \.lora_down | \.lora_A(?:\.[^.]+)? | \.lora_a | {_OLD}\.down ) \.weight",
        "up": rf"(?: \.lora_up | \.lora_B(?:\.[^.]+)? | \.lora_b | {_OLD}\.up ) \.weight",
        "mid": r"\.lora_mid\.weight",
        "embedding_down": r"\.lora_embedding_A(?:\.[^.]+)?",
        "embedding_up": r"\.lora_embedding_B(?:\.[^.]+)?",
        "mlx_a": r"\.lora_a",
        "mlx_b": r"\.lora_b",
        "bias": r"\.lora_B(?:\.[^.]+)?\.bias",
        "alpha": r"\.alpha",
        "scalar": r"\.scalar",
    }
    scalars = frozenset({"alpha", "scalar"})
    aside = frozenset({"bias"})
    scaled = True
    peft_types = frozenset({"LORA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """A pair of factors whose ranks agree; kernels count as columns."""
        roles = set(shapes) - self.scalars - self.aside
        if roles == {"down", "up"}:
            return _linear(shapes["down"], shapes["up"])
        if roles == {"down", "mid", "up"}:
            return _tucker(shapes["down"], shapes["mid"], shapes["up"])
        if roles == {"embedding_down", "embedding_up"}:
            down, up = shapes["embedding_down"], shapes["embedding_up"]
            if len(down) == len(up) == 2 and down[0] == up[1] > 0:
                return Layout(rank=down[0], rows=down[1], columns=up[0])
        if roles == {"mlx_a", "mlx_b"}:
            return _mlx(shapes["mlx_a"], shapes["mlx_b"], module)
        return None

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank, and the scalar where it was not folded into a factor."""
        scale = alpha_scale(values, config, module, rank or 1)
        return None if scale is None else scale * values.get("scalar", 1.0)

    def change(self, stack: Stack) -> LowRankChange:
        """Factors in the orientation in which the base stores the weight: an embedding's are swapped."""
        from lora_forensics.moments import LowRankChange

        tensors, scale, lead = stack.tensors, stack.scale, stack.lead
        if "embedding_down" in tensors:
            # PEFT: A (rank, vocabulary), B (dimension, rank), while the base stores (vocabulary, dimension)
            down, up = tensors["embedding_up"].mT, tensors["embedding_down"].mT
            return LowRankChange(down, up, scale, lead, swapped=True)
        if "mlx_a" in tensors:
            a, b = tensors["mlx_a"], tensors["mlx_b"]
            embedding = naming.role(stack.module) == "embedding"
            return (
                LowRankChange(b, a, scale, lead, swapped=True) if embedding else LowRankChange(a.mT, b.mT, scale, lead)
            )
        down, up = tensors["down"].flatten(2), tensors["up"].flatten(2)
        if "mid" in tensors:
            from lora_forensics.moments import tucker_down

            stored = tuple(tensors[role] for role in ("down", "mid", "up"))
            return LowRankChange(tucker_down(tensors["mid"], down), up, scale, lead, stored=stored)
        return LowRankChange(down, up, scale, lead)

    def bias_change(self, stack: Stack, weight: Weight | None) -> torch.Tensor | None:
        """PEFT's `lora_bias`: that of B, scaled alike."""
        bias = stack.aside.get("bias")
        return None if bias is None else stack.scale[:, None] * bias.double()


def _linear(down: tuple[int, ...], up: tuple[int, ...]) -> Layout | None:
    if len(down) < 2 or len(up) < 2 or down[0] != up[1] or 0 in (*down, *up) or product(up[2:]) != 1:
        return None
    return Layout(rank=down[0], rows=up[0], columns=product(down[1:]))


def _tucker(down: tuple[int, ...], mid: tuple[int, ...], up: tuple[int, ...]) -> Layout | None:
    flat = len(down) >= 2 and len(up) >= 2 and product(down[2:]) == product(up[2:]) == 1
    if not flat or len(mid) < 3 or mid[:2] != (up[1], down[0]) or 0 in (*down, *mid, *up):
        return None
    return Layout(rank=down[0], rows=up[0], columns=down[1] * product(mid[2:]))


def _mlx(a: tuple[int, ...], b: tuple[int, ...], module: str) -> Layout | None:
    if len(a) != 2 or len(b) != 2 or a[1] != b[0] or 0 in (*a, *b):
        return None
    rows, columns = (a[0], b[1]) if naming.role(module) == "embedding" else (b[1], a[0])
    return Layout(rank=a[1], rows=rows, columns=columns)
