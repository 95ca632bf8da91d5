"""Defaults from a file: `--config` and `--no-config`; and which findings are told: `--select` and `--ignore`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from lora_forensics.errors import UsageError

if TYPE_CHECKING:
    from lora_forensics.selection import Selection
    from lora_forensics.settings import Settings

F = TypeVar("F", bound=Callable[..., Any])
_FOUND, _NONE = "lora_forensics.settings", "lora_forensics.no_config"


def configured(command: F) -> F:
    """Options that say which file holds the defaults of the others; read before all others."""
    for option in (
        click.option(
            "--config",
            type=click.Path(path_type=Path, dir_okay=False),
            callback=_configure,
            is_eager=True,
            expose_value=False,
            help="Take defaults from this TOML file, not from the nearest one.",
        ),
        click.option(
            "--no-config",
            is_flag=True,
            callback=_refuse,
            is_eager=True,
            expose_value=False,
            help="Take defaults from no file.",
        ),
    ):
        command = option(command)
    return command


def selecting(command: F) -> F:
    """Options that say which findings are told, and count for exit codes."""
    for option in (
        click.option("--ignore", multiple=True, help="Leave out this rule, its beginning, or a severity (repeatable)."),
        click.option(
            "--select", multiple=True, help="Tell only of this rule, its beginning, or severity (repeatable)."
        ),
    ):
        command = option(command)
    return command


def current() -> Settings:
    """What the file says that this command was configured with."""
    from lora_forensics.settings import Settings

    found = click.get_current_context().meta.get(_FOUND)
    return found if isinstance(found, Settings) else Settings()


def chosen(settings: dict[str, Any]) -> Selection:
    """The findings that this command tells of; takes its options out of the others.

    Raises:
        UsageError: no rule and no severity is called so.
    """
    from lora_forensics.selection import Selection

    return Selection(settings.pop("select", ()), settings.pop("ignore", ()), current().severity)


def _refuse(context: click.Context, _parameter: click.Parameter, value: bool) -> None:
    if value:
        found = context.meta.pop(_FOUND, None)
        if found is not None and context.meta.get(_NONE) == "named":
            raise UsageError("--config and --no-config contradict each other", "give one of them")
        context.meta[_NONE] = True
        context.default_map = None


def _configure(context: click.Context, _parameter: click.Parameter, value: Path | None) -> None:
    from lora_forensics.settings import find_settings, read_settings

    if context.meta.get(_NONE):
        if value is not None:
            raise UsageError("--config and --no-config contradict each other", "give one of them")
        return
    found = find_settings(Path.cwd()) if value is None else read_settings(value)
    context.meta[_FOUND] = found
    context.meta[_NONE] = "named" if value is not None else None
    context.default_map = _defaults(context.command, found.options)


def _defaults(command: click.Command, options: Mapping[str, Any]) -> dict[str, Any]:
    """The values of the options that a command has, by the names of its parameters."""
    names = {flag: str(parameter.name) for parameter in command.params for flag in parameter.opts}
    return {names[f"--{key}"]: value for key, value in options.items() if f"--{key}" in names}
