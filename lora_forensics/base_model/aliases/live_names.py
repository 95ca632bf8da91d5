"""Modules named as `transformers` calls them in memory: its own conversions of checkpoints run over row tracers.

Which conversions are the model's cannot be told from names alone: the one that places most modules is taken, then the
one that places most of the others, as a model may hold models.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from functools import partial
from importlib import import_module
from typing import Any

from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import MAIN, TEXT, readings, unwrap
from lora_forensics.base_model.slices import ModuleShape, join
from lora_forensics.base_model.tracers import trace
from lora_forensics.records import RowSlice

_PEFT = "base_model."
_NUMBER = re.compile(r"(?:^|\.)(\d+)\.")


def aliases(index: NameIndex, modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """Names in memory of the tensors of a language or vision model."""
    wanted = {unwrap(next(readings(n)).path) for n in modules if n.startswith(_PEFT) or not index.denoiser()}
    main = {**index.paths.get(TEXT, {}), **index.paths.get(MAIN, {})}
    if not any(map(_NUMBER.search, wanted)) or not main:
        return
    conversions = _conversions()
    sample = [path for path in main if (number := _NUMBER.search(path)) is None or number[1] in "01"]
    while wanted and conversions:
        hits = [len(wanted & {_module(_renamed(path, conversion)[0]) for path in sample}) for conversion in conversions]
        best = max(range(len(hits)), key=hits.__getitem__)
        if not hits[best]:
            return
        conversion = conversions.pop(best)
        for found in trace({path: index.shapes[main[path]] for path in main}, partial(_converted, conversion)):
            if found.name.endswith(".weight") and _module(found.name) in wanted:
                parts = join((RowSlice(main[path], (start, stop)) for path, start, stop in found.runs), index.shapes)
                yield MAIN, found.name.removesuffix(".weight"), Source(parts, found.transposed)
                wanted.discard(_module(found.name))


def _conversions() -> list[Any]:
    """Those of the installed library; none where it is absent, or keeps them elsewhere."""
    try:
        table: Any = import_module("transformers.conversion_mapping")
        return list(table._build_checkpoint_conversion_mapping().values())
    except (ImportError, AttributeError):
        return []


def _module(path: str) -> str:
    return unwrap(path.removesuffix(".weight"))


def _renamed(path: str, conversion: list[Any]) -> tuple[str, Any]:
    """The name in memory, and the transform that also computes; the order is that of the library."""
    for transform in conversion:
        if not hasattr(transform, "operations"):
            path = transform.rename_source_key(path)[0]
    for transform in conversion:
        if hasattr(transform, "operations"):
            name, pattern = transform.rename_source_key(path)
            if pattern is not None:
                return name, (transform, pattern)
    return path, None


def _converted(conversion: list[Any], columns: Mapping[str, Any]) -> dict[str, Any]:
    out: dict[str, Any] = {}
    computed: dict[str, tuple[Any, dict[str, list[Any]]]] = {}
    for path in sorted(columns, key=_natural):
        name, found = _renamed(path, conversion)
        if found is None:
            out[name] = columns[path]
        else:
            transform, pattern = found
            computed.setdefault(name, (transform, {}))[1].setdefault(pattern, []).append(columns[path])
    for name, (transform, tensors) in computed.items():
        for target, tensor in _computed(name, transform, tensors).items():
            out[target] = tensor[0] if isinstance(tensor, list) else tensor
    return out


def _computed(name: str, transform: Any, tensors: dict[str, Any]) -> dict[str, Any]:
    """What a transform makes of the tensors that share a target; nothing where it needs the model itself."""
    sources, targets = list(transform.source_patterns), list(transform.target_patterns)
    try:
        for operation in copy.deepcopy(transform.operations):
            tensors = operation.convert(
                tensors,
                source_patterns=sources,
                target_patterns=targets,
                full_layer_name=name,
                model=_Unknown(),
                config=_Unknown(),
            )
    except Exception:  # noqa: BLE001 - it asks for the model's configuration, or was not made for these shapes
        return {}
    prefix, _, suffix = next((name.partition(target) for target in tensors if target in name), ("", "", ""))
    return {prefix + target + suffix: tensor for target, tensor in tensors.items()}


class _Unknown:
    """A configuration that nobody has: what depends on it is no answer, defaults included."""

    def __getattr__(self, name: str) -> Any:
        raise LookupError(name)


def _natural(path: str) -> list[tuple[int, str]]:
    """Numbers in order of their size: experts are stacked in it."""
    return [(int(step), "") if step.isdecimal() else (-1, step) for step in path.split(".")]
