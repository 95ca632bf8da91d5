"""Every metric by its definition, on dense float64 matrices."""

from __future__ import annotations

import torch

from lora_forensics.metrics import METRICS

METRIC = {metric.column.name: metric.compute for metric in METRICS}

LOOKS_BACK = {"rotation", "step_size", "step_alignment", "down_rotation", "up_rotation"}
"""Metrics that a broken checkpoint also takes from the one behind it."""


def dense(weight: torch.Tensor, delta: torch.Tensor, previous: torch.Tensor | None) -> dict[str, float]:
    """Every metric by its definition, in float64, on the dense change."""
    cosine = torch.nn.functional.cosine_similarity
    moved = weight + delta
    singular = torch.linalg.svdvals(delta)
    share = singular / singular.sum()
    share = share[share > 0]
    found = {
        "cosine": (weight * delta).sum() / (weight.norm() * delta.norm()),
        "cosine_rowwise": cosine(weight, delta, dim=1).mean(),
        "delta_norm": delta.norm(),
        "base_norm": weight.norm(),
        "relative_norm": delta.norm() / weight.norm(),
        "magnitude_change": (moved.norm(dim=1) - weight.norm(dim=1)).abs().mean(),
        "direction_change": (1 - cosine(weight, moved, dim=1)).mean(),
        "spectral_norm": singular[0],
        "stable_rank": delta.norm() ** 2 / singular[0] ** 2,
        "effective_rank": (-(share * share.log()).sum()).exp(),
        "layer_rotation": 1 - cosine(weight.flatten(), moved.flatten(), dim=0),
    }
    if previous is not None:
        found["rotation"] = 1 - (delta * previous).sum() / (delta.norm() * previous.norm())
        found["step_size"] = (delta - previous).norm()
        found["step_alignment"] = cosine((delta - previous).flatten(), previous.flatten(), dim=0)
    return {name: value.item() for name, value in found.items()}
