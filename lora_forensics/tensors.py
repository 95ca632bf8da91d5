"""Lazy, read-only, named tensors on disk: safetensors, shards of them, and torch pickles (`weights_only`).

Reading headers needs no torch: discovery and planning stay fast. Tensors are read one at a time, when asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import pickle
import re
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from io import FileIO, RawIOBase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lora_forensics.errors import CheckpointError, RemoteError
from lora_forensics.remote import RemotePath, local, same_file

if TYPE_CHECKING:
    import torch

SAFETENSORS = ".safetensors"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
TENSOR_FILES = (SAFETENSORS, *PICKLES)

_METADATA = re.compile(r'\s*\{\s*"__metadata__"\s*:\s*')
_MAX_HEADER = 100_000_000
"""The limit that the safetensors format sets itself."""
_TARGETS = 512
"""Pieces of memory that one call of the system fills: Linux and macOS take 1024."""
_STRUCTURE = 1 << 22
"""Bytes of a pickle in which names are looked for."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What a header tells about one tensor."""

    dtype: str
    """As safetensors writes it: F32, BF16, ..."""
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Header:
    """The header of a safetensors file."""

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    fingerprint: str
    """Hash of the header's bytes, the file's size and its modification time."""
    layout: str
    """Hash of names, types, shapes and offsets: equal for two files that differ in metadata or values only."""
    starts: Mapping[str, int]
    """Name to the first byte of the tensor, from the start of the data."""
    data_start: int
    size: int
    modified: float


class Tensors(Protocol):
    """Named tensors that are read when asked for."""

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to type and shape."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The file's own text metadata; empty where the format has none."""
        ...

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored type."""
        ...

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis` (0 or 1); of a safetensors file only these bytes are read."""
        ...


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without torch.

    Raises:
        CheckpointError: the file is empty, truncated, or no safetensors file; the message says which.
    """
    try:
        stat = path.stat()
        size = stat.st_size
        with path.open("rb") as file:
            if size < 8:
                what, rule = ("empty", "empty-file") if size == 0 else (f"only {size} bytes", "truncated-file")
                raise CheckpointError(f"{path}: {what}: not a safetensors file", rule=rule)
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER:
                raise CheckpointError(f"{path}: does not start with a safetensors header")
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if len(raw) < length:
        raise CheckpointError(
            f"{path}: truncated inside its header ({size} bytes)", "copy or download it again", "truncated-file"
        )
    try:
        metadata, tensors = _split_header(raw.decode("utf-8"))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not a safetensors header") from error
    expected = 8 + length + tensors.end
    if size != expected:
        what = f"truncated: {expected - size} bytes missing" if size < expected else f"{size - expected} bytes too long"
        message = f"{path}: {what} (header asks for {expected} bytes, file has {size})"
        raise CheckpointError(message, "save it again", "truncated-file" if size < expected else "unreadable-file")
    fingerprint = hashlib.sha256(raw + f"|{size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]
    return Header(tensors.infos, metadata, fingerprint, tensors.layout, tensors.starts, 8 + length, size, stat.st_mtime)


@dataclass(frozen=True, slots=True)
class _Described:
    """The part of a header that all checkpoints of a run have in common."""

    infos: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    starts: Mapping[str, int]
    end: int
    """Bytes of data."""
    layout: str


def _split_header(text: str) -> tuple[Mapping[str, str], _Described]:
    """Metadata and tensors. Writers put the metadata first: what follows is equal in a whole run, and parsed once."""
    found = _METADATA.match(text)
    if found is None:
        described = _describe(text.strip())
        return described.metadata, described
    metadata, stop = json.JSONDecoder().raw_decode(text, found.end())
    rest = text[stop:].strip()  # writers pad with spaces
    return _strings(metadata), _describe("{" + rest.removeprefix(","))


@lru_cache(maxsize=64)
def _describe(text: str) -> _Described:
    document = json.loads(text)
    metadata = _strings(document.pop("__metadata__", None))
    infos, starts, end = {}, {}, 0
    for name, entry in document.items():
        name.encode()  # JSON can spell lone surrogates, which are no text
        info = TensorInfo(str(entry["dtype"]), tuple(int(n) for n in entry["shape"]))
        start, stop = map(int, entry["data_offsets"])
        if min(start, *info.shape, 0) < 0 or math.prod(info.shape) > 8 * (stop - start):  # less than a bit for a number
            raise ValueError(name)
        infos[name], starts[name], end = info, start, max(end, stop)
    return _Described(infos, metadata, starts, end, hashlib.sha256(text.encode()).hexdigest())


def _strings(metadata: dict[object, object] | None) -> dict[str, str]:
    return {str(key): str(value) for key, value in (metadata or {}).items()}


def file_fingerprint(path: Path) -> str:
    """A hash that changes when the file does; of the header for safetensors, of size and time for the rest.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    if path.suffix == SAFETENSORS:
        return read_header(path).fingerprint
    try:
        stat = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    return hashlib.sha256(f"{stat.st_size}|{stat.st_mtime_ns}".encode()).hexdigest()[:16]


