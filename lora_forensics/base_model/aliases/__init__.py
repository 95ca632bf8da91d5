"""Other names of base weights, found by running diffusers' own converters.

Adding a family of names is one module here and one line in `ALIASERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lora_forensics.base_model.aliases import dialects, sgm_unet, single_file
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.slices import ModuleShape

Aliaser = Callable[[NameIndex, Mapping[str, ModuleShape]], Iterator[tuple[str, str, Source]]]
"""From the index so far and the modules that it could not place: component, path and weight of each new name."""

ALIASERS: tuple[Aliaser, ...] = (single_file.aliases, sgm_unet.aliases, dialects.aliases)
"""In the order in which they run, each only while modules remain without a weight."""
