"""`scan`: the main job."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from lora_forensics.commands.configured import configured, selecting
from lora_forensics.commands.gating import Gating, gating
from lora_forensics.commands.parameters import PLACE
from lora_forensics.commands.scanning import assessing, measuring, scan_options


@click.command()
@click.argument("runs", nargs=-1, required=True, type=PLACE)
@measuring
@assessing
@click.option(
    "--report",
    "reports",
    multiple=True,
    help="html, junit, sarif or github: report to write to OUT (repeatable; markdown and json always are).",
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
    with console_progress(enabled=not (quiet or as_json or redact)) as progress:
        options = scan_options(settings, reports, progress, plots=not no_plots)
        done = run_scan(runs, replace(options, redact=redact, gate=asked.gate))
    printed = "json" if as_json else "" if quiet else "terminal"
    after = _what_was_measured(done.new, done.known) if printed == "terminal" else ""
    return asked.end(done, printed, redact, verbose, after, strict)


def _what_was_measured(new: int, known: int) -> str:
    from lora_forensics.reports.text import count

    if not known:
        return f"measured {count(new, 'checkpoint')}"
    what = f"measured {count(new, 'new checkpoint')}; " if new else "nothing new: "
    return f"{what}{known} known before"
