"""Writers of real runs: peft and transformers objects where those write the files, exact layouts where not."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]


def library(name: str) -> Any:
    """A library that the test extra brings; without it the test is skipped, and in CI it fails."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        absent(name)


def absent(what: str) -> None:
    """Skip because of what this machine lacks; where `LORA_FORENSICS_COMPLETE=1` says that all is there, fail."""
    if os.environ.get("LORA_FORENSICS_COMPLETE") == "1":
        pytest.fail(f"{what} is missing, and this environment says that it is complete")
    pytest.skip(f"{what} is not on this machine")


def tiny_llama(seed: int = 0, **settings: Any) -> Any:
    """A real LlamaForCausalLM of two small layers."""
    transformers = library("transformers")
    torch.manual_seed(seed)
    sizes = {
        "vocab_size": 64, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 32,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **settings}))


@dataclass
class WrittenRun:
    """A run on disk and the truth about it."""

    path: Path
    base: Path
    steps: list[int]
    deltas: list[dict[str, torch.Tensor]]
    """For every checkpoint: module (as in the file) to the float64 change of its weight, as the library computes it."""
    weights: dict[str, torch.Tensor]
    """Module to its float64 base weight, in the same orientation."""


def peft_run(
    folder: Path,
    model: Any = None,
    steps: Sequence[int] = range(10, 130, 10),
    held_out: Callable[[int], float] | None = lambda step: (step - 60) ** 2 / 1000 + 1,
    dtype: torch.dtype = torch.float32,
    base_dtype: torch.dtype = torch.float32,
    **config: Any,
) -> WrittenRun:
    """A run saved by the real peft in `folder/run`, its base in `folder/base`; the factors wander with the step."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers warn about each other
        return _peft_run(folder, model, steps, held_out, dtype, base_dtype, config)


def _peft_run(
    folder: Path,
    model: Any,
    steps: Sequence[int],
    held_out: Callable[[int], float] | None,
    dtype: torch.dtype,
    base_dtype: torch.dtype,
    config: dict[str, Any],
) -> WrittenRun:
    peft = library("peft")
    model = tiny_llama() if model is None else model
    base = folder / "base"
    model.to(base_dtype)
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(base)
    else:
        base.mkdir(parents=True)
        save_file({n: t.detach().clone() for n, t in model.state_dict().items()}, base / "model.safetensors")
    lora = peft.get_peft_model(
        model, peft.LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **config})
    )
    lora.peft_config["default"].base_model_name_or_path = "base"
    lora.to(dtype)
    run = folder / "run"
    generator = torch.Generator().manual_seed(7)
    deltas = []
    for step in steps:
        for name, parameter in lora.named_parameters():
            if "lora_" in name:
                parameter.data += torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * 0.02
        lora.save_pretrained(run / f"checkpoint-{step}")
        trainer_state(run / f"checkpoint-{step}", [s for s in steps if s <= step], held_out)
        deltas.append(peft_deltas(lora))
    weights = {name: module.get_base_layer().weight.detach().double() for name, module in lora_modules(lora)}
    return WrittenRun(run, base, list(steps), deltas, {name: _oriented(w, lora, name) for name, w in weights.items()})


def lora_modules(model: Any) -> Iterable[tuple[str, Any]]:
    """The names of adapted modules, as in the file, and the peft layers."""
    from peft.tuners.lora import LoraLayer

    for name, module in model.named_modules():
        if isinstance(module, LoraLayer) and (module.lora_A or module.lora_embedding_A):
            yield name.removesuffix(".base_layer"), module


def peft_deltas(model: Any) -> dict[str, torch.Tensor]:
    """The change of every adapted weight in float64, from the factors as they are stored."""
    deltas = {}
    for name, module in lora_modules(model):
        if module.lora_embedding_A:
            down, up = module.lora_embedding_A["default"], module.lora_embedding_B["default"]
            delta = (up.detach().double() @ down.detach().double()).T
        else:
            down, up = module.lora_A["default"].weight, module.lora_B["default"].weight
            delta = up.detach().double().flatten(1) @ down.detach().double().flatten(1)
        deltas[name] = delta * module.scaling["default"]
    return deltas


def _oriented(weight: torch.Tensor, model: Any, name: str) -> torch.Tensor:
    """Out x in, kernels flattened; embeddings stay."""
    module = dict(lora_modules(model))[name]
    return (weight.T if getattr(module, "fan_in_fan_out", False) else weight).flatten(1)


def trainer_state(
    folder: Path, steps: Sequence[int], held_out: Callable[[int], float] | None, per_epoch: int = 20, **extra: Any
) -> None:
    """trainer_state.json as the Trainer writes it."""
    log: list[dict[str, Any]] = []
    for step in steps:
        log.append(
            {"step": step, "epoch": step / per_epoch, "loss": 3 - step / 1000, "learning_rate": 1e-3, "grad_norm": 1.0}
        )
        if held_out is not None:
            log.append({"step": step, "epoch": step / per_epoch, "eval_loss": held_out(step)})
    state = {
        "global_step": steps[-1],
        "epoch": steps[-1] / per_epoch,
        "train_batch_size": 2,
        "log_history": log,
        **extra,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text(json.dumps(state))


def lora_factors(
    modules: Mapping[str, tuple[int, int]],
    step: int,
    rank: int = 2,
    alpha: float | None = 1.0,
    dtype: Any = torch.float32,
) -> Tensors:
    """kohya-named factors of some modules that wander with the step; an alpha of None is left out."""
    tensors: Tensors = {}
    for number, (name, (rows, columns)) in enumerate(modules.items()):
        start = torch.Generator().manual_seed(number)
        walk = torch.Generator().manual_seed(1000 + number)
        down = torch.randn(rank, columns, generator=start)
        up = sum((torch.randn(rows, rank, generator=walk) for _ in range(step // 10)), torch.zeros(rows, rank)) * 0.01
        tensors[f"{name}.lora_down.weight"] = down.to(dtype)
        tensors[f"{name}.lora_up.weight"] = up.to(dtype)
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha).to(dtype)
    return tensors


KOHYA_MODULES = {
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q": (16, 16),
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_k": (16, 16),
    "lora_te_text_model_encoder_layers_0_self_attn_q_proj": (24, 24),
}


def kohya_metadata(step: int, epoch: int, name: str = "name", session: str = "1", **extra: str) -> dict[str, str]:
    """The `ss_*` header of sd-scripts."""
    return {
        "ss_session_id": session, "ss_training_started_at": f"17000000{session}.5", "ss_output_name": name,
        "ss_learning_rate": "0.0001", "ss_unet_lr": "0.0002", "ss_text_encoder_lr": "5e-05",
        "ss_lr_scheduler": "constant", "ss_lr_warmup_steps": "0", "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_num_train_images": "40", "ss_num_batches_per_epoch": "20", "ss_gradient_accumulation_steps": "1",
        "ss_total_batch_size": "2", "ss_max_train_steps": "1000", "ss_num_epochs": "50",
        "ss_network_module": "networks.lora", "ss_network_dim": "2", "ss_network_alpha": "1.0",
        "ss_sd_model_name": "base.safetensors", "ss_steps": str(step), "ss_epoch": str(epoch),
        **extra,
    }  # fmt: skip


def kohya_file(path: Path, step: int, metadata: dict[str, str] | None, **factors: Any) -> Path:
    """One kohya checkpoint."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(lora_factors(KOHYA_MODULES, step, **factors), path, metadata)
    return path


