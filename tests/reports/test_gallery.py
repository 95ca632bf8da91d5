"""The pictures in docs/images, of a scan of the sample runs: `make gallery` takes them, tests find stale ones."""

from __future__ import annotations

import base64
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner
from reports.pages import chromium, visit
from sweeps import sweep
from wholes import REPOSITORY

from lora_forensics.cli import main

pytest.importorskip("vl_convert")
pytest.importorskip("selenium")

REGENERATE = os.environ.get("LORA_FORENSICS_REGENERATE") == "1"
DOCS = REPOSITORY / "docs"
TEXT, DIGITS = "text_peft/output", "digits_kohya/output/digit-lora"


class Shot(NamedTuple):
    """What a window shows of a page, from its top or from a heading on, after a click on what a selector finds."""

    page: str
    heading: str = ""
    dark: bool = False
    width: int = 1280
    height: int = 720
    clicks: str = ""


SHOTS = {
    "report_text.png": Shot(f"{TEXT}/report.html"),
    "report_digits.png": Shot(f"{DIGITS}/report.html", dark=True),
    "report_modules.png": Shot(f"{DIGITS}/report.html", "Every module over the steps", height=900),
    "report_samples.png": Shot(f"{DIGITS}/report.html", "Samples of the trainer", height=860),
    "report_phone.png": Shot(f"{DIGITS}/report.html", dark=True, width=390, height=844),
    "report_index.png": Shot("index.html", height=560),
    "compare.png": Shot("comparison.html"),
    "compare_courses.png": Shot(
        "comparison.html", "Courses", height=1000, clicks="[value=dose], [data-run='0'], [data-run='4'], [data-run='8']"
    ),
}
FIGURES = {
    "text_peft.png": f"{TEXT}/plots/similarity.png",
    "text_peft_modules.png": f"{TEXT}/plots/modules.png",
    "text_peft_decomposition.png": f"{TEXT}/plots/decomposition.png",
    "digits_kohya.png": f"{DIGITS}/plots/similarity.png",
    "digits_kohya_modules.png": f"{DIGITS}/plots/modules.png",
}


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scan of the sample runs as the README has it, and a sweep side by side."""
    folder = tmp_path_factory.mktemp("gallery")
    shutil.copytree(REPOSITORY / "sample_runs", folder / "sample_runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        call("scan", "sample_runs", "--report", "html")
        call("scan", str(sweep(folder / "sweep")), "--out", "compared", "--no-plots", "--report", "html")
        call("compare", "compared", "--html", "forensics/comparison.html")
    return folder / "forensics"


def call(*arguments: str) -> None:
    """A command that must work."""
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output


def taken(page: Any, shot: Shot) -> bytes:
    """The picture as PNG."""
    if shot.clicks:
        page.execute_script("document.querySelectorAll(arguments[0]).forEach((one) => one.click())", shot.clicks)
        page.execute_async_script("setTimeout(arguments[0], 500)")
    if shot.heading:
        script = """const all = [...document.querySelectorAll("h2")];
            const top = all.find((heading) => heading.textContent === arguments[0]).getBoundingClientRect().top;
            window.scrollBy({ top: top - 16, behavior: "instant" });"""
        page.execute_script(script, shot.heading)
    return base64.b64decode(page.get_screenshot_as_base64())


def size(picture: bytes) -> tuple[int, int]:
    """Width and height of a PNG."""
    width, height = struct.unpack(">II", picture[16:24])
    return width, height


@pytest.mark.parametrize("dark", [False, True])
def test_the_pictures_of_the_pages_can_be_taken(out: Path, dark: bool) -> None:
    """Each page opens, has what the picture is to show, and the stored picture is of this size."""
    with chromium(dark) as page:
        for name, shot in SHOTS.items():
            if shot.dark == dark:
                visit(page, out / shot.page, shot.width, shot.height)
                picture = taken(page, shot)
                if REGENERATE:
                    (DOCS / "images" / name).write_bytes(picture)
                assert size((DOCS / "images" / name).read_bytes()) == size(picture) == (shot.width, shot.height)


def test_the_figures_are_those_of_a_scan(out: Path) -> None:
    """Of the size that is drawn today."""
    for name, source in FIGURES.items():
        if REGENERATE:
            shutil.copy(out / source, DOCS / "images" / name)
        assert size((DOCS / "images" / name).read_bytes()) == size((out / source).read_bytes()), name


def test_pages_show_these_pictures_and_no_others() -> None:
    """No picture that nobody made, none that nobody sees."""
    pages = [REPOSITORY / "README.md", *DOCS.glob("*.md")]
    shown = {name for page in pages for name in re.findall(r"\((?:docs/)?images/([\w.]+)\)", page.read_text("utf-8"))}
    assert shown == {path.name for path in (DOCS / "images").glob("*.*")} == {*SHOTS, *FIGURES}
