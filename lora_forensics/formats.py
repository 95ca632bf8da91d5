"""What is read, from the tables of the package: trainers, adapter kinds, base layouts, storage types."""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from lora_forensics.adapters import KINDS
from lora_forensics.checkpoints import TRAINERS, Trap
from lora_forensics.records import SCHEMA
from lora_forensics.reports.json import to_json


@dataclass(frozen=True, slots=True)
class Format:
    """One line of one table; what a table does not tell is empty."""

    name: str
    about: str
    """What it is, in one line."""
    recognised: str = ""
    """The files or tensors that it is recognised by."""
    formula: str = ""
    source: str = ""
    traps: tuple[Trap, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """One table."""

    key: str
    title: str
    formats: tuple[Format, ...]


_COLUMNS = {"about": "what it is", "recognised": "recognised by", "formula": "change", "source": "source"}
"""Field to the head of its column."""

_LAYOUTS = (
    Format("single file", "all parts of a model in one file, in the names of its publisher", "a .safetensors file"),
    Format("Hugging Face folder", "one model, whole or in shards", "model.safetensors, or its index and all shards"),
    Format("diffusers folder", "a folder for each part of a pipeline", "unet/ or transformer/, text_encoder/, ..."),
)
"""What `base_model.files` opens."""


def sections() -> tuple[Section, ...]:
    """All tables, in the order in which a person meets them."""
    return (
        Section("trainers", "Trainers", tuple(_format(entry) for entry in TRAINERS.values())),
        Section("adapters", "Adapter kinds", tuple(_format(entry) for entry in KINDS.values())),
        Section("base_layouts", "Base models", _table("layouts", "LAYOUTS") or _LAYOUTS),
        Section("storages", "Storage types of base weights", _table("storage", "STORAGES")),
    )


def formats_json() -> str:
    """The tables as one document."""
    return to_json({"schema": SCHEMA, **{section.key: [asdict(f) for f in section.formats] for section in sections()}})


def formats_text(width: int = 80) -> str:
    """The tables for the terminal."""
    lines = []
    for section in sections():
        lines += [section.title, ""] if section.formats else []
        for entry in section.formats:
            lines += textwrap.wrap(
                f"{entry.name}  {entry.about}", width, initial_indent="  ", subsequent_indent="      "
            )
            details = [("by ", entry.recognised), ("D = ", entry.formula.removeprefix("D = ")), ("", entry.source)]
            details += [("- ", _trap(trap)) for trap in entry.traps]
            for mark, text in details:
                if text:
                    lines += textwrap.wrap(mark + text, width, initial_indent=" " * 6, subsequent_indent=" " * 8)
        lines += [""] if section.formats else []
    return "\n".join(lines)


def formats_markdown() -> str:
    """The tables as the page docs/formats.md."""
    lines = ["# Formats", "", "What is read. Made by `lora-forensics formats --markdown` from the tables of the code."]
    for section in sections():
        fields = [field for field in _COLUMNS if any(getattr(entry, field) for entry in section.formats)]
        if not section.formats:
            continue
        heads = ["name", *(_COLUMNS[field] for field in fields)]
        lines += ["", f"## {section.title}", "", f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
        for entry in section.formats:
            told = {field: getattr(entry, field).replace("|", "\\|") for field in fields}
            cells = [f"`{text}`" if field == "formula" and text else _literal(text) for field, text in told.items()]
            lines.append(f"| `{entry.name}` | {' | '.join(cells)} |")
        for entry in section.formats:
            if entry.traps:
                lines += ["", f"What misleads in files of `{entry.name}`, and what is done about it:", ""]
                lines += [f"- {_literal(_trap(trap))}" for trap in entry.traps]
    return "\n".join(lines) + "\n"


def _literal(text: str) -> str:
    """Text in which Markdown sees no tags."""
    return text.replace("<", "\\<")


def _trap(trap: Trap) -> str:
    return trap.text if trap.verified else f"{trap.text} (not verified)"


def _format(entry: Any) -> Format:
    """A line from what a variant says of itself; without a word, from the first line of its module."""
    about = getattr(entry, "about", "") or getattr(entry, "description", "")
    about = about or (sys.modules[type(entry).__module__].__doc__ or "").partition("\n")[0]
    words = about if isinstance(about, str) else about.title
    told = {name: getattr(about, name, "") or getattr(entry, name, "") for name in ("recognised", "formula", "source")}
    return Format(entry.name, words, traps=getattr(entry, "traps", ()), **told)


def _table(module: str, name: str) -> tuple[Format, ...]:
    """A table of a module of `base_model`; nothing if there is none."""
    path = f"lora_forensics.base_model.{module}"
    found = getattr(import_module(path), name, {}) if find_spec(path) else {}
    entries: Iterable[Any] = found.values() if isinstance(found, dict) else found
    return tuple(_format(entry) for entry in entries)
