"""Row slices of base tensors: their shapes, and how they are cut and joined."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from lora_forensics.records import RowSlice, WeightRef

Shape = tuple[int, ...]
ModuleShape = tuple[int | None, int | None]
"""Rows and columns of the change that an adapter makes; None is unknown."""
Parts = tuple[RowSlice, ...]


def flat_shape(shape: Shape) -> tuple[int, int]:
    """Rows and columns of a tensor whose axes after the first are flattened; a vector is one column."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def part_shape(part: RowSlice, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Rows and columns of the whole matrix that a part is rows of: a tensor's, or one expert's."""
    shape = shapes[part.tensor]
    return flat_shape(shape if part.expert is None else shape[1:])


def span(part: RowSlice, shapes: Mapping[str, Shape]) -> tuple[int, int]:
    """Start and stop of a part's rows."""
    return part.rows or (0, part_shape(part, shapes)[0])


def stacked_shape(ref: WeightRef, shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns of the stacked parts as stored; None if they cannot be stacked."""
    lengths = [stop - start for start, stop in (span(part, shapes) for part in ref.parts)]
    widths = [part_shape(part, shapes)[1] for part in ref.parts]
    if stacks_outputs(ref):
        return (lengths[0], sum(widths)) if len(set(lengths)) == 1 else None
    return (sum(lengths), widths[0]) if len(set(widths)) == 1 else None


def stacks_outputs(ref: WeightRef) -> bool:
    """Whether parts lie side by side as stored: experts that are stored in x out."""
    return ref.transposed and any(part.expert is not None for part in ref.parts)


def weight_shape(ref: WeightRef, shapes: Mapping[str, Shape]) -> tuple[int, int] | None:
    """Rows and columns as `layers.parquet` states them: out x in, and embeddings as the base stores them."""
    stored = stacked_shape(ref, shapes)
    return stored[::-1] if stored and ref.transposed and not ref.embedding else stored


def cut(parts: Sequence[RowSlice], start: int, stop: int, shapes: Mapping[str, Shape]) -> list[RowSlice]:
    """Rows [start, stop) of the stacked parts."""
    out, offset = [], 0
    for part in parts:
        first, last = span(part, shapes)
        low, high = max(start - offset, 0), min(stop - offset, last - first)
        if low < high:
            out.append(replace(part, rows=(first + low, first + high)))
        offset += last - first
    return out


def join(parts: Iterable[RowSlice], shapes: Mapping[str, Shape]) -> Parts:
    """The same rows in as few slices as possible; a whole matrix has `rows` None."""
    runs: list[tuple[RowSlice, int, int]] = []
    for part in parts:
        whole = replace(part, rows=None)
        start, stop = span(part, shapes)
        if runs and runs[-1][0] == whole and runs[-1][2] == start:
            runs[-1] = (whole, runs[-1][1], stop)
        else:
            runs.append((whole, start, stop))
    return tuple(
        whole if span(whole, shapes) == (start, stop) else replace(whole, rows=(start, stop))
        for whole, start, stop in runs
    )
