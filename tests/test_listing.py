"""What `runs` prints for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import kohya_run, peft_adapter
from rich.cells import cell_len
from runs import search

from lora_forensics.listing import listing_text


@pytest.mark.parametrize("verbose", [False, True])
@pytest.mark.parametrize("name", ["a", "学習データの名前です漢", "x" * 70, "many words " * 7 + "end"])
def test_lines_fit_the_terminal_and_keep_their_margin(name: str, verbose: bool, tmp_path: Path) -> None:
    """In cells, of which a Chinese letter takes two; only a word that is longer than a line stands out."""
    kohya_run(tmp_path, name, [10, 20, 30])
    (tmp_path / f"{name}-step00000010.safetensors").write_bytes(b"")
    runs, skipped = search(tmp_path)
    head, *lines, last = listing_text([*runs, *skipped], 80, verbose).splitlines()
    assert (head, last) == (name, "1 run")
    assert [line for line in lines if not line.startswith("  ")] == ["", "1 tensor file skipped", ""]
    assert [line for line in lines if cell_len(line) > 80 and len(line[17:].split()) > 1] == []


def test_one_module_is_one(tmp_path: Path) -> None:
    """And is said so."""
    peft_adapter(tmp_path / "checkpoint-10", 10)
    assert "lora rank 2 on 1 module\n" in listing_text(search(tmp_path)[0])
