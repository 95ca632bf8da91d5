"""`probe RUN`: scan, score a few checkpoints, remember every score, and draw the verdict again with the answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from lora_forensics.assess import broken_steps
from lora_forensics.errors import LoraForensicsError, ScoreError, UsageError
from lora_forensics.measure import Progress
from lora_forensics.pipeline import Scanned, ScanOptions, scan_runs
from lora_forensics.probe import SCORERS
from lora_forensics.probe.interface import ProbeOptions, Scorer, ScorerSettings
from lora_forensics.probe.search import Search
from lora_forensics.probed import BEST, Asked, Score, load_probed, losses_of, save_probed
from lora_forensics.records import Checkpoint, Run, Summary
from lora_forensics.reports.text import count
from lora_forensics.scan import locate_run, update_summary
from lora_forensics.similarity import places_of
from lora_forensics.store import load_measured

Result = Sequence[float] | Score | ScoreError
"""Fresh numbers, a score that is known, or why there is none."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What a probe did."""

    summary: Summary
    """The run's verdict alone."""
    new: int
    """Checkpoints that were scored now."""
    known: int
    """Checkpoints whose score was known."""
    failed: tuple[tuple[str, ScoreError], ...]
    """Checkpoints without a score, and why."""

    def said(self) -> str:
        """How much was scored, in words."""
        known = f"; {self.known} known before" if self.known else ""
        failed = f"; {len(self.failed)} failed" if self.failed else ""
        return f"scored {count(self.new, 'checkpoint')}{known}{failed}"


def probe_run(path: Path, scan: ScanOptions, options: ProbeOptions) -> Probe:
    """Score checkpoints of one run and write the answer into its verdict.

    Args:
        path: a folder with one run, or FOLDER/NAME.
        scan: as for a scan; what was measured before is used again.
        options: the scorer and how often it may be asked.

    Raises:
        UsageError: there is no such run, or the options cannot be meant.
        ScoreError: no checkpoint got a score.
        BaseModelError: the scorer needs a base model that is not there.
        SeriesError: OUT cannot be written.
    """
    kind = _wanted(options)
    run, root = locate_run(path, scan)
    verdict = _scan(run, root, scan).verdict
    folder = scan.out / run.name
    scorer = kind(ScorerSettings(options, run, (*scan.base, *_base_files(folder))))
    usable = _usable(run, folder)
    order = [checkpoint.name for checkpoint in usable]
    named = [entry.checkpoint for entry in verdict.candidates if entry.why != BEST]
    probing = _Probing(folder, scorer, options, usable)
    probing.go([order.index(name) for name in named if name in order], scan.measure.progress, run.name)
    if not probing.losses:
        name, error = probing.failed[0]
        message = f"none of {count(len(probing.failed), 'checkpoint')} got a score; {name}: {error.message}"
        told = f" ({error.hint.splitlines()[-1]})" if error.hint else ""
        raise ScoreError(message + told, "run the scorer on that file by hand")
    verdict = _scan(run, root, replace(scan, rescan=False)).verdict
    update_summary(scan.out, verdict, scan.reports)
    summary = Summary((verdict,), (), verdict.versions, scan.out)
    return Probe(summary, probing.new, probing.known, tuple(probing.failed))


