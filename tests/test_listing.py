"""What `runs` prints for people."""

from __future__ import annotations

from pathlib import Path

import pytest
from factories import kohya_run, peft_adapter
from rich.cells import cell_len

from lora_forensics.discovery import discover_runs
from lora_forensics.listing import listing_text


@pytest.mark.parametrize("name", ["a", "学習データ" * 12, "x" * 70, "two words and many more of them " * 3])
def test_lines_fit_the_terminal_and_keep_their_margin(name: str, tmp_path: Path) -> None:
    """In cells, of which a Chinese letter takes two; only a word that is longer than a line stands out."""
    kohya_run(tmp_path / name.strip(), steps=[10, 20])
    for step in (10, 20):
        peft_adapter(tmp_path / "run" / f"checkpoint-{step}" / name.strip()[:9], step)
    (tmp_path / name.strip() / "name-step00000030.safetensors").touch()
    for verbose in (False, True):
        lines = listing_text(list(discover_runs(tmp_path)), 80, verbose).splitlines()
        wide = [line for line in lines if cell_len(line) > 80]
        assert all(len(line.split()) == 1 for line in wide), wide
        assert all(line.startswith("  ") for line in lines[1 : lines.index("")])


def test_one_module_is_one(tmp_path: Path) -> None:
    """And what has one is said so."""
    peft_adapter(tmp_path / "checkpoint-10", 10)
    assert "lora rank 2 on 1 module\n" in listing_text(list(discover_runs(tmp_path)))
