"""Experts: one tensor each on disk and all in one in memory, or the other way round; both answer to both spellings.

A fused tensor holds (experts, 2 * width, in) as `gate_up_proj`, gate first, and (experts, out, width) as `down_proj`
(transformers 5); some families store each expert in x out. PEFT names an adapter on such a parameter after the module
that holds it (`experts`, `experts.base_layer`): there its shape, (experts * out, in), tells which parameter it is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import readings, unwrap
from lora_forensics.base_model.slices import ModuleShape, Parts, Shape
from lora_forensics.records import RowSlice

_PATH = re.compile(r"(?P<layer>.*?)(?:[a-z][^.]*\.)?experts(?:\.(?P<number>\d+))?(?:\.(?P<name>[a-z]\w*))?")
"""The step before `experts` is left out: it has other names in memory than on disk, and a layer has one."""
_LLAMA_CPP = re.compile(r"blk\.(\d+)\.ffn_(gate|up|down|gate_up)_exps")
_ROLES = {
    "gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down",
    "gate_up_proj": "gate_up",
}  # fmt: skip


@dataclass(slots=True)
class _Layer:
    """All experts of a layer, by role and number."""

    slices: dict[str, dict[int, Parts]] = field(default_factory=dict)
    transposed: bool = False

    def sources(self, role: str | None, number: int | None) -> Iterator[Source]:
        """The weights of one expert, or of all stacked; without a role those of every role that PEFT can name."""
        for each in (role,) if role else ("gate_up", "down"):
            experts = self.slices.get(each, {})
            chosen = sorted(experts) if number is None else [number]
            if experts and all(n in experts for n in chosen):
                yield Source(tuple(part for n in chosen for part in experts[n]), self.transposed)


def aliases(index: NameIndex, modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """The weights of modules that name experts."""
    paths = {reading.path for name in modules for reading in readings(name)}
    wanted = {path: found for path in paths if (found := _PATH.fullmatch(path.removesuffix(".base_layer")))}
    if not wanted:
        return
    layers = dict(_layers(index))
    for path, found in wanted.items():
        name, number = found["name"], found["number"]
        if name and name not in _ROLES:
            continue
        for (component, layer), experts in layers.items():
            if layer == unwrap(found["layer"]):
                for source in experts.sources(_ROLES.get(name), None if number is None else int(number)):
                    yield component, path, source


def _layers(index: NameIndex) -> Iterator[tuple[tuple[str, str], _Layer]]:
    layers: dict[tuple[str, str], _Layer] = {}
    fused: dict[tuple[str, str], dict[str, str]] = {}
    for component, paths in index.paths.items():
        for path, tensor in paths.items():
            found = _PATH.fullmatch(_LLAMA_CPP.sub(r"layers.\1.experts.\2_proj", path.removesuffix(".weight")))
            role = _ROLES.get(found["name"]) if found else None
            if found is None or role is None:
                continue
            key, axes = (component, unwrap(found["layer"])), len(index.shapes[tensor])
            if found["number"] is not None and axes == 2:
                slices = layers.setdefault(key, _Layer()).slices
                slices.setdefault(role, {})[int(found["number"])] = (RowSlice(tensor),)
            elif found["number"] is None and axes == 3:
                fused.setdefault(key, {})[role] = tensor
    for key, tensors in fused.items():
        layers[key] = _unfuse(tensors, index.shapes)
    for layer in layers.values():
        gate, up = layer.slices.get("gate", {}), layer.slices.get("up", {})
        if gate and gate.keys() == up.keys():
            layer.slices.setdefault("gate_up", {n: gate[n] + up[n] for n in gate})
    yield from layers.items()


def _unfuse(tensors: Mapping[str, str], shapes: Mapping[str, Shape]) -> _Layer:
    both, down = shapes.get(tensors.get("gate_up", ""), (0, 0, 0)), shapes.get(tensors.get("down", ""), (0, 0, 0))
    layer = _Layer(transposed=both[2] == 2 * down[1] > 0 and both[1] == down[2])
    for role, tensor in tensors.items():
        numbers = range(shapes[tensor][0])
        layer.slices[role] = {n: (RowSlice(tensor, None, n),) for n in numbers}
        if role == "gate_up" and not layer.transposed:  # in x out there are no rows to halve
            half = shapes[tensor][1] // 2
            layer.slices["gate"] = {n: (RowSlice(tensor, (0, half), n),) for n in numbers}
            layer.slices["up"] = {n: (RowSlice(tensor, (half, 2 * half), n),) for n in numbers}
    return layer
