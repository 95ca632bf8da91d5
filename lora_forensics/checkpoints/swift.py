"""ms-swift: the layout of the Hugging Face Trainer in a folder for each start, `v0-20240101-120000/`.

Beside the checkpoints lie args.json (also in each of them) and logging.jsonl, whose last line holds the whole history.
Its Megatron path has the same names without trainer_state.json.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.interface import Folder, Trap
from lora_forensics.checkpoints.logs.entries import Entry, continued, read_entries
from lora_forensics.checkpoints.peft import PeftTrainer, Save
from lora_forensics.checkpoints.trainer_history import History
from lora_forensics.records import Finding, Run, Skipped
from lora_forensics.values import as_count, read_object

_LOG, _ARGUMENTS = "logging.jsonl", "args.json"
_OWN = {"swift_version", "template"}
"""Arguments of ms-swift's own."""
_PROGRESS = ("global_step/max_steps", "iteration")
_COUNT = re.compile(r"(\d{1,15})/(\d{1,15})")


class Swift(PeftTrainer):
    """`checkpoint-<step>` folders beside logging.jsonl or args.json."""

    name = "ms-swift"
    about = "ms-swift, also its Megatron path where that saves adapter_model.safetensors"
    recognised = "the layout of peft beside logging.jsonl, or with ms-swift's args.json in the run or its checkpoints"
    traps: tuple[Trap, ...] = (
        Trap("every start has a folder of its own, v0-<time>, v1-<time>, ...: each is a run"),
        Trap(
            "logging.jsonl rounds to eight decimals, small learning rates with it: its last line or trainer_state.json"
        ),
        Trap("`last` and `best` may be links to checkpoints, and checkpoint-<step>-merged is a merged model"),
        Trap("the Megatron path counts iterations, and keeps no trainer_state.json"),
    )

    def claims(self, folder: Folder) -> bool:
        """By the files that only it writes."""
        if folder.insisted or _LOG in folder.files:
            return True
        first = [path for name, path in folder.folders.items() if name.startswith("checkpoint-")][:1]
        # others call a file of arguments so too
        return any(not _OWN.isdisjoint(read_object(path / _ARGUMENTS) or {}) for path in (folder.path, *first))

    def log(self, folder: Path) -> tuple[History, tuple[Finding, ...]]:
        """The history in logging.jsonl's last line, else its lines, else TensorBoard."""
        lines, findings = read_entries(folder / _LOG) if (folder / _LOG).is_file() else ([], ())
        whole = next((line for line in reversed(lines) if isinstance(line.get("log_history"), list)), None)
        entries = continued([entry for line in lines if (entry := _entry(line)) is not None])
        if whole is not None and (as_count(whole.get("global_step")) or 0) >= max(
            (e["step"] for e in entries), default=0
        ):
            return History.of(whole), findings
        return (History(tuple(entries)), findings) if entries else super().log(folder)

    def run(
        self,
        folder: Path,
        adapter: str,
        training: list[Save],
        history: History,
        findings: Sequence[Finding],
        skipped: list[Skipped],
    ) -> Run:
        """With args.json: the batch size, and the base's name where adapter_config.json has a path from elsewhere."""
        run = super().run(folder, adapter, training, history, findings, skipped)
        known = next((found for path in (folder, training[0].folder) if (found := read_object(path / _ARGUMENTS))), {})
        name, model = run.base.name, known.get("model")
        away = name is None or (Path(name).is_absolute() and not Path(name).exists())
        return replace(
            run,
            batch_size=run.batch_size or as_count(known.get("per_device_train_batch_size")),
            base=replace(run.base, name=model) if away and isinstance(model, str) and model else run.base,
        )


def _entry(line: Mapping[str, Any]) -> Entry | None:
    """A line under the Trainer's names; None for the summary at the end."""
    counts = [_COUNT.fullmatch(str(line[key])) for key in _PROGRESS if key in line]
    return {**line, "step": int(counts[0][1])} if counts and counts[0] else None
