"""Trains the runs of the study: real PEFT LoRA adapters on small models, factors saved at an even cadence.

Each run leaves `<name>.safetensors` (A and B of every module at every save, stacked, and the frozen weights) and
`<name>.json` (settings, steps, held-out and training loss, learning rate).
"""

from __future__ import annotations

import json
import math
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from families import FAMILIES, Batch, Family
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file
from settings import Setting
from torch import Tensor, nn


class Lion(torch.optim.Optimizer):
    """Sign of a moving average of gradients (Chen et al., 2023)."""

    def __init__(self, parameters: Iterator[nn.Parameter], lr: float) -> None:
        """Usual constants 0.9 and 0.99."""
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                average = self.state[parameter].setdefault("average", torch.zeros_like(parameter))
                parameter.sub_((0.9 * average + 0.1 * parameter.grad).sign(), alpha=group["lr"])
                average.mul_(0.99).add_(parameter.grad, alpha=0.01)


def optimizer_of(setting: Setting, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser by its name."""
    if setting.optimizer == "adamw":
        return torch.optim.AdamW(parameters, lr=setting.rate)
    if setting.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=setting.rate, momentum=0.9)
    if setting.optimizer == "rmsprop":
        return torch.optim.RMSprop(parameters, lr=setting.rate)
    if setting.optimizer == "adagrad":
        return torch.optim.Adagrad(parameters, lr=setting.rate)
    if setting.optimizer == "lion":
        return Lion(iter(parameters), lr=setting.rate)
    from transformers.optimization import Adafactor

    return Adafactor(parameters, lr=setting.rate, relative_step=False, scale_parameter=False)


def rate_at(setting: Setting, step: int) -> float:
    """Learning rate of step 0, 1, ..."""
    share = step / setting.steps
    factor = {
        "constant": 1.0,
        "linear": 1 - share,
        "cosine": 0.5 * (1 + math.cos(math.pi * share)),
        "warmup": min(1.0, share / 0.1),
    }[setting.schedule]
    return setting.rate * max(factor, 1e-3)


def base_model(family: Family, size: str, domain: str, work: Path) -> nn.Module:
    """The base model, taught once for each size and kept in the work folder."""
    path = work / "bases" / f"{family.name}-{size}{'' if family.shared_base else f'-{domain}'}.pt"
    torch.manual_seed(1)
    model = family.build(size, domain)
    if not path.exists():
        _teach(model, family, family.base(domain))
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(model.state_dict(), temporary)
        temporary.replace(path)
    model.load_state_dict(torch.load(path, weights_only=True))
    return model


def _teach(model: nn.Module, family: Family, data: Batch) -> None:
    random = torch.Generator().manual_seed(2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=family.base_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, family.base_rate, total_steps=family.base_steps)
    for _ in range(family.base_steps):
        rows = torch.randint(len(data[0]), (32,), generator=random)
        optimizer.zero_grad()
        family.loss(model, tuple(part[rows] for part in data), random).backward()
        nn.utils.clip_grad_norm_(model.parameters(), family.base_clip)
        optimizer.step()
        schedule.step()


def train(setting: Setting, work: Path) -> float:
    """Train one run unless it is there; seconds taken."""
    path = work / "runs" / f"{setting.group}-{setting.name}.safetensors"
    if path.with_suffix(".json").exists():
        return 0.0
    path.parent.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    family = FAMILIES[setting.family]
    base = base_model(family, setting.size, setting.domain, work)
    own, others = family.personal(setting.domain, setting.seed, setting.samples)
    torch.manual_seed(setting.seed)
    model = _adapted(base, setting, family)
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    saves, log = _loop(model, layers, setting, family, own, others)
    tensors = {key: torch.stack([save[key] for save in saves]).contiguous() for key in saves[0]}
    tensors |= {f"{name}|W": layer.weight.detach().clone() for name, layer in layers.items()}
    save_file(tensors, path)
    seconds = time.perf_counter() - start
    document = {"setting": asdict(setting) | {"samples": len(own[0])}, "seconds": round(seconds, 2), "log": log}
    path.with_suffix(".json").write_text(json.dumps(document), "utf-8")
    return seconds


def _adapted(base: nn.Module, setting: Setting, family: Family) -> nn.Module:
    init: bool | str = {"default": True, "gaussian": "gaussian", "orthogonal": "orthogonal"}[setting.init]
    convolutional = any(isinstance(module, nn.Conv2d) for module in base.modules())
    if init == "orthogonal" and (convolutional or setting.rank % 2):
        init = True
    config = LoraConfig(
        r=setting.rank, lora_alpha=setting.alpha, target_modules=list(family.targets), init_lora_weights=init
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return get_peft_model(base, config)


def _loop(
    model: nn.Module, layers: dict[str, LoraLayer], setting: Setting, family: Family, own: Batch, others: Batch
) -> tuple[list[dict[str, Tensor]], dict[str, list[float]]]:
    """Train, save every so many steps, and look at the held-out loss at each save and before the first step."""
    random = torch.Generator().manual_seed(setting.seed)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = optimizer_of(setting, parameters)
    log: dict[str, list[float]] = {"step": [], "held_out": [], "train": [], "rate": [], "dose": []}
    saves: list[dict[str, Tensor]] = []
    first = _held_out(model, family, others)
    dose, losses = 0.0, []
    order: list[int] = []
    for step in range(setting.steps):
        rate = rate_at(setting, step)
        for group in optimizer.param_groups:
            group["lr"] = rate
        while len(order) < setting.batch:
            order += torch.randperm(len(own[0]), generator=random).tolist()
        rows, order = order[: setting.batch], order[setting.batch :]
        optimizer.zero_grad()
        loss = family.loss(model, tuple(part[rows] for part in own), random)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        dose += rate
        losses.append(loss.item())
        if (step + 1) % setting.save_every == 0:
            saves.append(_factors(layers))
            row = (step + 1, _held_out(model, family, others), sum(losses) / len(losses), rate, dose)
            for name, value in zip(log, row, strict=True):
                log[name].append(value)
            losses = []
    return saves, log | {"untrained": [first]}


@torch.no_grad()
def _held_out(model: nn.Module, family: Family, others: Batch) -> float:
    return family.loss(model, others, torch.Generator().manual_seed(3)).item()


def _factors(layers: dict[str, LoraLayer]) -> dict[str, Tensor]:
    """A and B of every module as PEFT would save them."""
    found = {}
    for name, layer in layers.items():
        found[f"{name}|A"] = layer.lora_A["default"].weight.detach().clone()
        found[f"{name}|B"] = layer.lora_B["default"].weight.detach().clone()
    return found
