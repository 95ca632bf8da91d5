"""The main job: discover, measure what is new, assess, write tables, plots and reports.

OUT holds one folder a run, so that a later scan knows what was measured and `report` needs no checkpoint.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from lora_forensics.assess import assess, versions
from lora_forensics.discovery import discover_runs, nothing_found
from lora_forensics.errors import LoraForensicsError, SeriesError, UsageError
from lora_forensics.gate import failing
from lora_forensics.pipeline import ScanOptions, scan_runs
from lora_forensics.plots import draw_plots, save_plots
from lora_forensics.probed import load_probed
from lora_forensics.records import SCHEMA, Finding, Gate, Run, Skipped, Summary, Verdict
from lora_forensics.redaction import Redaction, redacted
from lora_forensics.remote import fresh
from lora_forensics.reports import REPORTS, PagedReport, available
from lora_forensics.reports.text import count
from lora_forensics.selection import Selection
from lora_forensics.series import read_table, write_text
from lora_forensics.similarity import AssessOptions
from lora_forensics.store import (
    assessment_key,
    check_writable,
    load_measured,
    load_names,
    name_in,
    reserve,
    save_assessment,
    save_runs,
    stored_verdict,
)
from lora_forensics.tables import Measured
from lora_forensics.triage import file_findings

REDACTED = "redacted"
"""Folder in OUT with the reports that may be shared."""

__all__ = [
    "REDACTED",
    "Scan",
    "ScanOptions",
    "load_summary",
    "locate_run",
    "pick_checkpoint",
    "present",
    "report",
    "scan",
    "update_summary",
    "write_redacted",
    "write_reports",
]


@dataclass(frozen=True, slots=True)
class Scan:
    """What a scan found."""

    summary: Summary
    new: int
    """Checkpoints that were measured now."""
    known: int
    """Checkpoints that had been measured before."""
    failed: tuple[tuple[str, str], ...]
    """Runs that could not be measured or assessed, and why."""
    selection: Selection = field(default_factory=Selection)
    """Which findings count; those of the summary are chosen already."""

    def outcome(self, strict: bool = False) -> tuple[int, str]:
        """The contract's exit code and why it is not 0.

        0; 1 (a finding that the gate names); 2 (nothing measured, or a damaged file and `strict`); 3 (some not).
        """
        verdicts = self.summary.runs
        skipped = (*self.summary.skipped, *(s for v in verdicts for s in v.skipped))
        damaged = [s for s in skipped if not s.expected and self.selection.keeps_file(s)]
        runs = len({v.run for v in verdicts} | {name for name, _ in self.failed})
        reasons = "; ".join(f"{name}: {reason}" for name, reason in self.failed[:3])
        unmeasured = f"{len(self.failed)} of {count(runs, 'run')} could not be measured: {reasons}"
        if len(self.failed) == runs:
            return 2, unmeasured
        if strict and damaged:
            return 2, f"{count(len(damaged), 'damaged file')} skipped, first {damaged[0].path}: {damaged[0].reason}"
        if self.failed:
            return 3, unmeasured
        for run, finding in failing(self.summary):
            return 1, f"{run}{': ' if run else ''}{finding.rule} ({finding.severity}): {finding.message}"
        return 0, ""

    def redacted(self) -> Scan:
        """The same without paths and names, for whoever reads the terminal."""
        hidden = Redaction(self.summary)
        failed = tuple((hidden.run(name), hidden.text(reason)) for name, reason in self.failed)
        return replace(self, summary=redacted(self.summary), failed=failed)


def present(out: Path) -> tuple[str, ...]:
    """Reports whose files are in OUT; markdown and json always are."""
    files = {name: REPORTS[name]().filename for name in available()}
    there = [name for name, file in files.items() if file is not None and (out / file).exists()]
    return tuple(dict.fromkeys(("markdown", "json", *there)))


def scan(paths: Sequence[Path], options: ScanOptions) -> Scan:
    """Scan folders of runs.

    Raises:
        UsageError: a path is no folder of runs, or no run was found.
        BaseModelError: a base that was given cannot be used.
        SeriesError: OUT cannot be written.
    """
    found, skipped = _discover(paths, options)
    if not found:
        raise nothing_found(paths, skipped)
    check_writable(options.out)
    taken: set[str] = set()
    runs = [(replace(run, name=reserve(run, options.out, taken)), root) for run, root in found]
    verdicts: list[Verdict] = []
    failed: list[tuple[str, str]] = []
    new = known = 0
    for (run, _), result in zip(runs, scan_runs(runs, options), strict=True):
        if isinstance(result, LoraForensicsError):
            if len(runs) == 1:
                raise result
            skipped.append(Skipped.because(run.path, result))  # what fits other runs need not fit this one
            failed.append((run.name, result.message))
            continue
        verdicts.append(result.verdict)
        new += result.new
        known += result.known
        if result.verdict.status == "no_base_model" or (run.checkpoints and result.empty):
            failed.append((run.name, result.verdict.message))
    whole = Summary(
        tuple(verdicts),
        tuple(skipped),
        versions(),
        options.out,
        findings=tuple(file_findings(skipped)),
        gate=_gate(options, runs, found),
    )
    summary = options.selection.applied(whole)
    write_reports(summary, options.reports)
    if options.redact:
        write_redacted(summary, options.reports, options.plots)
    return Scan(summary, new, known, tuple(failed), options.selection)


def pick_checkpoint(run: Path, options: ScanOptions) -> tuple[Path | None, str]:
    """The checkpoint of one run to keep, or None and why there is none.

    `run` is a folder with one run in it, or FOLDER/NAME where several runs lie in one folder.

    Raises:
        UsageError: there is no run, or there are several; the hint names them.
    """
    chosen, root = locate_run(run, options)
    (result,) = scan_runs([(chosen, root)], options)
    if isinstance(result, LoraForensicsError):
        raise result
    keep = result.verdict.keep
    if keep is None:
        return None, f"{chosen.name}: no checkpoint to name: {result.verdict.message}"
    return chosen.path / keep.checkpoint, ""


def locate_run(run: Path, options: ScanOptions) -> tuple[Run, Path]:
    """One run under the name that it has in OUT, and the folder that it was found under.

    Raises:
        UsageError: there is no run, or there are several; the hint names them.
    """
    chosen, root = find_run(run, options)
    check_writable(options.out)
    known = name_in(options.out, chosen)  # measured by a scan of a folder above: not again under another name
    return replace(chosen, name=known or reserve(chosen, options.out, set())), root


def find_run(run: Path, options: ScanOptions) -> tuple[Run, Path]:
    """The one run that a person means, named as `pick_checkpoint` takes it, and the folder it was found under.

    Raises:
        UsageError: there is no run, or there are several; the hint names them.
    """
    place, name = (run, "") if run.exists() else (run.parent, run.name)
    found, skipped = _discover([place], options)
    wanted = [(r, root) for r, root in found if not name or r.name.rpartition("/")[2] == name]
    if name and found and not wanted:
        names = ", ".join(sorted(str(place / r.name) for r, _ in found)[:5])
        raise UsageError(f"{run} does not exist, and no run in {place} is called {name!r}", f"there is {names}")
    if not wanted:
        raise nothing_found([run], skipped)
    if len(wanted) > 1:
        names = ", ".join(sorted(str(place / r.name) for r, _ in wanted)[:5])
        raise UsageError(f"{run} holds {len(wanted)} runs", f"name one of them: {names}")
    return wanted[0]


def load_summary(out: Path) -> Summary:
    """The summary of the last scan into OUT.

    Raises:
        SeriesError: there is none, or it cannot be read.
    """
    try:
        document = json.loads((fresh(out) / "summary.json").read_text("utf-8"))
        if document["schema"] > SCHEMA:
            message = f"{out} has schema {document['schema']}, newer than {SCHEMA}"
            raise SeriesError(message, "upgrade lora-forensics")
        skipped = tuple(map(Skipped.from_dict, document["skipped"]))
        verdicts = tuple(Verdict.from_dict(entry) for entry in document["runs"])
        findings = tuple(map(Finding.from_dict, document.get("findings", ())))
        ignored = document.get("ignored", 0)
        gate = Gate(names=load_names(out))
        return Summary(verdicts, skipped, document["versions"], out, gate, findings, ignored)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"damaged ({error})"
        hint = "give the folder that a scan wrote with --out"
        raise SeriesError(f"{out} holds no readable summary.json of a scan: {reason}", hint) from error


def report(
    out: Path,
    reports: Sequence[str],
    options: AssessOptions | None = None,
    selection: Selection | None = None,
    gate: Gate | None = None,
) -> tuple[Summary, list[Skipped]]:
    """Render plots and reports of a scan again, from its tables; with `options`, after a new assessment.

    Also gives the runs whose tables are lost; what the summary says of them is rendered all the same.
    """
    summary = load_summary(out)
    verdicts, lost = [], []
    for known in summary.runs:
        folder = out / known.run
        if not folder.resolve().is_relative_to(out.resolve()):
            raise SeriesError(f"{out}/summary.json names a run outside of its folder: {known.run}", "scan again")
        verdict = stored_verdict(folder) or known  # the summary may lack findings that were ignored
        stored = load_measured(folder)
        if stored is None:
            lost.append(Skipped(folder, "its tables are missing or damaged: scan again"))
            verdicts.append(verdict)
        elif options is None:
            _plot(folder, stored, verdict, folder)
            verdicts.append(verdict)
        else:
            probed = load_probed(folder)
            assessment = assess(stored.layers, stored.checkpoints, stored.notes, options, probed)
            drawn = draw_plots(assessment.series, stored.layers, stored.checkpoints, assessment.verdict)
            save_assessment(folder, assessment, drawn, assessment_key(stored, options, probed))
            verdicts.append(assessment.verdict)
    if lost and len(lost) == len(verdicts):
        raise SeriesError(f"{lost[0].path} holds no layers.parquet", "scan again")
    known_files = [entry for entry in summary.skipped if entry not in lost]  # the last report said it, too
    skipped = (*known_files, *lost)
    findings = tuple(file_findings(known_files))
    gate = replace(gate or Gate(), names=summary.gate.names)
    summary = replace(summary, runs=tuple(verdicts), skipped=skipped, findings=findings, ignored=0, gate=gate)
    summary = (selection or Selection()).applied(summary)
    write_reports(summary, reports)
    return summary, lost


def update_summary(out: Path, verdict: Verdict, names: Iterable[str]) -> None:
    """Put one run's new verdict into the summary of OUT; write the reports that are named or are there."""
    try:
        summary = load_summary(out)
    except SeriesError:
        summary = Summary((), (), versions(), out)
    others = [entry for entry in summary.runs if entry.run != verdict.run]
    place = next((at for at, entry in enumerate(summary.runs) if entry.run == verdict.run), len(others))
    others.insert(place, verdict)
    write_reports(replace(summary, runs=tuple(others)), (*names, *present(out)))


