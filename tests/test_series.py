"""The Parquet files: what is written is read back, whole or not at all."""

from __future__ import annotations

import json
import math
import os
import stat
from pathlib import Path
from typing import IO

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lora_forensics.errors import SeriesError
from lora_forensics.records import SCHEMA
from lora_forensics.series import (
    CHECKPOINT_COLUMNS,
    RUN_COLUMNS,
    SERIES_COLUMNS,
    Column,
    read_notes,
    read_table,
    schema,
    write_table,
    write_text,
    write_whole,
)
from lora_forensics.tables import LAYER_COLUMNS

TABLES = {
    "layers": LAYER_COLUMNS,
    "checkpoints": CHECKPOINT_COLUMNS,
    "series": SERIES_COLUMNS,
    "runs": RUN_COLUMNS,
}

COLUMNS = (Column("step", "Int64", "optimizer step", "steps"), Column("cosine", "Float64", "CS", formula="<D,W>"))


@pytest.fixture
def frame() -> pl.DataFrame:
    """A small table with a null, a NaN and a NaN's neighbours."""
    return pl.DataFrame({"step": [1, 2, 3, 4], "cosine": [1e-300, None, math.nan, 0.1 + 0.2]})


def files_in(folder: Path) -> list[str]:
    """Everything in a folder, hidden files included."""
    return sorted(path.name for path in folder.iterdir())


def test_a_table_comes_back_bit_for_bit(tmp_path: Path, frame: pl.DataFrame) -> None:
    """Values, types, nulls and NaN survive, and null stays apart from NaN."""
    write_table(frame, tmp_path / "t.parquet", COLUMNS)
    back = read_table(tmp_path / "t.parquet")
    assert back.schema == frame.schema
    assert back.equals(frame, null_equal=True)
    assert back["cosine"].null_count() == 1
    assert back["cosine"].is_nan().sum() == 1


@pytest.mark.parametrize("table", TABLES)
def test_every_file_describes_its_columns_itself(tmp_path: Path, table: str) -> None:
    """Contract over the tables: an empty one keeps its schema, and its metadata says what each column means."""
    columns = TABLES[table]
    write_table(pl.DataFrame(schema=schema(columns)), tmp_path / f"{table}.parquet", columns)
    assert dict(read_table(tmp_path / f"{table}.parquet").schema) == schema(columns)
    notes = read_notes(tmp_path / f"{table}.parquet")
    assert notes["lora_forensics.schema"] == str(SCHEMA)
    described = json.loads(notes["lora_forensics.columns"])
    assert list(described) == [column.name for column in columns]
    assert all(entry["meaning"] and entry["dtype"] for entry in described.values())


@pytest.mark.parametrize("table", TABLES)
def test_columns_are_named_once_and_start_with_the_run(table: str) -> None:
    """Contract over the tables: no name twice, the run first."""
    names = [column.name for column in TABLES[table]]
    assert len(set(names)) == len(names)
    assert names[0] == "run"


def test_columns_are_those_of_the_contract() -> None:
    """Scripts depend on these names (design, section 5)."""
    place = "run step epoch checkpoint"
    promised = {
        "layers": f"{place} component module tensor block role adapter rank scale rows columns cosine cosine_rowwise "
        "delta_norm base_norm relative_norm magnitude_change direction_change down_norm up_norm spectral_norm "
        "stable_rank effective_rank rotation step_size nonfinite",
        "checkpoints": f"{place} learning_rate dose train_loss held_out_loss train_samples batch_size steps_per_epoch "
        "dtype bytes fingerprint modified",
        "series": f"{place} learning_rate modules cosine cosine_rowwise window cosine_ma slope slope_ma cs_fluctuation "
        "valley support_end_step",
    }
    for table, names in promised.items():
        assert [column.name for column in TABLES[table]][: len(names.split())] == names.split()


@pytest.mark.parametrize("folder", ["style [v2]", "a{b,c}", "{{x}}", "what?", "*", "[!a-"])
def test_a_name_is_no_pattern(tmp_path: Path, frame: pl.DataFrame, folder: str) -> None:
    """A run may have any name: signs of patterns in it mean themselves."""
    if os.name == "nt" and set(folder) & set("?*"):
        pytest.skip("no name on Windows")
    write_table(frame, tmp_path / folder / "layers.parquet", LAYER_COLUMNS)
    assert read_table(tmp_path / folder / "layers.parquet").equals(frame)
    assert read_notes(tmp_path / folder / "layers.parquet")


def test_notes_travel_with_the_table(tmp_path: Path, frame: pl.DataFrame) -> None:
    """Text of the caller comes back from the file's metadata, any script and quotes included."""
    notes = {"lora_forensics.run": json.dumps({"path": "läufe/ラン \"a'"}, ensure_ascii=False)}
    write_table(frame, tmp_path / "t.parquet", COLUMNS, notes)
    assert read_notes(tmp_path / "t.parquet")["lora_forensics.run"] == notes["lora_forensics.run"]


def test_another_program_reads_the_metadata(tmp_path: Path, frame: pl.DataFrame) -> None:
    """Plain polars, without this package, finds the description of each column."""
    write_table(frame, tmp_path / "t.parquet", COLUMNS)
    metadata = pl.read_parquet_metadata(tmp_path / "t.parquet")
    assert json.loads(metadata["lora_forensics.columns"])["step"] == {
        "name": "step",
        "dtype": "Int64",
        "meaning": "optimizer step",
        "unit": "steps",
    }


