"""Composer of the measuring half: a run and its base model to layers.parquet and checkpoints.parquet.

Only what is new is measured: rows of a checkpoint are reused while its file, its predecessor's file and the base model
are unchanged. Torch is imported when there is something to measure, and not before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from lora_forensics.adapters import KINDS
from lora_forensics.base_model import BaseModel, check_hash, find_base
from lora_forensics.engines import ENGINES
from lora_forensics.errors import BaseModelError, UsageError
from lora_forensics.records import SCHEMA, BaseModelSummary, Finding, Run, RunNotes
from lora_forensics.tables import LAYER_COLUMNS, Measured, Tables

DEFAULT_MEMORY = 1 << 30
"""Bytes of checkpoints that are held at once."""
_TOGETHER = 50
"""So many checkpoints make the products wide enough; more of them only take memory (docs/performance.md)."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


class Progress:
    """Told what is going on; this one says nothing."""

    def begin(self, run: str, checkpoints: int) -> None:
        """So many checkpoints of a run will be measured."""

    def advance(self, checkpoints: float) -> None:
        """So many more are done."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How to measure; what is measured does not depend on it."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    memory: int = DEFAULT_MEMORY
    """Bytes of checkpoints that may be held at once."""
    engine: str = "serial"
    """A name in `engines.ENGINES`."""
    download: bool = False
    """The base model may be fetched from the Hugging Face hub."""
    search_root: Path | None = None
    """The folder that the run was found under; bounds the search for its base."""
    spectra: bool = False
    """All singular values of every change, also of those that a dense decomposition is needed for."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: an unknown engine or device.
        """
        if self.engine not in ENGINES:
            raise UsageError(f"no engine is called {self.engine!r}", f"choose from {', '.join(ENGINES)}")
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"no device is called {self.device!r}", "use --device cpu, or auto, cuda, cuda:N, mps")


def measure_run(
    run: Run,
    base: str | Path | Sequence[str | Path] | None = None,
    device: str = "auto",
    *,
    known: Measured | None = None,
    options: MeasureOptions | None = None,
) -> Measured:
    """Measure the checkpoints of a run, or those that are not `known` yet.

    Args:
        run: from `discover_runs`.
        base: the frozen model's file or folder, or several; None looks where the run itself says.
        device: auto, cpu, cuda, cuda:N or mps.
        known: an earlier result for this run; rows of unchanged checkpoints are reused.
        options: further settings; `device` of theirs is overruled by the argument.

    Raises:
        BaseModelError: `base` was given and cannot be used. A base that was only looked for and is missing is told in
            the notes; what needs none is measured all the same.
        UsageError: the device does not exist, or `run` is no run.
    """
    if not isinstance(run, Run):
        raise UsageError(f"{run} is no run", "discover_runs also yields Skipped: measure only what is a Run")
    options = replace(options or MeasureOptions(), device=device)
    frozen, problem = _find_base(run, base, known, options)
    found = tuple(str(path.resolve()) for path in frozen.paths) if frozen else ()
    # a base that was there and is gone for now (another disk, another folder) must not cost what was measured with it
    away = known if frozen is None and known is not None and known.notes.base.matched else None
    measured_with = away.notes.measured_with if away else _key(frozen, options)
    reusable = known if known and known.notes.measured_with == measured_with else None
    fresh = unmeasured(run, reusable)
    waiting = {run.checkpoints[index].name for index in fresh} if away else set()
    tables = Tables(run, reusable, {run.checkpoints[index].name for index in fresh})
    if fresh and not away:
        _measure(run, fresh, frozen, options, tables)
    notes = RunNotes(
        path=run.path.resolve().as_posix(),
        trainer=run.trainer,
        step_unit=run.step_unit,
        save_more_often=run.save_more_often,
        base=BaseModelSummary(away.notes.base.path if away else frozen.path if frozen else None, 0, 0),
        base_files=away.notes.base_files if away else found,
        base_problem="" if away else problem,
        measured_with=measured_with,
    )
    # a base is read through for its hash when something is measured; the finding is kept with the rows
    extra = [check_hash(frozen, run.base)] if frozen and fresh else []
    if waiting:
        message = f"{len(waiting)} new checkpoints wait for the base model, which is not found any more"
        extra.append(Finding("base-missing", "warning", message, problem))
    return tables.result(notes, [finding for finding in extra if finding], waiting)


def _measure(run: Run, indices: list[int], frozen: BaseModel | None, options: MeasureOptions, tables: Tables) -> None:
    """Measure these checkpoints, in units that fit the memory."""
    from lora_forensics.units import Unit, measure_unit

    device = resolve_device(options.device)
    paths, fingerprint = (tuple(frozen.paths), frozen.fingerprint) if frozen else ((), "")
    units = [
        Unit(run.name, run.checkpoints[start:stop], lead, paths, fingerprint, device, spectra=options.spectra)
        for start, stop, lead in _spans(indices, [c.size for c in run.checkpoints], options.memory)
    ]
    options.progress.begin(run.name, len(indices))
    work = partial(measure_unit, advance=options.progress.advance)
    for result in ENGINES[options.engine]().map(work, units):
        tables.add(result.rows, result.dtypes, result.skipped, result.notices)


def unmeasured(run: Run, known: Measured | None) -> list[int]:
    """Indices of the checkpoints whose stored rows are missing or out of date.

    Rotation and step size look back one checkpoint, so that a new file also renews the one behind it.
    """
    stored: dict[str, tuple[str, str]] = {}
    if known is not None:
        names, prints = known.checkpoints["checkpoint"].to_list(), known.checkpoints["fingerprint"].to_list()
        stored = {name: (print_, before) for name, print_, before in zip(names, prints, ["", *prints], strict=False)}
    fingerprints = ["", *(checkpoint.fingerprint for checkpoint in run.checkpoints)]
    return [
        index
        for index, checkpoint in enumerate(run.checkpoints)
        if stored.get(checkpoint.name) != (checkpoint.fingerprint, fingerprints[index])
    ]


def resolve_device(name: str) -> str:
    """The torch device to use; `auto` takes CUDA, then MPS, then the CPU.

    Raises:
        UsageError: no such device here.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UsageError(f"device {name!r} cannot be used here: {reason}", "use --device cpu, or auto") from error
    return name


