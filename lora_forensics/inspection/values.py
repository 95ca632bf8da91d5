"""What a look at one checkpoint found, and at two: frozen values without torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lora_forensics.records import SCHEMA, Finding, RowSlice, describe_adapter

_MEANS = ("delta_norm", "relative_norm", "cosine", "stable_rank")
"""Metrics of which a group states the mean."""


@dataclass(frozen=True, slots=True)
class TensorFacts:
    """One tensor of the file: its header, and the statistics of its finite entries (NaN if there are none)."""

    name: str
    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]
    entries: int
    mean: float = math.nan
    minimum: float = math.nan
    maximum: float = math.nan
    mean_abs: float = math.nan
    min_abs: float = math.nan
    norm: float = math.nan
    """Frobenius norm."""
    zeros: int = 0
    nonfinite: int = 0


@dataclass(frozen=True, slots=True)
class Contents:
    """What stands in any tensor file; None where it was not asked for."""

    path: Path
    tensors: tuple[TensorFacts, ...] | None
    metadata: Mapping[str, str] | None
    config: Mapping[str, Any]
    """adapter_config.json beside it."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form: keys as in the document of an `Inspection`."""
        document: dict[str, Any] = {"schema": SCHEMA, "file": self.path.as_posix()}
        if self.tensors is not None:
            document["tensors"] = [asdict(tensor) for tensor in self.tensors]
        if self.metadata is not None:
            document |= {"metadata": dict(self.metadata), "config": dict(self.config)}
        return document


@dataclass(frozen=True, slots=True)
class ModuleFacts:
    """One adapted module: what it is, where it sits, and what was measured of it."""

    module: str
    """Part of the key before the adapter's suffix, as in the file."""
    component: str
    section: str
    """Name up to its first number, less the trainer's prefix: down_blocks_0, model.layers.3."""
    block: int | None
    role: str
    adapter: str
    """Name of the kind."""
    rank: int | None
    scale: float | None
    scale_from: str
    """tensor, configuration, convention (nothing is written, and the trainer's habit is known), unknown; or none, for
    a kind without a multiplier."""
    shape: tuple[int | None, int | None]
    """Rows and columns of the change."""
    tensors: tuple[str, ...]
    entries: int
    """Numbers stored for it."""
    average_magnitude: float
    """Mean Frobenius norm of its stored tensors."""
    average_strength: float
    """Mean absolute value of its stored numbers."""
    metrics: Mapping[str, float | int | None]
    """Columns of layers.parquet; None is unknown, NaN undefined."""
    parts: tuple[RowSlice, ...] | None = None
    """The weight below it, parts in stacking order; None if there is none."""
    transposed: bool | None = None
    """The base stores that weight in x out."""
    reason: str | None = None
    """Why there is no weight below it."""

    def metric(self, name: str) -> float:
        """One metric; NaN where it is unknown."""
        value = self.metrics.get(name)
        return math.nan if value is None else float(value)

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form; `tensor` and `rows` repeat a single part."""
        single = asdict(self.parts[0]) if self.parts is not None and len(self.parts) == 1 else {}
        document = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("parts", "metrics")}
        return {
            **document,
            "parts": None if self.parts is None else [asdict(part) for part in self.parts],
            **{f.name: single.get(f.name) for f in fields(RowSlice)},
            **self.metrics,
        }


@dataclass(frozen=True, slots=True)
class Group:
    """Modules of one sort together; sizes are means over modules where they are known, NaN if at none."""

    component: str
    role: str | None
    section: str | None
    adapters: tuple[str, ...]
    ranks: tuple[int, ...]
    scales: tuple[float, ...]
    modules: int
    entries: int
    delta_norm: float
    relative_norm: float
    cosine: float
    stable_rank: float
    average_magnitude: float
    average_strength: float

    @classmethod
    def of(cls, modules: Sequence[ModuleFacts], role: str | None = None, section: str | None = None) -> Group:
        """Modules of one component."""
        means = {name: mean(m.metric(name) for m in modules) for name in _MEANS}
        return cls(
            component=modules[0].component,
            role=role,
            section=section,
            adapters=tuple(sorted({m.adapter for m in modules})),
            ranks=tuple(sorted({m.rank for m in modules if m.rank is not None})),
            scales=tuple(sorted({m.scale for m in modules if m.scale is not None})),
            modules=len(modules),
            entries=sum(m.entries for m in modules),
            average_magnitude=mean(m.average_magnitude for m in modules),
            average_strength=mean(m.average_strength for m in modules),
            **means,
        )


@dataclass(frozen=True, slots=True)
class BaseFacts:
    """The base model that the file was measured against."""

    path: str | None = None
    """Its paths, joined for people."""
    paths: tuple[str, ...] = ()
    problem: str = ""
    """Why there is none."""


@dataclass(frozen=True, slots=True)
class Fact:
    """One thing that the metadata says, in plain words."""

    topic: str
    """about, base, network, training, data or hashes."""
    label: str
    value: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """One checkpoint; `to_dict` is the document of `inspect --json`."""

    path: Path
    size: int
    """Bytes of the file."""
    modified: float
    """Seconds since 1970."""
    trainer: str | None
    """Whose layout it has, by file and neighbours; None if that is no known one."""
    step: int | None
    epoch: float | None
    learning_rate: float | None
    train_loss: float | None
    held_out_loss: float | None
    facts: tuple[Fact, ...]
    modules: tuple[ModuleFacts, ...]
    unread: Mapping[str, str]
    """Modules whose tensors no kind reads, and why."""
    other_tensors: tuple[str, ...]
    """Tensors that belong to no adapter."""
    tensors: tuple[TensorFacts, ...]
    base: BaseFacts
    findings: tuple[Finding, ...]
    metadata: Mapping[str, str]
    """The header's own text."""
    config: Mapping[str, Any]
    """adapter_config.json beside it."""

    def dtypes(self) -> dict[str, int]:
        """Stored numbers by type, most first."""
        return dict(sorted(_sums((t.dtype, t.entries) for t in self.tensors).items(), key=lambda pair: -pair[1]))

    def adapter(self) -> str:
        """Kinds and ranks in words."""
        ranks = sorted({module.rank for module in self.modules if module.rank is not None})
        return describe_adapter(
            sorted({module.adapter for module in self.modules}) or ["a kind that is not read"], ranks
        )

    def components(self) -> list[Group]:
        """Modules by component."""
        return [Group.of(found) for found in _grouped(self.modules, lambda m: (m.component,))]

    def roles(self) -> list[Group]:
        """Modules by component, role and kind."""
        grouped = _grouped(self.modules, lambda m: (m.component, m.role, m.adapter))
        return [Group.of(found, role=found[0].role) for found in grouped]

    def sections(self) -> list[Group]:
        """Modules by component and block."""
        grouped = _grouped(self.modules, lambda m: (m.component, m.section))
        return [Group.of(found, section=found[0].section) for found in grouped]

    def unresolved(self) -> list[dict[str, str]]:
        """Modules that no kind reads, and those without a weight in the base, with the reason."""
        missing = {m.module: m.reason for m in self.modules if m.reason and self.base.path is not None}
        return [{"module": name, "reason": reason} for name, reason in {**self.unread, **missing}.items()]

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        topics: dict[str, dict[str, str]] = {}
        for fact in self.facts:
            topics.setdefault(fact.topic, {})[fact.label] = fact.value
        return {
            "schema": SCHEMA,
            "file": self.path.as_posix(),
            "bytes": self.size,
            "modified": self.modified,
            "trainer": self.trainer,
            "step": self.step,
            "epoch": self.epoch,
            "learning_rate": self.learning_rate,
            "train_loss": self.train_loss,
            "held_out_loss": self.held_out_loss,
            "adapter": self.adapter(),
            "dtypes": self.dtypes(),
            "base_model": asdict(self.base),
            "facts": topics,
            "components": [asdict(group) for group in self.components()],
            "roles": [asdict(group) for group in self.roles()],
            "sections": [asdict(group) for group in self.sections()],
            "modules": [module.to_dict() for module in self.modules],
            "unresolved": self.unresolved(),
            "other_tensors": self.other_tensors,
            "findings": [finding.to_dict() for finding in self.findings],
            "tensors": [asdict(tensor) for tensor in self.tensors],
            "metadata": dict(self.metadata),
            "config": dict(self.config),
        }


