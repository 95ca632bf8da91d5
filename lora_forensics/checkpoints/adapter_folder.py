"""A folder with an adapter as `PeftModel.save_pretrained` writes it; several trainers use it for a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

from lora_forensics.checkpoints.interface import stat_checkpoint
from lora_forensics.errors import CheckpointError
from lora_forensics.records import BaseReference, Checkpoint, Skipped
from lora_forensics.values import read_object

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
CONFIG = "adapter_config.json"
COMPANIONS = re.compile(
    r"(optimizer|scheduler|scaler|sampler|training_args|rng_state|random_states)\w*\.(pt|pth|bin|pkl|safetensors)"
    r"|trainer_state\.json|README\.md|chat_template\.jinja|(special_tokens_map|added_tokens|vocab)\.json|merges\.txt"
    r"|tokenizer(_config)?\.json|tokenizer\.model|processor_config\.json|preprocessor_config\.json"
)
"""Files that trainers write beside an adapter into a checkpoint's folder: of no use once it is gone."""
_SHARDED = {
    "DeepSpeed": re.compile(r"global_step\d+"),
    "FSDP": re.compile(r"pytorch_model_fsdp_\d+"),
    "Megatron": re.compile(r"iter_\d+"),
}
"""Folders with the state of all processes that a distributed trainer keeps for itself."""


def open_adapter(folder: Path, files: Collection[str], name: str, step: int | None) -> Checkpoint | Skipped | None:
    """The adapter among the files of a folder, called `name` relative to its run; None if there is none."""
    weights = next((weights for weights in WEIGHTS if weights in files), None)
    if weights is None:
        missing = f"has {CONFIG} but no {WEIGHTS[0]}: the save was not finished"
        return Skipped(folder, missing, rule="unfinished-save") if CONFIG in files else None
    path = folder / weights
    try:
        return stat_checkpoint(
            path, f"{name}/{weights}" if name else weights, step, folder / CONFIG if CONFIG in files else None
        )
    except CheckpointError as error:
        return Skipped.because(path, error)


def without_adapter(folders: Collection[str]) -> str:
    """Why a checkpoint's folder holds no adapter, by the folders in it."""
    for kind, pattern in _SHARDED.items():
        if any(pattern.fullmatch(name) for name in folders):
            return f"holds the training state of {kind} and no {WEIGHTS[0]}: gather it with the trainer's own tool"
    return f"holds no {WEIGHTS[0]}: the save was not finished, or the file was deleted"


def recorded_base(config: Path | None) -> BaseReference:
    """What adapter_config.json says about the base model."""
    document = (read_object(config) if config else None) or {}
    name, revision = document.get("base_model_name_or_path"), document.get("revision")
    return BaseReference(name=str(name) if name else None, revision=str(revision) if revision else None)
