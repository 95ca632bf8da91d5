"""Held-out samples as they lie on disk: texts in one file, images with captions in a folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lora_forensics.errors import UsageError

TEXTS = (".txt", ".jsonl")
IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
CAPTIONS = (".txt", ".caption")


@dataclass(frozen=True, slots=True)
class Text:
    """One text; only what follows the prompt is scored."""

    text: str = ""
    prompt: str = ""
    messages: tuple[dict[str, Any], ...] = ()
    """A conversation, of which the last message is scored."""


@dataclass(frozen=True, slots=True)
class Picture:
    """One image and what is on it."""

    path: Path
    caption: str


def read_texts(path: Path) -> list[Text]:
    """The samples of a file: .txt, parted by blank lines; .jsonl, one object a line.

    An object has `text`, or `prompt` and `completion`, or `messages`.

    Raises:
        UsageError: it cannot be read, holds no sample, or a line is none.
    """
    try:
        content = path.read_text("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--held-out {path} cannot be read: {reason}", "give a .txt or .jsonl file") from error
    if path.suffix.lower() not in TEXTS:
        raise UsageError(f"--held-out {path} is neither .txt nor .jsonl", "see docs/probe.md for what may stand in it")
    lines = content.split("\n")  # other ends of a line may stand inside of a JSON text
    samples = list(_objects(path, lines) if path.suffix.lower() == ".jsonl" else _paragraphs(lines))
    if not samples:
        raise UsageError(f"--held-out {path} holds no sample", "a few texts that were not trained on, four or more")
    return samples


def _paragraphs(lines: list[str]) -> Iterator[Text]:
    held: list[str] = []
    for line in [*lines, ""]:
        if line.strip():
            held.append(line)
        elif held:
            yield Text("\n".join(held))
            held = []


def _objects(path: Path, lines: list[str]) -> Iterator[Text]:
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            yield _sample(json.loads(line))
        except (ValueError, TypeError, KeyError) as error:
            hint = 'a line is {"text": ...}, {"prompt": ..., "completion": ...} or {"messages": [...]}'
            raise UsageError(f"--held-out {path}: line {number} is no sample: {error}", hint) from error


def _sample(entry: Any) -> Text:
    if not isinstance(entry, dict):
        raise TypeError("it is no object")
    prompt, completion = entry.get("prompt"), entry.get("completion")
    messages = entry.get("messages")
    if isinstance(prompt, list) and isinstance(completion, list):
        messages = [*prompt, *completion]
    if isinstance(messages, list) and all(isinstance(m, dict) and "content" in m and "role" in m for m in messages):
        if not messages:
            raise ValueError("it has no message")
        return Text(messages=tuple(messages))
    if isinstance(prompt, str) and isinstance(completion, str) and completion:
        return Text(completion, prompt)
    if isinstance(entry.get("text"), str) and entry["text"].strip():
        return Text(entry["text"])
    raise KeyError("it has no text")


def read_pictures(folder: Path) -> list[Picture]:
    """The images of a folder with their captions, by name: from metadata.jsonl, else from the text file beside each.

    Raises:
        UsageError: there is no image with a caption, or metadata.jsonl cannot be read.
    """
    told = _metadata(folder / "metadata.jsonl")
    found, without = [], []
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() not in IMAGES:
            continue
        beside = [path.with_suffix(ending) for ending in CAPTIONS if path.with_suffix(ending).is_file()]
        if path.name in told:
            found.append(Picture(path, told[path.name]))
        elif beside:
            found.append(Picture(path, beside[0].read_text("utf-8-sig", "replace").strip()))
        else:
            without.append(path.name)
    if without:
        message = f"--held-out {folder}: {len(without)} images have no caption, {without[0]} first"
        raise UsageError(message, "put a .txt of the same name beside each; it may be empty")
    if not found:
        raise UsageError(f"--held-out {folder} holds no image", f"it takes {', '.join(IMAGES)} with a .txt beside each")
    return found


def _metadata(path: Path) -> dict[str, str]:
    """The captions of a data set in Hugging Face's layout."""
    if not path.is_file():
        return {}
    told = {}
    for number, line in enumerate(path.read_text("utf-8-sig", "replace").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            told[str(entry["file_name"])] = str(entry.get("text", entry.get("caption", "")))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            hint = 'a line is {"file_name": ..., "text": ...}'
            raise UsageError(f"{path}: line {number} names no image and text", hint) from error
    return told


def mark(*parts: object) -> str:
    """A short hash of what scores depend on."""
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]
