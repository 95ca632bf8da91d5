"""What is wrong with one checkpoint, or worth a second look: findings from its facts.

The bounds are rules of thumb for finding damage, not measures of quality: nothing here says that a LoRA is good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Iterator, Sequence

from lora_forensics.inspection.values import ModuleFacts, TensorFacts
from lora_forensics.notices import some
from lora_forensics.records import Finding
from lora_forensics.rules import Thresholds

_BOUNDS = Thresholds()
_NARROW = ("F16", "F8_E4M3", "F8_E5M2")
"""Types in which small numbers become 0; BF16 has the exponents of F32."""


def health(modules: Sequence[ModuleFacts], tensors: Sequence[TensorFacts]) -> Iterator[Finding]:
    """Findings, gravest first."""
    damaged = [tensor for tensor in tensors if tensor.nonfinite]
    if damaged:
        total = sum(tensor.nonfinite for tensor in damaged)
        message = f"{total} NaN or Inf in {len(damaged)} of {len(tensors)} tensors: {some(t.name for t in damaged)}"
        yield Finding("nonfinite", "error", message, "the training diverged or the save failed: use another checkpoint")
    still = [module for module in modules if module.metric("delta_norm") == 0]
    if still and len(still) == len(modules):
        message = f"all {len(modules)} modules change nothing: never trained, or saved at step 0"
        yield Finding("zero-change", "error", message, "check that the optimizer got the adapter's parameters")
    elif still:
        message = f"{len(still)} of {len(modules)} modules change nothing: {some(m.module for m in still)}"
        yield Finding("dead-modules", "warning", message, "they were frozen, or their gradient never arrived")
    far = list(_outliers(modules))
    if far:
        times = f"{_BOUNDS.outlier_factor:g} times the median of their family"
        message = f"{len(far)} of {len(modules)} modules change more than {times}"
        yield Finding(
            "outlier-modules", "warning", f"{message}: {some(far)}", "they may dominate the result, or stack badly"
        )
    large = [module for module in modules if module.metric("relative_norm") > _BOUNDS.relative_norm]
    if large:
        message = (
            f"{len(large)} of {len(modules)} changes are larger than the weight below: {some(m.module for m in large)}"
        )
        yield Finding("larger-than-weight", "warning", message, "the scale or the learning rate may be too high")
    narrow = [t for t in tensors if t.dtype in _NARROW and t.zeros < t.entries]
    zeros, entries = sum(t.zeros for t in narrow), sum(t.entries for t in narrow)
    if entries and zeros / entries > _BOUNDS.zero_share:
        message = f"{zeros / entries:.0%} of the {'/'.join(sorted({t.dtype for t in narrow}))} numbers are exactly 0"
        yield Finding(
            "flushed-to-zero", "warning", message, "numbers too small for the type were lost: save as bf16 or fp32"
        )
    if any(math.isnan(module.metric("base_norm")) for module in modules if module.metrics.get("base_norm") is not None):
        names = some(m.module for m in modules if m.parts and math.isnan(m.metric("base_norm")))
        yield Finding("base-nonfinite", "error", f"the base model holds NaN or Inf below {names}", "copy it again")


def _outliers(modules: Sequence[ModuleFacts]) -> Iterable[str]:
    """Modules far above the median of those of their component, role and kind, by relative norm where it is known."""
    families: dict[tuple[str, str, str], list[ModuleFacts]] = {}
    for module in modules:
        families.setdefault((module.component, module.role, module.adapter), []).append(module)
    for family in families.values():
        known = [m for m in family if m.metric("relative_norm") > 0]
        name = "relative_norm" if len(known) == len(family) else "delta_norm"
        sizes = [size for m in family if math.isfinite(size := m.metric(name)) and size > 0]
        if len(sizes) >= _BOUNDS.family:
            bound = _BOUNDS.outlier_factor * statistics.median(sizes)
            yield from (m.module for m in family if m.metric(name) > bound)
