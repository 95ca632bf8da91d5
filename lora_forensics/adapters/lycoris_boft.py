"""BOFT (Liu et al. 2024) as LyCORIS has it: stages of block rotations of the outputs, mixed by butterflies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lora_forensics.adapters.diag_oft import DiagOFT
from lora_forensics.adapters.interface import KindDoc

if TYPE_CHECKING:
    import torch


class LycorisBOFT(DiagOFT):
    """Blocks with an axis of stages before them."""

    name = "boft-lycoris"
    about = KindDoc(
        "BOFT of LyCORIS", "diag(s) B_m ... B_1 W - W, B_i permuted block rotations", "Liu et al. 2024; LyCORIS"
    )
    axes = 4

    def turn(self, turned: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Stage i pairs units that are 2^i half blocks apart."""
        import torch

        stages, _, size, _ = turned.shape
        added = torch.zeros_like(weight)
        for stage in range(stages):
            distance = 2**stage * (size // 2)
            order = torch.arange(len(weight), device=weight.device).view(-1, 2, distance).mT.flatten()
            now = (weight + added)[order].view(-1, size, weight.shape[1])
            moved = (turned[stage] @ now).reshape(weight.shape)
            added = added + moved[order.argsort()]
        return added
