"""ms-swift: the layout of the Hugging Face Trainer in a folder for each start, `v0-20240101-120000/`.

Beside the checkpoints lie args.json (also in each of them) and logging.jsonl, whose last line holds the whole history.
Its Megatron path has the same names without trainer_state.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.adapter_folder import recorded_base
from lora_forensics.checkpoints.interface import Folder, Trap
from lora_forensics.checkpoints.logs.jsonl import Entry, continued, json_lines
from lora_forensics.checkpoints.peft import PeftTrainer
from lora_forensics.checkpoints.trainer_history import History
from lora_forensics.records import BaseReference, Checkpoint, Finding
from lora_forensics.values import as_count, read_object

_LOG, _ARGUMENTS = "logging.jsonl", "args.json"
_PROGRESS = ("global_step/max_steps", "iteration")
_COUNT = re.compile(r"(\d{1,15})/(\d{1,15})")


class Swift(PeftTrainer):
    """`checkpoint-<step>` folders beside logging.jsonl or args.json."""

    name = "ms-swift"
    about = "ms-swift, also its Megatron path where that saves adapter_model.safetensors"
    recognised = "the layout of peft beside logging.jsonl, or with args.json in the run or its checkpoints"
    traps: tuple[Trap, ...] = (
        Trap("every start has a folder of its own, v0-<time>, v1-<time>, ...: each is a run"),
        Trap("logging.jsonl rounds to eight decimals, small learning rates with it: its last line or trainer_state.json"),
        Trap("`last` and `best` may be links to checkpoints, and checkpoint-<step>-merged is a merged model"),
        Trap("the Megatron path counts iterations, and keeps no trainer_state.json"),
    )

    def claims(self, folder: Folder) -> bool:
        """By the files that only it writes."""
        if _LOG in folder.files or _ARGUMENTS in folder.files:
            return True
        first = next((name for name in folder.folders if name.startswith("checkpoint-")), None)
        return first is not None and (folder.folders[first] / _ARGUMENTS).is_file()

    def log(self, folder: Path) -> tuple[History, tuple[Finding, ...]]:
        """The history in logging.jsonl's last line, else its lines, else TensorBoard."""
        lines, findings = json_lines(folder / _LOG) if (folder / _LOG).is_file() else ([], ())
        whole = next((line for line in reversed(lines) if isinstance(line.get("log_history"), list)), None)
        entries = continued([entry for line in lines if (entry := _entry(line)) is not None])
        if whole is not None and (as_count(whole.get("global_step")) or 0) >= max((e["step"] for e in entries), default=0):
            return History.of(whole), findings
        return (History(tuple(entries)), findings) if entries else super().log(folder)

    def base(self, checkpoint: Checkpoint, folder: Path) -> BaseReference:
        """The name in args.json where adapter_config.json has a path that is not on this machine."""
        base = recorded_base(checkpoint.config)
        name = _arguments(folder, checkpoint.path.parent).get("model")
        away = base.name is None or (Path(base.name).is_absolute() and not Path(base.name).exists())
        return replace(base, name=name) if away and isinstance(name, str) and name else base

    def batch_size(self, state: Mapping[str, Any], folder: Path) -> int | None:
        """As in trainer_state.json, else in args.json."""
        known = super().batch_size(state, folder)
        return known or as_count(_arguments(folder).get("per_device_train_batch_size"))


def _arguments(*folders: Path) -> dict[str, Any]:
    return next((found for folder in folders if (found := read_object(folder / _ARGUMENTS))), {})


def _entry(line: Mapping[str, Any]) -> Entry | None:
    """A line under the Trainer's names; None for the summary at the end."""
    counts = [_COUNT.fullmatch(str(line[key])) for key in _PROGRESS if key in line]
    return {**line, "step": int(counts[0][1])} if counts and counts[0] else None
