"""MiSS, formerly Bone (Kang and Yin 2024): one small matrix added to all column blocks of W; Bat: W M + M."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange, Weight, WeightedLowRankChange


class MiSS(AdapterKind):
    """Its `mini` form repeats the matrix over the outputs too."""

    name = "miss"
    about = KindDoc("MiSS, Bone, Bat", "M^T repeated along the inputs; Bat: blocks W M + M", "Kang and Yin 2024; PEFT")
    suffixes: Mapping[str, str] = {"block": r"\.(?:miss|bone)_block(?:\.[^.]+)?"}
    peft_types = frozenset({"MISS", "BONE"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The inputs are not told."""
        shape = shapes.get("block", ())
        if len(shape) == 3 and shape[1] == shape[2] > 0:
            return Layout(shape[1], shape[0] * shape[1], None)
        if len(shape) != 2 or 0 in shape:
            return None
        return Layout(shape[0], None if config.values.get("init_weights") == "mini" else shape[1], None)

    def change(self, stack: Stack) -> FormedChange | WeightedLowRankChange:
        """A thin product with a tiled identity; Bat as a matrix."""
        import torch

        from lora_forensics.errors import CheckpointError
        from lora_forensics.moments import FormedChange, WeightedLowRankChange, widened

        block = stack.tensors["block"]

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            rank = block.shape[3]
            if weight.shape[1] % rank:
                raise CheckpointError(f"blocks of {rank} do not divide {weight.shape[1]} inputs")
            small = widened(block[index]).to(weight)
            parts = weight.view(len(small), rank, -1, rank).permute(2, 0, 1, 3)
            return (parts @ small + small).permute(1, 2, 0, 3).reshape(weight.shape)

        def build(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            count, rank, width = block.shape
            if weight.rows % width:
                raise CheckpointError(f"blocks of {width} do not divide {weight.rows} outputs")
            tiles = torch.eye(rank, dtype=torch.float64, device=device).repeat(1, -(-weight.columns // rank))
            up = widened(block).to(device).double().mT.repeat(1, weight.rows // width, 1)
            return tiles[:, : weight.columns].expand(count, -1, -1), up

        if block.dim() == 4:
            return FormedChange(form, (block,), stack.lead)
        return WeightedLowRankChange(build, (block,), stack.scale, stack.lead)