@dataclass(frozen=True, slots=True)
class Changed:
    """One entry that two files have in different values; None where one has it not."""

    name: str
    first: Any
    second: Any


@dataclass(frozen=True, slots=True)
class ModulePair:
    """One module of two files."""

    module: str
    component: str
    role: str
    delta_norms: tuple[float, float]
    step_size: float
    """|D_2 - D_1|; NaN where the two cannot be compared."""
    rotation: float
    """1 - cos(D_1, D_2)."""
    changed: tuple[Changed, ...]
    """Kind, rank and scale where they differ."""

    @property
    def cosine(self) -> float:
        """Of the two changes."""
        return 1 - self.rotation


@dataclass(frozen=True, slots=True)
class Difference:
    """What differs between two checkpoints."""

    first: Inspection
    second: Inspection
    metadata: tuple[Changed, ...]
    """Keys of the header and of adapter_config.json."""
    only_first: tuple[str, ...]
    """Modules."""
    only_second: tuple[str, ...]
    pairs: tuple[ModulePair, ...]
    """Modules that both have."""
    identical_tensors: int
    """Tensors of one name with the same type, shape and bits."""
    changed_tensors: int
    """Tensors of one name that differ."""

    def to_dict(self) -> dict[str, Any]:
        """The JSON-ready form."""
        pairs = [{**asdict(pair), "cosine": pair.cosine} for pair in self.pairs]
        return {
            "schema": SCHEMA,
            "files": [self.first.to_dict(), self.second.to_dict()],
            "difference": {
                "metadata": [asdict(entry) for entry in self.metadata],
                "only_first": self.only_first,
                "only_second": self.only_second,
                "modules": pairs,
                "identical_tensors": self.identical_tensors,
                "changed_tensors": self.changed_tensors,
            },
        }


def mean(values: Iterable[float]) -> float:
    """Mean of the finite ones; NaN if there are none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def _grouped(modules: Iterable[ModuleFacts], key: Callable[[ModuleFacts], tuple[str, ...]]) -> list[list[ModuleFacts]]:
    """Modules with one key each, in the order in which keys were met."""
    found: dict[tuple[str, ...], list[ModuleFacts]] = {}
    for module in modules:
        found.setdefault(key(module), []).append(module)
    return list(found.values())


def _sums(pairs: Iterable[tuple[str, int]]) -> dict[str, int]:
    total: dict[str, int] = {}
    for name, number in pairs:
        total[name] = total.get(name, 0) + number
    return total
