"""OUT: one folder a run, with tables, verdict and plots, so that a later scan knows what was measured."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl

from lora_forensics.assess import Assessment, versions
from lora_forensics.errors import SeriesError, UsageError
from lora_forensics.probed import Probed
from lora_forensics.records import Run, RunNotes, Verdict
from lora_forensics.remote import RemotePath, fresh, identity
from lora_forensics.reports import to_json
from lora_forensics.series import (
    CHECKPOINT_COLUMNS,
    COURSE_COLUMNS,
    RUN_COLUMNS,
    RUN_MODULE_COLUMNS,
    SERIES_COLUMNS,
    Column,
    read_notes,
    read_table,
    schema,
    write_bytes,
    write_table,
    write_text,
)
from lora_forensics.similarity import AssessOptions
from lora_forensics.tables import LAYER_COLUMNS, Measured
from lora_forensics.values import read_object

_NOTES = "lora_forensics.run"
"""Key of a run's notes in the metadata of layers.parquet."""
_OWNER = "run.txt"
"""File in a run's folder that says which run it is of; written first, so that no other scan takes the name."""
PRUNED = "pruned.json"
"""File in a run's folder: what `prune` deleted of it."""
_KEY = "lora_forensics.assessment"
"""Key in the metadata of series.parquet: what the assessment was made from."""
_NAMES = "lora_forensics.names"
"""Key in the metadata of runs.parquet: runs by the names that a baseline knows them by."""
_PLOTS = tuple(f"{name}.{kind}" for name in ("similarity", "modules", "decomposition") for kind in ("png", "svg"))


def check_writable(out: Path) -> None:
    """Fail before hours of measuring, not after.

    Raises:
        UsageError: OUT is a file.
        SeriesError: it cannot be written.
    """
    if fresh(out).exists() and not out.is_dir():
        raise UsageError(f"{out} is a file, not a folder to write into", "choose another place with --out")
    probe = out / ".writable"
    try:
        write_text(probe, "")
    except SeriesError as error:
        raise SeriesError(error.message.replace(str(probe), str(out), 1), error.hint) from error
    probe.unlink(missing_ok=True)


def reserve(run: Run, out: Path, taken: set[str]) -> str:
    """A name for the run in OUT that no other run has, numbered if need be; the same at the next scan."""
    own = identity(run.path)
    number, name = 1, run.name
    while True:
        folder = out / name
        # OUT may hold the run itself: its folder is not ours to write into
        if name.lower() not in taken and identity(folder) != own and _owner(folder, own) == own:
            taken.add(name.lower())
            return name
        number += 1
        name = f"{run.name}-{number}"


def name_in(out: Path, run: Run) -> str | None:
    """The name that the last scan into OUT gave to a run, if it was found under another folder then."""
    try:
        rows = read_table(out / "runs.parquet").select("run", "path").iter_rows()
    except (SeriesError, pl.exceptions.PolarsError):
        return None
    tail, own = run.name.rpartition("/")[2], identity(run.path)
    return next((name for name, path in rows if path == own and name.rpartition("/")[2] == tail), None)


def load_measured(folder: Path) -> Measured | None:
    """What an earlier scan measured of a run; None if there is nothing usable."""
    try:
        notes = RunNotes.from_dict(json.loads(read_notes(folder / "layers.parquet")[_NOTES]))
        deleted = [name for name in pruned_names(folder) if not (Path(notes.path or "") / name).exists()]
        notes = replace(notes, pruned=tuple(sorted(deleted)))
        return Measured(read_table(folder / "layers.parquet"), read_table(folder / "checkpoints.parquet"), notes)
    except (SeriesError, KeyError, ValueError, TypeError):
        return None


def save_measured(folder: Path, measured: Measured) -> None:
    """Write the tables of the measuring half."""
    notes = {_NOTES: json.dumps(measured.notes.to_dict())}
    # rows last: their file says which checkpoints are measured, and a scan that dies in between measures again
    write_table(measured.checkpoints, folder / "checkpoints.parquet", CHECKPOINT_COLUMNS)
    write_table(measured.layers, folder / "layers.parquet", LAYER_COLUMNS, notes)


def assessment_key(measured: Measured, options: AssessOptions, probed: Probed) -> str:
    """Changes when an assessment would: the tables, the options, the last probe, the versions."""
    known = json.dumps([measured.notes.to_dict(), repr(options), versions(), probed.to_dict()])
    return hashlib.sha256(f"{known}|{measured.checkpoints.write_json()}".encode()).hexdigest()[:16]


