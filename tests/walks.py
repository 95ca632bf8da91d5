"""Runs whose factors move as an optimizer moves them: small noisy steps of many modules, as PEFT and kohya save."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from factories import kohya_metadata
from safetensors.torch import save_file

WIDTH, RANK = 32, 4
LANGUAGE = tuple(f"model.layers.{n}.self_attn.{role}_proj" for n in range(4) for role in "qkv")
UNET = tuple(
    f"lora_unet_down_blocks_{n}_attentions_0_transformer_blocks_0_attn1_to_{r}" for n in range(4) for r in "qkv"
)
STEPS = tuple(range(50, 601, 50))
Rate = Callable[[int], float]
Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]


def constant(_step: int) -> float:
    """The usual rate."""
    return 1e-4


def walk(
    names: Sequence[str], steps: Sequence[int], rate: Rate = constant, ratio: float = 1.0, seed: int = 0
) -> Iterator[Factors]:
    """A and B at these steps; B starts at 0, and moves `ratio` times as fast as A (LoRA+)."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(rows: int, columns: int) -> torch.Tensor:
        return torch.randn(rows, columns, generator=generator)

    down = {name: drawn(RANK, WIDTH) / math.sqrt(WIDTH) for name in names}
    up = {name: torch.zeros(WIDTH, RANK) for name in names}
    aim = {name: (drawn(WIDTH, RANK).sign(), drawn(RANK, WIDTH).sign()) for name in names}
    last = 0
    for step in steps:
        for at in range(last + 10, step + 1, 10):
            pull, size = 0.3 * math.exp(-at / 300), 10 * rate(at)
            for name in names:
                up[name] += size * ratio * torch.tanh(pull * aim[name][0] + drawn(WIDTH, RANK) / 2)
                down[name] += size * torch.tanh(pull * aim[name][1] + drawn(RANK, WIDTH) / 2)
        last = step
        yield {name: (down[name].clone(), up[name].clone()) for name in names}


def peft_walk(
    folder: Path,
    steps: Sequence[int] = STEPS,
    dtype: torch.dtype = torch.float32,
    config: dict[str, Any] | None = None,
    **moves: Any,
) -> Path:
    """A run of a language model in PEFT's layout, its base and the Trainer's states; the folder of its checkpoints."""
    generator = torch.Generator().manual_seed(3)
    run = folder / "run"
    run.mkdir(parents=True)
    base = {f"{name}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for name in LANGUAGE}
    save_file(base, folder / "base.safetensors")
    rate = moves.get("rate", constant)
    settings = {"peft_type": "LORA", "r": RANK, "lora_alpha": 8, "base_model_name_or_path": "../base.safetensors"}
    log: list[dict[str, Any]] = []
    for step, factors in zip(steps, walk(LANGUAGE, steps, **moves), strict=True):
        saved = run / f"checkpoint-{step}"
        saved.mkdir()
        tensors = {f"base_model.model.{name}.lora_A.weight": down.to(dtype) for name, (down, _) in factors.items()}
        tensors |= {f"base_model.model.{name}.lora_B.weight": up.to(dtype) for name, (_, up) in factors.items()}
        save_file(tensors, saved / "adapter_model.safetensors", {"format": "pt"})
        (saved / "adapter_config.json").write_text(json.dumps({**settings, **(config or {})}))
        log.append({"step": step, "epoch": step / 100, "loss": 2 - step / 1000, "learning_rate": rate(step)})
        state = {"global_step": step, "epoch": step / 100, "train_batch_size": 2, "log_history": log}
        (saved / "trainer_state.json").write_text(json.dumps(state))
    return run


def kohya_walk(
    folder: Path, steps: Sequence[int] = STEPS, dtype: torch.dtype = torch.float32, alpha: float = 4.0, **moves: Any
) -> Path:
    """A run of a UNet in kohya's layout, and its base in diffusers' beside it; the folder of its checkpoints."""
    generator = torch.Generator().manual_seed(3)
    run, unet = folder / "run", folder / "base" / "unet"
    run.mkdir(parents=True)
    unet.mkdir(parents=True)
    base = {f"{diffusers_name(name)}.weight": torch.randn(WIDTH, WIDTH, generator=generator) for name in UNET}
    save_file(base, unet / "diffusion_pytorch_model.safetensors")
    (folder / "base" / "model_index.json").write_text("{}")
    for step, factors in zip(steps, walk(UNET, steps, **moves), strict=True):
        tensors = {}
        for name, (down, up) in factors.items():
            tensors |= {f"{name}.lora_down.weight": down.to(dtype), f"{name}.lora_up.weight": up.to(dtype)}
            tensors[f"{name}.alpha"] = torch.tensor(alpha, dtype=dtype)
        header = {"ss_network_dim": str(RANK), "ss_num_batches_per_epoch": "100", "ss_sd_model_name": "../base"}
        end = "" if step == steps[-1] else f"-step{step:08d}"
        save_file(tensors, run / f"name{end}.safetensors", kohya_metadata(step, step // 100) | header)
    return run


def diffusers_name(name: str) -> str:
    """The module's name with its dots."""
    block = name.removeprefix("lora_unet_down_blocks_")
    return f"down_blocks.{block[0]}.attentions.0.transformer_blocks.0.attn1.to_{block[-1]}"


def ai_toolkit_walk(folder: Path, steps: Sequence[int] = STEPS, **moves: Any) -> Path:
    """A run in ai-toolkit's layout, without a base; the folder of its checkpoints."""
    folder.mkdir(parents=True)
    names = [f"blocks.{n}.self_attn.{role}" for n in range(4) for role in "qkv"]
    for step, factors in zip(steps, walk(names, steps, **moves), strict=True):
        tensors = {f"diffusion_model.{name}.lora_A.weight": down for name, (down, _) in factors.items()}
        tensors |= {f"diffusion_model.{name}.lora_B.weight": up for name, (_, up) in factors.items()}
        told = {"training_info": json.dumps({"step": step, "epoch": step // 100}), "ss_output_name": "name"}
        save_file(tensors, folder / f"name{'' if step == steps[-1] else f'_{step:09d}'}.safetensors", told)
    return folder