class _Probing:
    """One search, with everything that is known written down after each score."""

    def __init__(self, folder: Path, scorer: Scorer, options: ProbeOptions, usable: Sequence[Checkpoint]) -> None:
        self.new = self.known = 0
        self.failed: list[tuple[str, ScoreError]] = []
        self.losses: dict[int, float] = {}
        self._folder = folder
        self._scorer = scorer
        self._identity = scorer.identity
        self._options = options
        self._usable = usable
        self._prints = {checkpoint.name: checkpoint.fingerprint for checkpoint in usable}
        self._stored = {} if options.again else load_probed(folder).known(self._identity, self._prints)
        self._samples = 0

    def go(self, candidates: Sequence[int], progress: Progress, name: str) -> None:
        """Search until the best is closed in or the evaluations are used up."""
        many = self._options.workers if self._scorer.parallel else 1
        search = Search(len(self._usable), candidates, self._options.evaluations, many)
        progress.begin(f"{name}: scoring", self._options.evaluations)
        for places in search:
            for place, found in self._score_all(places, many):
                search.tell(place, self._take(place, found))
                progress.advance(1)
        self.losses = search.losses
        if self.losses:
            reasons = {name: error.message for name, error in self.failed}
            asked = Asked(self._identity, self._scorer.what, self._options.maximise, self._prints, reasons)
            save_probed(self._folder, replace(load_probed(self._folder), asked=asked))

    def _score_all(self, places: Sequence[int], many: int) -> Iterator[tuple[int, Result]]:
        """Results as they come, so that each is kept whatever happens to the others."""
        for place in places:
            if (known := self._stored.get(self._usable[place].name)) is not None:
                yield place, known
        fresh = [place for place in places if self._usable[place].name not in self._stored]
        if len(fresh) < 2:
            yield from ((place, self._ask(place)) for place in fresh)
            return
        with ThreadPoolExecutor(many) as pool:
            futures = {pool.submit(self._ask, place): place for place in fresh}
            try:
                yield from ((futures[done], done.result()) for done in as_completed(futures))
            except BaseException:  # stopped, or another scorer's error: nothing is left running
                pool.shutdown(wait=False, cancel_futures=True)
                self._scorer.stop()
                raise

    def _ask(self, place: int) -> Sequence[float] | ScoreError:
        try:
            return self._scorer.score(self._usable[place])
        except ScoreError as error:
            return error

    def _take(self, place: int, found: Result) -> float | None:
        """Write a score down; its loss, or None where it is none."""
        checkpoint = self._usable[place]
        if isinstance(found, ScoreError):
            self.failed.append((checkpoint.name, found))
            return None
        if isinstance(found, Score):
            self.known += 1
            score = found
        else:
            samples = tuple(found)
            value = float(np.mean(samples))
            score = Score(
                checkpoint.name, checkpoint.fingerprint, self._identity, value, samples if len(samples) > 1 else ()
            )
        row = losses_of(score, self._options.maximise)
        self._samples = self._samples or len(row)
        if len(row) != self._samples:
            error = ScoreError(f"gave {len(row)} numbers where others gave {self._samples}")
            self.failed.append((checkpoint.name, error))
            return None
        if not isinstance(found, Score):
            self.new += 1
            save_probed(self._folder, load_probed(self._folder).with_score(score))  # another probe may write there, too
        return float(np.mean(row))


def _wanted(options: ProbeOptions) -> type[Scorer]:
    """The scorer that the options ask for.

    Raises:
        UsageError: none, two, or an option that does not go with it.
    """
    wanted = [scorer for scorer in SCORERS if scorer.wanted(options)]
    if len(wanted) != 1:
        hint = "--score 'COMMAND {checkpoint}', or --held-out with a file of texts or a folder of images"
        raise UsageError("give one way to score" if wanted else "nothing says how to score", hint)
    if options.held_out is not None and not options.held_out.exists():
        raise UsageError(f"--held-out {options.held_out} does not exist", "give a file of texts or a folder of images")
    if options.held_out is not None and (options.maximise or options.timeout is not None):
        name = "maximise" if options.maximise else "timeout"
        raise UsageError(f"--{name} goes with --score alone: a loss on held-out samples needs none")
    return wanted[0]


def _scan(run: Run, root: Path, options: ScanOptions) -> Scanned:
    (result,) = scan_runs([(run, root)], options)
    if isinstance(result, LoraForensicsError):
        raise result
    return result


def _base_files(folder: Path) -> tuple[Path, ...]:
    stored = load_measured(folder)
    return tuple(map(Path, stored.notes.base_files)) if stored else ()


def _usable(run: Run, folder: Path) -> list[Checkpoint]:
    """Those that may be kept: whole files, or all where none of them could be measured.

    Raises:
        UsageError: there is none.
    """
    stored = load_measured(folder)
    broken = broken_steps(stored.layers, places_of(stored.layers, stored.checkpoints)) if stored else []
    whole = [checkpoint for checkpoint in run.checkpoints if checkpoint.step not in broken]
    if not run.checkpoints:
        raise UsageError(f"{run.name}: no checkpoint has a step: there is no order to search in")
    return whole or list(run.checkpoints)
