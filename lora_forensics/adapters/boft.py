"""BOFT (Liu et al. 2024) as PEFT has it: stages of block rotations of the inputs, mixed by butterfly permutations."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange


class BOFT(AdapterKind):
    """Rotations by stage and block, and a factor for each output."""

    name = "boft"
    about = KindDoc("BOFT", "diag(s) W (B_m ... B_1)^T - W, B_i permuted block rotations", "Liu et al. 2024; PEFT")
    suffixes: Mapping[str, str] = {"blocks": r"\.boft_R(?:\.[^.]+)?", "factor": r"\.boft_s(?:\.[^.]+)?"}
    peft_types = frozenset({"BOFT"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Blocks times their size are the inputs."""
        blocks = shapes.get("blocks", ())
        if set(shapes) != {"blocks", "factor"} or len(blocks) != 4 or blocks[2] != blocks[3] or 0 in blocks:
            return None
        return Layout(None, max(shapes["factor"], default=None), blocks[1] * blocks[3])

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix, stage by stage; what a stage adds is kept apart from W, so that nothing cancels."""
        import torch

        from lora_forensics.moments import FormedChange, widened

        blocks, factor = stack.tensors["blocks"], stack.tensors["factor"]

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            stages = widened(blocks[index]).double().to(weight.device)
            number, count, size, _ = stages.shape
            skew = (stages - stages.mT) / 2
            eye = torch.eye(size, dtype=skew.dtype, device=skew.device).expand_as(skew)
            turned = torch.linalg.solve(eye + skew, -2 * skew, left=False).to(weight.dtype)  # R - I
            added = torch.zeros_like(weight)
            for stage in range(number):
                order = _order(count * size, count >> stage, size // 2, number).to(weight.device)
                back = order.argsort()
                now = (weight + added)[:, back].view(len(weight), count, size)
                moved = (now.transpose(0, 1) @ turned[stage].mT).transpose(0, 1).reshape(weight.shape)
                added = added + moved[:, order]
            factors = widened(factor[index]).to(weight).reshape(-1, 1)
            return factors * added + (factors - 1) * weight

        return FormedChange(form, (blocks, factor), stack.lead)


def _order(length: int, blocks: int, unit: int, stages: int) -> torch.Tensor:
    """In every block the units at even places, then those at odd ones; as it is where there is one stage."""
    import torch

    if stages == 1:
        return torch.arange(length)
    places = torch.arange(length).view(max(blocks, 1), -1, unit)
    return torch.cat([places[:, ::2], places[:, 1::2]], dim=1).flatten()
