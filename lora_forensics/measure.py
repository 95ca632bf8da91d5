"""Composer of the measuring half: a run and its base model to layers.parquet and checkpoints.parquet.

Only what is new is measured: rows of a checkpoint are reused while its file, its predecessor's file and the base model
are unchanged. Torch is imported when there is something to measure, and not before.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forensics.adapters import KINDS
from lora_forensics.analyses import ANALYSES
from lora_forensics.base_model import BaseModel, check_hash, find_base
from lora_forensics.engines import ENGINES, Engine, EngineSettings
from lora_forensics.errors import BaseModelError, LoraForensicsError, UsageError
from lora_forensics.inspection.metadata import settings
from lora_forensics.records import SCHEMA, BaseModelSummary, Finding, Run, RunNotes
from lora_forensics.remote import listed, place
from lora_forensics.tables import LAYER_COLUMNS, Measured, Tables, gone
from lora_forensics.tensors import PICKLES, open_tensors
from lora_forensics.values import read_object

if TYPE_CHECKING:
    from lora_forensics.estimate import Estimate
    from lora_forensics.units import Unit, UnitResult

DEFAULT_MEMORY = 1 << 30
"""Bytes of checkpoints that a worker works on at once."""

_NUMBERS = 2
"""Raised when a column comes to mean something else: tables of before are measured again, or findings would lack."""
_SMALLEST_BLOCK, _LARGEST_BLOCK = 64 << 20, 8 << 30
"""Bytes of checkpoints below which a run is not cut for more workers, since each block reads the base again; and above
which it is cut for one, so that a scan that is killed loses minutes at most."""
_TOGETHER = 50
"""So many checkpoints make the products wide enough; more of them only take memory (docs/performance.md)."""
_LARGE = 256 << 20
"""Bytes of checkpoints from which on it is told how long a run will take."""

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?|mps")


class Progress:
    """Told what is going on; this one says nothing."""

    def begin(self, run: str, checkpoints: int) -> None:
        """So many checkpoints of a run will be measured."""

    def advance(self, checkpoints: float) -> None:
        """So many more are done."""

    def expect(self, run: str, estimate: Callable[[], Estimate]) -> None:
        """A run of some size begins; the estimate takes a moment to make."""


@dataclass(frozen=True, slots=True)
class MeasureOptions:
    """How to measure; what is measured does not depend on it."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps."""
    memory: int = DEFAULT_MEMORY
    """Bytes of checkpoints that each worker may hold at once."""
    engine: str = "serial"
    """A name in `engines.ENGINES`."""
    workers: int | None = None
    """Units of work that run at once, where the engine has several workers."""
    ray_address: str | None = None
    """The Ray cluster to work on; None starts one on this machine."""
    download: bool = False
    """The base model may be fetched from the Hugging Face hub."""
    search_root: Path | None = None
    """The folder that the run was found under; bounds the search for its base."""
    spectra: bool = False
    """All singular values of every change, also of those that a dense decomposition is needed for."""
    analyses: tuple[str, ...] = ()
    """Names in `analyses.ANALYSES`."""
    cache: Path | None = None
    """A folder for decompositions of base weights, which only some analyses need."""
    progress: Progress = field(default_factory=Progress)

    def __post_init__(self) -> None:
        """Refuse what cannot be meant.

        Raises:
            UsageError: an unknown engine, device or analysis.
        """
        for name in self.analyses:
            if name not in ANALYSES:
                raise UsageError(f"no analysis is called {name!r}", f"choose from {', '.join(ANALYSES)}")
        if self.engine not in ENGINES:
            raise UsageError(f"no engine is called {self.engine!r}", f"choose from {', '.join(ENGINES)}")
        if not _DEVICE.fullmatch(self.device):
            raise UsageError(f"no device is called {self.device!r}", "use --device cpu, or auto, cuda, cuda:N, mps")

    def start(self) -> Engine:
        """The engine; workers start with the first unit of work."""
        return ENGINES[self.engine](EngineSettings(self.workers, self.ray_address, self.device, self.progress.advance))


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
    with options.start() as engine:
        job = Measuring(run, base, options, known=known, blocks=engine.workers)
        for unit, found in engine.map(measure_one, job.take()):
            if isinstance(found, LoraForensicsError):
                raise found
            job.add(unit, found)
    return job.result()


