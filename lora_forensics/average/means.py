"""The mean of one module over checkpoints, for every kind whose mean is one of its kind again.

A kind is a line in `MEANS`. Where the change is linear in what is saved, the mean of the saved tensors is that of the
changes. A product of factors is not: their sum is a product of larger rank, cut back to the rank that is asked for.
DoRA's change g (W + D) - W, g = m / norm(W + D) by rows, is a product beside a scaled W: with c = mean(g),
mean(g (W + D)) = c (W + D') for D' = mean(g D) / c, of rank at most the sum of ranks, and m' = c norm(W + D') makes it
DoRA again. For columns the same holds from the right.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lora_forensics.adapters import KINDS, AdapterConfig, AdapterModule, naming
from lora_forensics.adapters.dora import MAGNITUDES, by_column
from lora_forensics.adapters.initial import TAKEN_OUT
from lora_forensics.average.factors import Factors, balanced, distance, norm, truncated, weighted_sum
from lora_forensics.errors import CheckpointError, UsageError
from lora_forensics.moments import tucker_down, widened

Rank = int | str | None
"""A number, `full` for the sum of ranks, None for the run's own."""

CONSTANT = frozenset({"alpha", "number", "on_input", "places"})
"""Roles that say how to read the others: equal at all checkpoints, or nothing is averaged."""


@dataclass(frozen=True, slots=True)
class Part:
    """One module at all checkpoints, oldest first; the last one's form is that of the mean."""

    module: AdapterModule
    tensors: Sequence[Mapping[str, Tensor]]
    """Role to tensor."""
    scales: Sequence[float | None]
    weights: Sequence[float]
    config: AdapterConfig
    rank: Rank
    dtype: torch.dtype | None
    """To save in; None is that of each tensor."""
    weight: Callable[[], Tensor]
    """The weight below it (rows x columns), in float64; raises BaseModelError."""

    @property
    def multipliers(self) -> list[float]:
        """Weights times scales; an unknown scale counts as 1, since it is one and the same."""
        return [w * (1.0 if s is None else s) for w, s in zip(self.weights, self.scales, strict=True)]

    def stored(self, role: str, mean: Tensor) -> Tensor:
        """A float64 tensor in the type that is saved.

        Raises:
            CheckpointError: it does not fit that type.
        """
        like = self.tensors[-1][role]
        wanted = like.dtype if self.dtype is None or not like.is_floating_point() else self.dtype
        saved = mean.to(wanted).contiguous()
        if not bool(torch.isfinite(widened(saved)).all()):
            raise CheckpointError(f"{self.module.name}: the mean is too large for {wanted}: use --dtype float32")
        return saved


@dataclass(frozen=True, slots=True)
class Mean:
    """The mean of one module."""

    tensors: Mapping[str, Tensor]
    """Role to tensor, as it is saved."""
    norm: float
    """Of the mean: of its change, or of the tensors where `change` is False."""
    error: float
    """Norm of what is saved less the mean."""
    rank: int | None = None
    scale: float | None = None
    change: bool = True
    """What is saved is the weight's change by itself, without the base."""


def low_rank(part: Part) -> Mean:
    """LoRA in all its spellings; a Tucker kernel goes into the factor beside it."""
    pairs = [_read(part, tensors) for tensors in part.tensors]
    whole = weighted_sum(pairs, part.multipliers)
    rank = _rank(part, pairs)
    scale, tensors = _scale(part, rank)
    tensors |= _bias(part, scale) | _written(part, _shared(whole, rank, scale))
    return Mean(tensors, norm(whole), distance(whole, _times(_read(part, tensors), scale)), rank, scale)


def with_values(part: Part) -> Mean:
    """AdaLoRA: three factors, of a rank that cannot be chosen."""
    pairs = [(t["up"].double(), t["values"].double() * t["down"].double()) for t in part.tensors]
    whole = weighted_sum(pairs, part.multipliers)
    rank = _rank(part, pairs, fixed="AdaLoRA's rank is one with its training")
    scale = _known(part.scales[-1])
    u, values, v = truncated(whole, rank)
    tensors = {role: tensor for role, tensor in part.tensors[-1].items() if role in CONSTANT}
    for role, mean in (("up", u), ("values", values[:, None] / scale), ("down", v)):
        tensors[role] = part.stored(role, mean)
    saved = tensors["up"].double() * scale, tensors["values"].double() * tensors["down"].double()
    return Mean(tensors, norm(whole), distance(whole, saved), rank, scale)


