"""LLaMA-Factory: the layout of the Hugging Face Trainer, and `trainer_log.jsonl` beside it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from lora_forensics.checkpoints.interface import Folder, Trap
from lora_forensics.checkpoints.logs.entries import continued, read_entries
from lora_forensics.checkpoints.peft import PeftTrainer
from lora_forensics.checkpoints.trainer_history import History
from lora_forensics.records import Finding, Run, Skipped

_LOG = "trainer_log.jsonl"
_MARKS = {_LOG, "llamaboard_config.yaml", "training_args.yaml"}
_NAMES = {"current_steps": "step", "lr": "learning_rate"}
_PISSA = {
    "pissa_init": "the adapter that PiSSA started from",
    "pissa_backup": "a copy of the final adapter before PiSSA's conversion",
    "pissa_converted": "the final adapter of PiSSA, converted to a plain one of twice the rank",
}


class LlamaFactory(PeftTrainer):
    """`checkpoint-<step>` folders beside trainer_log.jsonl."""

    name = "llama-factory"
    about = "LLaMA-Factory"
    recognised = "the layout of peft beside trainer_log.jsonl, llamaboard_config.yaml or training_args.yaml"
    traps: tuple[Trap, ...] = (
        Trap("trainer_log.jsonl is appended to: after a restart steps go back, and the last pass counts"),
        Trap("pissa_init, pissa_backup and pissa_converted hold adapters that are no checkpoints"),
    )

    def claims(self, folder: Folder) -> bool:
        """By the files that only it writes."""
        return folder.insisted or not _MARKS.isdisjoint(folder.files)

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """As for peft; PiSSA's copies are told apart."""
        if self.claims(folder):
            for name in [n for n in folder.folders if n in _PISSA]:
                yield Skipped(folder.folders.pop(name), _PISSA[name], expected=True)
        yield from super().find(folder)

    def log(self, folder: Path) -> tuple[History, tuple[Finding, ...]]:
        """trainer_log.jsonl, else TensorBoard."""
        lines, findings = read_entries(folder / _LOG) if (folder / _LOG).is_file() else ([], ())
        entries = continued([{_NAMES.get(key, key): value for key, value in line.items()} for line in lines])
        return (History(tuple(entries)), findings) if entries else super().log(folder)
