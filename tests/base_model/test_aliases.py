"""Row tracers, and the contract of every table entry that finds names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from lora_forensics.base_model.aliases import ALIASERS, Aliaser
from lora_forensics.base_model.index import NameIndex
from lora_forensics.base_model.slices import flat_shape, span
from lora_forensics.base_model.tracers import Trace, trace

SHAPES = {"a": (6, 4), "b": (2, 3, 3, 3), "c": (5,), "d": ()}


@pytest.mark.parametrize(
    ("convert", "traces"),
    [
        (lambda t: {"x": t.pop("a")}, (Trace("x", (("a", 0, 6),), transposed=False),)),
        (lambda t: {"x": t["a"].chunk(3)[1]}, (Trace("x", (("a", 2, 4),), transposed=False),)),
        (lambda t: {"x": t["b"][:, :, 0, 0] * 1.0}, (Trace("x", (("b", 0, 2),), transposed=False),)),
        (lambda t: {"x": t["a"].roll(3, 0)}, (Trace("x", (("a", 3, 6), ("a", 0, 3)), transposed=False),)),
        (lambda t: {"x": torch.cat([t["c"], t["c"][:2]])}, (Trace("x", (("c", 0, 5), ("c", 0, 2)), transposed=False),)),
        (lambda t: {"x": t["a"].T.contiguous()}, (Trace("x", (("a", 0, 6),), transposed=True),)),
        (lambda t: {"x": t["a"] + 0.5, "y": torch.zeros(3), "z": None, "w": t["a"][:0]}, ()),
        (lambda t: {"x": t["a"] * 2}, ()),
        (lambda t: {"x": t["missing"]}, ()),
    ],
)  # fmt: skip
def test_tracers(convert: Callable[[dict[str, Any]], dict[str, Any]], traces: tuple[Trace, ...]) -> None:
    """Renaming, cutting, stacking and transposing are told; what is computed anew or fails leaves nothing."""
    assert trace(SHAPES, convert) == traces


def test_scalars_are_traced() -> None:
    """A tensor without axes is one row."""
    assert Trace("d", (("d", 0, 1),), transposed=False) in trace(SHAPES, dict)


@pytest.mark.parametrize("aliaser", ALIASERS, ids=lambda aliaser: aliaser.__module__.rpartition(".")[2])
@pytest.mark.parametrize(
    "name", ["kohya_sdxl__ldm", "kohya_sdxl_conv__diffusers", "xlabs_flux__bfl", "kohya_flux__diffusers"]
)
def test_aliases_stand_for_rows_of_the_base(aliaser: Aliaser, name: str, inventory: Callable[[str], Any]) -> None:
    """Every name that is found stands for rows that the base has, and no two for different ones."""
    modules, tensors, _ = inventory(name)
    index = NameIndex(tensors)
    found: dict[tuple[str, str], Any] = {}
    for component, path, source in aliaser(index, modules):
        assert found.setdefault((component, path), source) == source
        for part in source.parts:
            start, stop = span(part, tensors)
            assert 0 <= start < stop <= flat_shape(tensors[part.tensor])[0]


@pytest.mark.parametrize("aliaser", ALIASERS)
def test_nothing_comes_from_nothing(aliaser: Aliaser) -> None:
    """An empty base has no names."""
    assert list(aliaser(NameIndex({}), {"lora_unet_double_blocks_0_img_attn_qkv": (6, 2)})) == []