def decomposed(part: Part) -> Mean:
    """DoRA around LoRA: needs the base, in whose directions the magnitudes are."""
    (role,) = MAGNITUDES & part.tensors[-1].keys()
    stored = part.tensors[-1][role]
    columns = by_column(role, tuple(stored.shape), part.tensors[-1])
    axis = 0 if columns else 1
    weight = part.weight()
    if stored.numel() != weight.shape[1 - axis]:
        raise CheckpointError(f"{part.module.name}: one magnitude for several {'columns' if columns else 'rows'}")

    def lengths(change: Tensor) -> Tensor:
        length: Tensor = torch.linalg.vector_norm(weight + change, dim=axis)
        return length

    def scaled(factors: Factors, by: Tensor) -> Factors:
        return (factors[0], factors[1] * by) if columns else (factors[0] * by[:, None], factors[1])

    pairs = [_read(part, tensors) for tensors in part.tensors]
    gains, mean = [], torch.zeros_like(weight)
    for tensors, pair, scale, share in zip(part.tensors, pairs, part.scales, part.weights, strict=True):
        change = _known(scale) * (pair[0] @ pair[1])
        length = lengths(change)
        gain = torch.where(length > 0, tensors[role].double().flatten() / length, 1.0)
        gains.append(gain)
        mean += share * gain.unsqueeze(axis) * (weight + change)
    mean -= weight
    gain = sum((share * g for share, g in zip(part.weights, gains, strict=True)), torch.zeros_like(gains[0]))
    whole = weighted_sum([scaled(pair, g) for pair, g in zip(pairs, gains, strict=True)], part.multipliers)
    rank = _rank(part, pairs)
    scale, tensors = _scale(part, rank)
    direction = scaled(_shared(whole, rank, scale), torch.where(gain == 0, 1.0, 1 / gain))
    tensors |= _bias(part, scale) | _written(part, direction)
    up, down = _read(part, tensors)
    change = scale * (up @ down)
    length = lengths(change)
    tensors[role] = part.stored(role, (gain * length).reshape(stored.shape))
    kept = torch.where(length > 0, tensors[role].double().flatten() / length, 1.0)
    error = kept.unsqueeze(axis) * (weight + change) - weight - mean
    return Mean(tensors, float(mean.norm()), float(error.norm()), rank, scale)


def linear(part: Part) -> Mean:
    """Kinds whose change is linear in what they save."""
    last = part.tensors[-1]
    for role in CONSTANT & last.keys():
        if any(not torch.equal(tensors[role], last[role]) for tensors in part.tensors):
            raise CheckpointError(f"{part.module.name}: {role} differs between checkpoints: there is no mean of it")
    tensors, squares, errors = {}, 0.0, 0.0
    for role, tensor in last.items():
        if role in CONSTANT:
            tensors[role] = tensor
            continue
        mean = mean_of([t[role] for t in part.tensors], part.weights)
        tensors[role] = part.stored(role, mean)
        squares += float(mean.square().sum())
        errors += float((widened(tensors[role]).double() - mean).square().sum())
    return Mean(tensors, squares**0.5, errors**0.5, change=False)


def difference(part: Part) -> Mean:
    """The change itself is saved."""
    return replace(linear(part), change=True)


