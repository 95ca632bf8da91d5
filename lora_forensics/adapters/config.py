"""What a trainer wrote beside or inside a checkpoint about its adapter: scale, patterns, initialisation."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lora_forensics.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class AdapterConfig:
    """The settings of a LoRA that its weights do not tell; empty where nothing is known."""

    alpha: float | None = None
    rank: int | None = None
    rank_stabilised: bool = False
    """rsLoRA: the scale is alpha / sqrt(rank)."""
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    """Regular expressions for module names to their own alpha; the first that fits counts."""
    initialisation: str = ""
    """`init_lora_weights` where it is no plain one: pissa, olora, ..."""
    kind: str = ""
    """`peft_type`."""

    def scale(self, module: str, rank: int) -> float | None:
        """The multiplier on B @ A of one module, or None if no alpha is known."""
        alpha = self.alpha
        for pattern, value in self.alpha_pattern.items():
            try:
                fits = re.match(rf"(.*\.)?({pattern})$", module)
            except re.error:
                continue
            if fits:
                alpha = value
                break
        if alpha is None:
            return None
        return alpha / (math.sqrt(rank) if self.rank_stabilised else rank)


@dataclass(frozen=True, slots=True)
class Settings:
    """The adapter configurations of one checkpoint, by the key prefix that they are for ('' for all)."""

    by_prefix: Mapping[str, AdapterConfig] = field(default_factory=dict)

    def of(self, module: str) -> AdapterConfig:
        """The configuration of one module."""
        prefix = module.partition(".")[0]
        return self.by_prefix.get(prefix) or self.by_prefix.get("") or AdapterConfig()


def read_settings(config: Path | None, metadata: Mapping[str, str]) -> Settings:
    """The configuration beside a checkpoint (adapter_config.json) or in its header (diffusers).

    Raises:
        CheckpointError: adapter_config.json is there but cannot be read.
    """
    if config is not None:
        return Settings({"": _parse(_load(config))})
    packed = metadata.get("lora_adapter_metadata")
    if not packed:
        return Settings()
    try:
        document = json.loads(packed)
    except ValueError:
        return Settings()
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in document.items() if isinstance(document, dict) else ():
        prefix, _, name = str(key).partition(".")
        grouped.setdefault(prefix, {})[name] = value
    return Settings({prefix: _parse(values) for prefix, values in grouped.items()})


def _load(path: Path) -> dict[str, Any]:
    try:
        document = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read as JSON: {error}", "copy it from another checkpoint of the run"
        ) from error
    if not isinstance(document, dict):
        raise CheckpointError(f"{path}: holds no JSON object")
    return document


def _parse(values: Mapping[str, Any]) -> AdapterConfig:
    initialisation = values.get("init_lora_weights", True)
    pattern = values.get("alpha_pattern") or {}
    return AdapterConfig(
        alpha=_number(values.get("lora_alpha")),
        rank=None if _number(values.get("r")) is None else int(values["r"]),
        rank_stabilised=bool(values.get("use_rslora")),
        alpha_pattern={str(k): float(v) for k, v in pattern.items() if _number(v) is not None}
        if isinstance(pattern, dict)
        else {},
        initialisation=initialisation.lower() if isinstance(initialisation, str) else "",
        kind=str(values.get("peft_type") or ""),
    )


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    return float(value)
