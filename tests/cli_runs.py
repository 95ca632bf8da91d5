"""Tiny runs in PEFT's layout with their base, for the tests of the command line."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

MODULES = ("model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.v_proj", "model.layers.1.mlp.up_proj")
WIDTH, RANK = 8, 2


def base_model(path: Path, width: int = WIDTH) -> Path:
    """A base model of three square linear layers, as one file."""
    generator = torch.Generator().manual_seed(0)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({f"{name}.weight": torch.randn(width, width, generator=generator) for name in MODULES}, path)
    return path


def checkpoint(folder: Path, step: int, base: str | None = None) -> Path:
    """One saved adapter with its configuration; the same step gives the same numbers."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name in MODULES:
        wave = 1 + 0.5 * math.sin(step / 35)
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, WIDTH, generator=generator)
        up = torch.randn(WIDTH, RANK, generator=generator)
        tensors[f"base_model.model.{name}.lora_B.weight"] = up * step / 100 * wave + step / 500
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj", "up_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": base}))
    return folder / "adapter_model.safetensors"


def peft_run(
    folder: Path, count: int = 12, every: int = 10, base: str | None = None, losses: Sequence[float] | None = None
) -> Path:
    """A run of `count` checkpoints with the trainer's log; `losses` are its held-out losses, one per checkpoint."""
    log: list[dict[str, Any]] = []
    for place in range(1, count + 1):
        step = every * place
        log.append({"step": step, "epoch": step / 40, "learning_rate": 1e-4, "loss": 2.0 / place})
        if losses is not None:
            log.append({"step": step, "epoch": step / 40, "eval_loss": losses[place - 1]})
        saved = folder / f"checkpoint-{step}"
        checkpoint(saved, step, base)
        state = {"global_step": step, "epoch": step / 40, "log_history": log, "train_batch_size": 1}
        (saved / "trainer_state.json").write_text(json.dumps(state))
    return folder


def project(folder: Path, runs: Sequence[str] = ("run",), **settings: Any) -> Path:
    """Runs below `folder` that record the base model beside them."""
    base_model(folder / "base.safetensors")
    for name in runs:
        peft_run(folder / name, base="../base.safetensors", **settings)
    return folder
