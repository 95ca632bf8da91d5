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

import polars as pl

from lora_forensics.base_model import BaseModel, check_hash, find_base
from lora_forensics.engines import ENGINES
from lora_forensics.errors import BaseModelError, UsageError
from lora_forensics.metrics import METRICS
from lora_forensics.records import SCHEMA, BaseModelSummary, Finding, Run, RunNotes, Skipped, Unresolved
from lora_forensics.series import CHECKPOINT_COLUMNS, MODULE_COLUMNS, schema

LAYER_COLUMNS = (*MODULE_COLUMNS, *(metric.column for metric in METRICS))
"""Columns of layers.parquet."""

DEFAULT_MEMORY = 1 << 30
"""Bytes of checkpoints that are held at once."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")
_SVD_INITIALISED = {"pissa", "olora", "corda", "loftq", "eva", "mica"}
_LISTED = 5
"""Names that a message lists before it says how many more there are."""


class Progress:
    """Told what is going on; this one says nothing."""

    def begin(self, run: str, checkpoints: int) -> None:
        """So many checkpoints of a run will be measured."""

    def advance(self, checkpoints: float) -> None:
        """So many more are done."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The two tables of a run, and what they do not hold."""

    layers: pl.DataFrame
    checkpoints: pl.DataFrame
    notes: RunNotes
    new: int = 0
    """Checkpoints that were measured now; the others were known."""


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
    measured_with = _key(frozen)
    reusable = known if known and known.notes.measured_with == measured_with else None
    fresh = unmeasured(run, reusable)
    notes = RunNotes(
        path=run.path.resolve().as_posix(),
        trainer=run.trainer,
        step_unit=run.step_unit,
        save_more_often=run.save_more_often,
        base=BaseModelSummary(frozen.path if frozen else None, 0, 0),
        base_problem=problem,
        measured_with=measured_with,
    )
    tables = _Tables(run, reusable, {run.checkpoints[index].name for index in fresh})
    if fresh:
        tables.measure(fresh, frozen, options)
    return tables.result(notes, frozen, len(fresh))


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


class _Tables:
    """The tables of one run while they are put together from stored and new rows."""

    def __init__(self, run: Run, known: Measured | None, fresh: set[str]) -> None:
        self._run = run
        current = [checkpoint.name for checkpoint in run.checkpoints if checkpoint.name not in fresh]
        self._frames: list[pl.DataFrame] = []
        self._dtypes: dict[str, str] = {}
        self._skipped: list[Skipped] = []
        self._kept: tuple[Finding, ...] = ()
        self._unresolved: dict[str, Unresolved] = {}
        self._unread: dict[str, Unresolved] = {}
        self._scale_unknown: set[str] = set()
        self._initialisations: set[str] = set()
        self._problem = ""
        self._unread_before = 0
        if known is not None and current:
            self._frames.append(known.layers.filter(pl.col("checkpoint").is_in(current)))
            self._dtypes.update(zip(known.checkpoints["checkpoint"], known.checkpoints["dtype"], strict=True))
            self._kept = tuple(finding for finding in known.notes.findings if finding.rule in _MEASURING_RULES)
            self._skipped = [
                replace(skipped, path=checkpoint.path)  # a later scan may name the folder in another way
                for checkpoint in run.checkpoints
                for skipped in known.notes.skipped
                if checkpoint.name in current and skipped.path.as_posix().endswith(checkpoint.name)
            ]
            self._problem = known.notes.base_problem
            self._unread_before = known.notes.base.total - known.layers["module"].n_unique()

    def measure(self, indices: list[int], frozen: BaseModel | None, options: MeasureOptions) -> None:
        """Measure these checkpoints, in units that fit the memory."""
        from lora_forensics.units import Unit, measure_unit

        device = resolve_device(options.device)
        paths = tuple(frozen.paths) if frozen else ()
        units = [
            Unit(self._run.name, self._run.checkpoints[start:stop], lead, paths, device)
            for start, stop, lead in _spans(indices, [c.size for c in self._run.checkpoints], options.memory)
        ]
        options.progress.begin(self._run.name, len(indices))
        work = partial(measure_unit, advance=options.progress.advance)
        for result in ENGINES[options.engine]().map(work, units):
            self._frames.append(pl.DataFrame(result.rows, schema=schema(LAYER_COLUMNS)))
            self._dtypes.update(result.dtypes)
            self._skipped.extend(skipped for skipped in result.skipped if skipped not in self._skipped)
            self._unresolved.update(result.unresolved)
            self._unread.update(result.unread)
            self._scale_unknown |= result.scale_unknown
            self._initialisations |= result.initialisations

    def result(self, notes: RunNotes, frozen: BaseModel | None, new: int) -> Measured:
        """Both tables, in order, and the findings of all that was measured."""
        empty = pl.DataFrame(schema=schema(LAYER_COLUMNS))
        layers = pl.concat([empty, *self._frames])
        order = {name: place for place, name in enumerate(layers["module"].unique(maintain_order=True))}
        epochs = {checkpoint.name: checkpoint.epoch for checkpoint in self._run.checkpoints}
        layers = layers.with_columns(
            pl.lit(self._run.name).alias("run"),
            pl.col("checkpoint").replace_strict(epochs, return_dtype=pl.Float64).alias("epoch"),  # may be known by now
        )
        layers = layers.sort("step", pl.col("module").replace_strict(order, return_dtype=pl.Int64), maintain_order=True)
        modules = layers.select("module", "tensor").unique("module")
        unread = len(self._unread) if new else self._unread_before
        base = BaseModelSummary(notes.base.path, modules["tensor"].count(), len(modules) + unread)
        if frozen and not base.matched and base.total:
            reason = next((entry.reason for entry in self._unresolved.values()), "")
            misfit = f"{frozen.path} does not fit this adapter: none of its {base.total} modules is in it ({reason})"
            notes = replace(notes, base_problem=misfit if reason else self._problem)
        return Measured(
            layers,
            checkpoint_table(self._run, self._dtypes),
            replace(
                notes,
                base=base,
                findings=(*self._run.findings, *self._findings(frozen)),
                skipped=(*self._run.skipped, *self._skipped),
            ),
            new,
        )

    def _findings(self, frozen: BaseModel | None) -> tuple[Finding, ...]:
        found = [check_hash(frozen, self._run.base)] if frozen else []
        if frozen and self._unresolved:
            names, reasons = _some(self._unresolved), {entry.reason for entry in self._unresolved.values()}
            found.append(
                Finding(
                    "module-unresolved",
                    "warning",
                    f"{len(self._unresolved)} modules have no weight in the base model and no cosine: {names}",
                    next(iter(reasons)),
                )
            )
        if self._unread:
            reason = next(iter(self._unread.values())).reason
            found.append(
                Finding(
                    "module-unread",
                    "warning",
                    f"{len(self._unread)} modules of a kind that is not read are left out: {_some(self._unread)}",
                    reason,
                )
            )
        if self._scale_unknown:
            found.append(
                Finding(
                    "scale-unknown",
                    "warning",
                    f"no file tells the scale (alpha) of {len(self._scale_unknown)} modules: their norms assume 1",
                    "cosines do not depend on it; keep adapter_config.json beside the weights",
                )
            )
        svd = sorted(self._initialisations & _SVD_INITIALISED) or [
            name for name in self._initialisations if name.startswith("pissa_niter")
        ]
        if svd:
            found.append(
                Finding(
                    "svd-initialised",
                    "warning",
                    f"the adapter starts from {', '.join(svd)}: B @ A is not the change of the stock base weight",
                    "read the cosines with care: the turning point of the method is not defined for it",
                )
            )
        fresh = [finding for finding in found if finding is not None]
        return (*fresh, *(finding for finding in self._kept if finding.rule not in {f.rule for f in fresh}))


