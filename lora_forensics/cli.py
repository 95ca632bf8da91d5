"""Commands: parse, call the library, print, exit code. No rule lives here, nothing heavy is imported at the top."""

from __future__ import annotations

import io
import os
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_forensics import __version__
from lora_forensics.commands import average, check, compare, prune, rules, table
from lora_forensics.commands.configured import chosen, configured, current, selecting
from lora_forensics.commands.gating import Gating, gating
from lora_forensics.commands.parameters import FOLDER, HERE, PLACE
from lora_forensics.errors import LoraForensicsError, UsageError

if TYPE_CHECKING:
    from lora_forensics.inspection.values import Contents, Difference, Inspection
    from lora_forensics.records import Summary
    from lora_forensics.scan import ScanOptions
    from lora_forensics.similarity import AssessOptions

_SPECTRA = "All singular values, also of changes without a thin core."
F = TypeVar("F", bound=Callable[..., Any])


EXIT_USAGE, EXIT_BUG, EXIT_INTERRUPTED = 2, 70, 130


class Commands(click.Group):
    """The one place where errors become messages and exit codes."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command; every way out of it has its code."""
        kwargs["standalone_mode"] = False
        typed = sys.argv[1:] if kwargs.get("args") is None else kwargs["args"]
        _repair_streams()
        try:
            result = super().main(*args, **kwargs)
            sys.exit(result if isinstance(result, int) else 0)
        except click.ClickException as error:
            error.show()
            sys.exit(EXIT_USAGE)
        except LoraForensicsError as error:
            _complain(*_shown(typed, error.message, error.hint))
            sys.exit(error.exit_code)
        except (click.Abort, KeyboardInterrupt):
            _complain(
                "stopped; files on disk are those of the runs that were finished", "run the same command to go on"
            )
            sys.exit(EXIT_INTERRUPTED)
        except BrokenPipeError:
            sys.stderr.close()  # the reader has gone, as in `| head`
            sys.exit(0)
        except SystemExit:
            raise
        except BaseException as error:  # noqa: BLE001 - a bug must not look like a finding; a panic is no Exception
            with tempfile.NamedTemporaryFile(
                "w", prefix="lora-forensics-", suffix=".log", delete=False, encoding="utf-8"
            ) as log:
                log.write(traceback.format_exc())
            (said,) = _shown(typed, f"this is a bug: {type(error).__name__}: {error}")
            _complain(said, f"please report it with {log.name}")
            sys.exit(EXIT_BUG)