class Measuring:
    """One run on its way: units of work go out, their results come back in any order, tables come out at any time."""

    def __init__(
        self,
        run: Run,
        base: str | Path | Sequence[str | Path] | None,
        options: MeasureOptions,
        *,
        known: Measured | None = None,
        blocks: int = 1,
    ) -> None:
        """As `measure_run`; about so many `blocks` are made of a run that is large enough.

        Raises:
            BaseModelError: as `measure_run`.
            UsageError: as `measure_run`.
        """
        if not isinstance(run, Run):
            raise UsageError(f"{run} is no run", "discover_runs also yields Skipped: measure only what is a Run")
        self._run = run
        self._frozen, self._problem = _find_base(run, base, known, options)
        # a base that was there and is gone for now (another disk or folder) must not cost what was measured with it
        lost = self._frozen is None and known is not None and known.notes.base.matched
        self._away = known.notes if known and lost else None
        self._options = options = _as_measured(run, self._frozen, options, known)
        self._measured_with = self._away.measured_with if self._away else _key(run, self._frozen, options)
        reusable = known if known and known.notes.measured_with == self._measured_with else None
        self._pruned = gone(run, known)
        if reusable is None:  # no file is left to measure against what is new
            run = self._run = replace(run, checkpoints=tuple(c for c in run.checkpoints if not c.pruned))
        self._fresh = unmeasured(run, reusable)
        self._settings = reusable.notes.settings if reusable and not self._fresh else _settings(run)
        names = [run.checkpoints[index].name for index in self._fresh]
        self._tables = Tables(run, reusable, set(names))
        self._waiting = dict.fromkeys(names)
        self._units: list[Unit] = []
        self._early: dict[int, UnitResult] = {}
        """Results by the place of their unit, while one before it is still out."""
        self._added = 0
        if not self._away:
            sizes = [checkpoint.size for checkpoint in run.checkpoints]
            limit = min(_LARGEST_BLOCK, max(_SMALLEST_BLOCK, -(-sum(sizes) // blocks)))
            self._units = [self._unit(*span) for span in _spans(self._fresh, sizes, limit)]

    @property
    def done(self) -> bool:
        """Whether nothing is out."""
        return self._added == len(self._units)

    def take(self) -> Iterator[Unit]:
        """The units of work, in order."""
        if self._units:
            self._options.progress.begin(self._run.name, len(self._fresh))
            if sum(self._run.checkpoints[index].size for index in self._fresh) > _LARGE:
                self._options.progress.expect(self._run.name, self._estimate)
        yield from self._units

    def _estimate(self) -> Estimate:
        from lora_forensics.estimate import estimate

        options = self._options
        device = "cpu" if options.engine == "ray" else resolve_device(options.device)  # the cluster's are not known
        checkpoints = [self._run.checkpoints[index] for index in self._fresh]
        return estimate(checkpoints, _TOGETHER, options.memory, device, base=self._frozen is not None)

    def add(self, unit: Unit, result: UnitResult) -> None:
        """Take in the result of a unit; rows stand in the order of the units, whenever they come."""
        place = next(place for place, one in enumerate(self._units) if one is unit)
        self._early[place] = result
        while self._added in self._early:
            found, taken = self._early.pop(self._added), self._units[self._added]
            self._tables.add(found.rows, found.dtypes, found.skipped, found.notices)
            for checkpoint in taken.checkpoints[taken.lead :]:
                self._waiting.pop(checkpoint.name)
            self._added += 1

    def result(self) -> Measured:
        """The tables as far as they are known: all of them once it is `done`."""
        run, away, frozen = self._run, self._away, self._frozen
        found = tuple(str(path.resolve()) for path in frozen.paths) if frozen else ()
        notes = RunNotes(
            path=run.path.resolve().as_posix(),
            trainer=run.trainer,
            step_unit=run.step_unit,
            save_more_often=run.save_more_often,
            base=BaseModelSummary(away.base.path if away else frozen.path if frozen else None, 0, 0),
            base_files=away.base_files if away else found,
            base_problem="" if away else self._problem,
            measured_with=self._measured_with,
            pruned=tuple(sorted(self._pruned)),
            settings=self._settings,
        )
        # a base is read through for its hash when all is measured; the finding is kept with the rows
        extra = [check_hash(frozen, run.base)] if frozen and self._fresh and self.done else []
        if away and self._waiting:
            message = f"{len(self._waiting)} new checkpoints wait for the base model, which is not found any more"
            extra.append(Finding("base-missing", "warning", message, self._problem))
        return self._tables.result(notes, [finding for finding in extra if finding], self._waiting)

    def _unit(self, start: int, stop: int, lead: bool) -> Unit:
        from lora_forensics.units import Unit

        run, frozen, options = self._run, self._frozen, self._options
        paths, fingerprint = (tuple(frozen.paths), frozen.fingerprint) if frozen else ((), "")
        if lead and run.checkpoints[start].pruned:
            start, lead = start + 1, False
        origin = not run.checkpoints[0].pruned
        first = run.checkpoints[:1] if start and origin else ()  # movement is also told from there
        return Unit(
            run.name,
            (*first, *run.checkpoints[start:stop]),
            len(first) + lead,
            paths,
            fingerprint,
            options.device,
            options.memory,
            origin=origin,
            spectra=options.spectra,
            analyses=options.analyses,
            cache=options.cache,
        )


def measure_one(unit: Unit, advance: Callable[[float], None]) -> UnitResult:
    """Measure a unit wherever this is called, on a device of that machine."""
    from lora_forensics.units import measure_unit

    return measure_unit(replace(unit, device=resolve_device(unit.device)), advance)


def unmeasured(run: Run, known: Measured | None) -> list[int]:
    """Indices of the checkpoints whose stored rows are missing or out of date.

    Rotation and step size look back one checkpoint, so that a new file also renews the one behind it.
    """
    stored = known.notes.measured if known is not None else {}
    before = ["", *(checkpoint.fingerprint for checkpoint in run.checkpoints)]
    return [
        index
        for index, checkpoint in enumerate(run.checkpoints)
        if not checkpoint.pruned and stored.get(checkpoint.name, ())[:2] != (checkpoint.fingerprint, before[index])
    ]


def _settings(run: Run) -> dict[str, str]:
    """What the last file that is there says of the training, by its header and adapter_config.json alone."""
    last = next((checkpoint for checkpoint in reversed(run.checkpoints) if not checkpoint.pruned), None)
    if last is None or last.path.suffix in PICKLES:
        return {}
    try:
        metadata = open_tensors(last.path).metadata
    except LoraForensicsError:  # told where it is measured
        return {}
    return settings(metadata, read_object(last.config) or {} if last.config else {})


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
    given = tuple(dict.fromkeys(listed(place(path)) for path in named))
    try:
        return find_base(run.base, run.path, options.search_root, given, options.download), ""
    except BaseModelError as error:
        if given:
            raise
        before = [place(path) for path in known.notes.base_files] if known else []
        if before and all(path.exists() for path in before):
            return find_base(run.base, run.path, options.search_root, before), ""
        return None, f"{error.message}. {error.hint}" if error.hint else error.message


def _as_measured(run: Run, frozen: BaseModel | None, options: MeasureOptions, known: Measured | None) -> MeasureOptions:
    """The options with the analyses that the known rows have, if those are all that are asked for and more."""
    for chosen in product((True, False), repeat=len(ANALYSES)):
        names = tuple(name for name, used in zip(ANALYSES, chosen, strict=True) if used)
        wider = replace(options, analyses=names)
        if set(options.analyses) <= set(names) and known and known.notes.measured_with == _key(run, frozen, wider):
            return wider
    return replace(options, analyses=tuple(name for name in ANALYSES if name in options.analyses))


def _key(run: Run, frozen: BaseModel | None, options: MeasureOptions) -> str:
    first = run.checkpoints[0].fingerprint if run.checkpoints else ""
    columns = ",".join(column.name for column in LAYER_COLUMNS)
    base = frozen.fingerprint if frozen else ""
    text = f"{SCHEMA}|{_NUMBERS}|{columns}|{','.join(KINDS)}|{base}|{first}{'|spectra' if options.spectra else ''}"
    text += "".join(f"|{name}" for name in options.analyses)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _spans(indices: list[int], sizes: list[int], limit: int) -> Iterator[tuple[int, int, bool]]:
    """Stretches [start, stop) of neighbouring indices below a limit of bytes, and whether the first is a predecessor.

    A scan that goes on where another was killed cuts as that one did, so that its numbers are the same to the last bit.
    """
    stretch: list[int] = []
    held = 0
    for index in indices:
        full = len(stretch) == _TOGETHER or held + sizes[index] > limit
        if stretch and (full or index != stretch[-1] + 1):
            yield _with_lead(stretch)
            stretch = []
        if not stretch:
            held = sizes[index - 1] if index else 0
        stretch.append(index)
        held += sizes[index]
    if stretch:
        yield _with_lead(stretch)


def _with_lead(stretch: list[int]) -> tuple[int, int, bool]:
    first = stretch[0]
    return max(first - 1, 0), stretch[-1] + 1, first > 0
