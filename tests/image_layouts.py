"""Writers of the image trainers' layouts: the same factors in every dialect, in the files and folders of each.

The commits whose saving code was read: sd-scripts 48d368f, musubi-tuner 30c658c, ai-toolkit 27a03a9, OneTrainer
23df383, SimpleTuner bc8e6ab, diffusion-pipe 8f83dbf, DiffSynth-Studio fed7b18. diffusers' own code writes its files.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from factories import Tensors, kohya_metadata, library, lora_factors, tensorboard_log
from safetensors.torch import save_file

MODULES = {"blocks.0.self_attn.q": (16, 16), "blocks.0.ffn.0": (24, 16), "blocks.1.self_attn.q": (16, 16)}
RANK = 2
STEPS = tuple(range(10, 70, 10))
RATES = {step: 1e-4 * (1 - step / 100) for step in range(1, 91)}
LOSSES = {step: 1 / step for step in range(1, 91)}
BASE = "org/base"
HEADER = {"lora_adapter_metadata": json.dumps({"transformer.r": RANK, "transformer.lora_alpha": RANK})}


def factors(step: int, alpha: float | None = RANK) -> Tensors:
    """The factors of all modules at a step, in kohya's suffixes and dotted names."""
    return lora_factors(MODULES, step, RANK, alpha)


def kohya_keys(step: int) -> Tensors:
    """`lora_unet_` and underscores; alpha is the rank."""
    tensors = factors(step)
    ends = (".lora_down.weight", ".lora_up.weight", ".alpha")
    split = {key: next(end for end in ends if key.endswith(end)) for key in tensors}
    return {f"lora_unet_{key.removesuffix(end).replace('.', '_')}{end}": tensors[key] for key, end in split.items()}


def peft_keys(step: int, prefix: str = "diffusion_model.", adapter: str = "") -> Tensors:
    """lora_A and lora_B without alpha, which means a scale of 1."""
    renamed = (("lora_down", f"lora_A{adapter}"), ("lora_up", f"lora_B{adapter}"))
    tensors = factors(step, alpha=None)
    for old, new in renamed:
        tensors = {key.replace(old, new): value for key, value in tensors.items()}
    return {prefix + key: value for key, value in tensors.items()}


