"""Real peft models on a tiny net, saved as peft saves them, with the true change of every weight."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import polars as pl
import torch
from peft import PeftModel, get_peft_model
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from safetensors.torch import save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from lora_forensics.discovery import discover_runs
from lora_forensics.measure import measure_run
from lora_forensics.tables import Measured

TARGETS = ["q_proj", "k_proj", "up_proj", "down_proj"]


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = nn.Linear(16, 16, bias=False)
        self.k_proj = nn.Linear(16, 8)


class _Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up_proj = nn.Linear(16, 24, bias=False)
        self.down_proj = nn.Linear(24, 16, bias=False)


class _Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn = _Attention()
        self.mlp = _Mlp()


class Net(nn.Module):
    """Two blocks with layers of several shapes, a convolution and a transposed layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(_Layer() for _ in range(2))
        self.embed = nn.Embedding(20, 16)
        self.conv = nn.Conv2d(4, 8, 3)
        self.c_attn = Conv1D(24, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What it computes plays no role."""
        return x


class Saved:
    """A run of one checkpoint, its base, and the change of every base tensor, float64."""

    def __init__(self, folder: Path, model: PeftModel, base: dict[str, torch.Tensor], **kwargs: Any) -> None:
        self.run = folder / "run"
        self.checkpoint = self.run / "checkpoint-10"
        self.base = folder / "base.safetensors"
        save_file(base, self.base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model.save_pretrained(self.checkpoint, **kwargs)
            merged = copy.deepcopy(model).double().merge_and_unload()
        self.change = {name: tensor - base[name].double() for name, tensor in merged.state_dict().items()}
        self.weights = base

    def set(self, **values: object) -> None:
        """Overwrite settings in adapter_config.json."""
        path = self.checkpoint / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    def measure(self) -> Measured:
        """The run against its base."""
        found = next(iter(discover_runs(self.run)))
        return measure_run(found, self.base)

    def errors(self, measured: Measured, step: int = 10) -> dict[str, float]:
        """By module, how far the cosine (absolute) or the norm of the change (relative) is from the truth."""
        found = {}
        for row in measured.layers.filter(pl.col("step") == step).iter_rows(named=True):
            change, weight = self.change[row["tensor"]], self.weights[row["tensor"]].double()
            cosine = float((change * weight).sum() / (change.norm() * weight.norm()))
            norm = float(change.norm())
            found[row["module"]] = max(abs(row["cosine"] - cosine), abs(row["delta_norm"] / norm - 1))
        return found


def trained(peft_type: str, *, move_it: bool = True, **settings: Any) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    """A peft model whose trainable tensors were moved, and the weights that it started from."""
    torch.manual_seed(0)
    net = Net()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = PEFT_TYPE_TO_CONFIG_MAPPING[peft_type](**{"target_modules": TARGETS, **settings})
        model = get_peft_model(net, config)
    if move_it:
        move(model)
    return model, base


def move(model: PeftModel) -> None:
    """A step that changes every trainable tensor."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
