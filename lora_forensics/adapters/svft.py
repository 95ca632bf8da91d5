"""SVFT (Lingam et al. 2024): D = U M V^T, where W = U diag(s) V^T and M is sparse and trained.

The tensors of the authors' `LinearWithSVFT`, as they stand in the checkpoints of a training; at its end that code
merges them and saves a whole model. What a reduced rank cuts off W before training is no part of D.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    from lora_forensics.moments import LowRankChange

_TRAINED = ("u", "v", "s", "s_row", "s_col", "gate")


class SVFT(AdapterKind):
    """A sparse matrix between the singular vectors."""

    name = "svft"
    about = KindDoc("SVFT", "U M V^T, M sparse", "Lingam et al. 2024; the authors' code")
    suffixes: Mapping[str, str] = {
        role: rf"\.svft_layer\.{role}" for role in (*_TRAINED, "s_pre", "s_pre_row", "s_pre_col")
    }

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Singular vectors (rows, k) and (k, columns), and as many numbers as places."""
        if not set(_TRAINED) <= shapes.keys() or not shapes["s"] == shapes["s_row"] == shapes["s_col"]:
            return None
        if not len(shapes["u"]) == len(shapes["v"]) == 2 or shapes["u"][1] != shapes["v"][0]:
            return None
        return Layout(rank=shapes["u"][1], rows=shapes["u"][0], columns=shapes["v"][1])

    def change(self, stack: Stack) -> LowRankChange:
        """M goes to the side of V."""
        import torch

        from lora_forensics.adapters.algebra import sparse_core
        from lora_forensics.moments import LowRankChange

        stored = [stack.tensors[role] for role in _TRAINED]
        up, right, *sparse = stored
        size = up.shape[2]
        down = torch.stack(
            [
                sparse_core(size, row, column, value.double(), gate.double()) @ one.double()
                for one, value, row, column, gate in zip(right, *sparse, strict=True)
            ]
        )
        return LowRankChange(down, up.double(), stack.scale, stack.lead, stored=tuple(stored))
