"""Inventories of real adapters, as (modules, base tensors, truth)."""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FOLDER = Path(__file__).parents[1] / "data" / "inventories"
_PAIRS = (
    (".lora_down.weight", ".lora_up.weight"),
    (".lora_A.weight", ".lora_B.weight"),
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    (".down.weight", ".up.weight"),
)


class Inventory(NamedTuple):
    """One adapter on one base."""

    modules: dict[str, tuple[int | None, int | None]]
    tensors: dict[str, tuple[int, ...]]
    truth: dict[str, dict[str, Any]]


def _shape(module: str, lora: dict[str, Any]) -> tuple[int | None, int | None]:
    if f"{module}.lora_embedding_A" in lora:
        return lora[f"{module}.lora_embedding_A"]["shape"][1], lora[f"{module}.lora_embedding_B"]["shape"][0]
    for down, up in _PAIRS:
        if module + up in lora:
            return lora[module + up]["shape"][0], math.prod(lora[module + down]["shape"][1:])
    return None, None


@pytest.fixture(scope="session")
def inventory() -> Callable[[str], Inventory]:
    """Read one inventory by its name."""

    def read(name: str) -> Inventory:
        with gzip.open(FOLDER / f"{name}.json.gz") as file:
            document = json.load(file)
        return Inventory(
            {module: _shape(module, document["lora"]) for module in document["truth"]},
            {tensor: tuple(info["shape"]) for tensor, info in document["base"].items()},
            document["truth"],
        )

    return read