def _repair_streams() -> None:
    """Let printing never fail: streams that the caller closed, and consoles that cannot spell a name."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 - as long as we live
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _shown(typed: Sequence[str], *sentences: str) -> tuple[str, ...]:
    """What an error says, as it may be shown: with `--redact` without paths, names, and what the command was given."""
    if "--redact" not in typed:
        return sentences
    from lora_forensics.records import Summary
    from lora_forensics.redaction import Redaction

    given = [word for word in typed[1:] if not word.startswith("-")]
    return tuple(map(Redaction(Summary(()), given).text, sentences))


def _complain(message: str, hint: str = "", details: Iterable[str] = ()) -> None:
    from lora_forensics.reports.text import plain

    click.echo(f"lora-forensics: {plain(message)}", err=True)
    for line in details:
        click.echo(f"    {plain(line)}", err=True)
    if hint:
        click.echo(f"  try: {plain(hint)}", err=True)


def assessing(command: F) -> F:
    """Options that say how a series is read."""
    for option in reversed(
        (
            click.option("--component", multiple=True, help="Component that enters CS, or all (repeatable)."),
            click.option(
                "--similarity", default="flat", show_default=True, help="flat (the paper) or rowwise (its code)."
            ),
            click.option(
                "--window", default="auto", show_default=True, help="auto, epoch, or a number of checkpoints."
            ),
            click.option("--detector", default="half_path", show_default=True, help="A rule of docs/method.md."),
            click.option("--learning-rate", type=float, help="Divide by this rate instead of the recorded ones."),
        )
    ):
        command = option(command)
    return command


def measuring(command: F) -> F:
    """Options that say what is measured, and how."""
    for option in reversed(
        (
            click.option("--base", multiple=True, type=PLACE, help="Base model: file or folder."),
            click.option("--download", is_flag=True, help="Allow fetching the base model from the Hugging Face hub."),
            click.option(
                "--out",
                type=FOLDER,
                default=Path("forensics"),
                show_default=True,
                help="Folder for tables, plots and reports.",
            ),
            click.option("--trainer", help="Look for this trainer's layout only."),
            click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps."),
            click.option(
                "--engine", default="serial", show_default=True, help="Where work runs: serial, processes or ray."
            ),
            click.option(
                "--workers", type=click.IntRange(1), help="Workers of processes or ray; one for each core if left out."
            ),
            click.option("--ray-address", help="Ray cluster to work on; one on this machine is started if left out."),
            click.option(
                "--memory", default="1GB", show_default=True, help="Checkpoints that a worker holds at once, e.g. 4GB."
            ),
            click.option("--spectra", is_flag=True, help=_SPECTRA),
            click.option(
                "--analysis",
                "analyses",
                multiple=True,
                help="Also fill columns that cost more: columns, intruders, subspace (repeatable).",
            ),
            click.option("--rescan", is_flag=True, help="Measure everything again, not only what is new."),
        )
    ):
        command = option(command)
    return command


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lora-forensics")
def main() -> None:
    """Which checkpoint of a LoRA training to keep, and on what evidence."""


@main.command()
@click.argument("runs", nargs=-1, required=True, type=PLACE)
@measuring
@assessing
@click.option(
    "--report", "reports", multiple=True, help="Report to write to OUT (repeatable; markdown and json always are)."
)
@gating
@click.option("--no-plots", is_flag=True, help="Draw no figures; `report OUT` draws them later.")
@click.option("--strict", is_flag=True, help="Exit with 2 if a damaged file had to be skipped.")
@click.option("--json", "as_json", is_flag=True, help="Print summary.json and nothing else.")
@click.option("-q", "--quiet", is_flag=True, help="Print nothing but errors.")
@click.option("-v", "--verbose", is_flag=True, help="List every skipped file.")
@selecting
@configured
def scan(
    runs: tuple[Path, ...],
    reports: tuple[str, ...],
    fail_on: tuple[str, ...],
    baseline: Path | None,
    write_baseline: Path | None,
    redact: bool,
    no_plots: bool,
    strict: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Measure the runs below RUNS, name the checkpoint to keep, and write tables, plots and reports.

    Example: lora-forensics scan sample_runs/
    """
    from lora_forensics.console import console_progress
    from lora_forensics.scan import scan as run_scan

    asked = Gating.of(fail_on, baseline, write_baseline)
    if redact:
        _refuse_pages(reports)
    with console_progress(enabled=not (quiet or as_json or redact)) as progress:
        options = _scan_options(settings, reports, progress, plots=not no_plots)
        done = run_scan(runs, replace(options, redact=redact, gate=asked.gate))
    told = list(asked.settle(done.summary))
    for line in () if redact else told:
        _complain(line)
    if redact:
        done = done.redacted()
    if as_json:
        _print_report("json", done.summary)
    elif not quiet:
        _print_report("terminal", done.summary, verbose=verbose)
        click.echo(_what_was_measured(done.new, done.known))
    code, reason = done.outcome(fail_on, strict)
    if reason:
        _complain(reason)
    return code


@main.command()
@click.argument("path", type=PLACE)
@click.option("--trainer", help="Look for this trainer's layout only.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every skipped file.")
def runs(path: Path, trainer: str | None, as_json: bool, verbose: bool) -> int:
    """List the runs below PATH: trainer, checkpoints, rates, base model; and what is skipped, and why.

    Reads headers only. Example: lora-forensics runs sample_runs/
    """
    from lora_forensics.discovery import discover_runs, nothing_found
    from lora_forensics.listing import listing_json, listing_text
    from lora_forensics.records import Skipped

    found = list(discover_runs(path, trainer))
    click.echo(listing_json(found) if as_json else listing_text(found, _width(), verbose), nl=False)
    skipped = [entry for entry in found if isinstance(entry, Skipped)]
    if len(skipped) == len(found):
        raise nothing_found([path], skipped)
    return 0


@main.command()
@click.argument("run", type=PLACE)
@measuring
@assessing
@selecting
@configured
def pick(run: Path, **settings: Any) -> int:
    """Print the path of the checkpoint to keep, and nothing else; exit 1 with the reason if there is none.

    RUN is a folder with one run, or FOLDER/NAME where several share a folder. Measures what is new first.
    Example: lora-forensics pick sample_runs/text_peft
    """
    from lora_forensics.measure import Progress
    from lora_forensics.scan import pick_checkpoint

    path, reason = pick_checkpoint(run, _scan_options(settings, (), Progress()))
    if path is None:
        _complain(reason)
        return 1
    click.echo(path)
    return 0


