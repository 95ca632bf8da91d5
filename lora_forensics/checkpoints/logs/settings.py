"""Settings that trainers copy beside their checkpoints: YAML and TOML to plain objects, or nothing."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

_LARGEST = 1 << 20
"""Bytes of a file of settings; what is larger is something else."""
_BASE = re.compile(r"^base_model:\s*(?:-\s*)?[\"']?([^\s\"']+)", re.MULTILINE)


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file, without any type that is not plain; empty if it cannot be read."""
    text = _text(path)
    if not text:
        return {}
    import yaml

    try:
        document = yaml.load(text, _loader())  # noqa: S506 - a SafeLoader that drops what it does not know
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError):
        return {}
    return document if isinstance(document, dict) else {}


def read_toml(path: Path) -> dict[str, Any]:
    """The table in a TOML file; empty if it cannot be read."""
    import tomllib

    try:
        return tomllib.loads(_text(path))
    except (tomllib.TOMLDecodeError, RecursionError, ValueError):
        return {}


def base_of_card(folder: Path) -> str | None:
    """The base model that a model card (README.md) in this folder names."""
    found = _BASE.search(_text(folder / "README.md"))
    return found[1] if found else None


def nested(document: object, *keys: str | int) -> Any:
    """The value behind keys of nested objects and positions of lists; None if one of them is missing."""
    for key in keys:
        if isinstance(document, dict):
            document = document.get(key)
        elif isinstance(document, list) and isinstance(key, int) and key < len(document):
            document = document[key]
        else:
            return None
    return document


def _text(path: Path) -> str:
    try:
        return path.read_text("utf-8", errors="replace") if path.stat().st_size <= _LARGEST else ""
    except OSError:
        return ""


def _loader() -> Any:
    import yaml

    plain: Any = type("Plain", (yaml.SafeLoader,), {})
    plain.add_multi_constructor("", _nothing)  # tags of Python objects; the rest of the file stays readable
    # YAML 1.1 takes 1e-4 for text, and that is how people write rates
    number = re.compile(r"[-+]?\d[\d_]*(\.\d*)?[eE][-+]?\d+$")
    plain.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return plain


def _nothing(_loader: object, _suffix: str, _node: object) -> None:
    """What stands for a value of a type that is not plain."""
