"""Modules named in another layout than the base: diffusers' converters run over the modules themselves.

A publisher's name (`double_blocks.0.img_attn.qkv`) on a diffusers folder goes through the single-file converters,
an XLabs name through their LoRA converter. What they make of a module's rows is looked up among the names of the base,
so that a converter of the wrong family leaves nothing behind.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from importlib import import_module
from types import CodeType
from typing import Any

from lora_forensics.base_model.aliases.converters import transformer_converters
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import DENOISERS, readings
from lora_forensics.base_model.slices import ModuleShape, cut, join
from lora_forensics.base_model.tracers import Absent, Convert, lenient, names_out, trace
from lora_forensics.records import RowSlice

_STEP = re.compile(r"[A-Za-z0-9]+(?:_[A-Za-z0-9]+)+")
_XLABS = re.compile(r"processor\.\w+_lora\d?$")


def aliases(index: NameIndex, modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """The weights of modules whose own names the base does not have."""
    for component in DENOISERS:
        yield from _aliases(index, component, modules)


def _aliases(index: NameIndex, component: str, modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    base = index.denoiser(component)
    likeliest = {next(readings(name)): shape[0] for name, shape in modules.items()}
    rows = {reading.path: n for reading, n in likeliest.items() if n and component in reading.components}
    if not base or not rows:
        return
    xlabs = {f"{path}.up.weight": n for path, n in rows.items() if _XLABS.search(path)}
    if xlabs:
        yield from _placed(index, component, xlabs, _xlabs, ".up.weight")
        return
    base_steps = set(_STEP.findall(" ".join(base)))
    depth = max((int(n) for path in base for n in re.findall(r"\.(\d+)\.", path)), default=0)
    # all before any is handed on: the index must not learn one converter's names while others are asked
    found: list[tuple[str, str, Source]] = []
    for convert in transformer_converters():
        literals = set(_literals(convert.__code__))
        dotted = {f"{_dotted(path, base_steps | literals)}.weight": n for path, n in rows.items()}
        found += _placed(index, component, dotted, lenient(convert, _every_block(literals, depth)), ".weight")
    yield from found


def _placed(
    index: NameIndex, component: str, rows: Mapping[str, int], convert: Convert, suffix: str
) -> Iterator[tuple[str, str, Source]]:
    """Modules all of whose rows arrive at weights of this base."""
    shapes = {name: (n, 1) for name, n in rows.items()}
    outcome = (_diffusers_path(name) for name in names_out(shapes, convert))
    if not any(sources for path in outcome for sources in index.find((component,), path)):
        return
    arrivals: dict[str, list[tuple[int, int, list[RowSlice]]]] = {}
    for found in trace(shapes, convert):
        tiers = index.find((component,), _diffusers_path(found.name))
        source = next((sources[0] for sources in tiers if len(sources) == 1), None)
        offset = 0
        for module, start, stop in found.runs:
            if source is not None:
                pieces = cut(source.parts, offset, offset + stop - start, index.shapes)
                arrivals.setdefault(module, []).append((start, stop, pieces))
            offset += stop - start
    for module, landed in arrivals.items():
        landed.sort(key=lambda item: item[0])
        edges = [0, *(stop for _, stop, _ in landed)]
        if [start for start, _, _ in landed] == edges[:-1] and edges[-1] == rows[module]:
            parts = join((part for _, _, pieces in landed for part in pieces), index.shapes)
            yield component, module.removesuffix(suffix), Source(parts)


def _diffusers_path(name: str) -> str:
    return re.sub(r"^transformer\.|(\.lora_B)?\.weight$", "", name)


def _xlabs(columns: dict[str, Any]) -> Mapping[str, Any]:
    utils: Any = import_module("diffusers.loaders.lora_conversion_utils")
    downs = dict.fromkeys((name.replace(".up.", ".down.") for name in columns), Absent())
    return utils._convert_xlabs_flux_lora_to_diffusers({**downs, **columns})  # type: ignore[no-any-return]


def _dotted(path: str, steps: Collection[str]) -> str:
    """Put the dots back into a flattened path: between all words but those that form a known step."""
    if "." in path:
        return path
    words, out = path.split("_"), []
    while words:
        length = next((n for n in range(len(words), 1, -1) if "_".join(words[:n]) in steps), 1)
        out.append("_".join(words[:length]))
        del words[:length]
    return ".".join(out)


def _literals(code: CodeType) -> Iterator[str]:
    """Steps with an underscore in the text that a converter's code holds: the names that it knows."""
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _literals(constant)
        for text in constant if isinstance(constant, tuple) else (constant,):
            if isinstance(text, str):
                yield from _STEP.findall(text)


def _every_block(literals: Iterable[str], depth: int) -> list[str]:
    """Names that stand for all blocks: an adapter may cover some, and converters count them."""
    return [f"{step}.{n}.absent" for step in literals if step.endswith("_blocks") for n in range(depth + 1)]
