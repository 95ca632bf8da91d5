"""Adapter kinds: the tensors of a checkpoint to modules, their rank, shape, scale and change.

A new kind is one module here with a class that follows `interface.AdapterKind`, and one line in `KINDS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from lora_forensics.adapters import naming
from lora_forensics.adapters.adalora import AdaLoRA
from lora_forensics.adapters.boft import BOFT
from lora_forensics.adapters.config import AdapterConfig, Settings, read_settings
from lora_forensics.adapters.diag_oft import DiagOFT
from lora_forensics.adapters.dora import DoRA
from lora_forensics.adapters.dylora import DyLoRA
from lora_forensics.adapters.experts import ExpertLoRA
from lora_forensics.adapters.full import Full
from lora_forensics.adapters.glora import GLoRA
from lora_forensics.adapters.glora_peft import PeftGLoRA
from lora_forensics.adapters.hira import HiRA
from lora_forensics.adapters.hra import HRA
from lora_forensics.adapters.ia3 import IA3
from lora_forensics.adapters.initial import SvdLoRA
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layer, Layout, Stack, less_bias
from lora_forensics.adapters.loha import LoHa
from lora_forensics.adapters.lokr import LoKr
from lora_forensics.adapters.lora import LoRA
from lora_forensics.adapters.lycoris_boft import LycorisBOFT
from lora_forensics.adapters.miss import MiSS
from lora_forensics.adapters.oft import OFT
from lora_forensics.adapters.peft_types import WEIGHTLESS, through_peft
from lora_forensics.adapters.shira import SHiRA
from lora_forensics.adapters.ssf import SSF
from lora_forensics.adapters.svft import SVFT
from lora_forensics.adapters.tinylora import TinyLoRA
from lora_forensics.adapters.tlora import TLoRA
from lora_forensics.adapters.tokens import TrainableTokens
from lora_forensics.adapters.vera import VeRA
from lora_forensics.adapters.weights import Weights
from lora_forensics.errors import WeightlessError
from lora_forensics.records import Unresolved
from lora_forensics.tensors import TensorInfo

__all__ = [
    "KINDS",
    "AdapterConfig",
    "AdapterKind",
    "AdapterLayout",
    "AdapterModule",
    "KindDoc",
    "Layer",
    "Layout",
    "Settings",
    "Stack",
    "less_bias",
    "looks_like_adapter",
    "read_layout",
    "read_settings",
]

_OWN: tuple[AdapterKind, ...] = (
    ExpertLoRA(),
    DyLoRA(),
    SvdLoRA(),
    LoRA(),
    DoRA("dora", LoRA()),
    AdaLoRA(),
    LoHa(),
    DoRA("loha-dora", LoHa()),
    LoKr(),
    DoRA("lokr-dora", LoKr()),
    TLoRA(),
    GLoRA(),
    PeftGLoRA(),
    VeRA(),
    HiRA(),
    MiSS(),
    SHiRA(),
    HRA(),
    OFT(),
    BOFT(),
    DiagOFT(),
    LycorisBOFT(),
    TinyLoRA(),
    SVFT(),
    SSF(),
    TrainableTokens(),
)
_PLAIN: tuple[AdapterKind, ...] = (Full(), Weights(), IA3())
"""Kinds that also look like any model's weights."""
_ALL = (*_OWN, *through_peft(frozenset().union(*(kind.peft_types for kind in _OWN))), *_PLAIN)
KINDS: dict[str, AdapterKind] = {kind.name: kind for kind in _ALL}
"""Every kind by name; the order is the precedence."""

_UNREAD = r"\.(?: bat_\w+ | lora_[ab] | lora_ga\w* | lora_diag | oft_diag | bias_indices | bias_values )(?:\..*)?"
"""Ends of tensor names that some adapter writes and no kind here reads."""


def _telltale() -> re.Pattern[str]:
    """Matches what some adapter writes: a module with tensors that its kind does not claim is listed as unread
    instead of being measured as something that it is not."""
    suffixes = {
        re.sub(r"\(\?P<\w+>", "(?:", suffix)
        for kind in _ALL
        for role, suffix in kind.suffixes.items()
        if (role not in kind.scalars | {"alpha"} if kind.telling is None else role in kind.telling)
    }
    return re.compile(rf"(?P<module>.+?)(?=\.)(?: {' | '.join(sorted(suffixes))} | {_UNREAD} )", re.VERBOSE)


_TELLTALE = _telltale()


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
    bias: str | None = None
    """A bias that was trained and saved whole beside it."""


@dataclass(frozen=True, slots=True)
class AdapterLayout:
    """All modules of one checkpoint."""

    modules: Mapping[str, AdapterModule]
    unread: Mapping[str, Unresolved]
    """Modules whose tensors no kind can read, and why."""
    foreign: tuple[str, ...]
    """Tensors that no kind reads: biases trained beside the adapter, copies of frozen weights."""


