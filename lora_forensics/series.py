"""The Parquet files: which columns they have, what those mean, and how they are read and written.

Both halves of the tool meet here and nowhere else. Every file carries the description of its columns in its own
metadata, and is written beside its place and renamed, so that a killed scan leaves the old file or the new one.
"""

from __future__ import annotations

import glob
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import polars as pl

from lora_forensics.errors import SeriesError
from lora_forensics.records import SCHEMA
from lora_forensics.remote import local, published

_TEMPORARY = ".tmp"
_STALE_SECONDS = 600

_UNREADABLE = (OSError, ValueError, pl.exceptions.PolarsError, pl.exceptions.PanicException)
"""What polars raises on a damaged file; a panic is no `Exception` and would pass every other handler."""

_DTYPES: dict[str, pl.DataType | type[pl.DataType]] = {
    "String": pl.String,
    "Int64": pl.Int64,
    "Float64": pl.Float64,
    "Boolean": pl.Boolean,
}


@dataclass(frozen=True, slots=True)
class Column:
    """One documented column."""

    name: str
    dtype: str
    """Polars type: String, Int64, Float64 or Boolean."""
    meaning: str
    unit: str = ""
    formula: str = ""
    source: str = ""
    """Paper and equation, or the file that a trainer left."""

    @property
    def polars(self) -> pl.DataType | type[pl.DataType]:
        """The polars type."""
        return _DTYPES[self.dtype]


_PLACE = (
    Column("run", "String", "name of the run"),
    Column("step", "Int64", "optimizer step at which the checkpoint was saved", "steps"),
    Column("epoch", "Float64", "passes over the training data by then", "epochs"),
    Column("checkpoint", "String", "file, relative to the run's folder"),
)

MODULE_COLUMNS = (
    *_PLACE,
    Column(
        "component",
        "String",
        "part of the model: unet, transformer, text_encoder, text_encoder_2, text_encoder_3, model, other",
    ),
    Column("module", "String", "key in the checkpoint, before the adapter's suffix"),
    Column("tensor", "String", "base tensor below the module; several are joined by '+'"),
    Column("block", "Int64", "number of the block that the module sits in"),
    Column(
        "role",
        "String",
        "q, k, v, qkv, out, up, gate, down, ff_in, ff_out, proj_in, proj_out, conv, embedding, norm, head, other",
    ),
    Column("adapter", "String", "kind of adapter"),
    Column("rank", "Int64", "rank that the adapter was given; null for kinds without one"),
    Column(
        "scale",
        "Float64",
        "multiplier on B @ A (alpha / rank, or alpha / sqrt(rank) with rsLoRA); null for kinds without one",
    ),
    Column("rows", "Int64", "rows of W, the outputs"),
    Column("columns", "Int64", "columns of W, the inputs (convolution: in * kh * kw)"),
)
"""Columns of layers.parquet that say what a row is about; the metrics follow them."""

STORAGE_COLUMNS = (
    Column(
        "zero_share",
        "Float64",
        "share of its numbers that are exactly 0, tensors of zeros alone left out; null for types with the exponents "
        "of float32, which lose none",
    ),
)
"""Columns at the end of layers.parquet: what storing the numbers did to them."""

CHECKPOINT_COLUMNS = (
    *_PLACE,
    Column("learning_rate", "Float64", "rate at this step; the denoiser's where groups differ", "per step"),
    Column("dose", "Float64", "sum of the learning rates of all steps so far"),
    Column("train_loss", "Float64", "training loss that the trainer logged last"),
    Column("held_out_loss", "Float64", "loss on held-out data that the trainer logged at this step"),
    Column("train_samples", "Int64", "training samples in one epoch"),
    Column("batch_size", "Int64", "samples in one batch, as the trainer recorded it"),
    Column("steps_per_epoch", "Float64", "optimizer steps in one epoch", "steps"),
    Column("dtype", "String", "type that most of the adapter's numbers are stored in"),
    Column("bytes", "Int64", "size of the file", "bytes"),
    Column("fingerprint", "String", "changes when the file does"),
    Column("modified", "Float64", "modification time of the file", "seconds since 1970"),
)

