"""How the numbers of a base model are stored, and how they are read: 16-bit, fp8, GGUF, bitsandbytes, ...

A new storage is one module here with a `Storage`, and one line in `STORAGES`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forensics.base_model.storage import bitsandbytes, floats, gguf, refused, scaled
from lora_forensics.base_model.storage.interface import Storage, StoredWeight
from lora_forensics.errors import BaseModelError, CheckpointError
from lora_forensics.remote import kept
from lora_forensics.tensors import PICKLES, TENSOR_FILES, TensorInfo, Tensors, open_tensors

if TYPE_CHECKING:
    import torch

__all__ = ["BASE_FILES", "STORAGES", "Storage", "StoredWeight", "open_file", "unpacked"]

STORAGES: dict[str, Storage] = {
    storage.name: storage
    for storage in (*floats.STORAGES, scaled.STORAGE, gguf.STORAGE, *bitsandbytes.STORAGES, *refused.STORAGES)
}
"""Every storage by name; a weight that two recognise is the first one's."""

BASE_FILES = (*TENSOR_FILES, gguf.SUFFIX)
"""Suffixes of files that may hold base weights."""


def open_file(path: Path) -> Tensors:
    """Open one file of a base by its suffix.

    Raises:
        CheckpointError: damaged, or of a format that is not read.
        BaseModelError: a pickle that is not loaded, or a library is missing (the hint names the extra).
    """
    if path.suffix == gguf.SUFFIX:
        return gguf.GGUFFile(path)
    try:
        return open_tensors(kept(path))
    except CheckpointError as error:
        if path.suffix not in PICKLES:
            raise
        raise BaseModelError(error.message, "pass this model as .safetensors: a pickle may run code") from error


def unpacked(tensors: Tensors) -> Tensors:
    """The same tensors with every packed weight in its true shape.

    Raises:
        BaseModelError: weights are packed in a way that is not read.
    """
    weights: dict[str, StoredWeight] = {}
    companions: set[str] = set()
    for storage in STORAGES.values():
        for found in storage.find(tensors):
            for weight in found.weights:
                weights.setdefault(weight.name, weight)
            companions |= found.companions
    return _Unpacked(tensors, weights, companions) if weights or companions else tensors


class _Unpacked:
    """Tensors some of which are packed weights."""

    def __init__(self, tensors: Tensors, weights: Mapping[str, StoredWeight], companions: set[str]) -> None:
        self._tensors = tensors
        self._weights = weights
        plain = {name: info for name, info in tensors.infos.items() if name not in companions}
        self._infos = plain | {name: weight.info for name, weight in weights.items()}

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to type and true shape."""
        return self._infos

    @property
    def metadata(self) -> Mapping[str, str]:
        """Those of the tensors below."""
        return self._tensors.metadata

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor; a packed one as float32."""
        weight = self._weights.get(name)
        if weight is None:
            return self._tensors.read(name)
        shape = weight.info.shape
        return weight.rows(0, shape[0] if shape else 1).reshape(shape)

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis` (0 or 1)."""
        weight = self._weights.get(name)
        if weight is None:
            return self._tensors.read_slice(name, axis, start, stop)
        return weight.rows(start, stop) if axis == 0 else self.read(name)[:, start:stop]