_MEASURING_RULES = {"base-hash-differs", "module-unresolved", "module-unread", "scale-unknown", "svd-initialised"}


def checkpoint_table(run: Run, dtypes: dict[str, str]) -> pl.DataFrame:
    """checkpoints.parquet: what the trainer left."""
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
            "dtype": dtypes.get(checkpoint.name),
            "bytes": checkpoint.size,
            "fingerprint": checkpoint.fingerprint,
            "modified": checkpoint.modified,
        }
        for checkpoint in run.checkpoints
    ]
    return pl.DataFrame(rows, schema=schema(CHECKPOINT_COLUMNS))


def _find_base(
    run: Run, base: str | Path | Sequence[str | Path] | None, known: Measured | None, options: MeasureOptions
) -> tuple[BaseModel | None, str]:
    """The base model, or why there is none; where it was the last time counts as a place to look."""
    given = () if base is None else tuple(Path(b) for b in ([base] if isinstance(base, str | Path) else base))
    try:
        return find_base(run.base, run.path, options.search_root, given, options.download), ""
    except BaseModelError as error:
        if given:
            raise
        before = [Path(path) for path in known.notes.base.path.split(" + ")] if known and known.notes.base.path else []
        if before and all(path.exists() for path in before):
            return find_base(run.base, run.path, options.search_root, before), ""
        return None, f"{error.message}. {error.hint}" if error.hint else error.message


def _key(frozen: BaseModel | None) -> str:
    columns = ",".join(column.name for column in LAYER_COLUMNS)
    text = f"{SCHEMA}|{columns}|{frozen.fingerprint if frozen else ''}"
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spans(indices: list[int], sizes: list[int], memory: int) -> Iterable[tuple[int, int, bool]]:
    """Stretches [start, stop) of neighbouring indices that fit the memory, and whether the first is a predecessor."""
    stretch: list[int] = []
    held = 0
    for index in indices:
        if stretch and (index != stretch[-1] + 1 or held + sizes[index] > memory):
            yield _with_lead(stretch)
            stretch, held = [], sizes[index - 1]
        stretch.append(index)
        held += sizes[index]
    if stretch:
        yield _with_lead(stretch)


def _with_lead(stretch: list[int]) -> tuple[int, int, bool]:
    first = stretch[0]
    return max(first - 1, 0), stretch[-1] + 1, first > 0


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _LISTED} more" if len(listed) > _LISTED else ""
    return ", ".join(listed[:_LISTED]) + more