class SafetensorsFile:
    """One safetensors file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._header = read_header(path)
        self._handle: Any = None

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to type and shape."""
        return self._header.infos

    @property
    def metadata(self) -> Mapping[str, str]:
        """The header's `__metadata__`."""
        return self._header.metadata

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored type."""
        try:
            shape = self._header.infos[name].shape
            rows = self._rows(name, 0, shape[0] if shape else 1)
            return self._open().get_tensor(name) if rows is None else rows.reshape(shape)
        except RemoteError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis` (0 or 1)."""
        try:
            length = self._header.infos[name].shape[0]
            if axis == 1 and isinstance(self.path, RemotePath):  # no mapping: columns are cut from the whole
                return self.read(name)[:, start:stop]
            rows = self._rows(name, start, min(stop, length)) if axis == 0 and 0 <= start < stop else None
            if rows is not None:
                return rows
            view = self._open().get_slice(name)
            return view[start:stop] if axis == 0 else view[:, start:stop]  # type: ignore[no-any-return]
        except RemoteError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: tensor {name!r} cannot be read: {error}") from error

    def stackable(self, other: Tensors) -> bool:
        """Whether the other file holds tensors of the same names and shapes at the same places."""
        if not isinstance(other, SafetensorsFile):
            return False
        mine, theirs = self._header, other._header
        return mine.infos == theirs.infos and mine.starts == theirs.starts

    def read_into(self, targets: Mapping[str, memoryview]) -> None:
        """Whole tensors into memory of their size, what lies side by side in the file in one go.

        Raises:
            CheckpointError: the file cannot be read.
        """
        starts = self._header.starts
        try:
            self._fill([(starts[name], target) for name, target in targets.items()])
        except RemoteError:
            raise
        except Exception as error:
            raise CheckpointError(f"{self.path}: cannot be read: {error}") from error

    def _rows(self, name: str, start: int, stop: int) -> torch.Tensor | None:
        """Entries along the first axis, read and not mapped: what is mapped counts as memory until the file is closed.

        None for types that are left to safetensors.
        """
        import torch

        info = self._header.infos[name]
        dtype = dtype_of(info.dtype)
        if dtype is None or start >= stop:
            return None
        each = math.prod(info.shape[1:]) * dtype.itemsize
        raw = torch.empty((stop - start) * each, dtype=torch.uint8)
        self._fill([(self._header.starts[name] + start * each, memoryview(raw.numpy()))])  # type: ignore[arg-type]
        return raw.view(dtype).reshape(stop - start, *info.shape[1:])

    def _fill(self, parts: Iterable[tuple[int, memoryview]]) -> None:
        """Bytes of the data from given places on."""
        with self.path.open("rb", buffering=0) as file:
            for start, targets in _side_by_side(parts):
                _read_exactly(file, self._header.data_start + start, targets)

    def _open(self) -> Any:
        """The library's handle, which takes a file at a URL whole from the disk."""
        if self._handle is None:
            from safetensors import safe_open

            self._handle = safe_open(local(self.path), framework="pt")
        return self._handle


