"""HRA (Yuan et al. 2024): a chain of Householder reflections of the inputs. D = W (H_1 ... H_r - I)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Weight, WeightedLowRankChange


class HRA(AdapterKind):
    """Directions, made orthogonal first where the configuration says so."""

    name = "hra"
    about = KindDoc("HRA", "W (H_1 ... H_r - I), H_i = I - 2 u_i u_i^T", "Yuan et al. 2024; PEFT")
    suffixes: Mapping[str, str] = {"directions": r"\.hra_u(?:\.[^.]+)?"}
    peft_types = frozenset({"HRA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The outputs are not told."""
        shape = shapes.get("directions", ())
        return Layout(shape[1], None, shape[0]) if len(shape) == 2 and 0 not in shape else None

    def change(self, stack: Stack) -> WeightedLowRankChange:
        """The chain is I - U T U^T with a triangular T (its compact form): D is the thin product -(W U T) U^T."""
        import torch

        from lora_forensics.moments import WeightedLowRankChange, mask_nonfinite, times, widened

        stored = stack.tensors["directions"]
        orthogonal = stack.config.flag("apply_GS")

        def build(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            directions = mask_nonfinite(widened(stored).to(device).double())
            if orthogonal:
                directions = torch.linalg.qr(directions).Q
            else:
                directions = directions / directions.norm(dim=1, keepdim=True)
            count, _, rank = directions.shape
            chain = torch.zeros(count, rank, rank, dtype=directions.dtype, device=device)
            inner = directions.mT @ directions
            for i in range(rank):
                chain[:, i, i] = 2
                if not orthogonal:
                    chain[:, :i, i] = -2 * (chain[:, :i, :i] @ inner[:, :i, i : i + 1])[:, :, 0]
            down = directions.mT
            moved = times(weight, down.reshape(count * rank, -1), device).to(device)
            return down, -(moved.view(weight.rows, count, rank).transpose(0, 1) @ chain)

        return WeightedLowRankChange(build, (stored,), stack.scale, stack.lead)