def looks_like_adapter(names: Mapping[str, object]) -> bool:
    """Whether any tensor name is one that an adapter writes (`alpha` alone does not count)."""
    return any(_TELLTALE.fullmatch(name) for name in names)


def read_layout(infos: Mapping[str, TensorInfo], settings: Settings | None = None) -> AdapterLayout:
    """Group the tensors of one checkpoint into modules; the settings, where known, tell kinds apart.

    Raises:
        WeightlessError: the settings name a type that is no change of weights.
    """
    settings = settings or Settings()
    for config in settings.by_prefix.values():
        if config.peft_type.lower() in WEIGHTLESS:
            raise WeightlessError(f"is a {config.peft_type} adapter: {WEIGHTLESS[config.peft_type.lower()]}")
    telling = looks_like_adapter(infos) or any(config.peft_type for config in settings.by_prefix.values())
    kinds = [kind for kind in KINDS.values() if telling or not kind.companion]
    shared: dict[str, dict[str, str]] = {}  # a tensor's name to its role by the kinds that want it
    for name in infos:
        if roles := {kind.name: role for kind in kinds if (role := _shared_role(kind, name))}:
            shared[name] = roles
    grouped, foreign = _group([name for name in infos if name not in shared], kinds)
    modules: dict[str, AdapterModule] = {}
    unread: dict[str, Unresolved] = {}
    for module, names in grouped.items():
        found = _recognise(module, names, infos, settings.of(module), kinds, shared)
        if isinstance(found, Unresolved):  # a bias that was trained beside the adapter
            plain = [kind.keys.fullmatch(name) for name in names for kind in kinds if kind.companion]
            beside = [match.string for match in plain if match and match.group("module") == module]
            rest = [name for name in names if name not in beside]
            again = _recognise(module, rest, infos, settings.of(module), kinds, shared) if beside and rest else None
            if isinstance(again, AdapterModule):
                found = again
                foreign.extend(beside)
        if isinstance(found, AdapterModule):
            modules[module] = found
        elif found is not None:
            unread[module] = found
        else:
            foreign.extend(names)
    for name in foreign:
        owner = name.removesuffix(".bias").removesuffix(".base_layer")
        if name.endswith(".bias") and owner in modules:
            modules[owner] = replace(modules[owner], bias=name)
    owners = {module.kind for module in modules.values()}
    for name, roles in shared.items():
        if not owners & roles.keys() and not unread:
            unread[name] = Unresolved("is shared by all modules of the adapter, and no tensor tells which they are")
    return AdapterLayout(modules, unread, tuple(foreign))


def _group(names: Iterable[str], kinds: Sequence[AdapterKind]) -> tuple[dict[str, list[str]], list[str]]:
    grouped: dict[str, list[str]] = {}
    foreign = []
    for name in names:
        module = next((kind.module(found) for kind in kinds if (found := kind.keys.fullmatch(name))), None)
        if module is None and (found := _TELLTALE.fullmatch(name)):
            module = found["module"]
        if module is None:
            foreign.append(name)
        else:
            grouped.setdefault(module, []).append(name)
    return grouped, foreign


def _recognise(
    module: str,
    names: list[str],
    infos: Mapping[str, TensorInfo],
    config: AdapterConfig,
    kinds: Sequence[AdapterKind],
    shared: Mapping[str, Mapping[str, str]],
) -> AdapterModule | Unresolved | None:
    """The module, why it cannot be read, or None if it is a plain weight that no kind wants."""
    why: Unresolved | None = None
    for kind in sorted(kinds, key=lambda kind: config.peft_type not in kind.peft_types):
        keys = _roles(kind, module, names)
        if keys is None:
            continue
        keys.update({roles[kind.name]: name for name, roles in shared.items() if kind.name in roles})
        layout = kind.layout({role: infos[name].shape for role, name in keys.items()}, config, module)
        if isinstance(layout, Layout):
            place = naming.component(module), naming.block(module), naming.role(module)
            return AdapterModule(module, kind.name, keys, layout, *place)
        why = why or layout
    if why is not None or any(_TELLTALE.fullmatch(name) for name in names):
        shapes = ", ".join(f"{name[len(module) + 1 :]} {list(infos[name].shape)}" for name in names[:6])
        return why or Unresolved(f"no adapter kind reads these tensors together: {shapes}")
    return None


def _roles(kind: AdapterKind, module: str, names: Iterable[str]) -> dict[str, str] | None:
    """Role to name if all of a module's tensors are this kind's, each role once."""
    keys: dict[str, str] = {}
    for name in names:
        found = kind.keys.fullmatch(name)
        if found is None or found.lastgroup is None or kind.module(found) != module:
            return None
        role = found.groupdict().get("role") or found.lastgroup
        if role in keys:
            return None  # a second adapter in one file
        keys[role] = name
    return keys


def _shared_role(kind: AdapterKind, name: str) -> str | None:
    for role, pattern in kind.shared.items():
        if found := re.fullmatch(pattern, name):
            return found.groupdict().get("role") or role
    return None
