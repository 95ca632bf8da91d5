"""Changes of a weight W (rows x columns) in closed form, whether or not a kind has a file format.

Scaling features is scaling W: output features (SSF, Lian et al. 2022) its rows, input features (SAN, the scaling that a
layer before can take over) its columns. Methods on the singular vectors, W = U diag(s) V^T, change what stands between
them: the values alone (SVFit, Sun et al. 2024), or a sparse matrix added to them (SVFT, Lingam et al. 2024).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def scaled_rows(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Change of W by `factors` (rows,) on the output features: (factors - 1) W."""
    return (factors - 1)[:, None] * weight


def scaled_columns(weight: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """Change of W by `factors` (columns,) on the input features: W (factors - 1)."""
    return weight * (factors - 1)


def between_singular_vectors(left: torch.Tensor, core: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """U M V^T: what `core` (k x k, or (k,) for a diagonal) makes of singular vectors (rows x k) and (k x columns).

    With the trained minus the first singular values it is the change of SVFit, with the trained entries that of SVFT.
    """
    return (left * core if core.ndim == 1 else left @ core) @ right


def sparse_core(
    size: int, rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, gate: torch.Tensor
) -> torch.Tensor:
    """SVFT's trained matrix (size x size): sigmoid(gate) `values` at (rows, columns), summed where places repeat."""
    core = values.new_zeros(size, size)
    return core.index_put((rows, columns), values * gate.sigmoid(), accumulate=True)
