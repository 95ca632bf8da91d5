"""SHiRA (Bhardwaj et al. 2024): some entries of the weight are trained, and saved with their places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import AdapterKind, KindDoc, Layout, Shapes, Stack

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import FormedChange


class SHiRA(AdapterKind):
    """Values and their rows and columns."""

    name = "shira"
    about = KindDoc("SHiRA", "sparse", "Bhardwaj et al. 2024; PEFT")
    suffixes: Mapping[str, str] = {
        "values": r"\.shira_weight(?:\.[^.]+)?",
        "places": r"\.shira_indices(?:\.[^.]+)?",
    }
    peft_types = frozenset({"SHIRA"})

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """The shape is not told."""
        if set(shapes) != {"values", "places"} or shapes["places"] != (2, *shapes["values"]):
            return None
        return Layout(None, None, None)

    def change(self, stack: Stack) -> FormedChange:
        """As a matrix."""
        import torch

        from lora_forensics.errors import CheckpointError
        from lora_forensics.moments import FormedChange, widened

        values, places = stack.tensors["values"], stack.tensors["places"].long()

        def form(index: int, weight: torch.Tensor) -> torch.Tensor:
            rows, columns = places[index].to(weight.device)
            if len(rows) and (
                int(rows.max()) >= weight.shape[0]
                or int(columns.max()) >= weight.shape[1]
                or int(places[index].min()) < 0
            ):
                raise CheckpointError("places outside of the weight")
            changed = torch.zeros_like(weight)
            return changed.index_put_((rows, columns), widened(values[index]).to(weight), accumulate=True)

        return FormedChange(form, (values, places), stack.lead)
