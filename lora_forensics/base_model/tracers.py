"""Row tracers: run somebody else's converter and read from its output where every row came from."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lora_forensics.base_model.slices import Shape, flat_shape

if TYPE_CHECKING:
    import torch

Convert = Callable[[dict[str, Any]], Mapping[str, Any]]
"""A converter of state dicts: names to tensors, and the same under other names; it may empty its argument."""

_ROW_BITS = 32
_MAX_RUNS = 64
"""More than this is a row-by-row reordering (rotary halves), which row slices cannot sensibly state."""


@dataclass(frozen=True, slots=True)
class Trace:
    """What stands behind one name that a converter gave out."""

    name: str
    runs: tuple[tuple[str, int, int], ...]
    """Tensors that went in, with start and stop of their rows, in the order in which they are stacked."""
    transposed: bool


def trace(shapes: Mapping[str, Shape], convert: Convert) -> tuple[Trace, ...]:
    """What comes out of a converter; nothing if it fails, as it may on names that are not of its family.

    Each tensor becomes a column (with as many trailing axes of size 1 as it has) of `id << 32 | row`, in float64,
    which holds these numbers exactly and survives a converter that multiplies by a scale of 1.
    """
    columns = {name: _column(number, shape) for number, (name, shape) in enumerate(shapes.items(), start=1)}
    inputs = [(name, flat_shape(shape)[0]) for name, shape in shapes.items()]
    converted = _run(convert, columns)
    return tuple(trace for name, value in converted.items() if (trace := _read(name, value, inputs)) is not None)


def names_out(shapes: Mapping[str, Shape], convert: Convert) -> list[str]:
    """The names alone: costs no memory, so that it tells cheaply whether a trace is worth it."""
    import torch

    return list(_run(convert, {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}))


def _run(convert: Convert, tensors: dict[str, Any]) -> Mapping[str, Any]:
    import torch

    try:
        with torch.no_grad():
            return convert(tensors)
    except Exception:  # noqa: BLE001 - it asks for keys, axes and sizes that only its own family has
        return {}


def _read(name: str, value: Any, inputs: Sequence[tuple[str, int]]) -> Trace | None:
    """The rows that a converted column is made of; None if it is none, or holds anything else."""
    import torch

    if not isinstance(value, torch.Tensor) or value.dtype != torch.float64 or value.numel() == 0:
        return None
    transposed = value.ndim == 2 and value.shape[0] == 1 < value.shape[1]
    if not transposed and value.shape[:1].numel() != value.numel():
        return None
    entries = value.flatten().to(torch.int64)
    if not torch.equal(entries.double(), value.flatten()):
        return None
    breaks = (torch.nonzero(entries.diff() != 1).flatten() + 1).tolist()
    if len(breaks) >= _MAX_RUNS:
        return None
    runs = []
    for begin, end in itertools.pairwise([0, *breaks, len(entries)]):
        number, row = divmod(int(entries[begin]), 1 << _ROW_BITS)
        if not 1 <= number <= len(inputs) or row + end - begin > inputs[number - 1][1]:
            return None
        runs.append((inputs[number - 1][0], row, row + end - begin))
    return Trace(name, tuple(runs), transposed)


def _column(number: int, shape: Shape) -> torch.Tensor:
    import torch

    first = number << _ROW_BITS
    rows = torch.arange(first, first + flat_shape(shape)[0], dtype=torch.float64)
    return rows.reshape(-1, *(1 for _ in shape[1:])) if shape else rows[0]


def lenient(convert: Convert, names: Iterable[str] = ()) -> Convert:
    """The converter for a part of a model: tensors that it asks for and that are not there leave no trace.

    `names` are there for a converter that counts, and stand for nothing.
    """
    return lambda columns: convert(_Lenient({**dict.fromkeys(names, Absent()), **columns}))


class _Lenient(dict[str, Any]):
    """A state dict that gives out a stand-in for every tensor that it does not hold."""

    def __missing__(self, key: str) -> Absent:
        return Absent()

    def pop(self, key: str, *default: Any) -> Any:
        """The tensor, or a stand-in."""
        return super().pop(key, *(default or (Absent(),)))


class Absent:
    """Stands in for a tensor that is not there: whatever a converter makes of it leaves no trace."""

    shape = (0, 0)

    @classmethod
    def __torch_function__(cls, function: Any, _types: Any, args: tuple[Any, ...] = (), _kwargs: Any = None) -> Any:
        match function.__name__, args:
            case "chunk", (_, int(count), *_):
                return (cls(),) * count
            case "split", (_, [*sizes], *_):
                return (cls(),) * len(sizes)
        return cls()

    def chunk(self, count: int, **_: Any) -> tuple[Absent, ...]:
        """That many stand-ins."""
        return (self,) * count

    def __getitem__(self, key: Any) -> Absent:
        return self
