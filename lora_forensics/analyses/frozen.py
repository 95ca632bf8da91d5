"""A frozen weight as a matrix with its singular value decomposition, made once and kept on disk."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lora_forensics.analyses import ANALYSES
from lora_forensics.errors import LoraForensicsError
from lora_forensics.series import write_bytes
from lora_forensics.tensors import open_tensors

if TYPE_CHECKING:
    from lora_forensics.moments import Change

_DENSE = 512
"""Up to this shorter side a full decomposition costs no more than the leading part of one."""
_RIGHT = 256
"""Right singular vectors that are kept: only the leading ones are ever asked for."""


@dataclass(frozen=True, slots=True)
class Decomposition:
    """U (rows, k), s (k,) and the leading rows of V^T (at most 256, columns)."""

    left: Tensor
    values: Tensor
    right: Tensor


class Frozen:
    """One weight, for as long as its module is looked at."""

    def __init__(self, matrix: Tensor, folder: Path | None = None, key: str = "") -> None:
        """`folder` keeps decompositions under names made of `key`, which tells the base model and the weight."""
        self.matrix = matrix
        self._path = folder and folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.safetensors"

    @cached_property
    def decomposition(self) -> Decomposition:
        """The decomposition of the matrix, in its type and on its device."""
        found = self._stored() or self._made()
        return Decomposition(*(part.to(self.matrix) for part in found))

    def _stored(self) -> tuple[Tensor, ...] | None:
        if self._path is None or not self._path.is_file():
            return None
        with contextlib.suppress(LoraForensicsError):
            kept = open_tensors(self._path)
            left, values, right = (kept.read(name) for name in ("left", "values", "right"))
            if (len(left), right.shape[1]) == self.matrix.shape:
                return left, values, right
        return None

    def _made(self) -> tuple[Tensor, ...]:
        from safetensors.torch import save

        left, values, right = torch.linalg.svd(self.matrix, full_matrices=False)
        right = right[:_RIGHT]
        if self._path is not None:
            kept = {"left": left.float(), "values": values, "right": right.float()}
            with contextlib.suppress(LoraForensicsError):  # a worker's disk may be read-only or full: made again then
                write_bytes(self._path, save({name: part.cpu().contiguous() for name, part in kept.items()}))
        return left, values, right


def leading_triples(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """The `count` leading left singular vectors (rows, k), values (k,) and right vectors (k, columns)."""
    count = min(count, *matrix.shape)
    if min(matrix.shape) > max(_DENSE, 4 * count):
        with contextlib.suppress(ArithmeticError):
            return _by_products(matrix, count)
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return left[:, :count], values[:count], right[:count]


def _by_products(matrix: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """By restarted Lanczos steps (ARPACK) from a seeded start.

    Raises:
        ArithmeticError: they do not converge.
    """
    import numpy as np
    from scipy.sparse.linalg import ArpackError, LinearOperator, eigsh

    gram = matrix.mT if matrix.shape[1] > matrix.shape[0] else matrix
    size = gram.shape[1]

    def multiply(vector: np.ndarray) -> np.ndarray:
        given = torch.from_numpy(np.ascontiguousarray(vector)).to(gram)
        result: np.ndarray = (gram.mT @ (gram @ given)).double().cpu().numpy()
        return result

    operator = LinearOperator((size, size), matvec=multiply, dtype=np.float64)
    start = np.random.default_rng(0).standard_normal(size)
    try:
        _, vectors = eigsh(operator, k=count, which="LA", v0=start, ncv=min(size, 3 * count + 10))
    except ArpackError as error:
        raise ArithmeticError(str(error)) from error
    # one step more from there: values and both sides from a small decomposition
    basis = torch.from_numpy(np.ascontiguousarray(vectors)).to(gram)
    left, values, small = torch.linalg.svd(gram @ basis, full_matrices=False)
    right = small @ basis.mT
    return (left, values, right) if gram is matrix else (right.mT, values, left.mT)


@torch.no_grad()
def analyse(
    names: Sequence[str], frozen: Frozen, change: Change, indices: Sequence[int | None], rank: int | None
) -> dict[str, list[float | None]]:
    """Columns of the named analyses at checkpoints of a change; None stands for one that holds NaN or Inf."""
    found: dict[str, list[float | None]] = {column.name: [] for name in names for column in ANALYSES[name].columns}
    sound = bool(frozen.matrix.isfinite().all())
    for index in indices:
        delta = None if index is None or not sound else change.delta(index, frozen.matrix, frozen.matrix.device)
        for name in names:
            analysis = ANALYSES[name]
            none = [None if column.dtype == "Int64" else torch.nan for column in analysis.columns]
            values = none if delta is None else analysis.compute(frozen, delta.to(frozen.matrix), rank)
            for column, value in zip(analysis.columns, values, strict=True):
                found[column.name].append(value)
    return found