def kohya_run(
    folder: Path, name: str = "name", steps: Sequence[int] = range(10, 130, 10), session: str = "1", **extra: str
) -> Path:
    """A kohya run of step files, epoch files every 20 steps, and the final file."""
    for step in steps:
        if step == steps[-1]:
            kohya_file(folder / f"{name}.safetensors", step, kohya_metadata(step, step // 20, name, session, **extra))
            break
        kohya_file(
            folder / f"{name}-step{step:08d}.safetensors",
            step,
            kohya_metadata(step, step // 20, name, session, **extra),
        )
        if step % 20 == 0:
            epoch = step // 20
            kohya_file(
                folder / f"{name}-{epoch:06d}.safetensors", step, kohya_metadata(step, epoch, name, session, **extra)
            )
    return folder


def kohya_base(path: Path) -> Path:
    """A single-file base with the weights below `KOHYA_MODULES`, in diffusers names."""
    generator = torch.Generator().manual_seed(3)
    names = {
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": (16, 16),
        "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.weight": (16, 16),
        "text_encoder/text_model.encoder.layers.0.self_attn.q_proj.weight": (24, 24),
    }
    for name, shape in names.items():
        component, _, tensor = name.partition("/")
        target = (
            path
            / component
            / ("model.safetensors" if component == "text_encoder" else "diffusion_pytorch_model.safetensors")
        )
        target.parent.mkdir(parents=True, exist_ok=True)
        known = load_file(target) if target.exists() else {}
        save_file({**known, tensor: torch.randn(shape, generator=generator)}, target)
    (path / "model_index.json").write_text("{}")
    return path


def touch_later(path: Path, seconds: float = 5) -> None:
    """Move a file's modification time."""
    stat = path.stat()
    os.utime(path, (stat.st_atime + seconds, stat.st_mtime + seconds))


def tensorboard_log(
    folder: Path, scalars: Mapping[str, Mapping[int, float]], stamp: int | None = None
) -> Sequence[Path]:
    """An event file by torch's SummaryWriter, as accelerate's tracker writes them; `stamp` is when it was begun."""
    library("tensorboard")
    before = set(folder.glob("events*"))
    writer = library("torch.utils.tensorboard").SummaryWriter(folder)
    for tag, values in scalars.items():
        for step, value in values.items():
            writer.add_scalar(tag, value, step)
    writer.close()
    (written,) = set(folder.glob("events*")) - before
    if stamp is not None:
        name = written.name.split(".")
        written = written.rename(folder / ".".join([*name[:3], str(stamp), *name[4:]]))
    return [written]


def tiny_tokenizer(words: int = 60) -> Any:
    """A real fast tokenizer of a few words."""
    tokenizers, transformers = library("tokenizers"), library("transformers")
    vocabulary = {"<unk>": 0, "<pad>": 1, "<eos>": 2} | {f"w{n}": n + 3 for n in range(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))  # noqa: S106 (no password)
    raw.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "<unk>", "pad_token": "<pad>", "eos_token": "<eos>"}
    return transformers.PreTrainedTokenizerFast(tokenizer_object=raw, **special)


def trained_run(output: Path, adapters: Sequence[str] = ("default",), resume: bool = False, **settings: Any) -> Any:
    """The Hugging Face Trainer itself on a tiny model for a few steps; gives the trainer."""
    peft, transformers = library("peft"), library("transformers")
    library("accelerate")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers warn about each other
        config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=["q_proj"])
        model = peft.get_peft_model(tiny_llama(), config, adapter_name=adapters[0])
        for name in adapters[1:]:
            model.add_adapter(name, config)
        data = [{"input_ids": [n % 60, 3, 4], "labels": [n % 60, 3, 4], "attention_mask": [1, 1, 1]} for n in range(20)]
        arguments = transformers.TrainingArguments(
            **{
                "output_dir": str(output), "max_steps": -1, "num_train_epochs": 2, "save_strategy": "steps",
                "save_steps": 2, "logging_steps": 1, "per_device_train_batch_size": 2, "learning_rate": 1e-2,
                "report_to": "none", "use_cpu": True, "disable_tqdm": True, "seed": 0, **settings,
            }
        )  # fmt: skip
        trainer = transformers.Trainer(model, arguments, train_dataset=data, eval_dataset=data[:4])
        trainer.train(resume_from_checkpoint=resume or None)
    return trainer


def mlx_run(folder: Path, iterations: Sequence[int], **settings: Any) -> Path:
    """mlx-lm's files (tuner/trainer.py and lora.py at d78bf58): numbered adapters, their unnumbered copy, arguments."""
    folder.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {
        "model": "mlx-community/tiny", "fine_tune_type": "lora", "optimizer": "adam", "batch_size": 4,
        "iters": iterations[-1], "learning_rate": 1e-5, "lr_schedule": None, "save_every": iterations[0],
        "grad_accumulation_steps": 1, "resume_adapter_file": None, "num_layers": 16,
        "lora_parameters": {"rank": 2, "dropout": 0.0, "scale": 20.0},
    }  # fmt: skip
    for number in iterations:
        generator = torch.Generator().manual_seed(number)
        tensors = {
            "model.layers.0.self_attn.q_proj.lora_a": torch.randn(8, 2, generator=generator),
            "model.layers.0.self_attn.q_proj.lora_b": torch.randn(2, 6, generator=generator),
        }
        save_file(tensors, folder / f"{number:07d}_adapters.safetensors")
        save_file(tensors, folder / "adapters.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({**known, **settings}, indent=4, sort_keys=True))
    return folder


def peft_adapter(folder: Path, seed: int, config: bool = True) -> Path:
    """adapter_model.safetensors and adapter_config.json with factors that depend on the seed."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    name = "base_model.model.model.layers.0.self_attn.q_proj"
    tensors = {
        f"{name}.lora_A.weight": torch.randn(2, 8, generator=generator),
        f"{name}.lora_B.weight": torch.randn(6, 2, generator=generator),
    }
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})
    if config:
        settings = {"base_model_name_or_path": "org/model", "peft_type": "LORA", "r": 2, "lora_alpha": 4}
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder
