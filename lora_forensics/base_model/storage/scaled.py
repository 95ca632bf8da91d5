"""Eight-bit numbers, plain or with a scale: W = stored * scale, per tensor, per row, or per block on any axis."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from lora_forensics.base_model.storage.interface import Found, Storage, StoredWeight
from lora_forensics.errors import BaseModelError
from lora_forensics.tensors import TensorInfo, Tensors

if TYPE_CHECKING:
    import torch

_FP8 = ("F8_E4M3", "F8_E5M2")
_SCALES = (("", "_scale"), ("", "_scale_inv"), (".weight", ".scale_weight"))
"""What of a weight's name is left out, and what is put behind it, to get the name of its scale."""
_OTHERS = ((".weight", ".scale_input"), (".weight", ".input_scale"), (".weight", ".comfy_quant"))
"""The same for tensors that say nothing about the weight: scales of activations, markers."""
_MARKER = "scaled_fp8"
_USUAL_BLOCK = 128


def _find(tensors: Tensors) -> Iterator[Found]:
    infos = tensors.infos
    for name, info in infos.items():
        if name.rpartition(".")[2] == _MARKER:
            yield Found(companions=frozenset([name]))
            continue
        if info.dtype not in (*_FP8, "I8"):
            continue
        scale = next((s for s in _related(name, _SCALES) if s in infos), None)
        if info.dtype in _FP8 or scale is not None:
            others = [other for other in _related(name, _OTHERS) if other in infos]
            weight = StoredWeight(name, info, _Scaled(tensors, name, info, scale))
            yield Found((weight,), frozenset([scale, *others] if scale else others))


def _related(name: str, rules: Sequence[tuple[str, str]]) -> Iterator[str]:
    for ending, suffix in rules:
        if name.endswith(ending):
            yield name.removesuffix(ending) + suffix


class _Scaled:
    """Rows of one weight."""

    def __init__(self, tensors: Tensors, name: str, info: TensorInfo, scale: str | None) -> None:
        self._tensors, self._name, self._shape, self._scale = tensors, name, info.shape, scale
        if scale is not None:
            self._axes = _blocks(info.shape, tensors.infos[scale].shape)
            if self._axes is None:
                shapes = f"{list(tensors.infos[scale].shape)} for {list(info.shape)}"
                raise BaseModelError(
                    f"{name}: the shape of its scale is not one that is read ({shapes})",
                    "pass the 16-bit model that it was made from with --base",
                )

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        import torch

        if not self._shape:
            stored = self._tensors.read(self._name).float()
        else:
            stored = self._tensors.read_slice(self._name, 0, start, stop).to(torch.float32)
        if self._scale is None:
            return stored
        scale = self._tensors.read(self._scale).to(torch.float32)
        scale = scale.reshape([count for count, _ in self._axes or ()])
        for axis, (count, block) in enumerate(self._axes or ()):
            if count > 1:
                entries = torch.arange(start, stop) if axis == 0 else torch.arange(self._shape[axis])
                scale = scale.index_select(axis, entries // block)
        return stored * scale


def _blocks(shape: Sequence[int], scale: Sequence[int]) -> list[tuple[int, int]] | None:
    """On every axis of a weight: how many scales there are, and how many entries share one."""
    if math.prod(scale) == 1:
        return [(1, size) for size in shape]
    counts = list(scale)
    grouped = len(counts) == len(shape) + 1 and counts[-1] == 1  # as many entries for each scale of an axis
    if grouped:
        counts.pop()
    counts += [1] * (len(shape) - len(counts))
    if len(counts) != len(shape):
        return None
    blocks = []
    for size, count in zip(shape, counts, strict=True):
        usual = not grouped and math.ceil(size / _USUAL_BLOCK) == count
        block = _USUAL_BLOCK if usual else size // max(count, 1)
        block = 1 if size == count else size if count == 1 else block
        if block < 1 or math.ceil(size / block) != count:
            return None
        blocks.append((count, block))
    return blocks


STORAGE = Storage(
    "fp8",
    "float8 e4m3 and e5m2, and int8, plain or with scales: per tensor or row (`weight_scale`, `scale_weight`),"
    " per block (`weight_scale_inv`, 128 x 128)",
    "https://arxiv.org/abs/2209.05433, https://arxiv.org/abs/2412.19437 (section 3.3)",
    _find,
)
