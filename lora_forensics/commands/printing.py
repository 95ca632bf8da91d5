"""What commands print: reports, lines, and complaints on stderr."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from lora_forensics.records import Summary


def complain(message: str, hint: str = "", details: Iterable[str] = ()) -> None:
    """A line on stderr, more below it, and what to try."""
    from lora_forensics.reports.text import plain

    said = [f"lora-forensics: {plain(message)}", *(f"    {plain(line)}" for line in details)]
    say("\n".join([*said, f"  try: {plain(hint)}"] if hint else said), err=True)


def say(lines: str, err: bool = False) -> None:
    """Lines that fit into a terminal; in a pipe each stays whole, for programs that read lines."""
    if (sys.stderr if err else sys.stdout).isatty():
        from lora_forensics.console import terminal_width
        from lora_forensics.reports.text import fitted

        lines = "\n".join(fitted(lines, terminal_width()))
    click.echo(lines, err=err)


def print_report(name: str, summary: Summary, verbose: bool = False) -> None:
    """A report on stdout; the one for terminals as wide as this one."""
    from lora_forensics.reports import REPORTS

    options: dict[str, Any] = {}
    if name == "terminal":
        from lora_forensics.console import terminal_width, use_color

        options = {"width": terminal_width(), "color": use_color(), "verbose": verbose}
    click.echo(REPORTS[name](**options).render(summary), nl=False, color=options.get("color"))
