"""What a few held-out samples would have told: a reference beside the rules, not one of them.

The saved factors are loaded back into the model, and ten disjoint groups of four held-out samples are looked at. Each
group keeps the checkpoint where its own loss is lowest; the regret there is that of the whole held-out set.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from columns import Measured, measure
from families import FAMILIES, Batch
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file
from score import HORIZONS, regrets
from settings import Setting
from train import _adapted as adapted
from train import base_model

Floats = NDArray[np.float64]
GROUPS, SIZE = 10, 4
STRIDE = 4
"""Every fourth save is looked at: 40, 20 and 10 checkpoints."""


def group_losses(path: Path, work: Path) -> Floats:
    """Loss of each group at every fourth save, (saves, groups); kept beside the run."""
    stored = path.with_suffix(".groups.npy")
    if stored.exists():
        return np.load(stored)
    run = measure(path)
    setting = Setting(**run.setting)
    family = FAMILIES[setting.family]
    _, others = family.personal(setting.domain, setting.seed, setting.samples)
    torch.manual_seed(setting.seed)
    model = adapted(base_model(family, setting.size, setting.domain, work), setting, family)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    tensors = load_file(path)
    rows = []
    with torch.no_grad():
        for save in range(STRIDE - 1, len(run.log["step"]), STRIDE):
            for name, layer in layers.items():
                layer.lora_A["default"].weight.copy_(tensors[f"{name}|A"][save])
                layer.lora_B["default"].weight.copy_(tensors[f"{name}|B"][save])
            rows.append([_loss(model, setting.family, others, group) for group in range(GROUPS)])
    losses = np.array(rows)
    np.save(stored, losses)
    return losses


def _loss(model: torch.nn.Module, family: str, others: Batch, group: int) -> float:
    """Pictures of the denoiser stand in the set three times, for three draws of noise."""
    repeats = 3 if family == "diffusion" else 1
    distinct = len(others[0]) // repeats
    places = [
        (group * SIZE + number) % distinct + distinct * repeat for repeat in range(repeats) for number in range(SIZE)
    ]
    batch = tuple(part[places] for part in others)
    return FAMILIES[family].loss(model, batch, torch.Generator().manual_seed(26 + group)).item()


def group_regret(run: Measured, losses: Floats) -> Floats:
    """Mean regret over the groups at each horizon: (horizons,)."""
    held_out, untrained = run.log["held_out"][STRIDE - 1 :: STRIDE], float(run.log["untrained"][0])
    found = []
    for share in HORIZONS:
        count = int(len(losses) * share)
        regret = regrets(held_out[:count], untrained)
        found.append(float(regret[losses[:count].argmin(axis=0)].mean()))
    return np.array(found)