def write_reports(summary: Summary, names: Iterable[str]) -> None:
    """Write reports that are files, and runs.parquet, into the summary's folder."""
    if summary.folder is None:
        return
    for name in dict.fromkeys(names):
        rendered = REPORTS[name]()
        if rendered.filename is not None:
            write_text(summary.folder / rendered.filename, rendered.render(summary))
        if isinstance(rendered, PagedReport):
            for place, page in rendered.pages(summary):
                write_text(summary.folder / place, page)
    save_runs(summary.folder, summary.runs, summary.gate.names)


def write_redacted(summary: Summary, names: Iterable[str], plots: bool) -> Summary:
    """Write reports and figures without paths and names to OUT/redacted; gives the summary as it stands there."""
    shared = redacted(summary)
    folder = summary.folder
    if folder is None:
        return shared
    for verdict, label in zip(summary.runs, shared.runs, strict=True) if plots else ():
        stored = load_measured(folder / verdict.run)
        if stored is not None:
            _plot(folder / verdict.run, stored, label, folder / REDACTED / label.run)
    for name in dict.fromkeys(names):
        rendered = REPORTS[name]()
        if rendered.filename is not None:
            placed = replace(shared, folder=folder / REDACTED)
            write_text(folder / REDACTED / rendered.filename, rendered.render(placed))
        if isinstance(rendered, PagedReport):
            for place, page in rendered.pages(summary, Redaction(summary)):
                write_text(folder / REDACTED / place, page)
    return shared


