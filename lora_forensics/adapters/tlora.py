"""T-LoRA of LyCORIS (Soboleva et al. 2025): starts from singular vectors of W, whose part is subtracted again."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, alpha_scale, product
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Weight, WeightedLowRankChange

_PARTS = ("principal", "middle", "last")


class TLoRA(AdapterKind):
    """Three factors, and as many of the weight's own decomposition; all ranks are on, as at the last timestep."""

    name = "tlora"
    about = KindDoc(
        "T-LoRA", "s (P diag(l) Q - P0 diag(l0) Q0) with P0, l0, Q0 of the SVD of W", "Soboleva et al. 2025; LyCORIS"
    )
    suffixes: Mapping[str, str] = {
        "up": r"\.p_layer\.weight",
        "down": r"\.q_layer\.weight",
        "values": r"\.lambda_layer",
        "alpha": r"\.alpha",
    }
    scalars = frozenset({"alpha"})
    scaled = True

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """Three factors of one rank."""
        if set(shapes) - self.scalars != {"down", "up", "values"}:
            return None
        down, up = shapes["down"], shapes["up"]
        if len(down) < 2 or len(up) < 2 or not down[0] == up[1] == product(shapes["values"]) > 0:
            return None
        if not config.flag("use_data_init", True) or config.values.get("sig_type", _PARTS[0]) not in _PARTS:
            return Unresolved("it started from a random decomposition that the file does not hold")
        return Layout(down[0], up[0], product(down[1:]))

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank."""
        return alpha_scale(values, config, module, rank or 1)

    def change(self, stack: Stack) -> WeightedLowRankChange:
        """A thin product of twice the rank."""
        import torch

        from lora_forensics.moments import WeightedLowRankChange, widened

        stored = tuple(stack.tensors[role] for role in ("down", "up", "values"))
        part = str(stack.config.values.get("sig_type", _PARTS[0]))

        def build(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            down, up, values = (widened(tensor).flatten(2).double().to(device) for tensor in stored)
            count, rank = down.shape[:2]
            name = f"svd {part} {rank}"
            start_down, start_up = (
                t.to(device) for t in weight.remember(name, lambda: _start(weight, rank, part, device))
            )
            own = up * values.reshape(count, 1, rank)
            return (
                torch.cat([down, start_down.expand(count, -1, -1)], dim=1),
                torch.cat([own, -start_up.expand(count, -1, -1)], dim=2),
            )

        return WeightedLowRankChange(build, stored, stack.scale, stack.lead)


def _start(weight: Weight, rank: int, part: str, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Q0 (rank, columns) and P0 diag(l0) (rows, rank)."""
    from lora_forensics.moments import singular_triples

    left, values, right = singular_triples(weight, device)
    first = {"principal": 0, "middle": (len(values) - rank) // 2, "last": len(values) - rank}[part]
    chosen = slice(max(first, 0), max(first, 0) + rank)
    down, up = right[chosen], left[:, chosen] * values[chosen]
    missing = rank - len(down)  # LyCORIS pads with zeros
    return (
        _padded(down, missing, 0),
        _padded(up, missing, 1),
    )


def _padded(tensor: torch.Tensor, missing: int, axis: int) -> torch.Tensor:
    """Zeros behind a matrix."""
    import torch

    shape = list(tensor.shape)
    shape[axis] = max(missing, 0)
    return torch.cat([tensor, tensor.new_zeros(shape)], dim=axis)