def mean_of(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """The weighted mean in float64."""
    total = torch.zeros(tensors[0].shape, dtype=torch.float64)
    for tensor, weight in zip(tensors, weights, strict=True):
        total += weight * widened(tensor).double()
    return total


MEANS: Mapping[str, Callable[[Part], Mean]] = {
    "lora": low_rank,
    "dylora": low_rank,
    "svd-lora": low_rank,
    "dora": decomposed,
    "adalora": with_values,
    "full": difference,
    "weights": linear,
    "ia3": linear,
    "shira": linear,
    "ssf": linear,
    "trainable-tokens": linear,
}
"""Kind to its mean; of most others a mean of changes is no adapter of the same kind."""

NOT_LINEAR = "there is no exact mean of its changes as an adapter of that kind"
"""Why a kind is missing in `MEANS`."""


def _read(part: Part, tensors: Mapping[str, Tensor]) -> Factors:
    """B and A as the base stores the weight, in float64, without scale."""
    wide = {role: widened(tensor).double() for role, tensor in tensors.items()}
    if "embedding_up" in wide:
        return wide["embedding_down"].mT, wide["embedding_up"].mT
    if "mlx_a" in wide:
        a, b = wide["mlx_a"], wide["mlx_b"]
        return (a, b) if _embeds(part) else (b.mT, a.mT)
    down = wide["down"].flatten(1)
    if "mid" in wide:
        down = tucker_down(wide["mid"][None], down[None])[0]
    return wide["up"].flatten(1), down


def _written(part: Part, factors: Factors) -> dict[str, Tensor]:
    """The inverse of `_read`, in the type that is saved."""
    up, down = factors
    last = part.tensors[-1]
    if "embedding_up" in last:
        found = {"embedding_down": up.mT, "embedding_up": down.mT}
    elif "mlx_a" in last:
        found = {"mlx_a": up, "mlx_b": down} if _embeds(part) else {"mlx_b": up.mT, "mlx_a": down.mT}
    else:
        kernel = last["mid"].shape[2:] if "mid" in last else last["down"].shape[2:]
        inputs = last["down"].shape[1]
        found = {
            "up": up.reshape(*up.shape, *last["up"].shape[2:]),
            "down": down.reshape(len(down), inputs, *kernel),
        }
    return {role: part.stored(role, tensor) for role, tensor in found.items()}


def _embeds(part: Part) -> bool:
    return naming.role(part.module.name) == "embedding"


def _rank(part: Part, pairs: Sequence[Factors], fixed: str = "") -> int:
    """The rank to save.

    Raises:
        UsageError: another one than the run's own was asked for, and the adapter cannot have it.
    """
    own = pairs[-1][1].shape[0]
    asked = sum(down.shape[0] for _, down in pairs) if part.rank == "full" else part.rank
    rank = own if asked is None else int(asked)
    if rank != own:
        if part.module.kind == "svd-lora" or part.config.initialisation.startswith(TAKEN_OUT):
            start = part.config.initialisation or "another adapter"
            fixed = f"it started from {start}, and a part of its rank was taken out of the weight"
        elif part.module.kind == "dylora":
            fixed = "DyLoRA's scale counts blocks of its rank"
        elif part.scales[-1] is None:
            fixed = "no file tells its scale, which may follow the rank"
        if fixed:
            raise UsageError(f"{part.module.name} keeps its rank: {fixed}", "leave --rank out")
    return rank


def _scale(part: Part, rank: int) -> tuple[float, dict[str, Tensor]]:
    """The multiplier of the mean, that of the last checkpoint, and the tensors that tell it at this rank."""
    last, kind = part.tensors[-1], KINDS[part.module.kind]
    own = part.module.layout.rank or rank
    told = {"scalar": last["scalar"]} if "scalar" in last else {}
    if "alpha" not in last:
        return _known(part.scales[-1]), told
    told["alpha"] = part.stored("alpha", last["alpha"].double() * rank / own)
    values = {role: tensor.double().item() for role, tensor in told.items()}
    return _known(kind.scale(values, part.config, part.module.name, rank)), told


def _known(scale: float | None) -> float:
    return 1.0 if scale is None else scale


def _shared(whole: Factors, rank: int, scale: float) -> Factors:
    """Factors of rank `rank` whose product times the scale is nearest to the whole.

    Raises:
        CheckpointError: the scale is 0.
    """
    if scale == 0:
        raise CheckpointError("the adapter's scale is 0: it changes nothing")
    return balanced((whole[0] / scale, whole[1]), rank)


def _times(factors: Factors, scale: float) -> Factors:
    return scale * factors[0], factors[1]


def _bias(part: Part, scale: float) -> dict[str, Tensor]:
    """PEFT's `lora_bias`, which is scaled like the factors."""
    if "bias" not in part.tensors[-1]:
        return {}
    return {"bias": part.stored("bias", mean_of([t["bias"] for t in part.tensors], part.multipliers) / scale)}
