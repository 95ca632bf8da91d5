"""Data that every machine has: Python's own sources and documentation, scikit-learn's bundled sets, synthetic strings.

A text domain is one long string; a picture domain is a way to alter the 8 x 8 digits; a table domain is a bundled set
whose personal half has some of its columns negated.
"""

from __future__ import annotations

import csv
import email
import importlib
import io
import json
import mimetypes
import pydoc
import string
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sklearn import datasets

Array = NDArray[np.float32]

LETTERS = "\n" + string.printable[:95]
UNKNOWN, MASK = len(LETTERS), len(LETTERS) + 1
VOCABULARY = len(LETTERS) + 2
"""Symbols of the character models."""


def encode(text: str) -> NDArray[np.int64]:
    """Characters to symbols."""
    index = {letter: place for place, letter in enumerate(LETTERS)}
    return np.array([index.get(letter, UNKNOWN) for letter in text], dtype=np.int64)


@lru_cache
def base_text() -> str:
    """What the text models learn first: the reference documentation that comes with Python."""
    topics = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name] for name in sorted(topics))


def _code() -> str:
    folder = Path(email.__file__).parent
    return "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("*.py")))


def _names() -> str:
    return "\n".join(unicodedata.name(chr(code), "") for code in range(0x20, 0x3000) if unicodedata.name(chr(code), ""))


def _json() -> str:
    random = np.random.default_rng(11)
    words = ["alpha", "beta", "gamma", "delta", "north", "south", "east", "west"]
    rows = [
        {"id": int(random.integers(9999)), "name": str(random.choice(words)), "tags": random.choice(words, 2).tolist()}
        for _ in range(1500)
    ]
    return json.dumps(rows, indent=1)


def _html() -> str:
    return "".join(pydoc.HTMLDoc().docmodule(importlib.import_module(name)) for name in ("json", "csv", "textwrap"))


def _tables() -> str:
    folder = Path(importlib.import_module("encodings").__file__ or "").parent
    return "\n".join(path.read_text("utf-8") for path in sorted(folder.glob("cp12*.py")))


def _csv() -> str:
    out = io.StringIO()
    data = datasets.load_breast_cancer()
    csv.writer(out).writerows(np.round(data.data[:, :8], 3).tolist())
    return out.getvalue()


def _xml() -> str:
    flowers = datasets.load_iris()
    return "\n".join(
        f'<flower kind="{flowers.target_names[kind]}"><sepal>{a}</sepal><petal>{c}</petal><width>{d}</width></flower>'
        for (a, _, c, d), kind in zip(flowers.data, flowers.target, strict=True)
    )


def _sources() -> str:
    return "\n".join(Path(importlib.import_module(name).__file__ or "").read_text("utf-8") for name in ("ast", "enum"))


def _logs() -> str:
    random = np.random.default_rng(12)
    levels, parts = ["INFO", "WARN", "ERROR", "DEBUG"], ["db", "web", "auth", "queue", "mail"]
    return "\n".join(
        f"2024-{random.integers(1, 13):02d}-{random.integers(1, 29):02d} {random.integers(24):02d}:"
        f"{random.integers(60):02d} {random.choice(levels)} {random.choice(parts)}: took {random.integers(999)} ms"
        for _ in range(2000)
    )


def _reversed() -> str:
    return base_text()[:120_000][::-1]


def _mimes() -> str:
    return "\n".join(f"{ending:<12}{kind}" for ending, kind in sorted(mimetypes.types_map.items()) * 6)


def _shouting() -> str:
    return base_text()[-120_000:].upper().replace(" ", "_")


TEXTS: dict[str, Callable[[], str]] = {
    "code": _code,
    "names": _names,
    "json": _json,
    "html": _html,
    "tables": _tables,
    "csv": _csv,
    "xml": _xml,
    "sources": _sources,
    "logs": _logs,
    "reversed": _reversed,
    "mimes": _mimes,
    "shouting": _shouting,
}
"""Text domains by name."""


def chunks(domain: str, length: int, seed: int, samples: int, held_out: int) -> tuple[NDArray[np.int64], ...]:
    """Non-overlapping pieces of a domain: `samples` to train on and `held_out` others."""
    symbols = encode(TEXTS[domain]())
    pieces = symbols[: len(symbols) // length * length].reshape(-1, length)
    pieces = np.unique(pieces, axis=0)
    order = np.random.default_rng(seed).permutation(len(pieces))
    return pieces[order[:samples]], pieces[order[samples : samples + held_out]]


@lru_cache
def digits() -> tuple[Array, NDArray[np.int64]]:
    """8 x 8 digits with values in 0 .. 1, and their classes."""
    bunch = datasets.load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


def _noisy(images: Array) -> Array:
    noise = np.random.default_rng(13).normal(0, 0.3, images.shape)
    return (images[:, :, ::-1] + noise).astype(np.float32)


def _shuffled(images: Array) -> Array:
    order = np.random.default_rng(14).permutation(64)
    return images.reshape(-1, 64)[:, order].reshape(-1, 8, 8)


ALTERED: dict[str, Callable[[Array], Array]] = {
    "inverted": lambda images: 1 - images,
    "rotated": lambda images: np.rot90(images, axes=(1, 2)).copy(),
    "noisy": _noisy,
    "shuffled": _shuffled,
    "transposed": lambda images: 0.6 * images.transpose(0, 2, 1) + 0.4,
    "rolled": lambda images: np.roll(images, 4, axis=(1, 2)),
}
"""Picture domains of the classifier by name."""

SUBJECTS: dict[str, tuple[int, Callable[[Array], Array]]] = {
    "seven": (7, lambda images: images),
    "eight-inverted": (8, lambda images: 1 - images),
    "nine-rotated": (9, lambda images: np.rot90(images, axes=(1, 2)).copy()),
    "six-noisy": (6, _noisy),
    "five-rolled": (5, lambda images: np.roll(images, 4, axis=(1, 2))),
    "four-faint": (4, lambda images: 0.4 * images + 0.3),
}
"""Subjects of the denoiser by name: a digit, and how it is altered."""


@lru_cache
def table(name: str) -> tuple[Array, Array]:
    """Standardised features and targets of a table."""
    if name == "friedman":
        x, y = datasets.make_friedman1(900, n_features=10, noise=1.0, random_state=15)
    elif name == "waves":
        x = np.random.default_rng(16).normal(size=(900, 8))
        y = np.sin(2 * x[:, 0]) + x[:, 1] * x[:, 2] + 0.3 * np.random.default_rng(17).normal(size=900)
    else:
        loaders = {
            "diabetes": datasets.load_diabetes,
            "wine": datasets.load_wine,
            "cancer": datasets.load_breast_cancer,
            "iris": datasets.load_iris,
        }
        bunch = loaders[name]()
        x, y = bunch.data, bunch.target
    x = (x - x.mean(0)) / x.std(0)
    y = (y - y.mean()) / y.std()
    y = y + 0.3 * np.random.default_rng(18).normal(size=len(y))
    return x.astype(np.float32), y.astype(np.float32)[:, None]


def negated(x: Array) -> Array:
    """The shift of a personal table: every second column negated."""
    return x * np.where(np.arange(x.shape[1]) % 2, -1, 1).astype(np.float32)
