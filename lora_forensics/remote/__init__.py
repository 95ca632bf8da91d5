"""Runs, base models and results at URLs (`s3://`, `hf://`, ... through fsspec).

Everything else works on `pathlib` paths. `place` gives for a URL a `RemotePath`: a path whose text is the URL and whose
methods ask the server, so that no other module knows of two kinds of path. What a method cannot carry (a library that
opens a file by its name) goes through `local`, and what is written into OUT through `published`; both do nothing for
files of this machine. fsspec is imported when there is a URL, and not before.
"""

from __future__ import annotations

from lora_forensics.remote.filesystems import is_url
from lora_forensics.remote.paths import (
    RemotePath,
    fresh,
    identity,
    kept,
    listed,
    local,
    place,
    published,
    same_file,
    scanned,
)

__all__ = [
    "RemotePath",
    "fresh",
    "identity",
    "is_url",
    "kept",
    "listed",
    "local",
    "place",
    "published",
    "same_file",
    "scanned",
]
