"""SSF (Lian et al. 2022): features are scaled and shifted, y -> g y + b, which scales the rows of W: D = diag(g - 1) W.

The names are those of the authors' vision transformers: numbered within a block, by the layers whose output they scale.
The shift changes biases only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    from lora_forensics.moments import ScaledChange

_LAYERS = {
    "attn": ("qkv", "proj"),
    "mlp": ("fc1", "fc2"),
    "patch_embed": ("proj", "norm"),
}
"""The end of a block's name to the layers behind which its first and second scale stand; else its norms."""


class SSF(AdapterKind):
    """Scales of output features."""

    name = "ssf"
    about = KindDoc("SSF", "diag(g - 1) W", "Lian et al. 2022; the authors' vision transformers")
    suffixes: Mapping[str, str] = {role: rf"\.ssf_{role}_(?P<{role}_number>[12])" for role in ("scale", "shift")}
    aside = frozenset({"shift"})

    def module(self, found: re.Match[str]) -> str:
        """The scaled layer, not the block that the scale is named in."""
        block = found["module"]
        number = int(found["scale_number"] or found["shift_number"])
        return f"{block}.{_LAYERS.get(block.rpartition('.')[2], ('norm1', 'norm2'))[number - 1]}"

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """A number for each output feature."""
        return Layout(None, shapes["scale"][0], None) if len(shapes.get("scale", ())) == 1 else None

    def change(self, stack: Stack) -> ScaledChange:
        """A rescaled weight."""
        from lora_forensics.moments import ScaledChange

        return ScaledChange(stack.tensors["scale"], False, False, stack.lead)