PAPER = "Luo et al., Early-stopping Low-Rank Adaptation of Foundation Models"
"""Source of CS and of CS-Fluctuation."""

SERIES_COLUMNS = (
    *_PLACE,
    Column("learning_rate", "Float64", "rate at this step; null where unknown", "per step"),
    Column("modules", "Int64", "modules that are averaged: those with a cosine at every checkpoint used"),
    Column(
        "cosine", "Float64", "CS: mean over modules of the flat cosine", "", "mean_i <D,W>/(|D||W|)", f"{PAPER}, Eq. 2"
    ),
    Column("cosine_rowwise", "Float64", "the same with the row-wise cosine", "", "", f"{PAPER}, language-model code"),
    Column("window", "Int64", "M, the window of all moving averages", "checkpoints"),
    Column("cosine_ma", "Float64", "moving average of CS", "", "mean(CS_j .. CS_(j+M-1))", f"{PAPER}, Eq. 3"),
    Column("slope", "Float64", "change of the moving average", "per checkpoint", "MA_(j+1) - MA_j", f"{PAPER}, Eq. 3"),
    Column("slope_ma", "Float64", "moving average of the slopes, X", "per checkpoint", "mean over M slopes", PAPER),
    Column(
        "cs_fluctuation",
        "Float64",
        "CS-Fluctuation; the value belongs to the first checkpoint that it is computed from",
        "",
        "population variance of X over M, / learning_rate",
        f"{PAPER}, Eq. 4",
    ),
    Column("valley", "Int64", "1 for the first valley of CS-Fluctuation, 2 for the second, ...; else null"),
    Column(
        "support_end_step", "Int64", "step of the last checkpoint that cs_fluctuation here is computed from", "steps"
    ),
    Column("interpolated", "Boolean", "nothing was saved at this step: values lie between those of its neighbours"),
)
"""Columns of series.parquet; `mean_<metric>` columns follow, the mean of every metric over the same modules."""

COURSE_COLUMNS = (
    Column(
        "path_length",
        "Float64",
        "way that all modules together moved up to here, checkpoint by checkpoint from the base",
        formula="sum_t |D_t - D_previous|",
        source="docs/metrics.md",
    ),
    Column(
        "directness",
        "Float64",
        "how straight that way was: 1 for a straight line, about 1 / sqrt(T) for a random walk",
        formula="|D_t| / path_length",
        source="docs/metrics.md",
    ),
    Column(
        "angle",
        "Float64",
        "angle between this checkpoint and the one before as seen from the base, all modules together",
        "degrees",
        "arccos(<D_t, D_previous> / (|D_t| |D_previous|))",
        "Jang et al., Model Stock, 2024",
    ),
    Column(
        "magnitude_direction",
        "Float64",
        "correlation over modules of magnitude_change and direction_change",
        formula="Pearson",
        source="Liu et al., DoRA: Weight-Decomposed Low-Rank Adaptation, section 3",
    ),
    Column(
        "settled",
        "Float64",
        "share of the modules that move at a tenth of their fastest, or less, from here on",
        source="after Wen et al., GradES, 2025",
    ),
)
"""Columns at the end of series.parquet: all modules of the scope together; null where steps are interpolated."""

RUN_MODULE_COLUMNS = (
    Column("run", "String", "name of the run"),
    Column("component", "String", "part of the model"),
    Column("module", "String", "key in the checkpoint, before the adapter's suffix"),
    Column("role", "String", "as in layers.parquet"),
    Column("adapter", "String", "kind of adapter"),
    Column("path_length", "Float64", "way that its change moved", formula="|D_1| + sum_t |D_t - D_previous|"),
    Column("displacement", "Float64", "norm of its last change", formula="|D_T|"),
    Column("directness", "Float64", "how straight that way was", formula="displacement / path_length"),
    Column(
        "settled_step",
        "Int64",
        "step from which on it moves at a tenth of its fastest, or less, by learning rate where that is known; null if "
        "it still moves",
        "steps",
        source="after Wen et al., GradES, 2025",
    ),
    Column(
        "scale_through",
        "Float64",
        "product of scale_mean of all scaled modules of the component up to this one: how scales carry on",
        formula="prod_l mean_n g_ln",
        source="Lian et al., Scaling and Shifting Your Features, 2022",
    ),
)
"""Columns of modules.parquet: one row per module, over the checkpoints since the last reset."""


