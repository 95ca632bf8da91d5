"""All names of all base weights, and what each of them stands for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from lora_forensics.base_model.names import EMBEDDINGS, HEADS, INPUTS, MAIN, flatten, module_path, split_tensor, unwrap
from lora_forensics.base_model.slices import Parts, Shape
from lora_forensics.records import RowSlice


@dataclass(frozen=True, slots=True)
class Source:
    """What one name stands for."""

    parts: Parts
    transposed: bool = False
    """A converter transposes it."""


class NameIndex:
    """Names of base weights; a name may stand for several weights until a shape tells them apart."""

    def __init__(self, shapes: Mapping[str, Shape]) -> None:
        self.shapes = shapes
        self._exact: dict[tuple[str, str], list[Source]] = {}
        self._unwrapped: dict[tuple[str, str], list[Source]] = {}
        self.paths: dict[str, dict[str, str]] = {}
        """Component to path to tensor name."""
        self.inputs: dict[str, list[Source]] = {}
        """Component to its input embeddings."""
        for name in shapes:
            component, path = split_tensor(name)
            if component is None:
                continue
            self.paths.setdefault(component, {})[path] = name
            module = module_path(path)
            if module is not None:
                if module.rpartition(".")[2] in INPUTS:
                    self.inputs.setdefault(component, []).append(Source((RowSlice(name),)))
                self.add(component, module, Source((RowSlice(name),)))
                if path != name and "/" not in name:
                    self.add(component, name.removesuffix(".weight"), Source((RowSlice(name),)))

    def denoiser(self, component: str = MAIN) -> dict[str, str]:
        """Path to tensor name of a main component; empty where it is a language model or the head of one."""
        main = self.paths.get(component, {})
        if all(path.partition(".")[0] in HEADS for path in main):
            return {}
        return {} if any(EMBEDDINGS.search(path.removesuffix(".weight")) for path in main) else main

    def add(self, component: str, path: str, source: Source) -> None:
        """Let a weight answer to one more name."""
        for table, key in ((self._exact, path), (self._unwrapped, unwrap(path))):
            sources = table.setdefault((component, flatten(key)), [])
            if source not in sources:
                sources.append(source)

    def find(self, components: Sequence[str], path: str) -> Iterable[list[Source]]:
        """The weights of that name, in tiers: as written, then with wrappers left out on one side or both."""
        for table, key in ((self._exact, path), (self._unwrapped, path), (self._unwrapped, unwrap(path))):
            yield [source for component in components for source in table.get((component, flatten(key)), ())]
