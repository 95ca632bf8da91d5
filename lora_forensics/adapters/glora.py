"""GLoRA (Chavan et al. 2023) as LyCORIS has it: a low-rank map before the weight, and one beside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, alpha_scale, product

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Weight, WeightedLowRankChange

_PLAIN = {"a1", "a2", "b1", "b2"}


class GLoRA(AdapterKind):
    """Four factors; the map before a convolution acts on its channels."""

    name = "glora"
    about = KindDoc("GLoRA of LyCORIS", "s (W A1 A2 + B1 B2)", "Chavan et al. 2023; LyCORIS")
    suffixes: Mapping[str, str] = {
        **{role: rf"\.{role}\.weight" for role in ("a1", "a2", "b1", "b2", "bm")},
        "alpha": r"\.alpha",
    }
    scalars = frozenset({"alpha"})
    scaled = True

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The part beside the weight has its shape."""
        roles = set(shapes) - self.scalars
        if roles not in (_PLAIN, _PLAIN | {"bm"}) or any(len(shapes[role]) < 2 or 0 in shapes[role] for role in roles):
            return None
        a1, a2, b1, b2 = (shapes[role] for role in ("a1", "a2", "b1", "b2"))
        if a1[1] != a2[0] or a1[0] != a2[1] or b1[1] != (shapes["bm"][0] if "bm" in shapes else b2[0]):
            return None
        columns = product(b2[1:]) * product(shapes.get("bm", ())[2:])
        return None if columns % a1[0] else Layout(b1[1], b1[0], columns)

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """Alpha / rank; with rsLoRA / sqrt(rank), for alpha is stored as it was given."""
        rank = rank or 1
        root = rank**0.5 if config.flag("rs_lora") else 1.0
        scale = alpha_scale(values, config, module, rank)
        return None if scale is None else scale * root

    def change(self, stack: Stack) -> WeightedLowRankChange:
        """A thin product of twice the rank, whose first half is W A1 (a rank for every place of a kernel)."""
        import torch

        from lora_forensics.moments import WeightedLowRankChange, times, tucker_down, widened

        tensors = stack.tensors

        def build(weight: Weight, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
            a1, a2, b1, b2 = (widened(tensors[role]).double().to(device) for role in ("a1", "a2", "b1", "b2"))
            a1, a2, b1 = a1.flatten(2), a2.flatten(2), b1.flatten(2)
            beside = tucker_down(tensors["bm"].to(device), b2) if "bm" in tensors else b2.flatten(2)
            count, channels, rank = a1.shape
            places = weight.columns // channels
            eye = torch.eye(places, dtype=a1.dtype, device=device)
            inward = torch.einsum("tir,kl->trkil", a1, eye).reshape(count * rank * places, -1)
            outward = torch.einsum("tri,kl->trkil", a2, eye).reshape(count, rank * places, -1)
            moved = times(weight, inward, device).to(device).view(weight.rows, count, -1).transpose(0, 1)
            return torch.cat([outward, beside], dim=1), torch.cat([moved, b1], dim=2)

        return WeightedLowRankChange(build, tuple(tensors.values()), stack.scale, stack.lead)
