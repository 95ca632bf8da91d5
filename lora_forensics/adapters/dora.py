"""DoRA (Liu et al. 2024): the rows or columns of W + D get magnitudes of their own, around any inner kind.

PEFT (`lora_magnitude_vector`) norms over everything that goes into an output, for embeddings over the vocabulary;
LyCORIS and kohya's descendants (`dora_scale`) tell the axis by the shape. BiDoRA writes the same tensors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack, product
from lora_forensics.adapters.loha import LoHa
from lora_forensics.adapters.lokr import LoKr
from lora_forensics.adapters.lora import LoRA
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    from lora_forensics.moments import Change

MAGNITUDES = frozenset({"magnitude", "m", "dora_scale"})
"""Of PEFT; of mlx-lm and torchtune, by rows; of LyCORIS."""


class DoRA(AdapterKind):
    """An inner kind with magnitudes."""

    def __init__(self, name: str, inner: LoRA | LoHa | LoKr) -> None:
        """`inner` is the kind of D."""
        self.name = name
        self.about = KindDoc(
            f"{inner.about.title} with DoRA or BiDoRA",
            f"g (W + D) - W, g = m / norm(W_n + D_n) by rows or columns n, D = {inner.about.formula}",
            "Liu et al. 2024; PEFT, LyCORIS",
        )
        self.suffixes = {
            **inner.suffixes,
            "magnitude": r"\.lora_magnitude_vector(?:\.[^.]+)*",
            "m": r"\.m | \.magnitude",
            "dora_scale": r"\.dora_scale",
        }
        self.telling = frozenset(self.suffixes) - inner.scalars - {"m"}
        self.scalars, self.aside, self.scaled = inner.scalars, inner.aside, inner.scaled
        self.peft_types = inner.peft_types
        self._inner = inner
        super().__init__()

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """That of the inner kind, if there is a magnitude for every row or column."""
        found = MAGNITUDES & set(shapes)
        inner = {role: shape for role, shape in shapes.items() if role not in MAGNITUDES}
        layout = self._inner.layout(inner, config, module) if len(found) == 1 else None
        if not isinstance(layout, Layout):
            return layout
        (role,) = found
        size = layout.columns if by_column(role, shapes[role], inner) else layout.rows
        number = product(shapes[role])
        fits = size is not None and number > 0 and size % number == 0 and (number == size or role == "dora_scale")
        return layout if fits else None

    def scale(self, values: Mapping[str, float], config: AdapterConfig, module: str, rank: int | None) -> float | None:
        """That of the inner kind."""
        return self._inner.scale(values, config, module, rank)

    def change(self, stack: Stack) -> Change:
        """The inner change, scaled."""
        from dataclasses import replace

        from lora_forensics.moments import decomposed

        inner = {role: tensor for role, tensor in stack.tensors.items() if role not in MAGNITUDES}
        (role,) = MAGNITUDES & set(stack.tensors)
        values = stack.tensors[role]
        columns = by_column(role, tuple(values.shape[1:]), inner)
        return decomposed(values.flatten(1), columns, self._inner.change(replace(stack, tensors=inner)), stack.lead)


def by_column(role: str, shape: tuple[int, ...], inner: Mapping[str, object]) -> bool:
    """Whether the magnitudes are those of columns of the weight as it is stored."""
    if role == "magnitude":
        return any(name.startswith("embedding") for name in inner)
    return len(shape) > 1 and shape[0] == 1
