"""A GGUF file of a language model or text encoder answers to the names that llama.cpp's converter took it from."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec

from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import MAIN, TEXT
from lora_forensics.base_model.slices import ModuleShape
from lora_forensics.records import RowSlice

_BLOCK = re.compile(r"(?<=\bblk\.)\d+(?=\.)")


def aliases(index: NameIndex, _modules: Mapping[str, ModuleShape]) -> Iterator[tuple[str, str, Source]]:
    """All names that the `gguf` library's own table knows for each tensor."""
    tensors = {path: tensor for paths in index.paths.values() for path, tensor in paths.items()}
    if not any(_BLOCK.search(path) for path in tensors) or find_spec("gguf") is None:
        return
    table = import_module("gguf.tensor_mapping")
    names: dict[str, list[str]] = defaultdict(list)
    for mapping in (table.TensorNameMap.mappings_cfg, table.TensorNameMap.block_mappings_cfg):
        for kind, sources in mapping.items():
            names[table.TENSOR_NAMES[kind]] += sources
    for path, tensor in tensors.items():
        block = _BLOCK.search(path)
        for name in names.get(_BLOCK.sub("{bid}", path.removesuffix(".weight")), ()):
            source = Source((RowSlice(tensor),))
            for component in (MAIN, TEXT):
                yield component, name.replace("{bid}", block[0]) if block else name, source
