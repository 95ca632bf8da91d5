"""Metrics: columns of layers.parquet as pure functions of moments.

A new metric is one decorated function in the module of its topic and one line in `METRICS`; its column, its
documentation and its mean in series.parquet follow from the declaration.
"""

from __future__ import annotations

from lora_forensics.metrics import movement, norms, scales, similarity, spectra
from lora_forensics.metrics.interface import Metric

__all__ = ["METRICS", "Metric"]

METRICS: tuple[Metric, ...] = (
    similarity.cosine,
    similarity.cosine_rowwise,
    norms.delta_norm,
    norms.base_norm,
    norms.relative_norm,
    norms.magnitude_change,
    norms.direction_change,
    norms.down_norm,
    norms.up_norm,
    spectra.spectral_norm,
    spectra.stable_rank,
    spectra.effective_rank,
    movement.rotation,
    movement.step_size,
    norms.nonfinite,
    similarity.cosine_noise,
    movement.layer_rotation,
    movement.step_alignment,
    movement.down_rotation,
    movement.up_rotation,
    movement.down_moved,
    scales.scale_mean,
    scales.scale_spread,
    scales.scale_carried,
    scales.changed_share,
)
"""Every metric, in the order of the columns."""
