"""GGUF files: the `gguf` package reads the header and turns blocks of codes into numbers."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_forensics.base_model.storage.interface import Storage
from lora_forensics.errors import BaseModelError, CheckpointError, RemoteError
from lora_forensics.remote import local
from lora_forensics.tensors import TensorInfo

if TYPE_CHECKING:
    import torch

SUFFIX = ".gguf"

_PERMUTED = frozenset(
    {
        "llama", "arcee", "baichuan", "chameleon", "deci", "granite", "granitehybrid", "granitemoe", "internlm2",
        "llada", "minicpm", "mistral3", "olmo", "smollm3", "xverse",
    }
)  # fmt: skip
"""Architectures whose query and key rows llama.cpp reorders: pairs of rotary halves lie side by side in the file."""
_REGROUPED = frozenset({"bloom", "falcon", "gptneox"})
"""Architectures whose fused query, key and value llama.cpp takes apart by heads."""
_ROTARY = re.compile(r"blk\.(?P<block>\d+)\.attn_(?P<letter>[qk])\.weight")


class GGUFFile:
    """One GGUF file: tensors in their true shapes, read as float32 in the order of rows of the original model."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._gguf = _library()
        try:
            self._reader: Any = self._gguf.GGUFReader(local(path))
            self._tensors = {tensor.name: tensor for tensor in self._reader.tensors}
            self._architecture = str(self._field("general.architecture") or "")
            shapes = {name: self._shape(tensor) for name, tensor in self._tensors.items()}
        except RemoteError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: damaged, or not a GGUF file: {reason[:160]}", "copy or download it again"
            ) from error
        self._infos = {
            name: TensorInfo(str(self._tensors[name].tensor_type.name), shape)
            for name, shape in shapes.items()
            if not (self._architecture in _REGROUPED and name.endswith(".attn_qkv.weight"))
        }

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to type (Q4_K, ...) and shape."""
        return self._infos

    @property
    def metadata(self) -> Mapping[str, str]:
        """What the header says in one word or number."""
        return {"general.architecture": self._architecture}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, float32."""
        shape = self._infos[name].shape
        return self.read_slice(name, 0, 0, shape[0] if shape else 1).reshape(shape)

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis` (0 or 1), float32."""
        if axis == 1:
            return self.read(name)[:, start:stop]
        head = self._rotary_rows(name)
        if not head:
            return self._stored(name, start, stop)
        # row p * head / 2 + j of a head lies at 2 * j + p
        low, high = start // head * head, -(-stop // head) * head
        pairs = self._stored(name, low, high)
        rows = pairs.reshape(-1, head // 2, 2, *pairs.shape[1:]).transpose(1, 2).reshape(pairs.shape)
        return rows[start - low : stop - low]

    def _stored(self, name: str, start: int, stop: int) -> torch.Tensor:
        import numpy as np
        import torch

        tensor, shape = self._tensors[name], self._infos[name].shape
        width = math.prod(shape[1:])
        entries, size = self._gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        first, last = start * width // entries, -(-stop * width // entries)
        try:
            data = tensor.data.reshape(-1).view(np.uint8)[first * size : last * size]
            numbers = self._gguf.dequantize(data, tensor.tensor_type).reshape(-1)
        except (NotImplementedError, ValueError, TypeError) as error:
            raise BaseModelError(
                f"{self.path}: tensor {name!r} cannot be read: {error}",
                "pass the 16-bit model that it was made from with --base",
            ) from error
        offset = start * width - first * entries
        values = np.array(numbers[offset : offset + (stop - start) * width], dtype=np.float32)
        return torch.from_numpy(values).reshape(stop - start, *shape[1:])

    def _shape(self, tensor: Any) -> tuple[int, ...]:
        """As the original model has it: GGUF writes axes backwards, and image models note what they reshaped."""
        original = self._field(f"comfy.gguf.orig_shape.{tensor.name}")
        shape = tuple(int(n) for n in (original if original is not None else reversed(tensor.shape)))
        if math.prod(shape) != math.prod(int(n) for n in tensor.shape):
            raise ValueError(f"the shape noted for {tensor.name} has another number of entries")
        return shape

    def _rotary_rows(self, name: str) -> int:
        """Rows of one attention head of a weight whose rows were reordered; 0 for all others."""
        found = _ROTARY.fullmatch(name) if self._architecture in _PERMUTED else None
        if found is None:
            return 0
        queries = self._heads("head_count", int(found["block"]))
        heads = (self._heads("head_count_kv", int(found["block"])) or queries) if found["letter"] == "k" else queries
        rows = self._infos[name].shape[0]
        if not heads or rows % (2 * heads):
            raise BaseModelError(
                f"{self.path}: tensor {name!r} cannot be read: the header does not tell its attention heads",
                "pass the 16-bit model that it was made from with --base",
            )
        return rows // heads

    def _heads(self, key: str, block: int) -> int:
        value = self._field(f"{self._architecture}.attention.{key}")
        if isinstance(value, list):
            value = value[block] if block < len(value) else 0
        return value if isinstance(value, int) else 0

    def _field(self, key: str) -> Any:
        field = self._reader.get_field(key)
        return None if field is None else field.contents()


def _library() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise BaseModelError(
            "reading GGUF files takes the gguf library", "pip install 'lora-forensics[gguf]'"
        ) from error
    return gguf


STORAGE = Storage(
    "gguf",
    "GGUF with every type that the gguf library turns back into numbers; language models under the names of llama.cpp"
    " (rows of query and key put back in order), image models under their own",
    "https://github.com/ggml-org/ggml/blob/master/docs/gguf.md",
)