def _find_base(
    run: Run, base: str | Path | Sequence[str | Path] | None, known: Measured | None, options: MeasureOptions
) -> tuple[BaseModel | None, str]:
    """The base model, or why there is none; where it was the last time counts as a place to look."""
    named = [] if base is None else [base] if isinstance(base, str | Path) else base
    given = tuple(dict.fromkeys(Path(path) for path in named))
    try:
        return find_base(run.base, run.path, options.search_root, given, options.download), ""
    except BaseModelError as error:
        if given:
            raise
        before = [Path(path) for path in known.notes.base_files] if known else []
        if before and all(path.exists() for path in before):
            return find_base(run.base, run.path, options.search_root, before), ""
        return None, f"{error.message}. {error.hint}" if error.hint else error.message


def _key(frozen: BaseModel | None, options: MeasureOptions) -> str:
    columns = ",".join(column.name for column in LAYER_COLUMNS)
    base = frozen.fingerprint if frozen else ""
    text = f"{SCHEMA}|{columns}|{','.join(KINDS)}|{base}{'|spectra' if options.spectra else ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spans(indices: list[int], sizes: list[int], memory: int) -> Iterable[tuple[int, int, bool]]:
    """Stretches [start, stop) of neighbouring indices that fit the memory, and whether the first is a predecessor."""
    stretch: list[int] = []
    held = 0
    for index in indices:
        full = len(stretch) == _TOGETHER or held + sizes[index] > memory
        if stretch and (full or index != stretch[-1] + 1):
            yield _with_lead(stretch)
            stretch, held = [], sizes[index - 1]
        stretch.append(index)
        held += sizes[index]
    if stretch:
        yield _with_lead(stretch)


def _with_lead(stretch: list[int]) -> tuple[int, int, bool]:
    first = stretch[0]
    return max(first - 1, 0), stretch[-1] + 1, first > 0
