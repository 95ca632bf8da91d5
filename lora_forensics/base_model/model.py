"""An opened base model: which weight lies below a module, and its rows."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from lora_forensics.base_model.files import tensor_files
from lora_forensics.base_model.names import EMBEDDINGS, LOW_NOISE, MAIN, split_tensor
from lora_forensics.base_model.resolution import Resolver
from lora_forensics.base_model.slices import (
    ModuleShape,
    Shape,
    cut,
    flat_shape,
    part_shape,
    span,
    stacks_outputs,
    weight_shape,
)
from lora_forensics.base_model.storage import open_file, unpacked
from lora_forensics.errors import BaseModelError, CheckpointError
from lora_forensics.records import RowSlice, Unresolved, WeightRef
from lora_forensics.tensors import Tensors, TensorUnion, file_fingerprint

if TYPE_CHECKING:
    import torch

_LOW_NOISE = re.compile(r"low[_-]?noise", re.IGNORECASE)
"""In the file name of the second of two denoisers (Wan 2.2): all its tensors are called as the first one's."""


class BaseModel:
    """The frozen weights that adapters were trained on; headers are read at once, values when asked for."""

    def __init__(self, paths: Sequence[Path]) -> None:
        """`paths` are as for `open_base`."""
        bases = {path: tensor_files(path) for path in paths}
        files = [file for found in bases.values() for file in found]
        self.path = " + ".join(str(path) for path in paths)
        self.paths = tuple(paths)
        self.files = tuple(file for _, file in files)
        with _base_model_errors():
            self.tensors = unpacked(_union(bases))
            marks = [f"{prefix}{file_fingerprint(file)}" for prefix, file in files]
        self.fingerprint = hashlib.sha256("|".join(marks).encode()).hexdigest()[:16]
        self.shapes: dict[str, Shape] = {name: info.shape for name, info in self.tensors.infos.items()}
        self._resolver = Resolver(self.shapes)

    def resolve(
        self, modules: Mapping[str, ModuleShape], metadata: Mapping[str, str] | None = None
    ) -> dict[str, WeightRef | Unresolved]:
        """The weight below each module, or why there is none; see `lora_forensics.base_model.resolve`."""
        return self._resolver.resolve(modules, metadata)

    def shape(self, ref: WeightRef) -> tuple[int, int]:
        """Rows and columns of a weight: out x in, kernels flattened, embeddings entries x width."""
        shape = weight_shape(ref, self.shapes)
        if shape is None:
            raise BaseModelError(f"{self.path}: the parts of {ref.label()} have different numbers of columns")
        return shape

    def stored_shape(self, ref: WeightRef) -> Shape:
        """The shape of a weight, or of its rows in a larger one, as the base stores it: in x out if transposed."""
        rows, columns = self.shape(ref)
        if ref.transposed and not ref.embedding:
            return columns, rows
        return rows, *self.shapes[ref.parts[0].tensor][1:]

    def bias(self, ref: WeightRef) -> torch.Tensor | None:
        """The bias (rows,) beside a weight, as safetensors' names have it; None where there is none."""
        import torch

        names = [f"{part.tensor.removesuffix('.weight')}.bias" for part in ref.parts]
        if ref.embedding or any(name not in self.shapes or len(self.shapes[name]) != 1 for name in names):
            return None
        with _base_model_errors():
            pieces = []
            for part, name in zip(ref.parts, names, strict=True):
                start, stop = part.rows or (0, self.shapes[name][0])
                pieces.append(self.tensors.read_slice(name, 0, start, stop))
        return torch.cat(pieces) if sum(map(len, pieces)) == self.shape(ref)[0] else None

    def dtype(self, ref: WeightRef) -> str:
        """The type that a weight is stored in, as safetensors writes it: F32, BF16, ..."""
        return self.tensors.infos[ref.parts[0].tensor].dtype

    def rows(self, ref: WeightRef, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop) of a weight as (rows, columns), in its stored type; only these are read."""
        import torch

        with _base_model_errors():
            if stacks_outputs(ref):
                pieces = [self._columns(part, low, high).T for part, low, high in self._side_by_side(ref, start, stop)]
            elif ref.transposed and not ref.embedding:
                return torch.cat([self._columns(part, start, stop) for part in ref.parts]).T
            else:
                pieces = [self._rows(part) for part in cut(ref.parts, start, stop, self.shapes)]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _rows(self, part: RowSlice) -> torch.Tensor:
        first, last = span(part, self.shapes)
        if part.expert is not None:
            return self._expert(part)[first:last].flatten(1)
        if not self.shapes[part.tensor]:
            return self.tensors.read(part.tensor).reshape(1, 1)
        columns = flat_shape(self.shapes[part.tensor])[1]
        return self.tensors.read_slice(part.tensor, 0, first, last).reshape(last - first, columns)

    def _columns(self, part: RowSlice, start: int, stop: int) -> torch.Tensor:
        first, last = span(part, self.shapes)
        if part.expert is not None:
            return self._expert(part)[first:last, start:stop]
        return self.tensors.read_slice(part.tensor, 1, start, stop)[first:last]

    def _expert(self, part: RowSlice) -> torch.Tensor:
        number = part.expert or 0
        return self.tensors.read_slice(part.tensor, 0, number, number + 1)[0]

    def _side_by_side(self, ref: WeightRef, start: int, stop: int) -> Iterator[tuple[RowSlice, int, int]]:
        """Outputs [start, stop) of experts that are stored in x out: each part with its own share of them."""
        offset = 0
        for part in ref.parts:
            width = part_shape(part, self.shapes)[1]
            low, high = max(start - offset, 0), min(stop - offset, width)
            if low < high:
                yield part, low, high
            offset += width


def open_base(paths: Sequence[Path]) -> BaseModel:
    """Open a base model: one path, or several (denoiser and text encoders in files of their own) as one model.

    Raises:
        BaseModelError: a path is missing, damaged, or no base model; the message says which and the hint what to do.
    """
    if not paths:
        raise BaseModelError("no base model is given", "pass --base PATH")
    return BaseModel(paths)


def _union(bases: Mapping[Path, Sequence[tuple[str, Path]]]) -> Tensors:
    """All files as one; a file whose names are taken already (a second CLIP) gets its own name as prefix."""
    opened: dict[str, Tensors] = {}
    taken: set[str] = set()
    for path, files in bases.items():
        group = [(prefix, file, open_file(file)) for prefix, file in files]
        place = _place(path, [name for _, _, tensors in group for name in tensors.infos]) if len(bases) > 1 else ""
        for known, file, tensors in group:
            prefix = known or place
            if any(prefix + name in taken for name in tensors.infos):
                prefix = f"{file.stem.replace('#', '_')}/"
            taken.update(prefix + name for name in tensors.infos)
            opened[f"{prefix}#{len(opened)}"] = tensors
    return TensorUnion(opened)


def _place(path: Path, names: Sequence[str]) -> str:
    """The folder that one of several paths stands for, where its tensors' names alone would not tell."""
    if _LOW_NOISE.search(path.stem):
        return f"{LOW_NOISE}/"
    embeddings = (name for name in names if EMBEDDINGS.search(name.removesuffix(".weight")))
    return "text_encoder/" if any(split_tensor(name)[0] == MAIN for name in embeddings) else ""


@contextmanager
def _base_model_errors() -> Iterator[None]:
    """A damaged file of the base is the base's fault, not a checkpoint's."""
    try:
        yield
    except CheckpointError as error:
        hint = error.hint and "copy or download this file of the base model again"
        raise BaseModelError(error.message, hint) from error
