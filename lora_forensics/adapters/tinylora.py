"""TinyLoRA (2026): D = B (sum_i v_i P_i) A, where A and B are frozen singular factors and P_i frozen random matrices.

The trained vectors v are numbered by groups of layers in the model's order, which their names do not tell. The random
matrices do: those of layer i are drawn from the seed plus i.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack
from lora_forensics.errors import CheckpointError
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import LowRankChange


class TinyLoRA(AdapterKind):
    """Frozen singular factors with a few trained numbers between."""

    name = "tinylora"
    about = KindDoc("TinyLoRA", "B (sum_i v_i P_i) A", "arXiv 2602.04118; PEFT")
    suffixes: Mapping[str, str] = {role: rf"\.tinylora_{role}" for role in "ABP"}
    shared: Mapping[str, str] = {"v": r"base_model\.tinylora_v\.(?P<role>\d+)"}
    peft_types = frozenset({"TINYLORA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """Singular factors of one rank, with the random matrices that tell the layer's number."""
        if not {"A", "B"} <= shapes.keys() or not len(shapes["A"]) == len(shapes["B"]) == 2:
            return None
        if "P" not in shapes:
            return Unresolved(
                "which vector it uses depends on the order of the model's layers: save_projection tells it"
            )
        if not isinstance(config.values.get("projection_seed"), int):
            return Unresolved("tinylora is read with the settings in adapter_config.json, which is missing")
        return Layout(rank=shapes["A"][0], rows=shapes["B"][0], columns=shapes["A"][1])

    def change(self, stack: Stack) -> LowRankChange:
        """The core goes to the side of A."""
        from lora_forensics.moments import LowRankChange

        values, tensors = stack.config.values, stack.tensors
        layers = len(stack.layers())
        number = layer_number(tensors["P"][0], int(values["projection_seed"]), layers)
        vector = str(None if number is None else group(number, layers, float(values.get("weight_tying", 0.0))))
        if vector not in tensors:
            raise CheckpointError(
                f"{stack.module}: its random matrices are not those of the seed in adapter_config.json"
            )
        down = core(tensors["P"], tensors[vector]) @ tensors["A"].double()
        stored = tensors["A"], tensors["B"], tensors["P"], tensors[vector]
        return LowRankChange(down, tensors["B"].double(), stack.scale, stack.lead, stored=stored)


def layer_number(projection: torch.Tensor, seed: int, layers: int) -> int | None:
    """Which of the model's layers these random matrices (u, rank, rank) belong to, None if to none."""
    import torch

    for number in range(layers):
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.normal(0.0, projection.shape[-1] ** -0.5, tuple(projection.shape), generator=generator)
        if torch.allclose(drawn.to(projection.dtype), projection, rtol=1e-2, atol=1e-6):
            return number
    return None


def group(number: int, layers: int, tying: float) -> int:
    """The vector that a layer uses: `tying` 0 is one for each layer, 1 is one for all."""
    groups = max(1, round(layers * (1 - tying)))
    return min(number // max(1, layers // groups), groups - 1)


def core(projections: torch.Tensor, vectors: torch.Tensor) -> torch.Tensor:
    """sum_i v_i P_i (count, rank, rank) in float64, for P (count, u, rank, rank) and v (count, u)."""
    import torch

    return torch.einsum("ci,cijk->cjk", vectors.double(), projections.double())
