"""Other names of base weights, found by running the converters of the libraries that rename them.

Adding a family of names is one module here and one line in `ALIASERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

from lora_forensics.base_model.aliases import dialects, experts, live_names, llama_cpp, sgm_unet, single_file
from lora_forensics.base_model.index import NameIndex, Source
from lora_forensics.base_model.slices import ModuleShape

Aliaser = Callable[[NameIndex, Mapping[str, ModuleShape]], Iterator[tuple[str, str, Source]]]
"""From the index so far and the modules that it could not place: component, path and weight of each new name."""

ALIASERS: tuple[Aliaser, ...] = (
    llama_cpp.aliases,
    experts.aliases,
    single_file.aliases,
    sgm_unet.aliases,
    dialects.aliases,
    live_names.aliases,
)
"""In the order in which they run, each only while modules remain without a weight."""