@main.command()
@click.argument("run", type=HERE)
@click.option("--score", metavar="COMMAND", help="Command with {checkpoint} in it; its last line is a number.")
@click.option("--held-out", type=HERE, help="Samples not trained on: .txt, .jsonl, or a folder of images.")
@click.option("--maximise", is_flag=True, help="The command's number is better the higher it is.")
@click.option(
    "--timeout", type=click.FloatRange(0, min_open=True), help="Seconds that the command has for a checkpoint."
)
@click.option(
    "--evaluations", type=click.IntRange(1), default=6, show_default=True, help="Checkpoints that are scored at most."
)
@click.option("--json", "as_json", is_flag=True, help="Print the verdict as one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List all findings.")
@measuring
@assessing
@configured
def probe(run: Path, evaluations: int, as_json: bool, verbose: bool, **settings: Any) -> int:
    """Score a few checkpoints on what was not trained on, and keep the best of them.

    RUN as for `pick`. Scores are remembered, and the answer stands in the verdict until checkpoints change.
    Example: lora-forensics probe sample_runs/text_peft --held-out sample_runs/text_peft/held_out.txt
    """
    from lora_forensics.console import console_progress
    from lora_forensics.probe import ProbeOptions
    from lora_forensics.probe.probing import probe_run

    asked = {name: settings[name] for name in ("score", "held_out", "maximise", "timeout", "device")}
    options = ProbeOptions(**asked, evaluations=evaluations, workers=settings["workers"] or 1, again=settings["rescan"])
    with console_progress(enabled=not as_json) as progress:
        done = probe_run(run, _scan_options(settings, (), progress), options)
    _print_report("json" if as_json else "terminal", done.summary, verbose=verbose)
    for name, error in done.failed:
        _complain(f"{name} has no score: {error.message}", details=error.hint.splitlines())
    if not as_json:
        click.echo(done.said())
    return 0


@main.command()
@click.argument("out", type=PLACE)
@assessing
@click.option(
    "--report", "reports", multiple=True, help="Report to write (repeatable; those that are there if left out)."
)
@gating
@click.option("--json", "as_json", is_flag=True, help="Print summary.json and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every skipped file.")
@selecting
@configured
def report(
    out: Path,
    reports: tuple[str, ...],
    fail_on: tuple[str, ...],
    baseline: Path | None,
    write_baseline: Path | None,
    redact: bool,
    as_json: bool,
    verbose: bool,
    **settings: Any,
) -> int:
    """Render the reports of a scan again from its tables in OUT; needs neither torch nor the checkpoints.

    With --window, --detector, ... the verdicts are drawn anew. Example: lora-forensics report forensics
    """
    from lora_forensics.rules import Thresholds
    from lora_forensics.scan import Scan, present, write_redacted
    from lora_forensics.scan import report as run_report

    asked = Gating.of(fail_on, baseline, write_baseline)
    source = click.get_current_context().get_parameter_source
    selection = chosen(settings)
    changed = any(source(name) is not click.core.ParameterSource.DEFAULT for name in settings)
    options = _assess_options(settings) if changed or current().thresholds != Thresholds() else None
    if redact:
        _refuse_pages(reports)
    names = _report_names(reports) or present(out)
    summary, lost = run_report(out, names, options, selection, asked.gate)
    told = list(asked.settle(summary))
    failed = tuple((entry.path.relative_to(out).as_posix(), entry.reason) for entry in lost)
    done = Scan(summary, 0, 0, failed, selection)
    if redact:
        write_redacted(summary, names, plots=True)
        told, done = [], done.redacted()
    _print_report("json" if as_json else "terminal", done.summary, verbose=verbose)
    for line in told:
        _complain(line)
    code, reason = done.outcome()
    if reason:
        _complain(reason)
    return code


