"""Many runs through one engine: what is new is measured and stored as it comes, then each run is assessed.

Units of work and assessments are tasks of the engine; tables are written here, so that workers need not see OUT.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forensics.assess import Assessment, assess
from lora_forensics.errors import BaseModelError, LoraForensicsError, UsageError
from lora_forensics.measure import MeasureOptions, Measuring, measure_one
from lora_forensics.plots import draw_plots
from lora_forensics.probed import Probed, load_probed
from lora_forensics.records import Gate, Run, Verdict
from lora_forensics.remote import RemotePath
from lora_forensics.selection import Selection
from lora_forensics.similarity import AssessOptions
from lora_forensics.store import assessment_key, load_measured, load_verdict, save_assessment, save_measured
from lora_forensics.tables import Measured, only_pruned, with_pruned

if TYPE_CHECKING:
    from lora_forensics.units import Unit, UnitResult

_STORING = 0.05
"""Share of the time that storing a run's first blocks may take while the rest of it is measured."""

_DECOMPOSITIONS = ".decompositions"
"""Folder in OUT of what analyses made of base weights: may be deleted, and is made again."""


@dataclass(frozen=True, slots=True)
class ScanOptions:
    """All settings of a scan."""

    out: Path = Path("forensics")
    base: tuple[Path, ...] = ()
    trainer: str | None = None
    rescan: bool = False
    """Measure everything again."""
    reports: tuple[str, ...] = ("markdown", "json")
    """Names in `reports.REPORTS` that are written to OUT."""
    plots: bool = True
    """Draw each run's figures: most of the time that a small run takes. `report` draws them later."""
    redact: bool = False
    """Also write the reports without paths and names, to OUT/redacted."""
    gate: Gate = field(default_factory=Gate)
    measure: MeasureOptions = field(default_factory=MeasureOptions)
    assess: AssessOptions = field(default_factory=AssessOptions)
    selection: Selection = field(default_factory=Selection)
    """Which findings reports and exit codes tell of; what is stored of a run holds all."""


@dataclass(frozen=True, slots=True)
class Scanned:
    """What a scan has to say of one run."""

    verdict: Verdict
    new: int
    """Checkpoints that were measured now."""
    known: int
    """Checkpoints that had been measured before."""
    empty: bool
    """No checkpoint could be measured."""


@dataclass(frozen=True, slots=True)
class _Measure:
    """A task: one unit of work of a run."""

    place: int
    unit: Unit

    @property
    def anywhere(self) -> bool:
        """Whether it reads nothing but URLs, so that the machine does not matter."""
        paths = (*self.unit.base, *(checkpoint.path for checkpoint in self.unit.checkpoints))
        return all(isinstance(path, RemotePath) for path in paths)

    def run(self, advance: Any) -> UnitResult:
        return measure_one(self.unit, advance)


@dataclass(frozen=True, slots=True)
class _Assess:
    """A task: verdict and plots of a run."""

    place: int
    measured: Measured
    options: AssessOptions
    probed: Probed
    plots: bool
    anywhere = True
    """It reads no files."""

    def run(self, _advance: Any) -> tuple[Assessment, dict[str, bytes]]:
        layers, checkpoints = self.measured.layers, self.measured.checkpoints
        found = assess(layers, checkpoints, self.measured.notes, self.options, self.probed)
        return found, draw_plots(found.series, layers, checkpoints, found.verdict) if self.plots else {}


def _work(task: Any, advance: Any) -> Any:
    return task.run(advance)


