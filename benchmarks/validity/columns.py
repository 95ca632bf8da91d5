"""Every column that the tool computes, for a run of the study, by the tool's own code; and two things beyond.

Beyond: the inner products of all pairs of changes, summed over modules (`gram`), from which paths, displacements and
turns at any cadence follow; and the same for B, a mean over its rows (`gram_up`). Both need the files only.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file

from lora_forensics.metrics import METRICS
from lora_forensics.moments import LowRankChange, Weight

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Measured:
    """One run, measured. T saves, m modules."""

    setting: dict[str, Any]
    seconds: float
    log: dict[str, Floats]
    """step, held_out, train, rate, dose: (T,); untrained: (1,)."""
    modules: dict[str, Floats]
    """Every metric of the tool per module: (T, m)."""
    gram: Floats
    """(T, T) inner products of the joint changes."""
    gram_up: Floats
    """(T, T) inner products of the B's, per output row."""


def measure(path: Path) -> Measured:
    """Measure a run, or read what was measured before."""
    stored = path.with_suffix(".npz")
    document = json.loads(path.with_suffix(".json").read_text("utf-8"))
    if not stored.exists():
        np.savez_compressed(stored, **_compute(path, document["setting"]))
    with np.load(stored) as arrays:
        columns = {name: arrays[name] for name in arrays.files}
    log = {name: np.asarray(values, dtype=np.float64) for name, values in document["log"].items()}
    extra = {name: columns.pop(name) for name in ("gram", "gram_up")}
    return Measured(document["setting"], document["seconds"], log, columns, **extra)


def _compute(path: Path, setting: dict[str, Any]) -> dict[str, Floats]:
    tensors = load_file(path)
    names = sorted({key.split("|")[0] for key in tensors})
    count = len(tensors[f"{names[0]}|A"])
    scale = torch.full((count,), setting["alpha"] / setting["rank"], dtype=torch.float64)
    columns: dict[str, list[Floats]] = {}
    gram, gram_up, rows = np.zeros((count, count)), np.zeros((count, count)), 0
    for name in names:
        down, up, frozen = (tensors[f"{name}|{part}"] for part in "ABW")
        weight = frozen.flatten(1)
        change = LowRankChange(down.flatten(2), up.flatten(2), scale)
        batch = change.moments(Weight(*weight.shape, lambda a, b, w=weight: w[a:b]), torch.device("cpu"))
        for metric in METRICS:
            if metric.needs <= batch.known:
                columns.setdefault(metric.column.name, []).append(metric.compute(batch).double().numpy())
        dense = (scale[0] * (up.flatten(2).double() @ down.flatten(2).double())).flatten(1)
        gram += (dense @ dense.T).numpy()
        flat = up.flatten(1).double()
        gram_up += (flat @ flat.T).numpy()
        rows += up.shape[1]
    stacked = {name: np.stack(values, axis=1) for name, values in columns.items()}
    return stacked | {"gram": gram, "gram_up": gram_up / rows}