def write(tensors: Tensors, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    """One safetensors file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, dict(metadata) if metadata else None)
    return path


def base_model(path: Path) -> Path:
    """The weights below the modules, in the model's own names."""
    generator = torch.Generator().manual_seed(5)
    weights = {f"{name}.weight": torch.randn(shape, generator=generator) for name, shape in MODULES.items()}
    return write(weights, path)


def kohya(folder: Path, steps: Sequence[int] = STEPS, **extra: str) -> Path:
    """Step files and the last, with rates in a log below logs/."""
    for step in steps:
        end = "" if step == steps[-1] else f"-step{step:08d}"
        write(kohya_keys(step), folder / f"name{end}.safetensors", kohya_metadata(step, step // 20, **extra))
    log = {"lr/unet": RATES, "loss/average": LOSSES, "loss/current": LOSSES}
    tensorboard_log(folder / "logs" / "20240102030405" / "network_train", log)
    return folder


def musubi(folder: Path, steps: Sequence[int] = STEPS) -> Path:
    """sd-scripts' names; the metadata counts items, and the base has no hash."""
    for step in steps:
        metadata = kohya_metadata(step, step // 20, ss_num_train_items="40", ss_sd_model_name=BASE)
        del metadata["ss_num_train_images"]
        end = "" if step == steps[-1] else f"-step{step:08d}"
        write(kohya_keys(step), folder / f"name{end}.safetensors", metadata)
    tensorboard_log(folder / "logs" / "20240102030405" / "network_train", {"lr/unet": RATES, "loss/average": LOSSES})
    return folder


def ai_toolkit(folder: Path, steps: Sequence[int] = STEPS, keep: int = 100, **train: Any) -> Path:
    """Nine-digit steps, the final without a number, config.yaml and loss_log.db."""
    for step in steps:
        info = {"step": step, "epoch": step // 20}
        metadata = {"training_info": json.dumps(info), "ss_output_name": "name", "format": "pt"}
        end = "" if step == steps[-1] else f"_{step:09d}"
        write(peft_keys(step), folder / f"name{end}.safetensors", metadata)
    settings = {"batch_size": 2, "lr": 1e-4, "optimizer": "adamw8bit", **train}
    process = {"type": "sd_trainer", "train": settings, "model": {"name_or_path": BASE}}
    process["save"] = {"save_every": steps[0], "max_step_saves_to_keep": keep}
    yaml = library("yaml")
    document = {"job": "extension", "config": {"name": "name", "process": [process]}}
    (folder / "config.yaml").write_text(yaml.dump(document))
    loss_log(folder / "loss_log.db", {"learning_rate": RATES, "loss/loss": LOSSES}).close()
    return folder


def loss_log(path: Path, curves: Mapping[str, Mapping[int, float]]) -> sqlite3.Connection:
    """ai-toolkit's database, in WAL mode; open, as while it trains: the newest rows are in the second file."""
    connection = sqlite3.connect(path, isolation_level=None)
    for statement in (
        "PRAGMA journal_mode=WAL",
        "CREATE TABLE steps (step INTEGER PRIMARY KEY, wall_time REAL NOT NULL)",
        "CREATE TABLE metric_keys (key TEXT PRIMARY KEY, first_seen_step INTEGER, last_seen_step INTEGER)",
        "CREATE TABLE metrics (step INTEGER NOT NULL, key TEXT NOT NULL, value_real REAL, value_text TEXT,"
        " PRIMARY KEY (step, key))",
    ):
        connection.execute(statement)
    rows = [(step, key, value, None) for key, curve in curves.items() for step, value in curve.items()]
    connection.executemany("INSERT INTO metrics VALUES (?, ?, ?, ?)", rows)
    return connection


def onetrainer(
    folder: Path,
    steps: Sequence[int] = STEPS,
    accumulated: int = 1,
    start: str = "2026-05-01_10-00-00",
    keys: Callable[[int], Tensors] = kohya_keys,
    **settings: Any,
) -> Path:
    """A workspace: saves, settings, log; steps are those of the optimizer, names count batches."""
    day = start.partition("_")[0]
    hour = int(start[11:13])
    for step in steps:
        batch = step * accumulated
        name = (
            f"{day}_{hour:02d}-{step // 60:02d}-{step % 60:02d}-save-{batch}-{step // 20}-{batch % (20 * accumulated)}"
        )
        write(keys(step), folder / "save" / f"{name}.safetensors", {"ot_branch": "master", "modelspec.title": "x"})
    document = {"base_model_name": BASE, "batch_size": 2, "gradient_accumulation_steps": accumulated, **settings}
    (folder / "config").mkdir(exist_ok=True)
    (folder / "config" / f"{start}.json").write_text(json.dumps(document))
    first = min(steps[0] - 9, steps[-1])
    logged = range(first, steps[-1] + 1)
    curves = {"lr/unet": RATES, "loss/train_step": LOSSES}
    log = {tag: {step * accumulated - 1: curve[step] for step in logged} for tag, curve in curves.items()}
    tensorboard_log(folder / "tensorboard" / start, log)
    return folder


def simpletuner(folder: Path, steps: Sequence[int] = STEPS, **config: Any) -> Path:
    """Guarded checkpoint folders, metrics in JSON lines, the final file."""
    for step in steps:
        guarded_checkpoint(folder / f"checkpoint-{step}", step)
    write(peft_keys(steps[-1], "transformer."), folder / "pytorch_lora_weights.safetensors", HEADER)
    known = {"pretrained_model_name_or_path": BASE, "train_batch_size": 2, "gradient_accumulation_steps": 1, **config}
    (folder / "training_metrics.json").write_text(json.dumps({"schema_version": 1, "config": known}))
    lines = [
        {
            "step": step,
            "metrics": {"learning_rate": RATES[step], "train_loss": LOSSES[step], "epoch": (step - 1) // 20 + 1},
        }
        for step in range(1, steps[-1] + 1)
    ]
    (folder / "training_metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def guarded_checkpoint(folder: Path, step: int, guard: bool = True) -> Path:
    """One checkpoint folder of SimpleTuner."""
    write(peft_keys(step, "transformer."), folder / "pytorch_lora_weights.safetensors", HEADER)
    state = {"global_step": step, "epoch_step": step, "epoch": step // 20 + 1, "exhausted_backends": [], "repeats": {}}
    (folder / "training_state.json").write_text(json.dumps(state))
    torch.save({}, folder / "optimizer.bin")
    if guard:
        (folder / "checkpoint_manifest.json").write_text(json.dumps({"version": 1, "files": []}))
        (folder / ".guard").write_text("complete\n")
    return folder


TOML = f"""
output_dir = '/data/out'
dataset = 'dataset.toml'
epochs = 3
micro_batch_size_per_gpu = 2
gradient_accumulation_steps = 1
[model]
type = 'wan'
transformer_path = '{BASE}'
[adapter]
type = 'lora'
rank = {RANK}
[optimizer]
type = 'adamw_optimi'
lr = 1e-4
"""


def diffusion_pipe(
    folder: Path, steps: Sequence[int] = STEPS, toml: str = TOML, log: Mapping[str, Mapping[int, float]] | None = None
) -> Path:
    """Step folders with adapter, settings and a copy of the TOML."""
    for step in steps:
        pipe_save(folder / f"step{step}", step, toml)
    (folder / "run.toml").write_text(toml)
    (folder / "dataset.toml").write_text("resolutions = [512]\n")
    tensorboard_log(folder, {"train/loss": LOSSES} if log is None else log)
    return folder


def pipe_save(folder: Path, step: int, toml: str = TOML) -> Path:
    """One save of diffusion-pipe."""
    write(peft_keys(step), folder / "adapter_model.safetensors", {"format": "pt"})
    (folder / "adapter_config.json").write_text(json.dumps({"r": RANK, "lora_alpha": RANK, "peft_type": "LORA"}))
    (folder / "run.toml").write_text(toml)
    return folder


def diffusers(folder: Path, steps: Sequence[int] = STEPS, **arguments: Any) -> Path:
    """Checkpoints by diffusers' own save_lora_weights, arguments and log by accelerate's own tracker."""
    pipeline = library("diffusers").WanPipeline
    for step in steps:
        tensors = peft_keys(step, "")
        (folder / f"checkpoint-{step}").mkdir(parents=True)
        pipeline.save_lora_weights(folder / f"checkpoint-{step}", transformer_lora_layers=tensors, **_metadata())
        torch.save({}, folder / f"checkpoint-{step}" / "optimizer.bin")
        torch.save({}, folder / f"checkpoint-{step}" / "random_states_0.pkl")
    pipeline.save_lora_weights(folder, transformer_lora_layers=peft_keys(steps[-1], ""), **_metadata())
    tracked(folder / "logs", {"lr": RATES, "loss": LOSSES}, steps[-1], **arguments)
    return folder


def _metadata() -> dict[str, Any]:
    return {"transformer_lora_adapter_metadata": {"r": RANK, "lora_alpha": RANK}}


def tracked(logs: Path, curves: Mapping[str, Mapping[int, float]], steps: int, **arguments: Any) -> Path:
    """A log with its arguments, by accelerate's tracker."""
    library("tensorboard")
    known = {"pretrained_model_name_or_path": BASE, "train_batch_size": 2, "gradient_accumulation_steps": 1}
    library("accelerate").PartialState()
    tracker = library("accelerate.tracking").TensorBoardTracker("dreambooth-lora", logs)
    tracker.start()
    tracker.store_init_configuration({**known, "max_train_steps": steps, "num_train_epochs": 3, **arguments})
    for tag, curve in curves.items():
        for step, value in curve.items():
            if step <= steps:
                tracker.log({tag: value}, step=step)
    tracker.finish()
    return logs


def diffsynth(folder: Path, steps: Sequence[int] = STEPS, accumulated: int = 1, **arguments: Any) -> Path:
    """Numbered files without metadata, the arguments, and losses in a CSV; names count batches."""
    for step in steps:
        write(peft_keys(step, "", ".default"), folder / f"step-{step * accumulated}.safetensors")
    known = {"learning_rate": 1e-4, "num_epochs": 3, "gradient_accumulation_steps": accumulated, "save_steps": 10}
    known |= {"model_paths": json.dumps([BASE]), **arguments}
    (folder / "training_args.json").write_text(json.dumps(known))
    rows = [f"{step * accumulated},loss,{LOSSES[step]}\n" for step in range(1, steps[-1] + 1)]
    (folder / "loss.csv").write_text("step,key,value\n" + "".join(rows))
    return folder


LAYOUTS: dict[str, Callable[[Path], Path]] = {
    "kohya": kohya,
    "musubi": musubi,
    "ai-toolkit": ai_toolkit,
    "onetrainer": onetrainer,
    "simpletuner": simpletuner,
    "diffusion-pipe": diffusion_pipe,
    "diffusers": diffusers,
    "diffsynth": diffsynth,
}
"""Trainer to the writer of one run of it: `STEPS`, `RATES` and `LOSSES` in its own way."""
