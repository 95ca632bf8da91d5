"""torchtune: `epoch_<N>/` (from 0) or `step_<N>/` with adapter_model.safetensors (or `.bin`) under PEFT's names.

The same adapter lies beside it as adapter_model.pt under torchtune's own names, which is all that Phi, Llama 3.2 Vision
and Llama 4 have. Older versions wrote `adapter_<N>.pt` into the run's folder. A DiskLogger keeps logs/log_<time>.txt or
.jsonl; torchtune_config.yaml holds the configuration.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lora_forensics.checkpoints.adapter_folder import CONFIG, WEIGHTS, open_adapter, recorded_base
from lora_forensics.checkpoints.assembly import Told, as_epochs, assemble
from lora_forensics.checkpoints.interface import Folder, Trap, entries, stat_checkpoint
from lora_forensics.checkpoints.logs.entries import Entry, continued, read_entries
from lora_forensics.checkpoints.logs.settings import read_yaml
from lora_forensics.checkpoints.trainer_history import History
from lora_forensics.errors import CheckpointError
from lora_forensics.records import Checkpoint, Finding, Run, Skipped
from lora_forensics.values import as_count, spelt_number

_FOLDER = re.compile(r"(epoch|step)_(\d{1,15})")
_OLD = re.compile(r"adapter_(\d{1,15})\.pt")
_OWN = "adapter_model.pt"
_SETTINGS = "torchtune_config.yaml"
_LOGS = re.compile(r"log_(\d{1,15})\.(txt|jsonl)")
_LINE = re.compile(r"Step (\d{1,15}) \|(.*)")
_PAIR = re.compile(r"(\S+?):(\S+)")
_NAMES = {"lr": "learning_rate", "val_loss": "eval_loss"}


class Torchtune:
    """`epoch_<N>` and `step_<N>` folders."""

    name = "torchtune"
    about = "torchtune's LoRA recipes"
    recognised = "epoch_<N>/ or step_<N>/ with adapter_model.*, or adapter_<N>.pt of older versions"
    traps: tuple[Trap, ...] = (
        Trap("epochs count from 0: epoch_0 is the end of the first"),
        Trap("adapter_model.pt repeats adapter_model.safetensors in torchtune's names: one checkpoint, not two"),
        Trap(
            "query and key rows of adapter_model.pt are in Meta's order: not comparable with a Hugging Face base", False
        ),
        Trap("an epoch's steps are known only where the log is whole and as long as the configured epochs"),
        Trap("Phi, Llama 3.2 Vision and Llama 4 keep torchtune's names only, in a pickle"),
        Trap("every start begins a log of its own, log_<unix time>: a resumed one goes on, a new one starts at 1"),
        Trap("folders beyond the configured epochs are of an earlier training: another run"),
    )
    save_more_often = (
        "set save_every_n_steps (where the recipe has it); leave keep_last_n_checkpoints unset, it deletes"
    )

    def find(self, folder: Folder) -> Iterator[Run | Skipped]:
        """One run, and another of what an earlier training left."""
        found, skipped = _saves(folder)
        if not found:
            yield from skipped
            return
        settings = _settings(folder)
        history, findings = _logged(folder.path)
        end = as_count(settings.get("epochs"))
        groups: dict[bool, list[tuple[str, int, Checkpoint]]] = {}
        for unit, number, checkpoint in found:
            groups.setdefault(unit == "epoch" and bool(end) and number >= (end or 0), []).append(
                (unit, number, checkpoint)
            )
        findings = (*findings, *([_EARLIER] if len(groups) > 1 else []))
        for earlier, group in sorted(groups.items()):
            known = ({}, History()) if earlier and len(groups) > 1 else (settings, history)
            yield self._run(folder.path, group, *known, findings, skipped)
            skipped = []

    def _run(
        self,
        folder: Path,
        found: list[tuple[str, int, Checkpoint]],
        settings: Mapping[str, Any],
        history: History,
        findings: Sequence[Finding],
        skipped: list[Skipped],
    ) -> Run:
        per_epoch = _steps_per_epoch(found, settings, history)
        by_epochs = per_epoch is None and all(unit == "epoch" for unit, _, _ in found)
        factor = 1 if by_epochs else per_epoch
        dated = [
            replace(checkpoint, step=number)
            if unit == "step"
            else replace(checkpoint, step=factor and (number + 1) * factor, epoch=number + 1.0)
            for unit, number, checkpoint in found
        ]
        told = replace(
            Told() if by_epochs else history.told(),
            steps_per_epoch=per_epoch,
            batch_size=as_count(settings.get("batch_size")),
            base=recorded_base(found[0][2].config),
            findings=tuple(findings),
        )
        run = assemble(self, folder, "", dated, told, skipped)
        return as_epochs(run, _EPOCHS_ONLY) if by_epochs else run


_EARLIER = Finding(
    "several-trainings",
    "warning",
    "some folders lie beyond the epochs of torchtune_config.yaml: an earlier training wrote them",
    "they are listed as a run of their own; give each training its own output_dir",
)
_EPOCHS_ONLY = Finding(
    "epochs-only",
    "warning",
    "no complete log tells how many steps an epoch has, so all steps below count epochs",
    "keep log_<time>.txt or .jsonl of the DiskLogger in the run's folder, with log_every_n_steps: 1",
)


def _saves(folder: Folder) -> tuple[list[tuple[str, int, Checkpoint]], list[Skipped]]:
    """Unit, number and checkpoint of every save, taken out of `folder`; those that are damaged."""
    opened: list[tuple[str, int, Checkpoint | Skipped]] = []
    numbered = ((_FOLDER.fullmatch(name), name) for name in folder.folders)
    for unit, number, name in sorted((match[1], int(match[2]), name) for match, name in numbered if match):
        path = folder.folders[name]
        files, _ = entries(path)
        entry = _own(path / _OWN, name, files) if _OWN in files and not files & {*WEIGHTS} else None
        entry = entry or open_adapter(path, files, name, None)
        if entry is None or not (
            folder.insisted or _OWN in files or _SETTINGS in folder.files or _recipe(files, folder)
        ):
            continue
        del folder.folders[name]
        opened.append((unit, number, entry))
    for name in [name for name in folder.files if _OLD.fullmatch(name)]:
        path = folder.files.pop(name)
        opened.append(("epoch", int(name[8:-3]), _own(path, "", set(folder.files))))
    found = [(unit, number, entry) for unit, number, entry in opened if isinstance(entry, Checkpoint)]
    return found, [entry for _, _, entry in opened if isinstance(entry, Skipped)]


def _recipe(files: set[str], folder: Folder) -> bool:
    return "recipe_state.pt" in files or "recipe_state" in folder.folders


def _own(path: Path, name: str, files: set[str]) -> Checkpoint | Skipped:
    """A file in torchtune's own names."""
    try:
        label = f"{name}/{path.name}" if name else path.name
        return stat_checkpoint(path, label, None, path.parent / CONFIG if CONFIG in files else None)
    except CheckpointError as error:
        return Skipped.because(path, error)


