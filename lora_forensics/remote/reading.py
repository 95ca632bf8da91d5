"""Bytes at URLs: ranges with read-ahead, heads that were fetched beforehand, and whole copies of small files."""

from __future__ import annotations

import atexit
import errno
import io
import os
import shutil
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lora_forensics.errors import RemoteError
from lora_forensics.remote.filesystems import explained, filesystem
from lora_forensics.remote.listing import Entry, described

BLOCK = 8 << 20
"""Bytes that are asked for at once where a file is read on and on."""
_HEAD = 16 << 10
"""Bytes of a file's beginning that are fetched beforehand: the header of a small adapter."""
_LARGEST_HEAD = 4 << 20
_SMALL = 256 << 10
"""Bytes of a text up to which it is fetched beforehand; longer ones (vocabularies, long logs) when they are opened."""
_TEXTS = (".json", ".jsonl", ".toml", ".yaml", ".yml", ".csv", ".db", ".txt", ".parquet")
_EVENTS = "events.out.tfevents."
_STREAMS = 4
"""Files of which a stretch is held in memory."""
_AT_ONCE = 16
"""Requests for small files that run side by side."""

_HEADED = ".safetensors"
RANGED = (_HEADED, ".bin", ".pt", ".pth", ".ckpt", ".gguf")
"""Files that are read by ranges; all others are fetched whole when they are opened."""

_session: list[Path] = []
_kept: dict[tuple[str, Entry], _Kept] = {}
"""Files of which what was read stays on disk."""
_streams: OrderedDict[tuple[str, Entry], _Stream] = OrderedDict()
_guard = threading.Lock()
_ahead = ThreadPoolExecutor(2, thread_name_prefix="read-ahead")


def session(known: str | None = None) -> Path:
    """A temporary folder for what must lie on disk; that of the process that started this one, if it is there."""
    if not _session and known and os.path.isdir(known):
        _session.append(Path(known))
    if not _session:
        _session.append(Path(tempfile.mkdtemp(prefix="lora-forensics-")))
        atexit.register(shutil.rmtree, _session[0], ignore_errors=True)
    return _session[0]


def copied(url: str, found: Entry, copy: Path) -> Path:
    """A copy of a whole file on this disk.

    Raises:
        OSError: it cannot be read, or changed since it was listed.
    """
    if not copy.exists():
        with _Remote(url, found) as file:
            _store(copy, (file.read(start, min(start + BLOCK, found.size)) for start in range(0, found.size, BLOCK)))
    return copy


def _store(place: Path, blocks: Iterable[bytes]) -> None:
    """Whole or not at all: other workers of this machine look into the same folder."""
    place.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=place.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.writelines(blocks)
        os.replace(name, place)
    except BaseException:
        os.unlink(name)
        raise


def prefetch(files: Mapping[str, tuple[Entry, Path]]) -> None:
    """Fetch headers and small texts side by side: one after the other, each would wait for the network.

    What fails here is tried again, and told, when it is opened.
    """
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        list(pool.map(lambda item: _fetch_small(*item), ((url, *told) for url, told in files.items())))


def keep(url: str, found: Entry, copy: Path) -> None:
    """What is read of a file stays on this disk until the program ends: a base model is read for every few checkpoints.

    Each process keeps its own: two that write one file would have to agree on what is in it.
    """
    if (url, found) not in _kept:
        _kept[url, found] = _Kept(copy.with_name(f"{copy.name}#{os.getpid()}-{len(_kept)}"))


def _fetch_small(url: str, found: Entry, copy: Path) -> None:
    name = url.rpartition("/")[2]
    try:
        if name.endswith(_HEADED):
            _fetch_head(url, found, head_file(copy))
        elif (name.endswith(_TEXTS) or name.startswith(_EVENTS)) and found.size <= _SMALL:
            copied(url, found, copy)
    except (OSError, RemoteError):
        return


def _fetch_head(url: str, found: Entry, head: Path) -> None:
    with _Remote(url, found) as file:
        start = file.read(0, min(_HEAD, found.size))
        wanted = min(8 + int.from_bytes(start[:8], "little"), found.size)
        if len(start) < wanted <= _LARGEST_HEAD:
            start += file.read(len(start), wanted)
        _store(head, [start[: max(wanted, 8)]])


def head_file(copy: Path) -> Path:
    """Where the beginning of a file lies that is not copied whole."""
    return copy.with_name(copy.name + "#head")


