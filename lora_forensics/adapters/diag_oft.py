"""OFT (Qiu et al. 2023) as LyCORIS (diag-oft) and kohya have it: blocks of outputs are rotated. D = (R^T - I) W."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange


class DiagOFT(AdapterKind):
    """Square blocks, their constraint (stored as alpha), and a factor for each output if it is rescaled."""

    name = "diag-oft"
    about = KindDoc(
        "OFT (diag-oft)",
        "diag(s) R^T W - W, R block-diagonal orthogonal on the outputs",
        "Qiu et al. 2023; LyCORIS, kohya",
    )
    suffixes: Mapping[str, str] = {"blocks": r"\.oft_blocks", "factor": r"\.rescale", "alpha": r"\.alpha"}
    axes = 3
    """Of the blocks: number, rows, columns."""

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Blocks times their size are the outputs."""
        blocks = shapes.get("blocks", ())
        if len(blocks) != self.axes or blocks[-1] != blocks[-2] or 0 in blocks:
            return None
        return Layout(None, blocks[-3] * blocks[-1], None)

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix; what is added is kept apart from W, so that nothing cancels."""
        from lora_forensics.moments import FormedChange, widened

        tensors = stack.tensors

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            blocks = widened(tensors["blocks"][index]).double().to(weight.device)
            limit = float(tensors["alpha"][index]) * len(weight) if "alpha" in tensors else 0.0
            added = self.turn(rotation_less_identity(blocks, limit).to(weight.dtype), weight)
            if "factor" not in tensors:
                return added
            factors = widened(tensors["factor"][index]).to(weight).reshape(-1, 1)
            return factors * added + (factors - 1) * weight

        return FormedChange(form, tuple(tensors.values()), stack.lead)

    def turn(self, turned: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """What the rotations, less the identity, add to the weight."""
        parts = weight.view(*turned.shape[:2], -1)
        return (turned.mT @ parts).reshape(weight.shape)


def rotation_less_identity(blocks: torch.Tensor, limit: float) -> torch.Tensor:
    """R - I with R = (I + Q)(I - Q)^-1, Q = B - B^T; a limit > 0 bounds the norm of all Q together."""
    import torch

    skew = blocks - blocks.mT
    norm = float(skew.norm()) + 1e-8
    if 0 < limit < norm:
        skew = skew * (limit / norm)
    eye = torch.eye(skew.shape[-1], dtype=skew.dtype, device=skew.device).expand_as(skew)
    found: torch.Tensor = torch.linalg.solve(eye - skew, 2 * skew, left=False)
    return found
