"""Paths whose text is a URL, and whose methods ask the server."""

from __future__ import annotations

import io
import os
import shutil
import stat
import sys
import time
from collections.abc import Generator, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any

from lora_forensics.errors import UsageError
from lora_forensics.remote import listing, reading
from lora_forensics.remote.filesystems import cleaned, explained, filesystem, hint_of, is_url, remember, secrets_of
from lora_forensics.remote.listing import Entry

if sys.platform == "win32":
    from pathlib import WindowsPath as _Local
else:
    from pathlib import PosixPath as _Local


class RemotePath(_Local):
    """`s3://bucket/a/b` as a path with the parts `/`, `s3:`, `bucket`, `a`, `b`.

    `str` is the URL, so that whatever is said of it, or stored, is the URL. `os.fspath` is the place of a copy on this
    disk, which is there only once `local` was called: code that goes past the methods fails and reads nothing wrong.
    A recorded path that is absolute (`folder / "/home/..."`) is on the machine that recorded it: nothing is there.
    """

    @property
    def url(self) -> str:
        """The URL, without secrets; empty for what is none."""
        parts = self.parts
        if len(parts) < 2 or not parts[1].endswith(":") or parts[0] != self.anchor:
            return ""
        return f"{parts[1]}//{'/'.join(parts[2:])}"

    def __str__(self) -> str:
        return self.url or self._plain()

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def as_posix(self) -> str:
        """The URL."""
        return str(self)

    def __fspath__(self) -> str:
        if not self.url:
            return self._plain()
        parts = ("%2E%2E" if part == ".." else part for part in self.parts[2:])
        return os.path.join(reading.session(), self.parts[1].rstrip(":"), *parts)

    def _plain(self) -> str:
        return self.anchor + os.sep.join(self.parts[bool(self.anchor) :]) or "."

    def __reduce__(self) -> Any:
        if not self.url:
            return RemotePath, self.parts
        entry = listing.entry(self.url) if self._has_host() else None
        return _restored, (self.url, entry, secrets_of(self.url), str(reading.session()))

    def __hash__(self) -> int:
        return hash(self.parts)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and self.parts == other.parts

    @property
    def parent(self) -> RemotePath:
        """The folder; of a bucket or host itself."""
        return self if self.url and len(self.parts) <= 3 else super().parent

    @property
    def parents(self) -> tuple[RemotePath, ...]:
        """Up to the bucket or host."""
        found, here = [], self
        while (above := here.parent) != here:
            found.append(above)
            here = above
        return tuple(found)

    def is_absolute(self) -> bool:
        """URLs are."""
        return bool(self.anchor)

    def absolute(self) -> RemotePath:
        """Itself."""
        return self

    def resolve(self, strict: bool = False) -> RemotePath:  # noqa: ARG002
        """Without `..`; there are no links."""
        parts: list[str] = []
        for part in self.parts:
            if part == "..":
                del parts[max(3, len(parts) - 1) :]
            else:
                parts.append(part)
        return RemotePath(*parts)

    def entry(self) -> Entry | None:
        """What lies here.

        Raises:
            OSError: the server cannot be asked.
        """
        return listing.entry(self.resolve().url) if self._has_host() else None

    def _has_host(self) -> bool:
        return bool(self.url) and len(self.parts) > 2

    def _known(self) -> Entry | None:
        """What lies here; what may not be seen does not.

        Raises:
            UsageError: the server cannot be asked.
        """
        try:
            return self.entry()
        except PermissionError:
            return None
        except OSError as error:
            raise UsageError(f"{self}: {error.strerror}", hint_of(error)) from error

    def exists(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether something is there that may be seen."""
        return self._known() is not None

    def is_file(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether a file is."""
        found = self._known()
        return found is not None and not found.folder

    def is_dir(self, *, follow_symlinks: bool = True) -> bool:  # noqa: ARG002
        """Whether files lie below it."""
        found = self._known()
        return found is not None and found.folder

    def is_symlink(self) -> bool:
        """Never."""
        return False

    def stat(self, *, follow_symlinks: bool = True) -> os.stat_result:  # noqa: ARG002
        """Size and time as the server tells them; the nanoseconds change with the content (`listing.stamp`)."""
        found = self._there()
        seconds = found.modified
        kind = stat.S_IFDIR if found.folder else stat.S_IFREG
        times = dict.fromkeys(("st_atime", "st_mtime", "st_ctime"), seconds)
        whole = (kind | 0o444, 0, 0, 1, 0, 0, found.size, int(seconds), int(seconds), int(seconds))
        return os.stat_result(whole, {**times, "st_mtime_ns": listing.stamp(found)})

    def open(  # type: ignore[override]
        self,
        mode: str = "r",
        buffering: int = -1,
        encoding: str | None = None,
        errors: str | None = None,
        newline: str | None = None,
    ) -> IO[Any]:
        """Read: tensor files by ranges, ahead only without buffering; of others a copy. `published` writes."""
        if set(mode) & set("wax+"):
            raise io.UnsupportedOperation(f"{self} is not opened for writing")
        if not self.name.endswith(reading.RANGED):
            return open(local(self), mode, buffering, encoding, errors, newline)
        found = self._there()
        copy = Path(os.fspath(self.resolve()))
        file = reading.RangedFile(self.resolve().url, found, copy, ahead=buffering == 0)
        raw: Any = file if buffering == 0 else io.BufferedReader(file)
        return raw if "b" in mode else io.TextIOWrapper(raw, encoding, errors, newline)

    def iterdir(self) -> Generator[RemotePath, None, None]:
        """What lies in the folder, by name."""
        yield from (self / name for name in (listing.names(self.resolve().url) if self._has_host() else ()))

    def glob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """Paths below that fit, `*` within one name only; nothing where the folder cannot be read."""
        first, _slash, rest = str(pattern).partition("/")
        try:
            found = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        except OSError:
            return
        for path in found:
            if not rest:
                yield path
            elif path.is_dir():
                yield from path.glob(rest)

    def rglob(self, pattern: str, **_: Any) -> Iterator[RemotePath]:  # type: ignore[override]
        """The same in every folder below."""
        yield from self.glob(pattern)
        for path in self.glob("*"):
            if path.is_dir():
                yield from path.rglob(pattern)

    def mkdir(self, mode: int = 0o777, parents: bool = False, exist_ok: bool = False) -> None:  # noqa: ARG002
        """Only where copies lie: servers have folders by the files in them."""
        os.makedirs(self, exist_ok=True)

    def unlink(self, missing_ok: bool = False) -> None:
        """Delete it here and there.

        Raises:
            UsageError: it may not be deleted.
        """
        Path(os.fspath(self)).unlink(missing_ok=True)
        if self._known() is None and missing_ok:
            return
        found, path = filesystem(self.url)
        try:
            with explained(self.url):
                found.rm_file(path)
        except OSError as error:
            raise UsageError(f"{self} cannot be deleted: {error.strerror}", hint_of(error)) from error
        listing.put(self.url, None)

    def _there(self) -> Entry:
        found = self.entry()
        if found is None:
            raise FileNotFoundError(2, "does not exist", str(self))
        return found


def place(text: str | Path) -> Path:
    """A path as it was given or stored: a `RemotePath` for a URL, of this machine otherwise (`file://` too)."""
    if isinstance(text, Path):
        return text
    if not is_url(text):
        return Path(text)
    scheme, _, rest = text.partition("://")
    if scheme.lower() in ("file", "local"):
        return Path(rest)
    return RemotePath(*_parts(cleaned(text)))


def _parts(url: str) -> tuple[str, ...]:
    head, _, rest = url.partition("://")
    return (os.sep, f"{head}:", *rest.split("/"))


def identity(path: Path) -> str:
    """One text for all spellings of a place, which stays the same in later runs of this program."""
    return str(path.resolve()) if isinstance(path, RemotePath) else os.path.realpath(path)


def fresh(path: Path) -> Path:
    """List a tree anew, and fetch what is small in it; nothing for paths of this machine.

    Raises:
        UsageError: the server cannot be asked; the hint says what to check.
    """
    if isinstance(path, RemotePath) and path._has_host():
        url, copies = path.resolve().url, Path(os.fspath(path.resolve()))
        shutil.rmtree(copies, ignore_errors=True)
        try:
            files = listing.load(url)
        except FileNotFoundError:
            listing.start_empty(url)
        except OSError as error:
            raise UsageError(f"{path}: {error.strerror}", hint_of(error)) from error
        else:
            reading.prefetch({file: (found, copies / file[len(url) + 1 :]) for file, found in files.items()})
    return path


def listed(path: Path) -> Path:
    """As `fresh`, unless it was listed before.

    Raises:
        UsageError: as `fresh`.
    """
    return path if isinstance(path, RemotePath) and listing.is_listed(path.resolve().url) else fresh(path)


def scanned(folder: Path) -> AbstractContextManager[Iterable[os.DirEntry[str] | RemotePath]]:
    """What lies in a folder, as `os.scandir` gives it; its entries and paths answer to the same questions."""
    return nullcontext(folder.iterdir()) if isinstance(folder, RemotePath) else os.scandir(folder)


def same_file(first: Path, second: Path) -> bool:
    """Whether a server says that two files have the same bytes; False where it does not say."""
    one, two = (path.entry() if isinstance(path, RemotePath) else None for path in (first, second))
    return one is not None and two is not None and bool(one.tag) and (one.size, one.tag) == (two.size, two.tag)


def kept(path: Path) -> Path:
    """Say that a file will be read again and again: each byte is downloaded once. Nothing for files of this machine."""
    if isinstance(path, RemotePath) and (found := path.entry()):
        reading.keep(path.resolve().url, found, Path(os.fspath(path.resolve())))
    return path


def local(path: Path) -> Path:
    """A file of this disk with the same content, for libraries that open files by their names.

    Raises:
        OSError: it cannot be read.
    """
    if not isinstance(path, RemotePath) or not path.url:
        return Path(os.fspath(path))
    whole = path.resolve()
    return reading.copied(whole.url, whole._there(), Path(os.fspath(whole)))


def published(path: Path) -> None:
    """Upload what was just written at `os.fspath(path)`; nothing for paths of this machine.

    Raises:
        OSError: it cannot be written there.
    """
    if not isinstance(path, RemotePath) or not path._has_host():
        return
    copy = os.fspath(path)
    found, place = filesystem(path.url)
    with explained(path.url):
        found.put_file(copy, place)
    listing.put(path.url, Entry(False, os.path.getsize(copy), time.time()))


def _restored(url: str, found: Entry | None, secrets: tuple[str, str], session: str) -> RemotePath:
    """In another process, perhaps on another machine: what is known of the file goes along."""
    reading.session(session)
    remember(url, *secrets)
    if found is not None and not found.folder:
        listing.put(url, found)
    return RemotePath(*_parts(url))