class RangedFile(io.RawIOBase):
    """A file at a URL, read by ranges: what is asked for, or, `ahead`, large blocks where it is read on and on."""

    def __init__(self, url: str, found: Entry, copy: Path, ahead: bool) -> None:
        self._url = url
        self._entry = found
        self._ahead = ahead
        self._at = 0
        head = head_file(copy)
        self._head = head.read_bytes() if not ahead and head.exists() else b""

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Place of the next byte."""
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a place."""
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._entry.size}[whence]
        self._at = max(base + offset, 0)
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fill a buffer, as far as the file goes."""
        into = memoryview(buffer).cast("B")
        stop = min(self._at + len(into), self._entry.size)
        if stop <= self._at:
            return 0
        if self._at < len(self._head):
            data: bytes | memoryview = self._head[self._at : stop]
        else:
            stream = _stream(self._url, self._entry)
            data = stream.read(self._at, stop) if self._ahead else stream.exactly(self._at, stop)
        into[: len(data)] = data
        self._at += len(data)
        return len(data)


class _Stream:
    """One file: the stretch that was read last, and the one behind it on its way."""

    def __init__(self, url: str, found: Entry) -> None:
        self._file = _Remote(url, found)
        self._size = found.size
        self._lock = threading.Lock()
        self._start = self._stop = 0
        self._data = b""
        self._next: Future[bytes] | None = None

    def read(self, start: int, stop: int) -> memoryview:
        """Bytes [start, stop), or fewer: at least one."""
        with self._lock:
            if not self._start <= start < self._stop:
                self._fetch(start, stop)
            return memoryview(self._data)[start - self._start : min(stop, self._stop) - self._start]

    def exactly(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), and no more of the file."""
        return self._file.read(start, stop)

    def _fetch(self, start: int, stop: int) -> None:
        """A stretch that begins at `start`: what is asked for, and a whole block where the file is read on and on."""
        goes_on = 0 < self._stop <= start < self._stop + BLOCK  # a tensor left out is no jump
        coming, self._next = self._next, None
        if coming is not None and start == self._stop:
            data = coming.result()
        else:
            end = stop if stop - start < BLOCK and not goes_on else start + BLOCK
            data = self._file.read(start, min(end, self._size))
        self._start, self._stop, self._data = start, start + len(data), data
        # of a request that is not done, the rest; past its end only where reading goes on
        end = stop if stop > self._stop else self._size if goes_on and len(data) == BLOCK else 0
        if end > self._stop:
            self._next = _ahead.submit(self._file.read, self._stop, min(end, self._stop + BLOCK))


def _stream(url: str, found: Entry) -> _Stream:
    with _guard:
        stream = _streams.get((url, found))
        if stream is None:
            stream = _streams[url, found] = _Stream(url, found)
        _streams.move_to_end((url, found))
        while len(_streams) > _STREAMS:
            _streams.popitem(last=False)
        return stream


class _Remote:
    """One open file of a file system, which must be the one that was listed."""

    def __init__(self, url: str, found: Entry) -> None:
        self._url = url
        self._entry = found
        self._lock = threading.Lock()
        self._file: Any = None
        self._kept = _kept.get((url, found))

    def read(self, start: int, stop: int) -> bytes:
        """Bytes [start, stop), in one request, or in none where they are kept.

        Raises:
            OSError: they cannot be read, or the file changed since it was listed.
        """
        if start >= stop:
            return b""
        with self._lock:
            data = self._kept.read(start, stop) if self._kept else None
            if data is not None:
                return data
            with explained(self._url):
                file = self._open()
                file.seek(start)
                data = bytes(file.read(stop - start))
            if len(data) != stop - start:
                raise OSError(errno.EIO, "changed while it was read: it ends early", self._url)
            if self._kept:
                self._kept.write(start, data)
        return data

    def _open(self) -> Any:
        if self._file is None:
            found, path = filesystem(self._url)
            self._file = found.open(path, "rb", cache_type="none")
            now = described(getattr(self._file, "details", None) or found.info(path))
            if now.size != self._entry.size or (now.tag and self._entry.tag and now.tag != self._entry.tag):
                raise OSError(errno.EIO, "changed since it was listed", self._url)
        return self._file

    def __enter__(self) -> _Remote:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            self._file.close()


class _Kept:
    """Stretches of a file on this disk, in their places: of what is not there nothing is taken."""

    def __init__(self, place: Path) -> None:
        self._place = place
        self._spans: list[tuple[int, int]] = []
        self._lock = threading.Lock()

    def read(self, start: int, stop: int) -> bytes | None:
        """Bytes [start, stop), if all of them are here."""
        if not any(low <= start and stop <= high for low, high in self._spans):
            return None
        try:
            with self._place.open("rb") as file:
                file.seek(start)
                return file.read(stop - start)
        except OSError:
            return None

    def write(self, start: int, data: bytes) -> None:
        """Keep a stretch; a full disk keeps none."""
        with self._lock:
            try:
                self._place.parent.mkdir(parents=True, exist_ok=True)
                with self._place.open("r+b" if self._spans else "wb") as file:
                    file.seek(start)
                    file.write(data)
            except OSError:
                return
            low, high = start, start + len(data)
            near = [span for span in self._spans if span[1] >= low and high >= span[0]]
            whole = (min(low, *(one for one, _ in near)), max(high, *(two for _, two in near))) if near else (low, high)
            self._spans = [*(span for span in self._spans if span not in near), whole]
