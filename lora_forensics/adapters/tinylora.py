"""TinyLoRA (2026): D = B (sum_i v_i P_i) A, where A and B are frozen singular factors and P_i frozen random matrices.

The trained vectors v are numbered by groups of layers in the model's order, which their names do not tell. The random
matrices do: those of layer i are drawn from the seed plus i.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def layer_number(projection: torch.Tensor, seed: int, layers: int) -> int | None:
    """Which of the model's layers these random matrices (u, rank, rank) belong to, None if to none."""
    import torch

    for number in range(layers):
        generator = torch.Generator().manual_seed(seed + number)
        drawn = torch.normal(0.0, projection.shape[-1] ** -0.5, tuple(projection.shape), generator=generator)
        if torch.allclose(drawn.to(projection.dtype), projection, rtol=1e-2, atol=1e-6):
            return number
    return None


def group(number: int, layers: int, tying: float) -> int:
    """The vector that a layer uses: `tying` 0 is one for each layer, 1 is one for all."""
    groups = max(1, round(layers * (1 - tying)))
    return min(number // max(1, layers // groups), groups - 1)


def change(
    tensors: Mapping[str, torch.Tensor], vectors: Sequence[torch.Tensor], seed: int, layers: int, tying: float
) -> torch.Tensor | None:
    """Change of a weight (rows x columns), float64; None if the random matrices are not those of the seed.

    Args:
        tensors: `A` (rank, columns), `B` (rows, rank) and `P` (u, rank, rank) of one module.
        vectors: all of the adapter's vectors (u,), by their number.
        seed: `projection_seed` of adapter_config.json.
        layers: how many modules the adapter has.
        tying: `weight_tying` of adapter_config.json.
    """
    import torch

    number = layer_number(tensors["P"], seed, layers)
    if number is None:
        return None
    vector = vectors[group(number, layers, tying)]
    core = torch.einsum("i,ijk->jk", vector.double(), tensors["P"].double())
    return tensors["B"].double() @ core @ tensors["A"].double()
