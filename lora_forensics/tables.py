"""The two tables of a run while they are put together from stored and new rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import polars as pl

from lora_forensics.analyses import ANALYSIS_COLUMNS
from lora_forensics.metrics import METRICS
from lora_forensics.notices import MEASURING_RULES, Notices
from lora_forensics.records import BaseModelSummary, Checkpoint, Finding, Run, RunNotes, Skipped
from lora_forensics.series import CHECKPOINT_COLUMNS, MODULE_COLUMNS, STORAGE_COLUMNS, schema

LAYER_COLUMNS = (*MODULE_COLUMNS, *(metric.column for metric in METRICS), *ANALYSIS_COLUMNS, *STORAGE_COLUMNS)
"""Columns of layers.parquet."""
_SCHEMA = pl.Schema(schema(LAYER_COLUMNS))


@dataclass(frozen=True, slots=True)
class Measured:
    """The two tables of a run, and what they do not hold."""

    layers: pl.DataFrame
    checkpoints: pl.DataFrame
    notes: RunNotes
    new: int = 0
    """Checkpoints that were measured now; the others were known."""
    waiting: int = 0
    """Checkpoints that could not be measured now, for their base model is away."""


class Tables:
    """Rows and notices, new ones beside those that are reused."""

    def __init__(self, run: Run, known: Measured | None, fresh: Collection[str]) -> None:
        """`fresh` are the checkpoints whose stored rows are not reused."""
        self._run = run
        self._known = known
        self._new = 0
        self._frames: list[pl.DataFrame] = []
        self._dtypes: dict[str, str] = {}
        self._skipped: list[Skipped] = []
        self._notices = Notices()
        current = [checkpoint for checkpoint in run.checkpoints if checkpoint.name not in fresh]
        if not current:
            self._known = known = None  # nothing is reused, nor what was said about it
        if known is not None:
            rows = known.layers.filter(pl.col("checkpoint").is_in([c.name for c in current]))
            self._frames.append(rows.cast(_SCHEMA))
            self._dtypes.update({name: dtype for name, (_, _, dtype) in known.notes.measured.items()})
            self._skipped = [
                replace(skipped, path=checkpoint.path)  # a later scan may name the folder in another way
                for checkpoint in current
                for skipped in known.notes.skipped
                if f"/{skipped.path.as_posix()}".endswith(f"/{checkpoint.name}")
            ]

    def add(
        self, rows: dict[str, list[Any]], dtypes: dict[str, str], skipped: Sequence[Skipped], notices: Notices
    ) -> None:
        """Take in the result of a unit of work."""
        self._frames.append(pl.DataFrame(rows, schema=schema(LAYER_COLUMNS)))
        self._new += len(dtypes)
        self._dtypes.update(dtypes)
        self._skipped.extend(entry for entry in skipped if entry not in self._skipped)
        self._notices.add(notices)

    def result(self, notes: RunNotes, extra: Sequence[Finding], waiting: Collection[str]) -> Measured:
        """Both tables, in order, and the findings of all that was measured; `waiting` could not be measured now."""
        layers = self._layers()
        modules = layers.select("module", "tensor").unique("module")
        known = self._known.notes if self._known else RunNotes()
        before = known.base.total - self._known.layers["module"].n_unique() if self._known else 0
        unread = len(self._notices.unread) if self._new else before
        base = BaseModelSummary(notes.base.path, modules["tensor"].count(), len(modules) + unread)
        problem = notes.base_problem
        if notes.base_files and base.total and not base.matched:
            reason = next(iter(self._notices.unresolved.values()), "")
            problem = f"{base.path} does not fit this adapter: none of its {base.total} modules is in it ({reason})"
            problem = problem if reason else known.base_problem
        found = [*extra, *self._notices.findings()]
        rules = {finding.rule for finding in found}
        kept = [f for f in known.findings if f.rule in MEASURING_RULES - rules - {"base-missing"}]
        notes = replace(
            notes,
            base=base,
            base_problem=problem,
            measured=self._marks(waiting),
            findings=(*self._run.findings, *found, *kept),
            skipped=(*self._run.skipped, *self._skipped),
        )
        return Measured(layers, checkpoint_table(self._run, self._dtypes, waiting), notes, self._new, len(waiting))

    def _marks(self, waiting: Collection[str]) -> dict[str, tuple[str, str, str]]:
        """`RunNotes.measured`."""
        before = ["", *(checkpoint.fingerprint for checkpoint in self._run.checkpoints)]
        return {
            checkpoint.name: (checkpoint.fingerprint, previous, self._dtypes.get(checkpoint.name, ""))
            for checkpoint, previous in zip(self._run.checkpoints, before, strict=False)
            if checkpoint.name not in waiting
        }

    def _layers(self) -> pl.DataFrame:
        """All rows by step, modules in the order of the first checkpoint."""
        layers = pl.concat([pl.DataFrame(schema=schema(LAYER_COLUMNS)), *self._frames])
        order = {name: place for place, name in enumerate(layers["module"].unique(maintain_order=True))}
        epochs = {checkpoint.name: checkpoint.epoch for checkpoint in self._run.checkpoints}
        layers = layers.with_columns(
            pl.lit(self._run.name).alias("run"),
            pl.col("checkpoint").replace_strict(epochs, return_dtype=pl.Float64).alias("epoch"),  # may be known by now
        )
        layers = layers.cast(_SCHEMA)  # an empty mapping gives another type
        return layers.sort("step", pl.col("module").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)


def gone(run: Run, known: Measured | None) -> set[str]:
    """Checkpoints that `prune` deleted and that are not there again."""
    there = {checkpoint.name for checkpoint in (*run.checkpoints, *run.unplaced) if not checkpoint.pruned}
    return set(known.notes.pruned) - there if known else set()


def only_pruned(known: Measured | None) -> Measured | None:
    """What cannot be measured again: deleted checkpoints, and what is compared with them; None if all can be."""
    if known is None or not known.notes.pruned:
        return None
    marks = known.notes.measured
    lost = {marks[name][0] for name in known.notes.pruned if name in marks}
    measured = {name: (own, before, dtype) for name, (own, before, dtype) in marks.items() if lost & {own, before}}
    return replace(known, notes=replace(known.notes, measured=measured))


def with_pruned(run: Run, known: Measured | None) -> Run:
    """The run with the checkpoints that `prune` deleted, whose stored rows are reused like those of unchanged files.

    Only beside a file that is still the one that was measured: another training may have taken the folder since.
    """
    pruned = gone(run, known)
    if known is None or not pruned:
        return run
    folders = {run.path / Path(name).parts[0] for name in pruned}  # what is left there is no unfinished save
    run = replace(run, skipped=tuple(entry for entry in run.skipped if entry.path not in folders))
    if not any(known.notes.measured.get(c.name, ("",))[0] == c.fingerprint for c in run.checkpoints):
        return run
    taken = {checkpoint.step for checkpoint in run.checkpoints}
    rows = known.checkpoints.filter(pl.col("checkpoint").is_in(pruned) & ~pl.col("step").is_in(taken))
    lost = [
        Checkpoint(
            path=run.path / row["checkpoint"],
            name=row["checkpoint"],
            size=row["bytes"],
            pruned=True,
            **{
                name: row[name]
                for name in (
                    "step", "epoch", "learning_rate", "dose", "train_loss", "held_out_loss", "fingerprint", "modified",
                )
            },
        )
        for row in rows.iter_rows(named=True)
        if row["fingerprint"]
    ]  # fmt: skip
    return replace(run, checkpoints=tuple(sorted((*run.checkpoints, *lost), key=lambda c: c.step or 0)))


def checkpoint_table(run: Run, dtypes: dict[str, str], waiting: Collection[str] = ()) -> pl.DataFrame:
    """checkpoints.parquet: what the trainer left. What waits to be measured has no fingerprint yet."""
    rows = [
        {
            "run": run.name,
            "step": checkpoint.step,
            "epoch": checkpoint.epoch,
            "checkpoint": checkpoint.name,
            "learning_rate": checkpoint.learning_rate,
            "dose": checkpoint.dose,
            "train_loss": checkpoint.train_loss,
            "held_out_loss": checkpoint.held_out_loss,
            "train_samples": run.train_samples,
            "batch_size": run.batch_size,
            "steps_per_epoch": run.steps_per_epoch,
            "dtype": dtypes.get(checkpoint.name) or None,
            "bytes": checkpoint.size,
            "fingerprint": None if checkpoint.name in waiting else checkpoint.fingerprint,
            "modified": checkpoint.modified,
        }
        for checkpoint in run.checkpoints
    ]
    return pl.DataFrame(rows, schema=schema(CHECKPOINT_COLUMNS))
