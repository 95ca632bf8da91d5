"""An averaged adapter in the form of its run: key names, settings, header and file names are those of a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_forensics.checkpoints.adapter_folder import CONFIG
from lora_forensics.errors import CheckpointError, UsageError
from lora_forensics.records import Checkpoint
from lora_forensics.reports import to_json
from lora_forensics.series import write_bytes, write_text
from lora_forensics.tensors import SAFETENSORS
from lora_forensics.values import parse_object

Scales = Mapping[str, tuple[int, float]]
"""Module to rank and multiplier."""

AVERAGED = "lora_forensics_average"
"""Key in the header that tells what was averaged."""
_DIFFUSERS = "lora_adapter_metadata"
_PREFIX = "base_model.model."


def place_for(checkpoints: Sequence[Checkpoint], output: Path) -> tuple[Path, Path | None]:
    """The tensor file to write and, where the run's checkpoints have one, the configuration beside it.

    A run whose checkpoints are called alike, or have a configuration, has a folder for each: `output` is a folder then.
    """
    newest = checkpoints[-1]
    names = {checkpoint.path.name for checkpoint in checkpoints}
    if len(names) > 1 and newest.config is None:
        named = output if output.suffix == SAFETENSORS else output.with_name(output.name + SAFETENSORS)
        return named, None
    if output.suffix == SAFETENSORS:
        raise UsageError(f"{output} is a file, and this run has a folder for each checkpoint", "name a folder")
    return output / f"{newest.path.stem}{SAFETENSORS}", output / CONFIG if newest.config else None


def settings_with_ranks(values: Mapping[str, Any], scales: Scales) -> dict[str, Any]:
    """PEFT's or mlx-lm's settings for modules whose ranks are other than before and whose scales are the same.

    Raises:
        CheckpointError: these settings cannot hold several ranks.
    """
    if isinstance(given := values.get("lora_parameters"), dict):
        ranks = {rank for rank, _ in scales.values()}
        if len(ranks) > 1:
            raise CheckpointError("mlx-lm has one rank for all modules", "ask for one with --rank")
        return {**values, "lora_parameters": {**given, "rank": ranks.pop()}}
    root = math.sqrt if values.get("use_rslora") else float
    wanted = {name.removeprefix(_PREFIX): (rank, _whole(scale * root(rank))) for name, (rank, scale) in scales.items()}
    ((rank, alpha), _) = Counter(wanted.values()).most_common(1)[0]
    # peft takes a pattern for the end of a name: one that is the end of another has to say where it begins
    ends = {name[at + 1 :] for name in wanted for at, letter in enumerate(name) if letter == "."}
    wanted = {f"^{name}" if name in ends else name: known for name, known in wanted.items()}
    return {
        **values,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: own for name, (own, _) in wanted.items() if own != rank},
        "alpha_pattern": {name: own for name, (_, own) in wanted.items() if own != alpha},
    }


def header_with_ranks(metadata: Mapping[str, str], scales: Scales) -> dict[str, str]:
    """The header of kohya or diffusers for other ranks."""
    found = dict(metadata)
    (rank, scale), _ = Counter(scales.values()).most_common(1)[0]
    for key, value in (("ss_network_dim", rank), ("ss_network_alpha", _whole(rank * scale))):
        if key in found:
            found[key] = str(value)
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in (parse_object(found.get(_DIFFUSERS, "")) or {}).items():
        prefix, _, name = str(key).partition(".")
        grouped.setdefault(prefix, {})[name] = value
    told: dict[str, Any] = {}
    for prefix, values in grouped.items():
        own = {
            name.removeprefix(f"{prefix}."): known for name, known in scales.items() if name.startswith(f"{prefix}.")
        }
        new = settings_with_ranks(values, own) if own else values
        told |= {f"{prefix}.{name}": value for name, value in new.items()}
    return {**found, _DIFFUSERS: json.dumps(told, indent=2, sort_keys=True)} if told else found


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file whole, with kohya's hashes of it where its run has them.

    Raises:
        SeriesError: the place cannot be written.
    """
    from safetensors.torch import save as serialised

    written = dict(metadata)
    if "sshs_model_hash" in written:
        body = serialised(tensors, {key: value for key, value in written.items() if key.startswith("ss_")})
        data = body[8 + int.from_bytes(body[:8], "little") :]
        written["sshs_model_hash"] = hashlib.sha256(data).hexdigest()
        written["sshs_legacy_hash"] = hashlib.sha256(body[0x100000:0x110000]).hexdigest()[:8]
    write_bytes(path, serialised(tensors, written or None))


def save_settings(path: Path, values: Mapping[str, Any]) -> None:
    """Write adapter_config.json."""
    write_text(path, to_json(dict(values)))


def _whole(number: float) -> float | int:
    """An integer where it is one but for rounding."""
    nearest = round(number)
    return nearest if math.isclose(number, nearest, rel_tol=1e-12) else number
