"""LoRA on fused experts (PEFT's `target_parameters`, mlx-lm): one pair of tensors holds a pair for every expert."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack
from lora_forensics.adapters.lora import LoRA

if TYPE_CHECKING:
    from lora_forensics.moments import StackedLowRankChange


class ExpertLoRA(AdapterKind):
    """A is (experts * rank, in), an expert's rows together; B is (out, rank * experts), the expert fastest.

    mlx-lm has the experts on an axis of their own: (experts, rank, in) and (experts, out, rank). A module here is one
    parameter: the experts' weights are stacked along their outputs.
    """

    name = "lora-experts"
    about = KindDoc(
        "LoRA on fused experts", "s B_e A_e for every expert e", "Hu et al. 2021; PEFT with target_parameters, mlx-lm"
    )
    suffixes: Mapping[str, str] = {role: LoRA.suffixes[role] for role in ("down", "up", "bias", "mlx_a", "mlx_b")}
    aside = LoRA.aside
    scaled = True
    peft_types = LoRA.peft_types

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """In PEFT's names only where a parameter was asked for whose rank is a part of that in the file."""
        if set(shapes) == {"mlx_a", "mlx_b"}:
            return _stacked(shapes["mlx_a"], shapes["mlx_b"])
        whole = LoRA().layout(shapes, config, module)
        experts = _experts(config, module, None if whole is None else whole.rank)
        if whole is None or whole.rank is None or whole.rows is None or experts is None:
            return None
        return Layout(whole.rank // experts, whole.rows * experts, whole.columns)

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank of one expert."""
        return config.scale(module, rank or 1)

    def change(self, stack: Stack) -> StackedLowRankChange:
        """One pair an expert."""
        from lora_forensics.moments import StackedLowRankChange

        if "mlx_a" in stack.tensors:
            return StackedLowRankChange(stack.tensors["mlx_a"], stack.tensors["mlx_b"], stack.scale, stack.lead)
        down, up = stack.tensors["down"], stack.tensors["up"]
        rank = stack.layout.rank or 1
        down = down.reshape(len(down), -1, rank, down.shape[2])
        up = up.reshape(len(up), up.shape[1], rank, -1).permute(0, 3, 1, 2)
        return StackedLowRankChange(down, up, stack.scale, stack.lead)


def _stacked(a: tuple[int, ...], b: tuple[int, ...]) -> Layout | None:
    if len(a) != 3 or len(b) != 3 or a[0] != b[0] or a[1] != b[2] or 0 in (*a, *b):
        return None
    return Layout(rank=a[1], rows=b[0] * b[1], columns=a[2])


def _experts(config: AdapterConfig, module: str, rank: int | None) -> int | None:
    """How many there are, more than one."""
    asked = config.rank(module)
    wanted = config.values.get("target_parameters")
    if not rank or not asked or rank % asked or rank == asked or not isinstance(wanted, list):
        return None
    path = module.removesuffix(".base_layer")
    while path.endswith(".base_layer"):
        path = path.removesuffix(".base_layer")
    holders = {str(name).rpartition(".")[0] for name in wanted}
    return rank // asked if any(f".{path}".endswith(f".{holder}") for holder in holders) else None
