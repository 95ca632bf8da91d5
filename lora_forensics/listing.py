"""What discovery found, for the `runs` command: one table for people, one document for scripts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from lora_forensics.adapters import read_layout, read_settings
from lora_forensics.errors import LoraForensicsError
from lora_forensics.records import SCHEMA, Checkpoint, Run, Skipped, describe_adapter
from lora_forensics.reports.text import count, number, plain, wrapped
from lora_forensics.tensors import PICKLES, open_tensors

_LABEL = 15
"""Cells of a label and the space behind it."""


def listing_json(found: Sequence[Run | Skipped]) -> str:
    """All runs with all checkpoints, and all that is skipped."""
    runs = [entry for entry in found if isinstance(entry, Run)]
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    document = {
        "schema": SCHEMA,
        "runs": [_run(run) for run in runs],
        "skipped": [entry.to_dict() for entry in (*skipped, *(s for run in runs for s in run.skipped))],
    }
    return json.dumps(document, indent=2, ensure_ascii=True) + "\n"


def listing_text(found: Sequence[Run | Skipped], width: int = 80, verbose: bool = False) -> str:
    """A block a run, then what is skipped by reason."""
    runs = [entry for entry in found if isinstance(entry, Run)]
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    skipped.extend(entry for run in runs for entry in run.skipped)
    lines = [line for run in runs for line in (*_block(run, width), "")]
    if skipped:
        lines.append(f"{count(len(skipped), 'tensor file')} skipped")
        if verbose:
            for entry in skipped:
                lines.extend(_hanging(f"{plain(entry.path)}: {plain(entry.reason)}", width))
        else:
            reasons = Counter(_short(entry) for entry in skipped)
            for reason, times in reasons.most_common(8):
                lines.extend(_hanging(f"{times} x {reason}", width))
            lines.append("  (-v lists them one by one)")
        lines.append("")
    lines.append(count(len(runs), "run") if runs else "no run found")
    return "\n".join(lines) + "\n"


def _run(run: Run) -> dict[str, Any]:
    adapter, modules = _adapter(run)
    return {
        "name": run.name,
        "path": run.path.resolve().as_posix(),
        "trainer": run.trainer,
        "adapter": adapter,
        "modules": modules,
        "step_unit": run.step_unit,
        "steps_per_epoch": run.steps_per_epoch,
        "train_samples": run.train_samples,
        "batch_size": run.batch_size,
        "base": asdict(run.base),
        "checkpoints": [_checkpoint(checkpoint) for checkpoint in run.checkpoints],
        "unplaced": [_checkpoint(checkpoint) for checkpoint in run.unplaced],
        "findings": [asdict(finding) for finding in run.findings],
        "skipped": [entry.to_dict() for entry in run.skipped],
        "save_more_often": run.save_more_often,
    }


def _checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint": checkpoint.name,
        "step": checkpoint.step,
        "epoch": checkpoint.epoch,
        "learning_rate": checkpoint.learning_rate,
        "dose": checkpoint.dose,
        "train_loss": checkpoint.train_loss,
        "held_out_loss": checkpoint.held_out_loss,
        "bytes": checkpoint.size,
    }


def _block(run: Run, width: int) -> list[str]:
    """A run in a few lines: what, which files, rates and losses, base, what has no place, findings."""
    adapter, modules = _adapter(run)
    data = [f"{run.steps_per_epoch:g} steps an epoch"] if run.steps_per_epoch and run.step_unit == "step" else []
    data += [f"{run.train_samples} samples"] if run.train_samples else []
    data += [f"batch size {run.batch_size}"] if run.batch_size else []
    rows = (
        ("trainer", f"{run.trainer}, {adapter} on {count(modules or 0, 'module')}" if adapter else run.trainer),
        ("checkpoints", _extent(run)),
        ("files", _files(run)),
        ("learning rate", _range([c.learning_rate for c in run.checkpoints]) or "unknown"),
        ("train loss", _course([c.train_loss for c in run.checkpoints])),
        ("held-out loss", _held_out(run)),
        ("data", ", ".join(data)),
        ("base model", plain(run.base.name) if run.base.name else "not recorded: give it with --base"),
        ("not placed", ", ".join(plain(c.name) for c in run.unplaced)),
    )
    from rich.cells import cell_len

    lines = [plain(run.name)]
    for name, text in rows:
        label = name
        parts = list(wrapped(text, width - _LABEL - 2))
        if parts and cell_len(parts[0]) > width - _LABEL - 2:  # a path keeps a line to itself
            lines.append(f"  {label}")
            label = ""
        for index, part in enumerate(parts):
            lines.append(f"  {'' if index else label:<{_LABEL}}{part}")
    for finding in run.findings:
        lines.extend(_hanging(f"{finding.severity}: {plain(finding.message)}", width))
    return lines


def _files(run: Run) -> str:
    names = [plain(checkpoint.name) for checkpoint in run.checkpoints]
    return " to ".join(dict.fromkeys((names[0], names[-1]))) if names else ""


def _range(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    ends = [number(value, 3) for value in (min(known), max(known))] if known else []
    missing = f", unknown at {len(values) - len(known)}" if 0 < len(known) < len(values) else ""
    return " to ".join(dict.fromkeys(ends)) + missing


def _course(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{number(known[0], 3)} at the first, {number(known[-1], 3)} at the last" if known else ""


def _held_out(run: Run) -> str:
    known = [c for c in run.checkpoints if c.held_out_loss is not None]
    if not known:
        return ""
    best = min(known, key=lambda c: c.held_out_loss or 0.0)
    return f"logged at {count(len(known), 'checkpoint')}, lowest {number(best.held_out_loss, 3)} at step {best.step}"


def _extent(run: Run) -> str:
    if not run.checkpoints:
        return "none with a known step"
    first, last = run.checkpoints[0], run.checkpoints[-1]
    unit = "steps" if run.step_unit == "step" else "epochs"
    text = f"{len(run.checkpoints)}, {unit} {first.step} to {last.step}"
    return text + (f" (epoch {last.epoch:.4g})" if last.epoch is not None and unit == "steps" else "")


def _adapter(run: Run) -> tuple[str | None, int | None]:
    """Kinds, ranks and number of modules, by the header of the first checkpoint; pickles are not opened for that."""
    first = next(iter((*run.checkpoints, *run.unplaced)), None)
    if first is None or first.path.suffix in PICKLES:
        return None, None
    try:
        file = open_tensors(first.path)
        layout = read_layout(file.infos, read_settings(first.config, file.metadata))
    except LoraForensicsError:
        return None, None
    kinds = sorted({module.kind for module in layout.modules.values()})
    ranks = sorted({module.layout.rank for module in layout.modules.values() if module.layout.rank})
    return describe_adapter(kinds or ["a kind that is not read"], ranks), len(layout.modules) + len(layout.unread)


def _short(entry: Skipped) -> str:
    """The reason without the file's own path, so that equal reasons count together."""
    reason = plain(entry.reason).removeprefix(f"{plain(entry.path)}: ")
    return "no adapter" if reason.startswith("no adapter") else reason


def _hanging(text: str, width: int) -> Iterator[str]:
    """A line with a margin of two cells, and of four where it goes on."""
    for index, part in enumerate(wrapped(text, width - 4)):
        yield " " * (4 if index else 2) + part
