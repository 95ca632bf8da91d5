"""What lies at URLs: whole trees are listed with few requests, and asked for once.

All is kept for this process; `forget` makes the next question a new one.
"""

from __future__ import annotations

import hashlib
import posixpath
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from lora_forensics.remote.filesystems import explained, filesystem

_TIMES = ("LastModified", "last_modified", "mtime", "modified", "updated", "created")
_TAGS = ("ETag", "etag", "blob_id", "md5Hash", "content_md5", "Content-MD5", "checksum")
"""What file systems call the time of the last change, and a mark that changes with the content."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder."""

    folder: bool
    size: int = 0
    modified: float = 0.0
    """Seconds since 1970; 0 where the server does not say."""
    tag: str = ""
    """Changes with the content; empty where the server gives none."""


_NO_FOLDERS = ("http://", "https://")
"""Schemes whose folders are pages, if they are anything: to list one may download it."""
_FOLDER = Entry(folder=True)
_entries: dict[str, Entry | None] = {}
_folders: dict[str, dict[str, None]] = {}
"""Folders whose names are all known."""


def entry(url: str) -> Entry | None:
    """What lies at a clean URL; None if nothing does.

    Raises:
        OSError: it cannot be asked.
    """
    if url not in _entries:
        _entries[url] = None if _is_known_missing(url) else _asked(url)
    return _entries[url]


def put(url: str, found: Entry | None) -> None:
    """Take in what is known from elsewhere: just written, deleted, or told by whoever listed it."""
    _entries[url] = found
    parent, _, name = url.rpartition("/")
    if parent in _folders:
        _folders[parent].pop(name, None)
        if found:
            _folders[parent][name] = None


def names(url: str) -> list[str]:
    """The names in a folder, sorted.

    Raises:
        OSError: it cannot be read.
    """
    if url not in _folders:
        if entry(url) is None:
            raise FileNotFoundError(2, "does not exist", url)
        found, path = filesystem(url)
        with explained(url):
            infos = found.ls(path, detail=True)
        _folders[url] = {}
        for info in infos:
            name = str(info["name"]).rstrip("/").rpartition("/")[2]
            if name and str(info["name"]).strip("/") != path.strip("/"):
                put(f"{url}/{name}", described(info))
    return sorted(_folders[url])


def load(url: str) -> dict[str, Entry]:
    """List everything below a folder, with as few requests as its server needs; the files found.

    Raises:
        OSError: it cannot be listed; FileNotFoundError if nothing is there.
    """
    found, path = filesystem(url)
    forget(url)
    if url.startswith(_NO_FOLDERS) and (told := entry(url)):
        return {url: told}
    with explained(url):
        for known in [path, *(known for known in list(found.dircache) if str(known).startswith(f"{path}/"))]:
            found.invalidate_cache(known)  # and not all of it: what it lists elsewhere saves requests
        infos: Mapping[str, Any] = found.find(path, detail=True)
    files = {}
    for name, info in infos.items():
        inside = str(name).strip("/").removeprefix(path.strip("/")).strip("/")
        if inside and not str(name).endswith("/") and posixpath.normpath(inside) == inside:
            files[f"{url}/{inside}"] = described(info)
    if not files:
        if entry(url) is None:
            raise FileNotFoundError(2, "does not exist", url)
        if entry(url) == _FOLDER:
            _folders[url] = {}
        return {}
    _entries[url], _folders[url] = _FOLDER, {}
    for file, told in files.items():
        for folder in _between(url, file):
            if folder not in _folders:
                _folders[folder] = {}
                put(folder, _FOLDER)
        put(file, told)
    return files


def is_listed(url: str) -> bool:
    """Whether all names in this folder are known."""
    return url in _folders


def start_empty(url: str) -> None:
    """Take a place where nothing is yet for an empty folder, so that nothing in it is asked for."""
    _entries[url], _folders[url] = None, {}


def forget(url: str) -> None:
    """Ask again for all that lies here and below, and what lies in the folders above."""
    for known in (_entries, _folders):
        for key in [key for key in known if f"{key}/".startswith(f"{url}/") or url.startswith(f"{key}/")]:
            del known[key]


def described(info: Mapping[str, Any]) -> Entry:
    """An entry from what fsspec says of it."""
    if info.get("type") == "directory":
        return _FOLDER
    time = next((info[key] for key in _TIMES if info.get(key)), 0.0)
    if isinstance(time, str):
        try:
            time = datetime.fromisoformat(time)
        except ValueError:
            time = 0.0
    tag = next((str(info[key]) for key in _TAGS if info.get(key)), "")
    return Entry(
        False, int(info.get("size") or 0), time.timestamp() if isinstance(time, datetime) else float(time), tag
    )


def stamp(found: Entry) -> int:
    """Modification time in nanoseconds, the part below a second being a hash of the tag.

    Servers tell whole seconds: a fingerprint of size and time alone would miss a file that was replaced within one, and
    everything on a server that tells none.
    """
    below = int(hashlib.sha256(found.tag.encode()).hexdigest()[:12], 16) % 10**9 if found.tag else 0
    return int(found.modified) * 10**9 + (below or round(found.modified % 1 * 10**9))


def _is_known_missing(url: str) -> bool:
    while "/" in url.partition("://")[2]:
        url, _, name = url.rpartition("/")
        if url in _folders:
            return name not in _folders[url]
    return False


def _asked(url: str) -> Entry | None:
    found, path = filesystem(url)
    try:
        with explained(url):
            try:
                return described(found.info(path))
            except (ValueError, NotImplementedError):  # no such place can be, as a folder of repositories
                return None
    except FileNotFoundError:
        return None


def _between(top: str, file: str) -> Iterator[str]:
    """The folders from below `top` down to a file's own."""
    for place, letter in enumerate(file):
        if letter == "/" and place > len(top):
            yield file[:place]