def _settings(folder: Folder) -> Mapping[str, Any]:
    return read_yaml(folder.path / _SETTINGS) if _SETTINGS in folder.files else {}


def _logged(folder: Path) -> tuple[History, tuple[Finding, ...]]:
    """All logs of a run, those of later starts behind those of earlier ones."""
    logs = sorted(
        (int(match[1]), path / name)
        for path in (folder, folder / "logs")
        for name in entries(path)[0]
        if (match := _LOGS.fullmatch(name))
    )
    lines: list[Entry] = []
    findings: list[Finding] = []
    for _, path in logs:
        read, problems = read_entries(path) if path.suffix == ".jsonl" else (_text_lines(path), ())
        lines.extend({_NAMES.get(key, key): value for key, value in line.items()} for line in read)
        findings.extend(problems)
    return History(tuple(continued(lines))), tuple(findings[:1])


def _text_lines(path: Path) -> list[dict[str, Any]]:
    """Lines such as `Step 3 | loss:1.25 lr:0.0003`."""
    try:
        text = path.read_text("utf-8", errors="replace")
    except OSError:
        return []
    found = []
    for line in text.splitlines():
        if match := _LINE.match(line):
            values = {
                key: number for key, value in _PAIR.findall(match[2]) if (number := spelt_number(value)) is not None
            }
            found.append({"step": int(match[1]), **values})
    return found


def _steps_per_epoch(
    found: list[tuple[str, int, Checkpoint]], settings: Mapping[str, Any], history: History
) -> int | None:
    """Where the log has every step, and ends with the last of the configured epochs."""
    steps, epochs = history.curve("loss").steps, as_count(settings.get("epochs"))
    done = max((number + 1 for unit, number, _ in found if unit == "epoch"), default=0)
    whole = bool(steps) and steps == tuple(range(1, len(steps) + 1))
    return len(steps) // epochs if whole and epochs and done == epochs and len(steps) % epochs == 0 else None
