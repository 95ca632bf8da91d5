"""Adapter kinds: the tensors of a checkpoint to modules, their rank, shape, scale and change.

A new kind is one module here with a class that follows `interface.AdapterKind`, and one line in `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from lora_forensics.adapters import naming
from lora_forensics.adapters.config import AdapterConfig, Settings, read_settings
from lora_forensics.adapters.interface import AdapterKind, Layout
from lora_forensics.adapters.lora import LoRA
from lora_forensics.records import Unresolved
from lora_forensics.tensors import TensorInfo

__all__ = [
    "KINDS",
    "AdapterConfig",
    "AdapterKind",
    "AdapterLayout",
    "AdapterModule",
    "Settings",
    "looks_like_adapter",
    "read_layout",
    "read_settings",
]

KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in (LoRA(),)}
"""Every kind by name; the order is the precedence."""

_TELLTALE = re.compile(
    r"^(?P<module>.+?)[._](lora_down|lora_up|lora_mid|lora_A|lora_B|lora_E|lora_embedding_[AB]|lora_magnitude_vector|"
    r"dora_scale|hada_w\w+|hada_t\d|lokr_\w+|oft_\w+|boft_\w+|hra_u|ia3_l|vera_lambda_\w+|diff|diff_b|w_norm|b_norm|"
    r"oft_blocks|a[12]|b[12]|on_input|lora_[ab]|lora\.(down|up)|lora_linear_layer|alpha|scalar|"
    r"bias_indices|bias_values|lora_ga\w*|lora_diag|bat_\w+|miss_\w+)(\.|$)"
)
"""Ends of tensor names that some adapter writes, read here or not: a module with tensors that its kind does not claim
is listed as unread instead of being measured as something that it is not."""


@dataclass(frozen=True, slots=True)
class AdapterModule:
    """One module of an adapter, as a checkpoint's header tells it."""

    name: str
    kind: str
    """Key of `KINDS`."""
    keys: Mapping[str, str]
    """Role to tensor name."""
    layout: Layout
    component: str
    block: int | None
    role: str


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """All modules of one checkpoint."""

    modules: Mapping[str, AdapterModule]
    unread: Mapping[str, Unresolved]
    """Modules whose tensors no kind can read, and why."""
    foreign: tuple[str, ...]
    """Tensors that belong to no adapter: full weights saved beside it (`modules_to_save`), for example."""


def looks_like_adapter(names: Mapping[str, object]) -> bool:
    """Whether any tensor name is one that an adapter writes (`alpha` alone does not count)."""
    return any((found := _TELLTALE.match(name)) and found.group(2) != "alpha" for name in names)


def read_layout(infos: Mapping[str, TensorInfo]) -> AdapterLayout:
    """Group the tensors of one checkpoint into modules."""
    grouped, foreign = _group(infos)
    modules: dict[str, AdapterModule] = {}
    unread: dict[str, Unresolved] = {}
    for module, names in grouped.items():
        found = _recognise(module, names, infos)
        if isinstance(found, Unresolved):
            unread[module] = found
        else:
            modules[module] = found
    return AdapterLayout(modules, unread, tuple(foreign))


def _group(infos: Mapping[str, TensorInfo]) -> tuple[dict[str, list[str]], list[str]]:
    grouped: dict[str, list[str]] = {}
    foreign = []
    for name in infos:
        found = next((m for kind in KINDS.values() if (m := kind.keys.fullmatch(name))), None) or _TELLTALE.match(name)
        if found:
            grouped.setdefault(found.group("module"), []).append(name)
        else:
            foreign.append(name)
    return grouped, foreign


def _recognise(module: str, names: list[str], infos: Mapping[str, TensorInfo]) -> AdapterModule | Unresolved:
    for kind in KINDS.values():
        keys: dict[str, str] = {}
        for name in names:
            found = kind.keys.fullmatch(name)
            if found is None or found.lastgroup is None or found.group("module") != module or found.lastgroup in keys:
                break  # a tensor of another kind, or a second adapter in one file
            keys[found.lastgroup] = name
        else:
            layout = kind.layout({role: infos[name].shape for role, name in keys.items()})
            if layout is not None:
                place = naming.component(module), naming.block(module), naming.role(module)
                return AdapterModule(module, kind.name, keys, layout, *place)
    shapes = ", ".join(f"{name[len(module) + 1 :]} {list(infos[name].shape)}" for name in names[:6])
    return Unresolved(f"no adapter kind reads these tensors together: {shapes}")
