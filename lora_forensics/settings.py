"""Settings in a file: `lora-forensics.toml`, or `[tool.lora-forensics]` in pyproject.toml, searched upward.

One table says what may stand there; the commands take their defaults from it, so that the command line wins.
"""

from __future__ import annotations

import difflib
import os
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from lora_forensics.errors import UsageError
from lora_forensics.remote import is_url
from lora_forensics.rules import SEVERITIES, Severity, Thresholds, matching, rule_of

FILE = "lora-forensics.toml"
PROJECT = "pyproject.toml"
_TABLE = "lora-forensics"

KINDS: dict[str, tuple[type, ...]] = {
    "text": (str,),
    "path": (str,),
    "whole number": (int,),
    "number": (int, float),
    "text or whole number": (str, int),
    "true or false": (bool,),
    "list of texts": (list, str),
    "list of paths": (list, str),
}
"""What a value may be to the types that TOML gives for it; a list of one may be written without brackets."""


@dataclass(frozen=True, slots=True)
class Setting:
    """One key of the file; an option of the same name has the same meaning."""

    name: str
    kind: str
    """A key of `KINDS`."""
    example: str
    """As TOML."""
    about: str


SETTINGS: tuple[Setting, ...] = (
    Setting("base", "list of paths", '["models/sdxl.safetensors"]', "base model: files or folders"),
    Setting("out", "path", '"forensics"', "folder for tables, plots and reports"),
    Setting("trainer", "text", '"kohya"', "look for this trainer's layout only"),
    Setting("download", "true or false", "true", "the base model may be fetched from the Hugging Face hub"),
    Setting("device", "text", '"cpu"', "auto, cpu, cuda, cuda:N or mps"),
    Setting("engine", "text", '"processes"', "serial, processes or ray"),
    Setting("workers", "whole number", "4", "workers of processes or ray"),
    Setting("ray-address", "text", '"auto"', "Ray cluster to work on"),
    Setting("memory", "text", '"4GB"', "checkpoints that a worker holds at once"),
    Setting("spectra", "true or false", "true", "all singular values"),
    Setting("analysis", "list of texts", '["intruders"]', "columns that cost more"),
    Setting("component", "list of texts", '["unet"]', "components that enter CS, or all"),
    Setting("similarity", "text", '"rowwise"', "flat or rowwise"),
    Setting("window", "text or whole number", '"epoch"', "auto, epoch, or a number of checkpoints"),
    Setting("detector", "text", '"algorithm1"', "a rule of docs/method.md"),
    Setting("learning-rate", "number", "1e-4", "divide by this rate instead of the recorded ones"),
    Setting("report", "list of texts", '["markdown"]', "reports to write"),
    Setting("fail-on", "list of texts", '["error", "last-is-past"]', "rules and severities that make the exit code 1"),
    Setting("baseline", "path", '"accepted.json"', "a file of findings that are accepted"),
    Setting("select", "list of texts", '["error", "warning"]', "report these rules and severities only"),
    Setting("ignore", "list of texts", '["weak-evidence"]', "leave these rules and severities out"),
    Setting("no-plots", "true or false", "true", "draw no figures"),
    Setting("strict", "true or false", "true", "exit with 2 if a damaged file had to be skipped"),
    Setting("verbose", "true or false", "true", "list everything"),
)
"""Keys of the file, besides the tables `severity` and `thresholds`."""

TABLES = ("severity", "thresholds")


