"""Row slices of base tensors: their shapes, and how they are cut and joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from lora_forensics.records import RowSlice, WeightRef

Shape = tuple[int, ...]
ModuleShape = tuple[int | None, int | None]
"""Rows and columns of the change that an adapter makes; None is unknown."""
Parts = tuple[RowSlice, ...]


def flat_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor whose axes after the first are flattened; a vector is one column."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def span(part: RowSlice, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Start and stop of a part's rows."""
    return part.rows or (0, flat_shape(shapes[part.tensor])[0])


def stacked_shape(parts: Sequence[RowSlice], shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the stacked parts as stored; None if their columns differ."""
    columns = {flat_shape(shapes[part.tensor])[1] for part in parts}
    rows = sum(stop - start for start, stop in (span(part, shapes) for part in parts))
    return (rows, columns.pop()) if len(columns) == 1 else None


def weight_shape(ref: WeightRef, shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns as `layers.parquet` states them: out x in, and embeddings as the base stores them."""
    stored = stacked_shape(ref.parts, shapes)
    return stored[::-1] if stored and ref.transposed and not ref.embedding else stored


def cut(parts: Sequence[RowSlice], start: int, stop: int, shapes: Mapping[str, Shape]) -> list[RowSlice]:
    """Rows [start, stop) of the stacked parts."""
    out, offset = [], 0
    for part in parts:
        first, last = span(part, shapes)
        low, high = max(start - offset, 0), min(stop - offset, last - first)
        if low < high:
            out.append(RowSlice(part.tensor, (first + low, first + high)))
        offset += last - first
    return out


def join(parts: Iterable[RowSlice], shapes: Mapping[str, Shape]) -> Parts:
    """The same rows in as few slices as possible; a whole tensor has `rows` None."""
    runs: list[tuple[str, int, int]] = []
    for part in parts:
        start, stop = span(part, shapes)
        if runs and runs[-1][0] == part.tensor and runs[-1][2] == start:
            runs[-1] = (part.tensor, runs[-1][1], stop)
        else:
            runs.append((part.tensor, start, stop))
    whole = {tensor: (0, flat_shape(shapes[tensor])[0]) for tensor, _, _ in runs}
    return tuple(RowSlice(name, None if whole[name] == (start, stop) else (start, stop)) for name, start, stop in runs)
