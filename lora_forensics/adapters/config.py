"""What a trainer wrote beside or inside a checkpoint about its adapter: scale, patterns, initialisation."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lora_forensics.errors import CheckpointError
from lora_forensics.values import as_number, parse_object, read_object

_REPEATED_REPEAT = re.compile(r"[+*}]\)*[+*{]|\([^()]*[+*|][^()]*\)[+*{]")
"""A repetition of what repeats: takes exponential time on a name that almost fits."""


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of a LoRA that its weights do not tell; empty where nothing is known."""

    alpha: float | None = None
    rank_stabilised: bool = False
    """rsLoRA: the scale is alpha / sqrt(rank)."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Regular expressions for module names to their own alpha; the first that fits counts."""
    initialisation: str = ""
    """`init_lora_weights` where it is no plain one: pissa, olora, ..."""
    values: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """All of it as it was read: what only one kind asks for."""
    folder: Path | None = field(default=None, compare=False)
    """Where it lies, if beside the checkpoint."""

    @property
    def peft_type(self) -> str:
        """The type that peft gave it, in capitals; '' where it is not told."""
        return str(self.values.get("peft_type") or "").upper()

    def rank(self, module: str) -> int | None:
        """The rank that was asked for, by pattern or for all modules."""
        patterns = self.values.get("rank_pattern")
        rank = self.values.get("r")
        for pattern, value in (patterns if isinstance(patterns, dict) else {}).items():
            if _fits(str(pattern), module.removeprefix("base_model.model.")):
                rank = value
                break
        return rank if isinstance(rank, int) and rank > 0 else None

    def number(self, name: str, default: float) -> float:
        """A number, or its default where none is told."""
        value = as_number(self.values.get(name))
        return default if value is None else value

    def flag(self, name: str, default: bool = False) -> bool:
        """A switch; kohya writes it as a word."""
        value = self.values.get(name, default)
        return value.lower() == "true" if isinstance(value, str) else bool(value)

    def scale(self, module: str, rank: int) -> float | None:
        """The multiplier on B @ A of one module, or None if no alpha is known; mlx-lm writes it as such."""
        given = self.values.get("lora_parameters")
        if isinstance(given, dict) and (scale := as_number(given.get("scale"))) is not None:
            return scale
        alpha = self.alpha
        name = module.removeprefix("base_model.model.")
        for pattern, value in self.alpha_pattern.items():
            if _fits(pattern, name):
                alpha = value
                break
        if alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True, slots=True)
class Settings:
    """The adapter configurations of one checkpoint, by the key prefix that they are for ('' for all)."""

    by_prefix: Mapping[str, AdapterConfig] = field(default_factory=dict)

    def told(self) -> dict[str, Mapping[str, Any]]:
        """All that was read, by prefix: equal for two checkpoints whose tensors mean the same."""
        return {prefix: config.values for prefix, config in self.by_prefix.items()}

    def of(self, module: str) -> AdapterConfig:
        """The configuration of one module."""
        prefix = module.partition(".")[0]
        return self.by_prefix.get(prefix) or self.by_prefix.get("") or AdapterConfig()


def read_settings(config: Path | None, metadata: Mapping[str, str]) -> Settings:
    """The configuration beside a checkpoint (adapter_config.json) or in its header (diffusers, kohya).

    Raises:
        CheckpointError: adapter_config.json is there but cannot be read.
    """
    if config is not None:
        beside = read_object(config)
        if beside is None:
            raise CheckpointError(f"{config}: is no JSON object", "copy it from another checkpoint of the run")
        return Settings({"": replace(_parse(beside), folder=config.parent)})
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in (parse_object(metadata.get("lora_adapter_metadata", "")) or {}).items():
        prefix, _, name = str(key).partition(".")
        grouped.setdefault(prefix, {})[name] = value
    found = {prefix: _parse(values) for prefix, values in grouped.items()}
    arguments = parse_object(metadata.get("ss_network_args", "")) or {}
    kohya = {**arguments, **{key: value for key, value in metadata.items() if key.startswith("ss_network_")}}
    return Settings({"": AdapterConfig(values=kohya), **found} if kohya else found)


def _fits(pattern: str, name: str) -> bool:
    """Whether peft would apply a pattern to a module. What could search for ever, or is no pattern, does not fit."""
    if len(pattern) > 200 or _REPEATED_REPEAT.search(pattern):
        return False
    try:
        return re.match(rf"(.*\.)?({pattern})$", name) is not None
    except (re.error, RecursionError):
        return False


def _parse(values: Mapping[str, Any]) -> AdapterConfig:
    initialisation = values.get("init_lora_weights", True)
    pattern = values.get("alpha_pattern")
    alphas = {str(k): as_number(v) for k, v in pattern.items()} if isinstance(pattern, dict) else {}
    return AdapterConfig(
        alpha=as_number(values.get("lora_alpha", values.get("alpha"))),
        rank_stabilised=bool(values.get("use_rslora")),
        alpha_pattern={key: alpha for key, alpha in alphas.items() if alpha is not None},
        initialisation=initialisation.lower() if isinstance(initialisation, str) else "",
        values=values,
    )
