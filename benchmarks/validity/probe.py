"""How few evaluations `probe` needs: the search of the tool against every checkpoint, on runs of the study.

python benchmarks/validity/probe.py [--work DIR] [--jobs N]

A part of the study's runs is trained (one of each domain). Every fourth save is then evaluated on each of 40 held-out
samples by itself. A draw takes four of them; the search sees the loss of those at the checkpoints that it asks for, and
its regret is counted on all held-out data of the run.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
HORIZONS = (1.0, 0.5, 0.25)
STRIDE = 4
SAMPLES, SIZE, DRAWS = 40, 4, 20
"""Held-out samples that are evaluated, how many of them a draw has, and draws of each run and horizon."""


@dataclass(frozen=True, slots=True)
class Curves:
    """One run at every fourth save."""

    name: str
    family: str
    losses: Floats
    """(saves, samples)"""
    held_out: Floats
    """(saves,) on all held-out data."""
    untrained: float
    path: Floats
    """(saves,) how far the weights have moved."""


def curves_of(path: Path, work: Path) -> Curves:
    """Evaluate a run that was trained; kept beside it."""
    document = json.loads(path.with_suffix(".json").read_text("utf-8"))
    stored = path.with_suffix(".samples.npz")
    if not stored.exists():
        np.savez_compressed(stored, **_evaluate(path, work, document["setting"]))
    with np.load(stored) as arrays:
        losses, moved = arrays["losses"], arrays["path"]
    log, setting = document["log"], document["setting"]
    held_out = np.array(log["held_out"])[STRIDE - 1 :: STRIDE]
    return Curves(path.stem, setting["family"], losses, held_out, log["untrained"][0], moved)


def _evaluate(path: Path, work: Path, described: dict[str, object]) -> dict[str, Floats]:
    import torch
    from families import FAMILIES
    from peft.tuners.lora import LoraLayer
    from safetensors.torch import load_file
    from settings import Setting
    from train import _adapted, base_model

    setting = Setting(**described)  # type: ignore[arg-type]
    family = FAMILIES[setting.family]
    _, others = family.personal(setting.domain, setting.seed, setting.samples)
    torch.manual_seed(setting.seed)
    model = _adapted(base_model(family, setting.size, setting.domain, work), setting, family)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    tensors = load_file(path)
    repeats = 3 if setting.family == "diffusion" else 1  # each picture stands there three times, for three noises
    distinct = len(others[0]) // repeats
    rows, moved, before = [], [], dict.fromkeys(layers, 0.0)
    with torch.no_grad():
        for save in range(STRIDE - 1, len(tensors[next(iter(tensors))]), STRIDE):
            squares = 0.0
            for name, layer in layers.items():
                down, up = tensors[f"{name}|A"][save], tensors[f"{name}|B"][save]
                layer.lora_A["default"].weight.copy_(down)
                layer.lora_B["default"].weight.copy_(up)
                change = (up.flatten(2) if up.ndim > 2 else up).flatten(1).double() @ down.flatten(1).double()
                squares += float((change - before[name]).square().sum())
                before[name] = change  # type: ignore[assignment]
            moved.append(squares**0.5)
            rows.append([])
            for number in range(min(SAMPLES, distinct)):
                places = [number + distinct * repeat for repeat in range(repeats)]
                batch = tuple(part[places] for part in others)
                rows[-1].append(family.loss(model, batch, torch.Generator().manual_seed(26 + number)).item())
    return {"losses": np.array(rows), "path": np.cumsum(moved)}
