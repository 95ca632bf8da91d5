"""What a way of storing weights is to the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lora_forensics.tensors import TensorInfo, Tensors

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight that stands on disk as something else."""

    name: str
    """As the weight would be called if it stood there plainly."""
    info: TensorInfo
    """Its true shape; the type names the storage."""
    rows: Callable[[int, int], torch.Tensor]
    """Entries [start, stop) along axis 0, float32."""


@dataclass(frozen=True, slots=True)
class Found:
    """What a storage recognises among tensors."""

    weights: tuple[StoredWeight, ...] = ()
    companions: frozenset[str] = frozenset()
    """Tensors that are no weights: scales, maps, markers."""


def nothing(_tensors: Tensors) -> Iterator[Found]:
    """What a storage finds whose files are read as they are."""
    return iter(())


@dataclass(frozen=True, slots=True)
class Storage:
    """One way of storing weights."""

    name: str
    description: str
    source: str
    """Where the format is laid down."""
    find: Callable[[Tensors], Iterator[Found]] = nothing
    """Recognise its weights by names, types and shapes; raises BaseModelError where they cannot be read."""
