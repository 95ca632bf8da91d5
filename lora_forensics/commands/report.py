"""`report`: a scan rendered again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from lora_forensics.commands.configured import chosen, configured, current, selecting
from lora_forensics.commands.gating import Gating, gating
from lora_forensics.commands.parameters import PLACE
from lora_forensics.commands.scanning import assess_options, assessing, report_names


@click.command()
@click.argument("out", type=PLACE)
@assessing
@click.option(
    "--report",
    "reports",
    multiple=True,
    help="html, junit, sarif, github, markdown or json (repeatable; those that are there if left out).",
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
    options = assess_options(settings) if changed or current().thresholds != Thresholds() else None
    names = report_names(reports) or present(out)
    summary, lost = run_report(out, names, options, selection, asked.gate)
    if redact:
        write_redacted(summary, names, plots=True)
    failed = tuple((entry.path.relative_to(out).as_posix(), entry.reason) for entry in lost)
    done = Scan(summary, 0, 0, failed, selection)
    return asked.end(done, "json" if as_json else "terminal", redact, verbose)
