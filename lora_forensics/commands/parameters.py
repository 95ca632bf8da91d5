"""Types of arguments that several commands take."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from lora_forensics.errors import UsageError
from lora_forensics.remote import is_url, place

F = TypeVar("F", bound=Callable[..., Any])


class _Place(click.Path):
    """A path of this machine, or a URL."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What `click.Path` says of paths, nothing yet of URLs."""
        return place(value) if is_url(value) else super().convert(value, param, ctx)


class _Here(click.Path):
    """A path of this machine only: what is read there is read by other libraries, or deleted."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """What `click.Path` says of paths.

        Raises:
            UsageError: it is a URL.
        """
        if is_url(value):
            command = ctx.info_name if ctx else "this command"
            raise UsageError(f"{command} works on folders of this machine only", "copy the run here first")
        return super().convert(value, param, ctx)


PLACE, FOLDER = _Place(path_type=Path), _Place(path_type=Path, file_okay=False)
HERE, FOLDER_HERE = _Here(path_type=Path), _Here(path_type=Path, file_okay=False)


def scanned(command: F) -> F:
    """Options that say which scan's verdict counts."""
    command = click.option("--trainer", help="Look for this trainer's layout only.")(command)
    return click.option(
        "--out",
        type=FOLDER_HERE,
        default=Path("forensics"),
        show_default=True,
        help="Folder of the scan whose verdict counts.",
    )(command)