def _plot(folder: Path, stored: Measured, verdict: Verdict, to: Path) -> None:
    """Draw the plots of a run again from its tables."""
    save_plots(to / "plots", read_table(folder / "series.parquet"), stored.layers, stored.checkpoints, verdict)


def _gate(options: ScanOptions, runs: Sequence[tuple[Run, Path]], found: Sequence[tuple[Run, Path]]) -> Gate:
    """The gate, with the names that runs have wherever OUT lies and however often they were moved."""
    times = Counter(run.name for run, _ in found)
    pairs = ((run.name, own.name) for (run, _), (own, _) in zip(runs, found, strict=True))
    names = {name: own for name, own in pairs if name != own and times[own] == 1}
    return replace(options.gate, names=names)


def _discover(paths: Sequence[Path], options: ScanOptions) -> tuple[list[tuple[Run, Path]], list[Skipped]]:
    """All runs with the folder they were found under; and all that belongs to none. Each once, however often named."""
    runs: list[tuple[Run, Path]] = []
    skipped: dict[str, Skipped] = {}
    seen: set[str] = set()
    for path in paths:
        if os.path.realpath(path) == os.path.realpath(options.out):
            raise UsageError(
                f"{path} is also where the output goes, which is never scanned", "choose another folder with --out"
            )
        for found in discover_runs(path, options.trainer, exclude=[options.out]):
            if isinstance(found, Skipped):
                skipped.setdefault(os.path.realpath(found.path), found)
                continue
            files = {os.path.realpath(checkpoint.path) for checkpoint in (*found.checkpoints, *found.unplaced)}
            if not seen & files:
                seen |= files
                runs.append((found, path))
    return runs, list(skipped.values())
