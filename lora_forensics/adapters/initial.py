"""LoRA that starts at a part of the weight: B @ A is not the change of the stock base.

PEFT takes the first adapter out of the weight before it trains, so the change is `s B A - s B0 A0`. Where the adapter
was saved before the first step, in a folder beside the checkpoints, that is B0 A0. Two methods make it from the weight
alone, and it is made again: PiSSA (Meng et al. 2024) from the leading singular vectors, OLoRA (Büyükakyüz 2024) from
the leading columns of a QR decomposition. An adapter that PEFT converted while saving holds the difference already,
says `init_lora_weights: true` and is plain LoRA.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.interface import KindDoc, Layout, Shapes, Stack
from lora_forensics.adapters.lora import LoRA
from lora_forensics.errors import LoraForensicsError
from lora_forensics.tensors import Tensors, open_tensors

if TYPE_CHECKING:
    import torch

    from lora_forensics.moments import Change, Weight

    Factors = tuple[torch.Tensor, torch.Tensor]

_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_AS_PEFT = 768
"""Shorter sides up to which a full decomposition takes no more than seconds."""


def principal(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """PiSSA's first factors, up (rows x rank) and down (rank x columns): up @ down is the best rank-r part of W.

    They hold the scale already, whatever it is. Small weights go through the float32 decomposition that PEFT takes, to
    the same rounding. Large ones would take minutes; float64 on the Gram matrix differs from it by up to some 1e-5 of
    that part's norm, where the spectrum has no gap behind it.
    """
    del scale  # PEFT divides by it, and multiplies by it in every forward pass
    import numpy as np
    import torch
    from scipy.sparse.linalg import eigsh

    if min(weight.shape) <= _AS_PEFT:
        left, values, right = torch.linalg.svd(weight.float(), full_matrices=False)
        return left[:, :rank].double() * values[:rank], right[:rank].double()
    wide = weight.double() if weight.shape[0] <= weight.shape[1] else weight.double().mT
    gram = (wide @ wide.mT).cpu().numpy()
    _, vectors = eigsh(gram, k=rank, v0=np.ones(len(gram)))
    basis = torch.from_numpy(vectors).to(weight.device)
    return (basis, basis.mT @ wide) if wide.shape == weight.shape else ((basis.mT @ wide).mT, basis.mT)


def leading(weight: torch.Tensor, rank: int, scale: float) -> Factors:
    """OLoRA's first factors, times the scale: Q_r and R_r of W = Q R, where only r columns of W determine Q_r."""
    import torch

    wide = weight.double()
    basis, _ = torch.linalg.qr(wide[:, :rank])
    return scale * basis, basis.mT @ wide


MADE_FROM_WEIGHT = {"olora": leading, "pissa": principal}
"""`init_lora_weights` whose first factors follow from the weight (rows x columns), the rank and the scale."""

TAKEN_OUT = (*MADE_FROM_WEIGHT, "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where the first adapter is no zero and was taken out of the weight."""


class SvdLoRA(LoRA):
    """LoRA less the adapter that it started from."""

    name = "svd-lora"
    about = KindDoc(
        "PiSSA, OLoRA; CorDA, LoRA-GA, LoftQ where the first adapter was saved",
        "s B A - s B0 A0",
        "Meng et al. 2024, Büyükakyüz 2024; PEFT",
    )
    corrected = True

    def layout(self, shapes: Shapes, config: AdapterConfig, module: str) -> Layout | None:
        """Pairs of matrices whose first adapter is known; PEFT starts no other layers from their weight."""
        if shapes.keys() - self.aside != {"down", "up"} or len(shapes["down"]) != 2:
            return None
        if config.initialisation not in MADE_FROM_WEIGHT and _saved(config) is None:
            return None
        return super().layout(shapes, config, module)

    def change(self, stack: Stack) -> Change:  # type: ignore[override] # of another form than LoRA's
        """Of twice the rank: the first adapter's factors stand beside the trained ones."""
        import torch

        from lora_forensics.moments import LowRankChange, WeightedLowRankChange, widened

        down, up = stack.tensors["down"], stack.tensors["up"]
        rank, scale, one = down.shape[1], float(stack.scale[0]), torch.ones_like(stack.scale)

        def less(first_up: torch.Tensor, first_down: torch.Tensor) -> Factors:
            """A (count, 2 rank, columns) and B (count, rows, 2 rank), scale included."""
            trained = stack.scale[:, None, None] * widened(up).double()
            first_up, first_down = (factor.cpu().expand(len(up), *factor.shape) for factor in (first_up, first_down))
            return torch.cat([widened(down).double(), first_down], dim=1), torch.cat([trained, -first_up], dim=2)

        def build(weight: Weight, device: torch.device) -> Factors:
            make = MADE_FROM_WEIGHT[stack.config.initialisation]
            name = f"{stack.config.initialisation} {rank} {scale}"
            first_up, first_down = weight.remember(name, lambda: make(weight.matrix(device), rank, scale))
            return less(first_up, first_down)

        saved = _saved(stack.config)
        if saved is None:
            return WeightedLowRankChange(build, (down, up), one, stack.lead)
        names = {role: name for name in saved.infos if (role := self._role(name, stack.module))}
        first = {role: widened(saved.read(name)).double() for role, name in names.items()}
        # rounding would give the first adapter itself a direction
        moved = (down != first["down"]).flatten(1).any(dim=1) | (up != first["up"]).flatten(1).any(dim=1)
        a, b = less(scale * first["up"], first["down"])
        return LowRankChange(a, b * moved[:, None, None], one, stack.lead, stored=(down, up))

    def _role(self, name: str, module: str) -> str | None:
        found = self.keys.fullmatch(name)
        return found.lastgroup if found and found.group("module") == module else None


def _saved(config: AdapterConfig) -> Tensors | None:
    """The adapter before the first step, if one was taken out of the weight and is at hand.

    PEFT has it saved with `init_lora_weights` set to true, and what is saved after says the same: then the folder's
    name tells (`pissa_init`).
    """
    found = first_adapter(config.folder) if config.folder else None
    if found is None:
        return None
    return found[1] if (config.initialisation or found[0].lower()).startswith(TAKEN_OUT) else None


@lru_cache(maxsize=64)
def first_adapter(folder: Path) -> tuple[str, Tensors] | None:
    """The adapter in a folder named `*init*`, or `checkpoint-0`, near a checkpoint's: its name and its tensors.

    In the checkpoint's folder, the one that holds it, or the next: the first with the same tensors, nearest first.
    """
    nearby = [near for level in (folder, *folder.parents[:2]) for near in _starts(level)]
    own = _open(folder) if nearby else None
    for near in nearby:
        tensors = _open(near)
        if own and tensors and _shapes(own) == _shapes(tensors):
            return near.name, tensors
    return None


@lru_cache(maxsize=64)
def _starts(folder: Path) -> tuple[Path, ...]:
    return tuple(sorted((*folder.glob("*init*"), *folder.glob("checkpoint-0"))))


def _shapes(tensors: Tensors) -> dict[str, tuple[int, ...]]:
    return {name: info.shape for name, info in tensors.infos.items()}


def _open(folder: Path) -> Tensors | None:
    for name in _FILES:
        if (folder / name).is_file():
            try:
                return open_tensors(folder / name)
            except LoraForensicsError:
                return None
    return None
