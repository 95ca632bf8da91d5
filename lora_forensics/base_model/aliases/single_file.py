"""A base in its publisher's layout answers to the names of diffusers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace

from lora_forensics.base_model.aliases.converters import (
    LDM,
    ldm_unet_converter,
    single_file_utils,
    transformer_converter,
)
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import CLIP_1, CLIP_2, DENOISERS
from lora_forensics.base_model.slices import ModuleShape, Shape, join
from lora_forensics.base_model.tracers import Convert, lenient, trace
from lora_forensics.records import RowSlice

_OPEN_CLIP = ("conditioner.embedders.1.model.", "conditioner.embedders.0.model.", "cond_stage_model.model.")

_DIFFUSERS = ("transformer/", "transformer_2/", "unet/")
"""Folders whose names are those of diffusers already."""


def aliases(index: NameIndex, _modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """Names of diffusers for the denoiser and for the OpenCLIP text encoders of a single file."""
    for component in DENOISERS:
        main = index.denoiser(component)
        if any(path.startswith("input_blocks.") for path in main):
            names = {LDM + path: name for path, name in main.items()}
            yield from _traced(index, component, names, ldm_unet_converter(names))
        elif main and not any(name.startswith(_DIFFUSERS) for name in main.values()):
            convert = transformer_converter({path: index.shapes[name] for path, name in main.items()})
            if convert is not None:  # a file may lack what the converter asks for: then a part is converted
                found = list(_traced(index, component, main, convert))
                yield from found or _traced(index, component, main, lenient(convert))
    for component in (CLIP_1, CLIP_2):
        for prefix in _OPEN_CLIP:
            own = {name: name for name in index.paths.get(component, {}).values() if name.startswith(prefix)}
            if own:
                yield from _traced(index, component, own, _open_clip(prefix, index.shapes))


def _traced(
    index: NameIndex, component: str, names: Mapping[str, str], convert: Convert
) -> Iterator[tuple[str, str, Source]]:
    """What a converter makes of base tensors that it knows under `names`."""
    for found in trace({path: index.shapes[name] for path, name in names.items()}, convert):
        if found.name.endswith(".weight"):
            parts = join((RowSlice(names[path], (start, stop)) for path, start, stop in found.runs), index.shapes)
            yield component, found.name.removesuffix(".weight"), Source(parts, found.transposed)


def _open_clip(prefix: str, shapes: Mapping[str, Shape]) -> Convert:
    convert = single_file_utils().convert_open_clip_checkpoint
    width = shapes.get(f"{prefix}ln_final.weight", (0,))[0]
    model = SimpleNamespace(config=SimpleNamespace(hidden_size=width))
    return lambda columns: convert(model, columns, prefix=prefix)