class PickleFile:
    """A torch pickle, loaded with `weights_only`: it can hold tensors and plain values, and run no code."""

    def __init__(self, path: Path) -> None:
        import torch

        self.path = path
        try:
            # mmap needs the zip format of torch >= 1.6; older files are read whole
            loaded = torch.load(local(path), map_location="cpu", weights_only=True, mmap=_is_zip(path))
        except RemoteError:
            raise
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path}: refused or unreadable as a weights-only pickle: {reason[:160]}",
                "save it as safetensors with the trainer that wrote it",
                _pickle_rule(path, error),
            ) from error
        state = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else {}
        entries = state.items() if isinstance(state, dict) else ()
        self._tensors: dict[str, torch.Tensor] = {
            str(name): value for name, value in entries if isinstance(value, torch.Tensor)
        }
        for name, value in self._tensors.items():
            if value.layout != torch.strided or value.is_quantized or value.is_meta:
                raise CheckpointError(f"{path}: tensor {name!r} is sparse, quantized or without numbers: not read")

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Name to type and shape."""
        return {name: TensorInfo(_dtype_name(t.dtype), tuple(t.shape)) for name, t in self._tensors.items()}

    @property
    def metadata(self) -> Mapping[str, str]:
        """Pickles have none."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored type."""
        return self._tensors[name].detach()

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis`."""
        return self._tensors[name].detach().narrow(axis, start, stop - start)


class TensorUnion:
    """Several files as one; the first that holds a name wins."""

    def __init__(self, files: Mapping[str, Tensors]) -> None:
        """`files` maps a prefix, put before every name of the file, to the file. A key may end in '#' and digits to
        tell files of one prefix apart; that part is dropped."""
        self._owner: dict[str, tuple[Tensors, str]] = {}
        self._infos: dict[str, TensorInfo] = {}
        for key, file in files.items():
            prefix = key.partition("#")[0]
            for name, info in file.infos.items():
                if prefix + name not in self._owner:
                    self._owner[prefix + name] = (file, name)
                    self._infos[prefix + name] = info

    @property
    def infos(self) -> Mapping[str, TensorInfo]:
        """Prefixed name to type and shape."""
        return self._infos

    @property
    def metadata(self) -> Mapping[str, str]:
        """A union has none."""
        return {}

    def read(self, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU, in its stored type."""
        file, own = self._owner[name]
        return file.read(own)

    def read_slice(self, name: str, axis: int, start: int, stop: int) -> torch.Tensor:
        """Entries [start, stop) along `axis`."""
        file, own = self._owner[name]
        return file.read_slice(own, axis, start, stop)


def open_tensors(path: Path) -> Tensors:
    """Open one file by its suffix.

    Raises:
        CheckpointError: damaged, or of a format that is not read.
    """
    if path.suffix == SAFETENSORS:
        return SafetensorsFile(path)
    if path.suffix in PICKLES:
        return PickleFile(path)
    raise CheckpointError(f"{path}: not a tensor file ({', '.join(TENSOR_FILES)})")


def pickle_mentions(path: Path, words: Sequence[str]) -> bool:
    """Whether the structure of a torch pickle spells any of these words; nothing of it is unpickled.

    Raises:
        CheckpointError: the file is damaged or cannot be read.
    """
    try:
        if not _is_zip(path):
            with path.open("rb") as file:
                structure = file.read(_STRUCTURE)
        else:
            with path.open("rb") as file, zipfile.ZipFile(file) as archive:
                name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
                structure = archive.open(name).read(_STRUCTURE) if name else b""
    except (OSError, zipfile.BadZipFile, NotImplementedError, RuntimeError, zlib.error, EOFError) as error:
        message = f"{path}: empty, truncated, or no torch pickle ({error})"
        raise CheckpointError(message, "save it again", _pickle_rule(path, error)) from error
    return any(word.encode() in structure for word in words)


def _pickle_rule(path: Path, error: Exception) -> str:
    """The rule for a pickle that was not opened: empty, refused since it names what only code would, or cut."""
    try:
        if not path.stat().st_size:
            return "empty-file"
    except OSError:
        return "unreadable-file"
    return "unsafe-pickle" if isinstance(error, pickle.UnpicklingError) and "GLOBAL" in str(error) else "truncated-file"


def _side_by_side(parts: Iterable[tuple[int, memoryview]]) -> Iterator[tuple[int, list[memoryview]]]:
    """Start and targets of every stretch of neighbouring bytes, in the file's order."""
    first, end, targets = 0, -1, list[memoryview]()
    for start, target in sorted(parts, key=lambda part: part[0]):
        if not target.nbytes:
            continue
        if start != end or len(targets) == _TARGETS:
            if targets:
                yield first, targets
            first, targets = start, []
        targets.append(target)
        end = start + target.nbytes
    if targets:
        yield first, targets


def _read_exactly(file: RawIOBase, offset: int, targets: list[memoryview]) -> None:
    """Fill the targets one after the other; with one call of the system where it has one for that."""
    if hasattr(os, "preadv") and isinstance(file, FileIO):
        while targets:
            count = os.preadv(file.fileno(), targets, offset)
            if not count:
                raise CheckpointError("the file ends inside a tensor", rule="truncated-file")
            offset += count
            while targets and count >= targets[0].nbytes:
                count -= targets.pop(0).nbytes
            if count:
                targets[0] = targets[0][count:]
        return
    data = memoryview(bytearray(sum(target.nbytes for target in targets)))
    file.seek(offset)
    filled = 0
    while filled < len(data):
        count = file.readinto(data[filled:]) or 0
        if not count:
            raise CheckpointError("the file ends inside a tensor", rule="truncated-file")
        filled += count
    for target in targets:
        target[:] = data[: target.nbytes]
        data = data[target.nbytes :]


def same_content(first: Path, second: Path) -> bool:
    """Whether two files of one format hold equal tensors in one order; metadata and names may differ.

    Names may, since some trainers spell the last file of a run in another way. Of safetensors files sixteen spread
    blocks are compared first, so that files that differ cost almost nothing; of pickles the sums in their archives.
    Of files at URLs the server's own mark, or eight such blocks alone, decide: to list runs downloads no tensors.
    """
    try:
        if same_file(first, second):
            return True
        if first.suffix in PICKLES and second.suffix in PICKLES:
            return _sums(first) == _sums(second)
        one, two = read_header(first), read_header(second)
        if one.layout != two.layout and list(one.infos.values()) != list(two.infos.values()):
            return False
        length = one.size - one.data_start
        with first.open("rb") as a, second.open("rb") as b:
            whole = ((n, 1 << 22) for n in range(0, length, 1 << 22))
            for start, count in _spread(length, 8) if isinstance(first, RemotePath) else (*_spread(length), *whole):
                a.seek(one.data_start + start)
                b.seek(two.data_start + start)
                if a.read(min(count, length - start)) != b.read(min(count, length - start)):
                    return False
    except (CheckpointError, OSError, zipfile.BadZipFile):
        return False
    return True


def _sums(path: Path) -> list[tuple[str, int, int]]:
    """Name, sum and size of the structure and of every tensor of a torch pickle."""
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        entries = [(entry.filename.partition("/")[2], entry.CRC, entry.file_size) for entry in archive.infolist()]
    return sorted(entry for entry in entries if entry[0] == "data.pkl" or entry[0].startswith("data/"))


def _spread(length: int, blocks: int = 16, block: int = 4096) -> Sequence[tuple[int, int]]:
    return [((length * i) // blocks, block) for i in range(blocks)]


def _is_zip(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(2) == b"PK"


def dtype_of(name: str) -> torch.dtype | None:
    """Torch's type of a name in a header, None for those that are left to safetensors."""
    return next((dtype for dtype, known in _dtype_names().items() if known == name), None)


def _dtype_name(dtype: torch.dtype) -> str:
    return _dtype_names().get(dtype, str(dtype))


@lru_cache(maxsize=1)
def _dtype_names() -> Mapping[torch.dtype, str]:
    import torch

    return {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
        torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
        torch.bool: "BOOL", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2",
    }  # fmt: skip
