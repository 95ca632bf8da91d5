"""Options of every command that scans, and what they stand for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_forensics.commands.configured import chosen, current
from lora_forensics.commands.parameters import FOLDER, PLACE
from lora_forensics.errors import UsageError

if TYPE_CHECKING:
    from lora_forensics.scan import ScanOptions
    from lora_forensics.similarity import AssessOptions

F = TypeVar("F", bound=Callable[..., Any])

SPECTRA = "All singular values, also of changes without a thin core."


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
            click.option("--spectra", is_flag=True, help=SPECTRA),
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


def scan_options(settings: dict[str, Any], reports: tuple[str, ...], progress: Any, plots: bool = True) -> ScanOptions:
    """The options of `measuring`, `assessing` and `selecting` as values."""
    from lora_forensics.measure import MeasureOptions
    from lora_forensics.scan import ScanOptions

    return ScanOptions(
        out=settings["out"],
        base=settings["base"],
        trainer=settings["trainer"],
        rescan=settings["rescan"],
        reports=("markdown", "json", *report_names(reports)),
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
        assess=assess_options(settings),
        selection=chosen(settings),
    )


def assess_options(settings: dict[str, Any]) -> AssessOptions:
    """Those of `assessing`."""
    from lora_forensics.similarity import AssessOptions

    names = ("window", "detector", "similarity", "component", "learning_rate")
    return AssessOptions(**{name: settings[name] for name in names}, thresholds=current().thresholds)


def report_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, once all are known and what they need is installed.

    Raises:
        UsageError: there is no such report.
    """
    from lora_forensics.reports import REPORTS, PagedReport

    for name in names:
        if name not in REPORTS:
            raise UsageError(f"no report is called {name!r}", f"choose from {', '.join(REPORTS)}")
        report = REPORTS[name]()
        if isinstance(report, PagedReport):
            report.check()
    return names


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