def scan_runs(runs: Sequence[tuple[Run, Path]], options: ScanOptions) -> list[Scanned | LoraForensicsError]:
    """Measure, store and assess runs, each with the folder it was found under; of each its result or what failed.

    Raises:
        SeriesError: OUT cannot be written.
        UsageError: the engine cannot be had.
    """
    with options.measure.start() as engine:
        scan = _Scan(runs, options, -(-engine.workers // len(runs)))
        tasks = scan.tasks()
        while True:
            for task, found in engine.map(_work, tasks):
                scan.take(task, found)
            if not scan.ready:
                return [scan.results[place] for place in range(len(runs))]
            tasks = scan.assessments()


class _Scan:
    """Where every run stands."""

    def __init__(self, runs: Sequence[tuple[Run, Path]], options: ScanOptions, blocks: int) -> None:
        self.results: dict[int, Scanned | LoraForensicsError] = {}
        self.ready: deque[_Assess] = deque()
        self._runs = runs
        self._options = options
        self._blocks = blocks
        self._jobs: dict[int, tuple[Measuring, Measured | None]] = {}
        self._storing = self._stored_at = 0.0

    def tasks(self) -> Iterator[_Measure | _Assess]:
        """All units of work, run after run, and the assessments that came to be possible in between."""
        for place in range(len(self._runs)):
            self._begin(place)
            for unit in self._jobs[place][0].take() if place in self._jobs else ():
                yield _Measure(place, unit)
                yield from self.assessments()
                if place in self.results:  # it failed
                    break
            yield from self.assessments()

    def assessments(self) -> Iterator[_Assess]:
        """Those that wait."""
        while self.ready:
            yield self.ready.popleft()

    def take(self, task: _Measure | _Assess, found: Any) -> None:
        """The result of a task, or its error."""
        if task.place in self.results:  # it failed with another unit
            return
        if isinstance(found, LoraForensicsError):
            self._fail(task.place, found)
        elif isinstance(task, _Assess):
            assessment, plots = found
            key = assessment_key(task.measured, task.options, task.probed)
            save_assessment(self._folder(task.place), assessment, plots, key)
            self._end(task.place, task.measured, assessment.verdict)
        else:
            self._jobs[task.place][0].add(task.unit, found)
            self._after_unit(task.place)

    def _begin(self, place: int) -> None:
        run, root = self._runs[place]
        options = replace(self._options.measure, search_root=root, cache=self._options.out / _DECOMPOSITIONS)
        stored = load_measured(self._folder(place))
        known = only_pruned(stored) if self._options.rescan else stored
        try:
            job = Measuring(
                with_pruned(run, stored), self._options.base or None, options, known=known, blocks=self._blocks
            )
        except (UsageError, BaseModelError) as error:
            self._fail(place, error)
            return
        self._jobs[place] = job, stored
        self._stored_at = time.monotonic()
        if job.done:
            self._after_unit(place)

    def _after_unit(self, place: int) -> None:
        job, stored = self._jobs[place]
        started = time.monotonic()
        if not job.done and self._storing > _STORING * (started - self._stored_at):
            return
        measured = job.result()
        if self._options.base and stored and stored.notes.base.matched and not measured.notes.base.matched:
            hint = "the tables of the earlier scan are kept as they are"
            self._fail(place, BaseModelError(measured.notes.base_problem, hint))
            return
        same = stored and stored.notes == measured.notes and stored.checkpoints.equals(measured.checkpoints)
        if measured.new or not same:
            save_measured(self._folder(place), measured)  # before anything else can go wrong
        self._stored_at = time.monotonic()
        self._storing = self._stored_at - started
        if job.done:
            self._assess(place, measured)

    def _assess(self, place: int, measured: Measured) -> None:
        options = self._options
        probed = load_probed(self._folder(place))
        key = assessment_key(measured, options.assess, probed)
        verdict = None if options.rescan else load_verdict(self._folder(place), key, options.plots)
        if verdict is None:
            self.ready.append(_Assess(place, measured, options.assess, probed, options.plots))
        else:
            self._end(place, measured, verdict)

    def _end(self, place: int, measured: Measured, verdict: Verdict) -> None:
        known = len(measured.checkpoints) - measured.new - measured.waiting
        self.results[place] = Scanned(verdict, measured.new, known, measured.layers.is_empty())
        self._jobs.pop(place, None)

    def _fail(self, place: int, error: LoraForensicsError) -> None:
        self.results[place] = error
        self._jobs.pop(place, None)

    def _folder(self, place: int) -> Path:
        return self._options.out / self._runs[place][0].name