def test_writing_again_replaces_the_file_and_leaves_nothing_else(tmp_path: Path, frame: pl.DataFrame) -> None:
    """The second table stands in the first one's place; no temporary file stays."""
    write_table(frame, tmp_path / "a" / "b" / "t.parquet", COLUMNS)
    write_table(frame.head(1), tmp_path / "a" / "b" / "t.parquet", COLUMNS)
    assert len(read_table(tmp_path / "a" / "b" / "t.parquet")) == 1
    assert files_in(tmp_path / "a" / "b") == ["t.parquet"]


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path: Path, error: type[BaseException]) -> None:
    """Half a write, whatever ends it, is not seen: the old content stays and no temporary file does."""
    write_text(tmp_path / "t.txt", "old")

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise error

    with pytest.raises(error):
        write_whole(tmp_path / "t.txt", fail)
    assert (tmp_path / "t.txt").read_text() == "old"
    assert files_in(tmp_path) == ["t.txt"]


def test_a_full_disk_is_said_in_a_sentence(tmp_path: Path) -> None:
    """An error of the operating system while writing names the file and leaves nothing behind."""

    def full(file: IO[bytes]) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(SeriesError, match=r"t\.txt cannot be written: No space left on device") as caught:
        write_whole(tmp_path / "t.txt", full)
    assert caught.value.hint
    assert files_in(tmp_path) == []


def test_a_place_below_a_file_cannot_be_written(tmp_path: Path, frame: pl.DataFrame) -> None:
    """A path that goes through a regular file is refused with the path and a way out."""
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "t.parquet", tmp_path / "file" / "deep" / "t.parquet"):
        with pytest.raises(SeriesError, match="cannot be written") as caught:
            write_table(frame, place, COLUMNS)
        assert str(place) in caught.value.message
        assert "--out" in caught.value.hint
    assert (tmp_path / "file").read_text() == "x"


def test_a_folder_in_the_files_place_is_not_replaced(tmp_path: Path, frame: pl.DataFrame) -> None:
    """A folder that has the file's name is an error, and stays with its content."""
    (tmp_path / "t.parquet" / "inner").mkdir(parents=True)
    with pytest.raises(SeriesError, match="cannot be written"):
        write_table(frame, tmp_path / "t.parquet", COLUMNS)
    assert files_in(tmp_path) == ["t.parquet"]


@pytest.mark.skipif(os.name == "nt", reason="file modes are of POSIX")
def test_files_have_the_mode_of_any_new_file(tmp_path: Path) -> None:
    """A report in a shared folder can be read by whoever the umask lets, unlike a bare temporary file."""
    write_text(tmp_path / "t.txt", "x")
    (tmp_path / "plain.txt").write_text("x")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("t.txt", "plain.txt")]
    assert modes[0] == modes[1]


def test_text_is_utf8_with_bare_newlines(tmp_path: Path) -> None:
    """Reports are the same bytes on every system."""
    write_text(tmp_path / "t.txt", "ü\nn")
    assert (tmp_path / "t.txt").read_bytes() == b"\xc3\xbc\nn"


def test_a_newer_schema_is_refused(tmp_path: Path, frame: pl.DataFrame) -> None:
    """A table of a later version is not read with the wrong meaning."""
    frame.write_parquet(tmp_path / "t.parquet", metadata={"lora_forensics.schema": str(SCHEMA + 1)})
    with pytest.raises(SeriesError, match=f"schema {SCHEMA + 1}, newer than {SCHEMA}") as caught:
        read_table(tmp_path / "t.parquet")
    assert "upgrade" in caught.value.hint


@pytest.mark.parametrize("version", ["", "one", "1.5"])
def test_a_schema_that_is_no_number_is_refused(tmp_path: Path, frame: pl.DataFrame, version: str) -> None:
    """Foreign metadata under our key is an error that can be acted on."""
    frame.write_parquet(tmp_path / "t.parquet", metadata={"lora_forensics.schema": version})
    with pytest.raises(SeriesError, match="no readable Parquet file"):
        read_table(tmp_path / "t.parquet")


@pytest.mark.parametrize("content", [b"", b"x", b"PAR1", b"PAR1PAR1", b"not a table at all\n" * 100, b"\x00" * 4096])
def test_garbage_is_refused(tmp_path: Path, content: bytes) -> None:
    """A file that is no Parquet file is named, with what to do; its notes are empty."""
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(SeriesError, match=r"t\.parquet: no readable Parquet file") as caught:
        read_table(tmp_path / "t.parquet")
    assert "--rescan" in caught.value.hint
    assert read_notes(tmp_path / "t.parquet") == {}


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    """Neither is a table."""
    for place in (tmp_path / "none.parquet", tmp_path):
        with pytest.raises(SeriesError, match="no readable Parquet file"):
            read_table(place)
        assert read_notes(place) == {}


@given(st.integers(0, 10_000))
@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_table_that_was_cut_off_is_refused(tmp_path: Path, frame: pl.DataFrame, place: int) -> None:
    """Anywhere: a disk that was full, a copy that was stopped. A flipped byte inside can crash polars itself."""
    path = tmp_path / "t.parquet"
    write_table(frame, path, COLUMNS)
    content = path.read_bytes()
    path.write_bytes(content[: place % len(content)])
    with pytest.raises(SeriesError) as caught:
        read_table(path)
    assert str(path) in caught.value.message
