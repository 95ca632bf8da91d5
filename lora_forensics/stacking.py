"""Tensors of many checkpoints, read straight into the stack that is computed with, and ahead of the computing."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from typing import TypeVar

import torch

from lora_forensics.errors import CheckpointError
from lora_forensics.tensors import SafetensorsFile, Tensors, dtype_of

T = TypeVar("T")
BATCHES = 32
"""The memory for checkpoints holds so many batches of modules: one is worked on and one read, the rest is room to work.
Small ones keep what is worked on near, and still make long reads of every file."""
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
"""Numbers of glibc's malloc.h."""


class UnreadableError(Exception):
    """One of several files cannot be read."""

    def __init__(self, index: int, error: CheckpointError) -> None:
        super().__init__(error.message)
        self.index = index
        """Position of the file."""
        self.error = error


def read_together(files: Sequence[Tensors], names: Iterable[str]) -> dict[str, list[torch.Tensor] | torch.Tensor]:
    """Named tensors of all files: (files, *shape) where the files are laid out alike, else one of each file.

    Every file is opened once and read in its own order.

    Raises:
        UnreadableError: a file cannot be read.
    """
    found: dict[str, list[torch.Tensor] | torch.Tensor] = {}
    names = list(names)
    first = files[0]
    alike = isinstance(first, SafetensorsFile) and all(first.stackable(file) for file in files[1:])
    raw = {}
    for name in names:
        info = first.infos[name] if alike else None
        if info is not None and (dtype := dtype_of(info.dtype)) is not None:
            size = math.prod(info.shape) * dtype.itemsize
            if size:
                raw[name] = torch.empty(len(files), size, dtype=torch.uint8)
                found[name] = raw[name].view(dtype).reshape(len(files), *info.shape)
    others = [name for name in names if name not in raw]
    arrays = {name: buffer.numpy() for name, buffer in raw.items()}
    for index, file in enumerate(files):
        try:
            if isinstance(file, SafetensorsFile) and arrays:
                file.read_into({name: memoryview(rows[index]) for name, rows in arrays.items()})
            for name in others:
                found.setdefault(name, []).append(file.read(name))  # type: ignore[union-attr]
        except CheckpointError as error:
            raise UnreadableError(index, error) from error
    return found


@lru_cache(maxsize=1)
def keep_freed_memory() -> None:
    """Tell glibc not to give every freed temporary back to the system: faulting it in again takes 5 % of a scan.

    Elsewhere, or under another allocator, this does nothing.
    """
    with suppress(OSError, AttributeError, TypeError):
        allocator = ctypes.CDLL(None)
        allocator.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        allocator.mallopt(_M_TRIM_THRESHOLD, 256 << 20)


def staged(
    blocks: Iterator[tuple[int, int, torch.Tensor]], device: torch.device
) -> Iterator[tuple[int, int, torch.Tensor]]:
    """Blocks of a weight, each read (and on CUDA sent, from pinned memory) while the one before is worked on."""
    if device.type != "cuda":
        yield from ahead(blocks)
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def sent() -> Iterator[tuple[int, int, torch.Tensor, torch.cuda.Event]]:
        for start, stop, rows in blocks:
            with torch.cuda.stream(stream):
                there = rows.pin_memory().to(device, non_blocking=True)
            yield start, stop, there, stream.record_event()

    for start, stop, there, arrived in ahead(sent()):
        torch.cuda.current_stream(device).wait_event(arrived)
        there.record_stream(torch.cuda.current_stream(device))  # not to be used again for another block before
        yield start, stop, there


def ahead(items: Iterator[T]) -> Generator[T]:
    """The same items, each made in a thread while the one before it is worked on."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, items, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, items, end)
            yield item  # type: ignore[misc]
