"""Trainable tokens (PEFT): new values for some rows of an embedding. D = new - W on these rows, else 0."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack
from lora_forensics.records import Unresolved

if TYPE_CHECKING:
    from lora_forensics.moments import GivenChange


class TrainableTokens(AdapterKind):
    """Rows by the indices in the configuration."""

    name = "trainable-tokens"
    about = KindDoc("trainable tokens", "new - W on chosen rows", "PEFT")
    suffixes: Mapping[str, str] = {"rows": r"(?:\.token_adapter)?\.trainable_tokens_delta(?:\.[^.]+)?"}
    peft_types = frozenset({"TRAINABLE_TOKENS"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | Unresolved | None:
        """The embedding's width."""
        if len(shapes.get("rows", ())) != 2:
            return None
        number = len(_indices(config, module))
        if number != shapes["rows"][0]:
            return Unresolved(f"{shapes['rows'][0]} tokens are saved, and adapter_config.json names {number}")
        return Layout(None, None, shapes["rows"][1])

    def change(self, stack: Stack) -> GivenChange:
        """The difference to the base in these rows."""
        from lora_forensics.moments import GivenChange

        rows = _indices(stack.config, stack.module)
        return GivenChange(stack.tensors["rows"], stack.lead, less_weight=True, rows=rows)


def _indices(config: AdapterConfig, module: str) -> list[int]:
    """Of the tokens of one embedding."""
    found = config.values.get("token_indices") or config.values.get("trainable_token_indices")
    if isinstance(found, dict):
        found = next((rows for name, rows in found.items() if f".{module}".endswith(f".{name}")), None)
    return [row for row in found if isinstance(row, int) and row >= 0] if isinstance(found, list) else []
