"""From the names of an adapter's modules to rows of base tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from lora_forensics.base_model.aliases import ALIASERS
from lora_forensics.base_model.family import adapter_family, base_family
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.names import EMBEDDINGS, MAIN, TIED, readings, unwrap
from lora_forensics.base_model.slices import ModuleShape, Shape, weight_shape
from lora_forensics.records import Unresolved, WeightRef

_CONV1D = frozenset({"c_attn", "q_attn", "c_fc", "c_proj"})
_HEADS_ON_DISK = {"lm_head": ("embed_out", "output"), "embed_out": ("lm_head",)}
"""Heads by their name in the live model, and what the file may call them instead."""
_HEAD = re.compile(r"(^|\.)(\w*head|cls|decoder|score|classifier)\.(?!.*\d)(.*\.)?weight$")
"""Tensors outside of all layers that are called a head."""


def resolve(modules: Mapping[str, ModuleShape], tensors: Mapping[str, Shape]) -> dict[str, WeightRef | Unresolved]:
    """The frozen weight below each module of an adapter; a pure function of names and shapes.

    Args:
        modules: Name of each module, as in the adapter's file, to (out, in) of its change: in * kh * kw columns for a
            convolution, embeddings as the base stores them, (n, 1) for vectors; None where it cannot be known.
        tensors: Name of each base tensor to its shape; `<component folder>/<name>` in a diffusers folder.
    """
    return Resolver(tensors).resolve(modules)


class Resolver:
    """Resolution against one base; what was learned about its names is kept."""

    def __init__(self, tensors: Mapping[str, Shape]) -> None:
        self._shapes = dict(tensors)
        self._index = NameIndex(self._shapes)
        self._conv1d = _stores_conv1d(self._shapes)
        self._cache: dict[tuple[str, ModuleShape], WeightRef | Unresolved] = {}

    def resolve(
        self, modules: Mapping[str, ModuleShape], metadata: Mapping[str, str] | None = None
    ) -> dict[str, WeightRef | Unresolved]:
        """As the function of that name; the adapter's metadata may tell its family where its names do not."""
        missing = {name: shape for name, shape in modules.items() if (name, shape) not in self._cache}
        missing = self._place(missing)
        for aliaser in ALIASERS:
            if not missing:
                break
            for component, path, source in aliaser(self._index, missing):
                self._index.add(component, path, source)
            missing = self._place(missing)
        self._explain(modules, missing, metadata)
        return {name: self._cache[name, shape] for name, shape in modules.items()}

    def _explain(
        self,
        modules: Mapping[str, ModuleShape],
        missing: Mapping[str, ModuleShape],
        metadata: Mapping[str, str] | None,
    ) -> None:
        """Where little fits and the base is of another family, say so; what fits of the denoiser fits by chance."""
        if 2 * len(missing) <= len(modules):
            return
        adapter, base = adapter_family(modules, metadata), base_family(self._shapes)
        if adapter and base and adapter != base:
            families = f"this adapter is for {adapter}, this base is {base}"
            for key in modules.items():
                found = self._cache[key]
                if isinstance(found, Unresolved):
                    if key[0] in missing:
                        self._cache[key] = Unresolved(f"{families}: {found.reason}")
                elif MAIN in next(readings(key[0])).components:
                    self._cache[key] = Unresolved(families)

    def _place(self, modules: Mapping[str, ModuleShape]) -> dict[str, ModuleShape]:
        """Look every module up; the ones without a weight are returned."""
        for name, shape in modules.items():
            self._cache[name, shape] = self._lookup(name, shape)
        return {n: s for n, s in modules.items() if isinstance(self._cache[n, s], Unresolved)}

    def _lookup(self, name: str, shape: ModuleShape) -> WeightRef | Unresolved:
        misfits: dict[WeightRef, None] = {}
        for sources in self._tiers(name, shape[0]):
            refs = dict.fromkeys(self._ref(name, source) for source in sources)
            fitting = [ref for ref in refs if _fits(shape, weight_shape(ref, self._shapes))]
            if len(fitting) == 1:
                return fitting[0]
            if fitting:
                return Unresolved(f"several base weights fit: {' and '.join(sorted(ref.label() for ref in fitting))}")
            misfits.update(refs)
        if misfits:
            return Unresolved(f"wrong shape: the adapter is {_words(shape)}, {self._describe(misfits)}")
        return Unresolved("no base tensor has this name")

    def _tiers(self, name: str, rows: int | None) -> Iterator[list[Source]]:
        for reading in readings(name):
            yield from self._index.find(reading.components, reading.path)
        for reading in readings(name):
            others = _HEADS_ON_DISK.get(unwrap(reading.path), ())
            for other in others:
                yield from self._index.find(reading.components, other)
        for reading in readings(name):
            if rows is not None and TIED.search(reading.path):  # a shape tells vocabularies from classes
                inputs = [source for part in reading.components for source in self._index.inputs.get(part, ())]
                yield [source for source in inputs if not self._has_twin(source)]

    def _has_twin(self, source: Source) -> bool:
        """Whether a tensor that is called a head has the shape of an input embedding: then that is not shared."""
        shape = self._shapes[source.parts[0].tensor]
        heads = (name for name, other in self._shapes.items() if other == shape and _HEAD.search(name))
        return any(not EMBEDDINGS.search(name.removesuffix(".weight")) for name in heads)

    def _ref(self, name: str, source: Source) -> WeightRef:
        embedding = EMBEDDINGS.search(name) is not None
        first = source.parts[0].tensor.removesuffix(".weight").rpartition(".")[2]
        conv1d = self._conv1d and first in _CONV1D
        return WeightRef(source.parts, source.transposed or embedding or conv1d, embedding)

    def _describe(self, refs: Iterable[WeightRef]) -> str:
        return ", ".join(f"{ref.label()} is {_words(weight_shape(ref, self._shapes) or (None, None))}" for ref in refs)


def _stores_conv1d(shapes: Mapping[str, Shape]) -> bool:
    """GPT-2 and its kin store in x out: only the fused query, key and value can tell, all else may be square."""
    fused = [shape for name, shape in shapes.items() if name.endswith("c_attn.weight") and len(shape) == 2]
    return bool(fused) and all(columns > rows for rows, columns in fused)


def _fits(wanted: ModuleShape, found: tuple[int, int] | None) -> bool:
    return found is not None and all(w is None or w == f for w, f in zip(wanted, found, strict=True))


def _words(shape: ModuleShape) -> str:
    return " x ".join("?" if n is None else str(n) for n in shape)
