"""What is wrong with one checkpoint, or worth a second look: findings from its facts.

The bounds are rules of thumb for finding damage, not measures of quality: nothing here says that a LoRA is good.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

from lora_forensics.inspection.values import ModuleFacts, TensorFacts
from lora_forensics.notices import some
from lora_forensics.records import Finding
from lora_forensics.rules import Thresholds

_NARROW = ("F16", "F8_E4M3", "F8_E5M2")
"""Types in which small numbers become 0; BF16 has the exponents of F32."""


def health(modules: Sequence[ModuleFacts], tensors: Sequence[TensorFacts], bounds: Thresholds) -> Iterator[Finding]:
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
    beside = list(_in_family(modules, bounds))
    low = {m.module for m in still} | {m.module for m, size in beside if size * bounds.dead_factor < 1}
    if low and len(still) < len(modules):
        dead = [m.module for m in modules if m.module in low]
        message = f"{len(dead)} of {len(modules)} modules change nothing or next to it: {some(dead)}"
        yield Finding("dead-modules", "warning", message, "they were frozen, or their gradient never arrived")
    far = [module.module for module, size in beside if size > bounds.outlier_factor]
    if far:
        times = f"{bounds.outlier_factor:g} times the median of their family"
        message = f"{len(far)} of {len(modules)} modules change more than {times}"
        yield Finding(
            "outlier-modules", "warning", f"{message}: {some(far)}", "they may dominate the result, or stack badly"
        )
    large = [module for module in modules if module.metric("relative_norm") > bounds.relative_norm]
    if large:
        than = "larger than" if bounds.relative_norm == 1 else f"more than {bounds.relative_norm:g} times"
        message = f"{len(large)} of {len(modules)} changes are {than} the weight below: {some(m.module for m in large)}"
        yield Finding("larger-than-weight", "warning", message, "the scale or the learning rate may be too high")
    narrow = [t for t in tensors if t.dtype in _NARROW and t.zeros < t.entries]
    zeros, entries = sum(t.zeros for t in narrow), sum(t.entries for t in narrow)
    if entries and zeros / entries > bounds.zero_share:
        message = f"{zeros / entries:.0%} of the {'/'.join(sorted({t.dtype for t in narrow}))} numbers are exactly 0"
        yield Finding(
            "flushed-to-zero", "warning", message, "numbers too small for the type were lost: save as bf16 or fp32"
        )
    if any(math.isnan(module.metric("base_norm")) for module in modules if module.metrics.get("base_norm") is not None):
        names = some(m.module for m in modules if m.parts and math.isnan(m.metric("base_norm")))
        yield Finding("base-nonfinite", "error", f"the base model holds NaN or Inf below {names}", "copy it again")


def _in_family(modules: Sequence[ModuleFacts], bounds: Thresholds) -> Iterator[tuple[ModuleFacts, float]]:
    """Modules and how large they are beside the median of their component, role and kind, where that has enough.

    By relative norm where it is known; modules that change nothing do not count for the median.
    """
    families: dict[tuple[str, str, str], list[ModuleFacts]] = {}
    for module in modules:
        families.setdefault((module.component, module.role, module.adapter), []).append(module)
    for family in families.values():
        known = [m for m in family if m.metric("relative_norm") > 0]
        name = "relative_norm" if len(known) == len(family) else "delta_norm"
        sizes = [size for m in family if math.isfinite(size := m.metric(name)) and size > 0]
        if len(sizes) >= bounds.family:
            yield from ((m, m.metric(name) / statistics.median(sizes)) for m in family)
