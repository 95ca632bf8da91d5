"""Weights as bitsandbytes serialises them: blocks of 4-bit codes, or rows of 8-bit integers."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from lora_forensics.base_model.storage.interface import Found, Storage, StoredWeight
from lora_forensics.errors import BaseModelError
from lora_forensics.tensors import TensorInfo, Tensors
from lora_forensics.values import as_count, as_number, parse_object

if TYPE_CHECKING:
    import torch

_STATE = ".quant_state.bitsandbytes__"
_COMPANIONS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map")
_INSTEAD = "save the model again, or pass the 16-bit model that it was made from with --base"


def _find_4bit(tensors: Tensors) -> Iterator[Found]:
    for state in tensors.infos:
        name, found, kind = state.partition(_STATE)
        if found and name in tensors.infos:
            settings = parse_object(bytes(tensors.read(state).flatten().tolist()).decode("utf-8", "replace"))
            weight = _FourBit(tensors, name, settings or {})
            companions = {name + suffix for suffix in _COMPANIONS} & tensors.infos.keys()
            yield Found(
                (StoredWeight(name, TensorInfo(kind.upper(), weight.shape), weight),), frozenset({state, *companions})
            )


class _FourBit:
    """Two codes a byte, the first in the high half; W = map[code] * absmax of its block of entries, row by row."""

    def __init__(self, tensors: Tensors, name: str, settings: dict[str, Any]) -> None:
        self._tensors, self._name = tensors, name
        shape, block = settings.get("shape"), as_count(settings.get("blocksize"))
        sizes = [as_count(size) for size in shape] if isinstance(shape, list) else [None]
        packed = math.prod(tensors.infos[name].shape)
        self.shape = tuple(size for size in sizes if size)
        entries = math.prod(self.shape)
        self._bytes = -(-entries // 2)
        if len(self.shape) != len(sizes) or not block or not packed or self._bytes % packed:
            raise BaseModelError(f"{name}: its bitsandbytes state does not fit its numbers", _INSTEAD)
        self._block = block
        self._item = self._bytes // packed
        """Bytes of one number of the stored type: codes may be kept in wider ones."""
        self._nested_block = as_count(settings.get("nested_blocksize"))
        self._offset = as_number(settings.get("nested_offset")) or 0.0
        needed = [name + suffix for suffix in (_COMPANIONS if self._nested_block else _COMPANIONS[:2])]
        missing = [companion for companion in needed if companion not in tensors.infos]
        if missing:
            raise BaseModelError(f"{name}: {', '.join(missing)} is missing, so its 4-bit codes mean nothing", _INSTEAD)

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        import torch

        width = math.prod(self.shape[1:])
        first, last = start * width, stop * width
        low, high = first // (2 * self._item), -(-last // (2 * self._item))
        codes = self._tensors.read_slice(self._name, 0, low, high).contiguous().flatten().view(torch.uint8)
        values = torch.stack([codes >> 4, codes & 15], dim=1).flatten()
        values = values[first - 2 * low * self._item :][: last - first].long()
        blocks = torch.arange(first, last) // self._block
        scale = self._absmax(int(blocks[0]), int(blocks[-1]) + 1)[blocks - blocks[0]]
        return (self._read(".quant_map")[values] * scale).reshape(stop - start, *self.shape[1:])

    def _absmax(self, start: int, stop: int) -> torch.Tensor:
        import torch

        absmax = self._tensors.read_slice(self._name + ".absmax", 0, start, stop)
        if not self._nested_block:
            return absmax.float()
        scale = self._read(".nested_absmax")[torch.arange(start, stop) // self._nested_block]
        return self._read(".nested_quant_map")[absmax.long()] * scale + self._offset

    def _read(self, suffix: str) -> torch.Tensor:
        return self._tensors.read(self._name + suffix).float()


def _find_8bit(tensors: Tensors) -> Iterator[Found]:
    for scale in tensors.infos:
        if not scale.endswith(".SCB"):
            continue
        module = scale.removesuffix(".SCB")
        name, mark = f"{module}.weight", f"{module}.weight_format"
        info = tensors.infos.get(name)
        if info is None or info.dtype != "I8" or len(info.shape) != 2 or tensors.infos[scale].shape != info.shape[:1]:
            continue
        if mark in tensors.infos and int(tensors.read(mark).reshape(-1)[0]) != 0:
            raise BaseModelError(f"{name}: its int8 numbers lie in an order for one kind of GPU", _INSTEAD)
        rows = _EightBit(tensors, name, scale)
        yield Found((StoredWeight(name, TensorInfo("INT8", info.shape), rows),), frozenset({scale, mark}))


class _EightBit:
    """W = stored * SCB / 127, row by row."""

    def __init__(self, tensors: Tensors, name: str, scale: str) -> None:
        self._tensors, self._name, self._scale = tensors, name, scale

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        stored, scale = (self._tensors.read_slice(name, 0, start, stop).float() for name in (self._name, self._scale))
        return stored * (scale / 127)[:, None]


STORAGES = (
    Storage(
        "bitsandbytes-4bit",
        "nf4 and fp4 with their maps and block scales, nested scales included",
        "https://arxiv.org/abs/2305.14314 (QLoRA)",
        _find_4bit,
    ),
    Storage(
        "bitsandbytes-8bit", "int8 rows with their `SCB`", "https://arxiv.org/abs/2208.07339 (LLM.int8())", _find_8bit
    ),
)
