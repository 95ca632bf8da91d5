"""What commands print: reports, and complaints on stderr."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_forensics.records import Summary


def complain(message: str, hint: str = "", details: Iterable[str] = ()) -> None:
    """A line on stderr, more below it, and what to try."""
    from lora_forensics.reports.text import plain

    click.echo(f"lora-forensics: {plain(message)}", err=True)
    for line in details:
        click.echo(f"    {plain(line)}", err=True)
    if hint:
        click.echo(f"  try: {plain(hint)}", err=True)


def print_report(name: str, summary: Summary, verbose: bool = False) -> None:
    """A report on stdout; the one for terminals as wide as this one."""
    from lora_forensics.reports import REPORTS

    options: dict[str, Any] = {}
    if name == "terminal":
        from lora_forensics.console import terminal_width, use_color

        options = {"width": terminal_width(), "color": use_color(), "verbose": verbose}
    click.echo(REPORTS[name](**options).render(summary), nl=False, color=options.get("color"))