@main.command()
@click.argument("files", nargs=-1, required=True, metavar="FILE [FILE]", type=PLACE)
@click.option("--base", multiple=True, type=PLACE, help="Base model: file or folder (repeatable).")
@click.option("--download", is_flag=True, help="Allow fetching the base model from the Hugging Face hub.")
@click.option("--device", default="auto", show_default=True, help="auto, cpu, cuda, cuda:N or mps.")
@click.option("--spectra", is_flag=True, help=_SPECTRA)
@click.option("--keys", is_flag=True, help="List every tensor with its statistics, and nothing else.")
@click.option("--metadata", is_flag=True, help="Print all metadata as it stands in the file, and nothing else.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
@click.option("-v", "--verbose", is_flag=True, help="List every module.")
def inspect(
    files: tuple[Path, ...],
    base: tuple[Path, ...],
    download: bool,
    device: str,
    spectra: bool,
    keys: bool,
    metadata: bool,
    as_json: bool,
    verbose: bool,
) -> int:
    """Look at one checkpoint: metadata, kinds, ranks, scales, norms, spectra, health; of two files, the difference.

    FILE is a tensor file or the folder of an adapter. Example: lora-forensics inspect sample_runs/text_peft/output
    """
    from lora_forensics.console import use_color
    from lora_forensics.inspection.difference import compare_files
    from lora_forensics.inspection.looking import inspect_file, read_contents
    from lora_forensics.reports import to_json
    from lora_forensics.reports.inspection import inspection_text

    if len(files) > (1 if keys or metadata else 2):
        hint = "inspect looks at one file or compares two; --keys and --metadata are for one"
        raise UsageError(f"{len(files)} files are given", hint)
    found: Contents | Inspection | Difference
    if keys or metadata:
        found = read_contents(files[0], keys, metadata)
    elif len(files) == 1:
        found = inspect_file(files[0], base, device, download=download, spectra=spectra)
    else:
        found = compare_files(files[0], files[1], base, device, download=download)
    text = to_json(found.to_dict()) if as_json else inspection_text(found, _width(), use_color(), verbose)
    click.echo(text, nl=False, color=use_color())
    return 0


@main.command()
@click.option("--markdown", is_flag=True, help="As a Markdown page.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else.")
def formats(markdown: bool, as_json: bool) -> int:
    """List the trainers, adapter kinds, base layouts and storage types that are read, and how they are recognised."""
    from lora_forensics.formats import formats_json, formats_markdown, formats_text

    click.echo(formats_json() if as_json else formats_markdown() if markdown else formats_text(_width()), nl=False)
    return 0


@main.command()
@click.option("--markdown", is_flag=True, help="As a Markdown page.")
def metrics(markdown: bool) -> int:
    """Describe every column of the Parquet files: meaning, unit, formula, source."""
    from lora_forensics.reference import columns_markdown, columns_text

    click.echo(columns_markdown() if markdown else columns_text(_width()), nl=False)
    return 0


main.add_command(average.average)
main.add_command(check.check)
main.add_command(compare.compare)
main.add_command(rules.rules)
main.add_command(prune.prune)
main.add_command(table.table)


def _scan_options(settings: dict[str, Any], reports: tuple[str, ...], progress: Any, plots: bool = True) -> ScanOptions:
    from lora_forensics.measure import MeasureOptions
    from lora_forensics.scan import ScanOptions

    return ScanOptions(
        out=settings["out"],
        base=settings["base"],
        trainer=settings["trainer"],
        rescan=settings["rescan"],
        reports=("markdown", "json", *_report_names(reports)),
        plots=plots,
        measure=MeasureOptions(
            settings["device"],
            parse_size(settings["memory"]),
            settings["engine"],
            settings["workers"],
            settings["ray_address"],
            settings["download"],
            spectra=settings["spectra"],
            analyses=settings["analyses"],
            progress=progress,
        ),
        assess=_assess_options(settings),
        selection=chosen(settings),
    )


def _assess_options(settings: dict[str, Any]) -> AssessOptions:
    from lora_forensics.similarity import AssessOptions

    names = ("window", "detector", "similarity", "component", "learning_rate")
    return AssessOptions(**{name: settings[name] for name in names}, thresholds=current().thresholds)


def _refuse_pages(names: tuple[str, ...]) -> None:
    from lora_forensics.reports import REPORTS, PagedReport

    for name in names:
        if name in REPORTS and isinstance(REPORTS[name](), PagedReport):
            raise UsageError(f"{name} holds tables and pictures, and cannot be redacted", "leave out one of the two")


def _report_names(names: tuple[str, ...]) -> tuple[str, ...]:
    from lora_forensics.reports import REPORTS, PagedReport

    for name in names:
        if name not in REPORTS:
            raise UsageError(f"no report is called {name!r}", f"choose from {', '.join(REPORTS)}")
        report = REPORTS[name]()
        if isinstance(report, PagedReport):
            report.check()
    return names


def _print_report(name: str, summary: Summary, verbose: bool = False) -> None:
    from lora_forensics.reports import REPORTS

    options: dict[str, Any] = {}
    if name == "terminal":
        from lora_forensics.console import use_color

        options = {"width": _width(), "color": use_color(), "verbose": verbose}
    click.echo(REPORTS[name](**options).render(summary), nl=False, color=options.get("color"))


def _what_was_measured(new: int, known: int) -> str:
    from lora_forensics.reports.text import count

    if not known:
        return f"measured {count(new, 'checkpoint')}"
    what = f"measured {count(new, 'new checkpoint')}; " if new else "nothing new: "
    return f"{what}{known} known before"


def _width() -> int:
    from lora_forensics.console import terminal_width

    return terminal_width()


def parse_size(text: str) -> int:
    """Bytes of '500MB', '4GB', '1.5GiB' or a plain number.

    Raises:
        UsageError: it is none of these.
    """
    import re

    found = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)i?b?\s*", text.lower())
    size = float(found.group(1)) * 1024 ** " kmgt".index(found.group(2) or " ") if found else 0
    if not 1 <= size < 1 << 63:
        raise UsageError(f"{text!r} is no size", "write it as 500MB or 4GB")
    return int(size)