@dataclass(frozen=True, slots=True)
class Settings:
    """What a file says."""

    path: Path | None = None
    """The file; None where there is none."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """Setting to its value; paths are relative to the current folder."""
    severity: Mapping[str, Severity] = field(default_factory=dict)
    """Rule to the severity that its findings have."""
    thresholds: Thresholds = field(default_factory=Thresholds)


def find_settings(start: Path) -> Settings:
    """The nearest file at or above a folder; in one folder lora-forensics.toml counts before pyproject.toml.

    Raises:
        UsageError: the file is no TOML, or says what cannot be meant.
    """
    for folder in (start, *start.parents):
        if (folder / FILE).is_file():
            return read_settings(folder / FILE)
        project = folder / PROJECT
        if project.is_file() and (document := _tool(project, _read(project))) is not None:
            return _settings(project, document)
    return Settings()


def read_settings(path: Path) -> Settings:
    """The settings in one file.

    Raises:
        UsageError: it cannot be read, is no TOML, or says what cannot be meant.
    """
    document = _read(path)
    if path.name == PROJECT:
        document = _tool(path, document) or {}
    return _settings(path, document)


def settings_markdown() -> str:
    """The page docs/configuration.md."""
    lines = [
        "# Configuration",
        "",
        "`scan`, `pick`, `probe`, `report` and `inspect` take defaults from the nearest `lora-forensics.toml`, or a",
        "`pyproject.toml` with a table `[tool.lora-forensics]`, in the current folder or above it; `--config FILE`",
        "names another, `--no-config` reads none. One file counts, they are not merged; in one folder it is",
        "`lora-forensics.toml`. An option on the command line wins, and replaces a whole list: with `--ignore X` what",
        "the file ignores is told again. What is both selected and ignored is ignored. Paths are relative to the file.",
        "A key that does not exist, or a value of another type, is an error (exit code 2). Made from a table.",
        "",
        "```toml",
        'fail-on = ["error", "last-is-past"]',
        'ignore = ["weak-evidence"]',
        "window = 4",
        "",
        "[severity]",
        '"uneven-cadence" = "info"',
        "",
        "[thresholds]",
        "outlier_factor = 20",
        "```",
        "",
        "| key | value | example | what |",
        "|---|---|---|---|",
    ]
    lines += [f"| `{s.name}` | {s.kind} | `{s.example}` | {s.about} |" for s in SETTINGS]
    lines += [
        "",
        "## severity",
        "",
        "A rule of [the table](rules.md) to `info`, `warning` or `error`: all its findings have this severity in",
        "reports, and for `--fail-on`, `--select` and `--ignore`.",
        "",
        "## thresholds",
        "",
        "Bounds that rules compare with: rules of thumb for finding damage, above 0; `inf` is never reached. A change",
        "draws the verdict anew.",
        "",
        "| key | default | what |",
        "|---|---|---|",
    ]
    lines += [f"| `{f.name}` | {f.default:g} | {f.metadata['about']} |" for f in fields(Thresholds)]
    return "\n".join(lines) + "\n"


def _read(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_bytes().decode("utf-8-sig"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}", "check the path of --config") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is no TOML: {error}", "correct it, or pass --no-config") from error


def _tool(path: Path, document: Mapping[str, Any]) -> dict[str, Any] | None:
    """The tool's own table of a pyproject.toml.

    Raises:
        UsageError: something else stands in its place, or it is spelled in another way.
    """
    tools = document.get("tool")
    for name, table in tools.items() if isinstance(tools, dict) else ():
        if name.lower().replace("_", "-") == _TABLE:
            if name != _TABLE or not isinstance(table, dict):
                raise UsageError(f"{path}: tool.{name} is no table of settings", f"write it as [tool.{_TABLE}]")
            return table
    return None


def _settings(path: Path, document: Mapping[str, Any]) -> Settings:
    known = {setting.name: setting for setting in SETTINGS}
    options = {}
    for name, value in document.items():
        key = name.replace("_", "-")
        if key in options:
            raise UsageError(f"{path}: {key} is set twice, as {key} and as {key.replace('-', '_')}", "leave one out")
        if key in known:
            options[key] = _value(path, known[key], value)
        elif name not in TABLES:
            raise _unknown(path, "setting", name, (*known, *TABLES))
        elif not isinstance(value, dict):
            raise UsageError(f"{path}: {name} is {_spelled(value)}, not a table", f"write it as [{name}]")
    _check_rules(path, options)
    severity = document.get("severity", {})
    for rule, level in severity.items():
        try:
            rule_of(rule)
        except UsageError as error:
            raise UsageError(f"{path}: severity: {error.message}", error.hint) from error
        if level not in SEVERITIES:
            raise UsageError(f"{path}: the severity of {rule} is {_spelled(level)}", f"use {', '.join(SEVERITIES)}")
    return Settings(path, options, severity, _thresholds(path, document.get("thresholds", {})))


def _check_rules(path: Path, options: Mapping[str, Any]) -> None:
    """Refuse names of rules that stand for nothing, and say in which file.

    Raises:
        UsageError: there is such a name.
    """
    for key in ("fail-on", "select", "ignore"):
        try:
            matching(options.get(key, ()))
        except UsageError as error:
            raise UsageError(f"{path}: {key}: {error.message}", error.hint) from error


def _thresholds(path: Path, table: Mapping[str, Any]) -> Thresholds:
    known = {entry.name: entry for entry in fields(Thresholds)}
    for name, value in table.items():
        if name not in known:
            raise _unknown(path, "threshold", name, known)
        whole = isinstance(known[name].default, int)
        if isinstance(value, bool) or not isinstance(value, int if whole else (int, float)):
            kind = "whole number" if whole else "number"
            hint = f"for example {name} = {known[name].default:g}"
            raise UsageError(f"{path}: the threshold {name} is {_spelled(value)}, not a {kind}", hint)
    try:
        return Thresholds(**table)
    except UsageError as error:
        raise UsageError(f"{path}: {error.message}", error.hint) from error


def _value(path: Path, setting: Setting, value: Any) -> Any:
    """A value as its option takes it.

    Raises:
        UsageError: it is of another type.
    """
    kinds = KINDS[setting.kind]
    entries = value if isinstance(value, list) else [value]
    fits = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits or (list in kinds and not all(isinstance(entry, str) for entry in entries)):
        hint = f"for example {setting.name} = {setting.example}"
        raise UsageError(f"{path}: {setting.name} is {_spelled(value)}, not a {setting.kind}", hint)
    if "path" in setting.kind:
        entries = [_beside(path, entry) for entry in entries]
    return tuple(entries) if list in kinds else entries[0]


def _beside(path: Path, value: str) -> str:
    """A path that is relative to the file, as seen from the current folder."""
    expanded = os.path.expanduser(value)
    if is_url(value) or os.path.isabs(expanded) or path.parent.resolve() == Path.cwd():
        return expanded
    return str(path.parent / expanded)


def _unknown(path: Path, what: str, name: str, known: Iterable[str]) -> UsageError:
    near = difflib.get_close_matches(name, list(known), 1)
    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(known)}"
    return UsageError(f"{path}: no {what} is called {name!r}", hint)


def _spelled(value: Any) -> str:
    return ("true" if value else "false") if isinstance(value, bool) else repr(value)
