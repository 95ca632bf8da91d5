"""VeRA (Kopiczko et al. 2024), its random projections saved beside: all modules share A and B, cut to their size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Weight, WeightedLowRankChange


class VeRA(AdapterKind):
    """Two vectors a module; how many of A's columns it uses, only the weight tells."""

    name = "vera"
    about = KindDoc("VeRA", "diag(b) B[:out] diag(d) A[:, :in]", "Kopiczko et al. 2024; PEFT with save_projection")
    suffixes: Mapping[str, str] = {
        "outer": r"\.vera_lambda_b(?:\.[^.]+)?",
        "inner": r"\.vera_lambda_d(?:\.[^.]+)?",
    }
    shared: Mapping[str, str] = {
        "down": r"(?:base_model\.)?vera_A(?:\.[^.]+)?",
        "up": r"(?:base_model\.)?vera_B(?:\.[^.]+)?",
    }
    peft_types = frozenset({"VERA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Only with both projections, and large enough."""
        if set(shapes) != {"outer", "inner", "down", "up"}:
            return None
        outer, inner, down, up = (shapes[role] for role in ("outer", "inner", "down", "up"))
        if (len(outer), len(inner), len(down), len(up)) != (1, 1, 2, 2) or 0 in (*outer, *inner):
            return None
        (rows,), (rank,) = outer, inner
        return Layout(rank, rows, None) if down[0] == up[1] == rank and up[0] >= rows else None

    def change(self, stack: Stack) -> WeightedLowRankChange:
        """A thin product, once the weight is there."""
        from lora_forensics.moments import WeightedLowRankChange, widened

        tensors = stack.tensors

        def build(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            outer, inner, down, up = (widened(tensors[r]).to(device).double() for r in ("outer", "inner", "down", "up"))
            return inner[:, :, None] * down[:, :, : weight.columns], outer[:, :, None] * up[:, : weight.rows]

        return WeightedLowRankChange(build, tuple(tensors.values()), stack.scale, stack.lead)