RUN_COLUMNS = (
    Column("run", "String", "name of the run"),
    Column("path", "String", "its folder"),
    Column("trainer", "String", "trainer whose layout it has"),
    Column("adapter", "String", "kinds and ranks of its adapters"),
    Column("status", "String", "of the verdict"),
    Column("checkpoints", "Int64", "checkpoints with a known step"),
    Column("keep", "String", "checkpoint to keep; null where none is named"),
    Column("keep_step", "Int64", "its step", "steps"),
    Column("rests_on", "String", "what that rests on"),
    Column("turning_point_step", "Int64", "second valley of CS-Fluctuation", "steps"),
    Column("last_is_past_turning_point", "Boolean", "whether training went on past it"),
    Column("window", "Int64", "M, the window of all moving averages", "checkpoints"),
    Column("detector", "String", "rule that found the turning point"),
    Column("similarity", "String", "flat or rowwise"),
    Column("base_model", "String", "frozen weights that it was measured against"),
)
"""Columns of runs.parquet: one row per run of the last scan."""


def schema(columns: Iterable[Column]) -> dict[str, pl.DataType | type[pl.DataType]]:
    """Polars schema of documented columns."""
    return {column.name: column.polars for column in columns}


def write_table(
    frame: pl.DataFrame, path: Path, columns: Iterable[Column], notes: Mapping[str, str] | None = None
) -> None:
    """Write a table with its columns' descriptions and `notes` in the file's metadata; whole or not at all."""
    described = {column.name: {k: v for k, v in asdict(column).items() if v} for column in columns}
    metadata = {"lora_forensics.schema": str(SCHEMA), "lora_forensics.columns": json.dumps(described), **(notes or {})}
    write_whole(path, lambda file: frame.write_parquet(file, metadata=metadata))


def read_table(path: Path) -> pl.DataFrame:
    """Read a table that `write_table` wrote.

    Raises:
        SeriesError: missing, unreadable, or written by a newer version.
    """
    try:
        version = read_notes(path).get("lora_forensics.schema", "0")
        if int(version) > SCHEMA:
            raise SeriesError(f"{path} has schema {version}, newer than {SCHEMA}", "upgrade lora-forensics")
        return pl.read_parquet(local(path), memory_map=False, glob=False)  # names may hold brackets
    except _UNREADABLE as error:
        raise SeriesError(f"{path}: no readable Parquet file: {error}", "run `lora-forensics scan --rescan`") from error


def read_notes(path: Path) -> dict[str, str]:
    """The text metadata of a Parquet file; empty if the file is missing or unreadable."""
    try:
        return dict(pl.read_parquet_metadata(local(path)))
    except _UNREADABLE:
        return {}


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    write_whole(path, lambda file: file.write(content))


def write_whole(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Write beside the place and rename.

    Raises:
        SeriesError: the place cannot be written: read-only, full, or not a folder.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(path)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_TEMPORARY, dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write(file)
            umask = os.umask(0)
            os.umask(umask)
            Path(name).chmod(0o666 & ~umask)  # mkstemp makes the file private
            Path(name).replace(path)
            published(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except (OSError, pl.exceptions.PolarsError) as error:  # polars wraps a full disk
        reason = getattr(error, "strerror", None) or error
        raise SeriesError(f"{path} cannot be written: {reason}", "choose another folder with --out") from error


def _remove_leftovers(path: Path) -> None:
    """Delete what a killed scan left behind of this file; a scan that runs beside this one is not that old."""
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.*{_TEMPORARY}"):
        if leftover.stat().st_mtime < time.time() - _STALE_SECONDS:
            leftover.unlink(missing_ok=True)
