"""Images that the trainer sampled during training, at the steps that are worth comparing.

Names after the sources of sd-scripts and musubi-tuner, ai-toolkit, OneTrainer and SimpleTuner.
"""

from __future__ import annotations

import base64
import io
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from lora_forensics.records import Verdict

_PATTERNS = (
    ("sample", r"(?:(?P<run>.+)_)?(?:e(?P<epoch>\d{6})|(?P<step>\d{6,}))_(?P<prompt>\d{2,})_\d{14}(?:_-?\d+)?"),
    ("samples", r"\d+__(?P<step>\d{9})_(?P<prompt>\d+)"),
    ("samples/*", r".*-training-sample-(?P<step>\d+)-\d+-\d+"),
    ("validation_images", r"step_(?P<step>\d+)_(?P<prompt>.+)_[\d(), x]+"),
)
"""Folder in the run's, or in the one above, and the name of a file without its ending."""
_ENDINGS = frozenset((".png", ".jpg", ".jpeg", ".webp"))
_FORMATS = ("PNG", "JPEG", "WEBP")
"""What is decoded, whatever a file is called: other decoders start programs (EPS) or have seen less abuse."""
_SIDE, _BYTES, _TOTAL, _FILES = 320, 60_000, 700_000, 20_000
_PIXELS = 64_000_000
PROMPTS, COLUMNS = 4, 5


@dataclass(frozen=True, slots=True)
class Sample:
    """One image that the trainer saved."""

    path: Path
    prompt: str
    step: float


@dataclass(frozen=True, slots=True)
class Column:
    """A candidate, and for each prompt the image that was sampled nearest to it."""

    step: int
    why: str
    images: tuple[tuple[int, str] | None, ...]
    """Step of the image and its data: URL."""


def sample_columns(verdict: Verdict, epochs: dict[float, int]) -> tuple[list[str], list[Column]]:
    """Prompts, and a column for each candidate; nothing where the trainer saved no images.

    Args:
        verdict: its `path` is searched, its candidates are the columns.
        epochs: step of each epoch at which something was saved.
    """
    found = list(_found(verdict, epochs)) if verdict.path else []
    steps = sorted({sample.step for sample in found})
    if not steps:
        return [], []
    prompts = sorted({sample.prompt for sample in found})[:PROMPTS]
    reasons = {candidate.step: candidate.why for candidate in verdict.candidates}
    if verdict.keep is not None:
        kept = verdict.keep.step
        reasons = {kept: "", **reasons}
        reasons[kept] = f"kept: {reasons[kept]}" if reasons[kept] else "kept"
    chosen = sorted(list(reasons)[:COLUMNS])
    columns, left = [], _TOTAL
    for step in chosen:
        images: list[tuple[int, str] | None] = []
        for prompt in prompts:
            near = min((s for s in found if s.prompt == prompt), key=lambda s: (abs(s.step - step), s.path.name))
            data = _small(near.path) if left > _BYTES else None
            left -= len(data or "")
            images.append((round(near.step), data) if data else None)
        columns.append(Column(step, reasons[step], tuple(images)))
    return (prompts, columns) if any(any(column.images) for column in columns) else ([], [])


def _found(verdict: Verdict, epochs: dict[float, int]) -> Iterator[Sample]:
    folder = Path(verdict.path or "")
    names = [point.checkpoint for point in verdict.points()]
    for place, pattern in _PATTERNS:
        for inside in sorted({*_folders(folder, place), *_folders(folder.parent, place)}):
            for path in _files(inside):
                match = re.fullmatch(pattern, path.stem) if path.suffix.lower() in _ENDINGS else None
                if match is None:
                    continue
                told = match.groupdict()
                if told.get("run") and names and not any(_belongs(name, told["run"] or "") for name in names):
                    continue
                step = float(told["step"]) if told.get("step") else _step_of(epochs, float(told.get("epoch") or 0))
                if step is not None:
                    yield Sample(path, told.get("prompt") or inside.name, step)


def _belongs(checkpoint: str, run: str) -> bool:
    """Whether kohya would call a checkpoint of a run so: several runs may share a folder."""
    return re.fullmatch(re.escape(run) + r"(-\d+|-step\d+)?", Path(checkpoint).stem) is not None


def _step_of(epochs: dict[float, int], epoch: float) -> float | None:
    near = min(epochs, key=lambda known: abs(known - epoch), default=None)
    return None if near is None or abs(near - epoch) > 0.5 else float(epochs[near])


def _folders(folder: Path, place: str) -> list[Path]:
    try:
        # OneTrainer's samples/custom are not at the prompts of the others
        return [path for path in sorted(folder.glob(place)) if path.is_dir() and path.name != "custom"]
    except (OSError, ValueError):
        return []


def _files(folder: Path) -> Sequence[Path]:
    try:
        return sorted(path for path in folder.iterdir() if path.is_file())[:_FILES]
    except OSError:
        return []


def _small(path: Path) -> str | None:
    """A thumbnail as a data: URL; None for what is no image, or far too large for one."""
    from PIL import Image

    try:
        with warnings.catch_warnings(), Image.open(path, formats=_FORMATS) as image:
            warnings.simplefilter("ignore")
            if image.width * image.height > _PIXELS:
                return None
            image.draft("RGB", (_SIDE, _SIDE))
            small = image.convert("RGB")
            small.thumbnail((_SIDE, _SIDE))
            for quality in (80, 60, 40):
                target = io.BytesIO()
                small.save(target, "WEBP", quality=quality, method=4)
                if target.tell() <= _BYTES * 3 // 4:
                    return f"data:image/webp;base64,{base64.b64encode(target.getvalue()).decode()}"
    except Exception:  # noqa: BLE001 - decoders raise whatever a broken file makes them raise
        return None
    return None
