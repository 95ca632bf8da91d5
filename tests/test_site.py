"""The documentation site is built without a warning, and asks nobody for anything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from factories import library

from lora_forensics.checkpoints import TRAINERS

REPOSITORY = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All pages."""
    library("mkdocs")
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", REPOSITORY / ".mkdocs.yml", "-d", folder]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PYTHONPATH": str(REPOSITORY)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


def test_every_page_is_reached(site: Path) -> None:
    """Each file in docs is a page, and each page stands in the navigation."""
    start = (site / "index.html").read_text("utf-8")
    for page in (REPOSITORY / "docs").glob("*.md"):
        assert (site / page.stem / "index.html").exists()
        assert f'href="{page.stem}/"' in start, page.name


def test_the_quick_start_has_every_trainer(site: Path) -> None:
    """With what to set so that it saves more often."""
    text = (site / "quickstart" / "index.html").read_text("utf-8")
    for name in TRAINERS:
        assert f'id="{name}"' in text
    assert "checkpoint-&lt;step&gt;" in text


def test_signatures_come_from_the_code(site: Path) -> None:
    """What scripts may call is there with its docstring."""
    text = re.sub(r"<[^>]+>", "", (site / "api" / "index.html").read_text("utf-8"))
    for part in ("discover_runs", "measure_run", "assess_run", "inspect_file", "fluctuation", "BaseModelError"):
        assert part in text


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    """Scripts, styles, fonts and pictures lie beside them."""
    for page in site.rglob("*.html"):
        text = page.read_text("utf-8")
        assert not re.findall(r'<(?:script|img|iframe)[^>]+src="https?:', text), page
        assert not re.findall(r'<link[^>]+rel="(?:stylesheet|preconnect|preload)"[^>]+href="https?:', text), page
