"""NVIDIA NeMo: adapters in Hugging Face form, in a folder for each checkpoint.

NeMo 2: `<name>--val_loss=1.25-step=100-consumed_samples=800/hf_adapter/`, with a `-last` copy of the newest.
NeMo Automodel: `epoch_<E>_step_<S>/model/` with losses.json, and training.jsonl and validation.jsonl beside them.
Megatron's own distributed checkpoints are not read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from lora_forensics.checkpoints.adapter_folder import open_adapter, recorded_base
from lora_forensics.checkpoints.assembly import Told, assemble
from lora_forensics.checkpoints.history import Curve
from lora_forensics.checkpoints.interface import Folder, Trap, entries
from lora_forensics.checkpoints.logs.entries import Entry, continued, read_entries
from lora_forensics.checkpoints.trainer_history import History
from lora_forensics.records import Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count, read_object

_NEMO = re.compile(r".+--.*?step=(\d{1,15})(?:\.0)?(?:-.*?)??(-last)?")
_UNFINISHED = "-unfinished"
_AUTOMODEL = re.compile(r"epoch_(\d{1,15})_step_(\d{1,15})")


class NeMo:
    """`<name>--...step=<N>.../hf_adapter` folders."""

    name = "nemo"
    about = "NVIDIA NeMo 2 where it saves in Hugging Face form"
    recognised = "<name>--...step=<N>.../hf_adapter/adapter_model.safetensors"
    traps: tuple[Trap, ...] = (
        Trap("the copy that ends in -last repeats a step and counts once"),
        Trap("a file <checkpoint>-unfinished beside a checkpoint marks a save that was not finished"),
        Trap("the loss in a name is rounded, and may be of an earlier evaluation: it is not taken for a held-out loss"),
        Trap("step in a name is the number of optimizer steps on the Hugging Face path", verified=False),
        Trap("weights/ in Megatron's distributed format is not read"),
    )
    save_more_often = "set every_n_train_steps of ModelCheckpoint to fewer, and save_top_k=-1, which deletes nothing"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run for each name before `--`."""
        named = {name: match for name in folder.folders if (match := _NEMO.fullmatch(name))}
        runs: dict[str, list[Checkpoint]] = {}
        skipped: list[Skipped] = []
        for name, match in sorted(named.items(), key=lambda item: (bool(item[1][2]), int(item[1][1]))):
            path = folder.folders[name] / "hf_adapter"
            entry = open_adapter(path, entries(path)[0], f"{name}/hf_adapter", int(match[1]))
            if entry is None and (folder.folders[name] / "weights" / "adapter_metadata.json").is_file():
                entry = Skipped(
                    folder.folders[name],
                    "an adapter in Megatron's distributed format: export it to hf_adapter",
                    rule="unplaced-adapter",
                )
            if entry is None:
                continue
            del folder.folders[name]
            if name + _UNFINISHED in folder.files:
                entry = Skipped(path, "a save that was not finished", rule="unfinished-save")
            if isinstance(entry, Checkpoint):
                runs.setdefault(name.partition("--")[0], []).append(entry)
            else:
                skipped.append(entry)
        for name, found in runs.items():
            label = name if len(runs) > 1 else ""
            yield assemble(self, folder.path, label, found, Told(base=recorded_base(found[0].config)), skipped)
            skipped = []
        yield from skipped


class Automodel:
    """`epoch_<E>_step_<S>/model` folders."""

    name = "nemo-automodel"
    about = "NVIDIA NeMo Automodel"
    recognised = "epoch_<E>_step_<S>/model/adapter_model.safetensors"
    traps: tuple[Trap, ...] = (
        Trap("steps count from 0: step_99 holds 100 optimizer steps, in names and in training.jsonl"),
        Trap("LATEST and LOWEST_VAL are links to checkpoints"),
    )
    save_more_often = "set a smaller ckpt_every_steps; leave max_recent_checkpoints unset, it deletes"

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run."""
        found: list[Checkpoint] = []
        skipped: list[Skipped] = []
        losses: list[Entry] = []
        named = ((_AUTOMODEL.fullmatch(name), name) for name in folder.folders)
        for step, name in sorted((int(match[2]) + 1, name) for match, name in named if match):
            path = folder.folders[name] / "model"
            entry = open_adapter(path, entries(path)[0], f"{name}/model", step)
            if entry is None:
                continue
            del folder.folders[name]
            known = read_object(path.parent / "losses.json") or {}
            losses.append({"step": step, "loss": known.get("train_loss"), "eval_loss": known.get("val_loss")})
            (found if isinstance(entry, Checkpoint) else skipped).append(entry)  # type: ignore[arg-type] # by type
        if not found:
            yield from skipped
            return
        trained, findings = _lines(folder.path / "training.jsonl")
        evaluated, more = _lines(folder.path / "validation.jsonl")
        later = [e for e in trained if as_count(e.get("epoch"))]
        per_epoch = (int(later[0]["step"]) - 1) / int(later[0]["epoch"]) if later else None
        told = replace(
            History((*losses, *trained, *evaluated)).told(),
            epochs=Curve(),  # in the log it is the number of the epoch, from 0
            steps_per_epoch=per_epoch,
            base=recorded_base(found[0].config),
            findings=(*findings, *more)[:1],
        )
        yield assemble(self, folder.path, "", found, told, skipped)


def _lines(path: Path) -> tuple[list[Entry], tuple[Finding, ...]]:
    """A log under the Trainer's names, steps from 1."""
    lines, findings = read_entries(path) if path.is_file() else ([], ())
    names = {"lr": "learning_rate", "val_loss": "eval_loss"}
    found = [
        {**{names.get(key, key): value for key, value in line.items()}, "step": step + 1}
        for line in lines
        if (step := as_count(line.get("step"))) is not None
    ]
    return continued(found), findings