def save_assessment(folder: Path, assessment: Assessment, plots: Mapping[str, bytes], key: str) -> None:
    """Write verdict, plots and series; the series last, for its key says that the rest is there."""
    means = [
        Column(f"mean_{c.name}", "Float64", f"mean over the modules that are averaged: {c.meaning}", c.unit)
        for c in LAYER_COLUMNS
        if f"mean_{c.name}" in assessment.series.columns
    ]
    for name in _PLOTS:
        if name in plots:
            write_bytes(folder / "plots" / name, plots[name])
        else:
            (folder / "plots" / name).unlink(missing_ok=True)  # of another verdict
    write_text(folder / "verdict.json", to_json(assessment.verdict.to_dict()))
    write_table(assessment.modules, folder / "modules.parquet", RUN_MODULE_COLUMNS)
    columns = (*SERIES_COLUMNS, *means, *COURSE_COLUMNS)
    write_table(assessment.series, folder / "series.parquet", columns, {_KEY: key})


def load_verdict(folder: Path, key: str, plots: bool) -> Verdict | None:
    """The verdict of an earlier scan, if it is the one that this key stands for and all that belongs to it is there."""
    if read_notes(folder / "series.parquet").get(_KEY) != key:
        return None
    if plots and not all((folder / "plots" / name).exists() for name in _PLOTS):
        return None
    return stored_verdict(folder)


def stored_verdict(folder: Path) -> Verdict | None:
    """The verdict of the last scan of a run; None if there is none that can be read."""
    try:
        return Verdict.from_dict(json.loads((folder / "verdict.json").read_text("utf-8")))
    except (OSError, ValueError, SeriesError):
        return None


def stored_name(out: Path, run: Run) -> str | None:
    """The name of a run in OUT, if an earlier scan stored it there."""
    named = name_in(out, run)
    if named is None and _same(read_text(out / run.name / _OWNER) or "", identity(run.path)):
        named = run.name
    return named


def pruned_names(folder: Path) -> frozenset[str]:
    """Checkpoints of a run that `prune` deleted, by its log; one whose deletion was begun may still be there."""
    states = ("deleting", "deleted")
    return frozenset(
        str(entry.get("checkpoint"))
        for entry in logged(folder)
        if entry.get("weights") and entry.get("state") in states
    )


def logged(folder: Path) -> list[dict[str, Any]]:
    """The files in the log of `prune`, each with what became of it."""
    entries = (read_object(folder / PRUNED) or {}).get("files")
    return [entry for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []


def save_runs(out: Path, verdicts: Iterable[Verdict], names: Mapping[str, str]) -> None:
    """Write runs.parquet; `names` are those of `Gate`."""
    table = pl.DataFrame([_row(verdict) for verdict in verdicts], schema=schema(RUN_COLUMNS))
    write_table(table, out / "runs.parquet", RUN_COLUMNS, {_NAMES: json.dumps(names)})


def load_names(out: Path) -> dict[str, str]:
    """The names that `save_runs` was given."""
    try:
        found = json.loads(read_notes(out / "runs.parquet").get(_NAMES, "{}"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _owner(folder: Path, own: str) -> str:
    """Which run a folder of OUT is of; `own` takes it if it is of none."""
    path = folder / _OWNER
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        if not isinstance(path, RemotePath):
            with path.open("x", encoding="utf-8", errors="surrogateescape") as file:
                file.write(own)
        elif not path.exists():
            write_text(path, own)
    found = read_text(path)
    return (
        own if found is None or _same(found, own) else found
    )  # where nothing can be written the error comes with the first table


def _same(one: str, two: str) -> bool:
    """Whether two paths are the same bytes: a process without UTF-8 spells them in another way."""
    first, second = (text.encode("utf-8", "surrogateescape") for text in (one, two))
    return first == second


def read_text(path: Path) -> str | None:
    """A small text file of OUT; None if it cannot be read."""
    try:
        return path.read_text("utf-8", "surrogateescape")
    except OSError:
        return None


def _row(verdict: Verdict) -> Mapping[str, Any]:
    keep, turning = verdict.keep, verdict.turning_point
    return {
        "run": verdict.run,
        "path": verdict.path and verdict.path.encode("utf-8", "backslashreplace").decode(),
        "trainer": verdict.trainer,
        "adapter": verdict.adapter,
        "status": verdict.status,
        "checkpoints": verdict.checkpoints,
        "keep": keep.checkpoint if keep else None,
        "keep_step": keep.step if keep else None,
        "rests_on": keep.rests_on if keep else None,
        "turning_point_step": turning.step if turning else None,
        "last_is_past_turning_point": verdict.last_is_past_turning_point,
        "window": verdict.window,
        "detector": verdict.detector,
        "similarity": verdict.similarity,
        "base_model": verdict.base_model.path and verdict.base_model.path.encode("utf-8", "backslashreplace").decode(),
    }
