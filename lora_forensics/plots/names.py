"""Short names for modules, and numbers and text that matplotlib can draw."""

from __future__ import annotations

import functools
import itertools
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import polars as pl
from numpy.typing import NDArray

if TYPE_CHECKING:
    from matplotlib.ticker import Locator


Floats = NDArray[np.float64]

Row = tuple[str, str]
"""Component and module of one row of the heat map."""

ROW_LABELS = 24
"""Modules up to which each row has its own label; above, only blocks do."""
_COMPONENTS = ("unet", "transformer", "model", "text_encoder", "text_encoder_2", "text_encoder_3")
"""Order of the rows: what was trained to draw or write comes first."""
_FILLERS = frozenset(("block", "blocks", "layer", "layers", "attentions", "transformer"))
"""Words of module names that tell one block from another no better than its number."""


def model_order(row: Row) -> tuple[int, str, bool, str]:
    """Denoiser first, then as the blocks follow each other: numbers count, and FLUX's single blocks come last."""
    component, module = row
    rank = _COMPONENTS.index(component) if component in _COMPONENTS else len(_COMPONENTS)
    return rank, component, "single_" in module, re.sub(r"\d+", lambda digits: digits[0].zfill(9), module)


def row_labels(rows: Sequence[Row]) -> list[str]:
    """Short names: of each module while these are few, else of the block that it sits in."""
    shared: dict[str, int] = {}
    for component in {component for component, _ in rows}:
        words = [_words(module) for owner, module in rows if owner == component]
        shared[component] = _shared_words(words)
    if len(rows) <= ROW_LABELS:
        return [_module_label(module, shared[component]) for component, module in rows]
    return [_block_label(component, module, shared[component]) for component, module in rows]


def _shared_words(names: Sequence[list[str]]) -> int:
    """How many words all names begin with; at least one word of each is left."""
    first, last = min(names), max(names)
    same = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False))
    return min(sum(1 for _ in same), min(map(len, names)) - 1)


def _words(module: str) -> list[str]:
    return re.findall(r"[^._]+", drawable_text(module)) or [""]


def _module_label(module: str, shared: int) -> str:
    """What follows the part that all modules share."""
    begins = [word.start() for word in re.finditer(r"[^._]+", drawable_text(module))]
    return elided(drawable_text(module)[begins[shared] if shared < len(begins) else 0 :], 20)


def _block_label(component: str, module: str, shared: int) -> str:
    """'down 0' for lora_unet_down_blocks_0_attentions_1_...: the words up to the first number."""
    words = _words(module)
    number = next((place for place in range(shared, len(words)) if words[place].isdecimal()), None)
    if number is None:
        return elided(" ".join(words[shared : shared + 2]), 16)
    before = words[shared:number] or words[max(shared - 1, 0) : number]
    telling = [word for word in before if word not in _FILLERS] or before[-1:]
    if component.startswith("text_encoder"):
        telling = [component.replace("text_encoder", "te").replace("_", "")]
    return elided(" ".join([*telling, words[number]]), 16)


def spans(keys: Sequence[object]) -> list[tuple[int, int]]:
    """Start and stop of each stretch of equal neighbours."""
    starts = [place for place, key in enumerate(keys) if place == 0 or key != keys[place - 1]]
    return list(itertools.pairwise([*starts, len(keys)]))


def points(frame: pl.DataFrame, column: str) -> tuple[Floats, Floats]:
    """Steps, ascending, and a column's values there; NaN where unknown, nothing where the step is."""
    if "step" not in frame.columns:
        return np.empty(0), np.empty(0)
    value = pl.col(column) if column in frame.columns else pl.lit(None)
    pairs = frame.select(
        pl.col("step").cast(pl.Float64).alias("step"), value.cast(pl.Float64, strict=False).fill_null(np.nan).alias("y")
    )
    known = pairs.drop_nulls("step").sort("step")
    finite = known["y"].to_numpy().copy()
    finite[~np.isfinite(finite)] = np.nan
    return known["step"].to_numpy(), finite


def few_ticks(most: int, integer: bool = False) -> Locator:
    """Ticks at round numbers; none between steps or epochs where `integer`."""
    from matplotlib.ticker import MaxNLocator

    return MaxNLocator(most, integer=integer, min_n_ticks=1, steps=[1, 2, 2.5, 5, 10])


def power_of_ten(values: Floats) -> int:
    """The power of ten to take out of an axis; 0 while its numbers are short without."""
    largest = float(np.nanmax(np.abs(values))) if np.isfinite(values).any() else 0.0
    return 0 if largest == 0 or 0.1 <= largest < 10_000 else math.floor(math.log10(largest))


def times(power: int) -> str:
    """The end of a title whose axis has a power of ten taken out: ', ×10⁻⁴'."""
    return f", ×10{raised(power)}" if power else ""


def raised(power: int) -> str:
    """A number in superscript digits, which need no mathematics of matplotlib."""
    return str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def elided(text: str, most: int) -> str:
    """A name without its middle where it is too long."""
    text = drawable_text(text)
    tail = 2 * (most - 1) // 3
    return text if len(text) <= most else f"{text[: most - 1 - tail]}…{text[-tail:]}"


def drawable_text(text: str) -> str:
    """Text from a file that can be drawn: no control characters or direction marks, a box for what no font has."""
    bare = " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
    return bare if bare.isascii() else "".join(sign if ord(sign) in _drawable() else "□" for sign in bare)


@functools.cache
def _drawable() -> frozenset[int]:
    from matplotlib.font_manager import findfont, get_font

    return frozenset(get_font(findfont("DejaVu Sans")).get_charmap())
