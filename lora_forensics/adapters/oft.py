"""OFT (Qiu et al. 2023) as PEFT has it: blocks of inputs are rotated. D = W (R^T - I), R = diag(R_1 ... R_k).

R_i is the Cayley transform of a skew matrix whose upper triangle is saved, or the first terms of its Neumann series.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange


class OFT(AdapterKind):
    """One triangle a block, or one for all blocks."""

    name = "oft"
    about = KindDoc("OFT, COFT", "W (R^T - I), R block-diagonal orthogonal on the inputs", "Qiu et al. 2023; PEFT")
    suffixes: Mapping[str, str] = {
        "triangle": r"\.oft_R(?:\.[^.]+)?\.weight",
        "embedding": r"\.oft_embedding_R(?:\.[^.]+)?\.weight",
    }
    peft_types = frozenset({"OFT"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The number of blocks and their size give the inputs, unless all blocks share one rotation."""
        shape = next(iter(shapes.values()), ())
        if len(shapes) != 1 or len(shape) != 2 or 0 in shape or _size(shape[1]) is None:
            return None
        return Layout(None, None, None if config.flag("block_share") else shape[0] * (_size(shape[1]) or 0))

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix, by blocks of columns."""

        from lora_forensics.errors import CheckpointError
        from lora_forensics.moments import FormedChange, widened

        ((role, stored),) = stack.tensors.items()
        size = _size(stored.shape[2]) or 1

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            if weight.shape[1] % size:
                raise CheckpointError(f"blocks of {size} do not divide {weight.shape[1]} inputs")
            turned = _rotation_less_identity(widened(stored[index]).double().to(weight.device), size, stack.config)
            turned = turned if role == "embedding" else turned.mT
            parts = weight.view(len(weight), -1, size)
            turned = turned.to(weight.dtype).expand(parts.shape[1], -1, -1)
            return (parts.transpose(0, 1) @ turned).transpose(0, 1).reshape(weight.shape)

        return FormedChange(form, (stored,), stack.lead)


def _size(entries: int) -> int | None:
    """Size of a square matrix whose triangle above the diagonal has so many entries."""
    size = (1 + math.isqrt(1 + 8 * entries)) // 2
    return size if size * (size - 1) // 2 == entries and size > 1 else None


def _rotation_less_identity(triangle: torch.Tensor, size: int, config: AdapterConfig) -> torch.Tensor:
    """R - I (blocks, size, size)."""
    import torch

    skew = triangle.new_zeros(len(triangle), size, size)
    rows, columns = torch.triu_indices(size, size, 1)
    skew[:, rows, columns] = triangle
    skew = skew - skew.mT
    if config.flag("coft"):
        bound = config.number("eps", 6e-5) / math.sqrt(len(triangle))
        skew = skew * (bound / skew.norm(dim=(1, 2), keepdim=True).clamp(min=bound))
    if not config.flag("use_cayley_neumann", True):
        eye = torch.eye(size, dtype=skew.dtype, device=skew.device).expand_as(skew)
        found: torch.Tensor = torch.linalg.solve(eye + skew, -2 * skew, left=False)
        return found
    terms = int(config.number("num_cayley_neumann_terms", 5))
    if terms <= 1:
        return torch.zeros_like(skew)
    total, power = 2 * skew, skew
    if terms > 2:
        power = power @ skew
        total = total + 2 * power
        for _ in range(3, terms - 1):
            power = power @ skew
            total = total + 2 * power
        total = total + power @ skew
    return total
