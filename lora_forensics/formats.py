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
    """One line of one table."""

    name: str
    about: str
    recognised: str = ""
    traps: tuple[Trap, ...] = ()


@dataclass(frozen=True, slots=True)
class Section:
    """One table."""

    key: str
    title: str
    formats: tuple[Format, ...]


_LAYOUTS = (
    Format("single file", "all parts of a model in one file, in the names of its publisher", "a .safetensors file"),
    Format(
        "Hugging Face folder", "one model in one file or in shards", "model.safetensors, or its index and all shards"
    ),
    Format("diffusers folder", "a folder for each part of a pipeline", "unet/ or transformer/, text_encoder/, ..."),
)
"""Until `base_model` has a table of its own."""


def sections() -> tuple[Section, ...]:
    """All tables, in the order in which a person meets them."""
    return (
        Section("trainers", "Trainers", tuple(_format(entry) for entry in TRAINERS.values())),
        Section("adapters", "Adapter kinds", tuple(_format(entry) for entry in KINDS.values())),
        Section("base_layouts", "Base models", _table("LAYOUTS") or _LAYOUTS),
        Section("storages", "Storage types of base weights", _table("STORAGES")),
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
            details = [f"by {entry.recognised}"] if entry.recognised else []
            details += [f"- {_trap(trap)}" for trap in entry.traps]
            for detail in details:
                lines += textwrap.wrap(detail, width, initial_indent="      ", subsequent_indent="        ")
        lines += [""] if section.formats else []
    return "\n".join(lines)


def formats_markdown() -> str:
    """The tables as the page docs/formats.md."""
    lines = ["# Formats", "", "What is read. Made by `lora-forensics formats --markdown` from the tables of the code."]
    for section in sections():
        if not section.formats:
            continue
        lines += ["", f"## {section.title}", "", "| name | what it is | recognised by |", "|---|---|---|"]
        for entry in section.formats:
            about, recognised = (text.replace("|", "\\|") for text in (entry.about, entry.recognised))
            lines.append(f"| `{entry.name}` | {about} | {recognised} |")
        for entry in section.formats:
            if entry.traps:
                lines += ["", f"What misleads in files of `{entry.name}`, and what is done about it:", ""]
                lines += [f"- {_trap(trap)}" for trap in entry.traps]
    return "\n".join(lines) + "\n"


def _trap(trap: Trap) -> str:
    return trap.text if trap.verified else f"{trap.text} (not verified)"


def _format(entry: Any) -> Format:
    """A line from what a variant says of itself; without `about`, from the first line of its module."""
    about = getattr(entry, "about", "") or (sys.modules[type(entry).__module__].__doc__ or "").partition("\n")[0]
    return Format(entry.name, about, getattr(entry, "recognised", ""), getattr(entry, "traps", ()))


def _table(name: str) -> tuple[Format, ...]:
    """A table of `base_model` by its name; nothing if there is none."""
    module = f"lora_forensics.base_model.{name.lower()}"
    found = getattr(import_module(module), name, {}) if find_spec(module) else {}
    entries: Iterable[Any] = found.values() if isinstance(found, dict) else found
    return tuple(_format(entry) for entry in entries)
