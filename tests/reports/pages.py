"""A run's page from synthetic tables, and a browser to look at it with."""

from __future__ import annotations

import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from lora_forensics.records import BaseModelSummary, Candidate, Finding, Keep, Summary, TurningPoint, Verdict
from lora_forensics.reports.html import HtmlReport
from lora_forensics.series import (
    CHECKPOINT_COLUMNS,
    RUN_MODULE_COLUMNS,
    SERIES_COLUMNS,
    schema,
    write_table,
)
from lora_forensics.tables import LAYER_COLUMNS

HOSTILE = (
    "<script>alert(1)</script>",
    "</script><script>alert(2)</script>",
    '"><img src=x onerror=alert(3)>',
    "javascript:alert(4)",
    "{{constructor.constructor('alert(5)')()}}",
    "datum.step; warn(1); [].constructor.constructor('alert(6)')()",
    "<!-- <script>",
    "\x1b[31mred\x1b]0;title\x07",
    "\u202eevil\u2066",
    "' onmouseover='alert(7)",
    "</style><style>*{display:none}",
    "&lt;b&gt; \u2028 \udcff",
)
"""Texts that try every way out: markup, the end of a block, addresses, templates, expressions, codes, directions."""
METRICS = ("cosine", "delta_norm", "relative_norm", "magnitude_change", "direction_change", "spectral_norm")
METRICS += ("stable_rank", "effective_rank", "rotation", "step_size")


def write_tables(folder: Path, steps: int = 24, modules: int = 12, name: str = "layer", **columns: Any) -> None:
    """The Parquet files of a run with `steps` checkpoints at 10, 20, ...; `columns` replace those of layers.parquet."""
    random = np.random.default_rng(1)
    at = [10 * place for place in range(1, steps + 1)]
    names = [f"model.{name}.{place // 4}.{'qkvo'[place % 4]}_proj" for place in range(modules)]
    rows = steps * modules
    values: dict[str, Any] = {
        "run": ["r"] * rows,
        "step": np.repeat(at, modules),
        "checkpoint": [f"c{step}.safetensors" for step in np.repeat(at, modules)],
        "component": ["model"] * rows,
        "module": names * steps,
        "role": ["qkvo"[place % 4] for place in range(modules)] * steps,
        "adapter": ["lora"] * rows,
        "rank": [8] * rows,
        **{metric: random.lognormal(size=rows) for metric in METRICS},
        **columns,
    }
    write_table(pl.DataFrame(values, strict=False), folder / "layers.parquet", LAYER_COLUMNS)
    losses = {"train_loss": random.random(steps), "held_out_loss": random.random(steps)}
    files = [f"c{step}.safetensors" for step in at]
    known = {"run": ["r"] * steps, "step": at, "epoch": [step / 40 for step in at], "checkpoint": files}
    types = schema(CHECKPOINT_COLUMNS)
    write_table(
        pl.DataFrame({**known, **losses}, schema_overrides={n: types[n] for n in known}),
        folder / "checkpoints.parquet",
        CHECKPOINT_COLUMNS,
    )
    fluctuation = [1e-6 * (2 + math.sin(place / 2)) if place < steps - 6 else None for place in range(steps)]
    series = {**known, "cosine": random.random(steps), "cs_fluctuation": fluctuation}
    series["valley"] = [1 if step == 90 else 2 if step == 150 else None for step in at]
    write_table(pl.DataFrame(series, strict=False), folder / "series.parquet", SERIES_COLUMNS)
    course = {"run": ["r"] * modules, "component": ["model"] * modules, "module": names}
    course["path_length"] = random.random(modules)
    write_table(pl.DataFrame(course), folder / "modules.parquet", RUN_MODULE_COLUMNS)


def verdict_of(run: str, **changes: Any) -> Verdict:
    """A verdict for the tables of `write_tables`."""
    verdict = Verdict(
        run=run,
        status="turning_point",
        keep=Keep("c100.safetensors", 100, 2.5, "weights"),
        turning_point=TurningPoint(14, 150, 3.75, "c150.safetensors", 200),
        candidates=(
            Candidate("c100.safetensors", 100, "half of the way"),
            Candidate("c150.safetensors", 150, "second valley"),
            Candidate("c240.safetensors", 240, "the last"),
        ),
        evidence={
            "steps": [10, 240],
            "null_band": [80, 180],
            "inside_null_band": True,
            "window_sweep": [{"window": 2, "step": 110}, {"window": 5, "step": None}],
            "layer_interval": {"low_step": 120, "high_step": 160},
        },
        last_is_past_turning_point=True,
        window=3,
        window_reason="one epoch",
        cadence_steps=10.0,
        detector="half_path",
        similarity="flat",
        components=("model",),
        base_model=BaseModelSummary("base.safetensors", 12, 12),
        checkpoints=24,
        findings=(
            Finding("weak-evidence", "info", "the answer rests on saved weights alone", "compare the candidates"),
            Finding("nonfinite", "error", "NaN in 2 checkpoints", "train again"),
        ),
        message="second valley found",
    )
    return replace(verdict, **changes)


def write_pages(out: Path, *verdicts: Verdict) -> Path:
    """Index and pages; the path of the first page."""
    summary = Summary(verdicts, folder=out, versions={"polars": "1"})
    report = HtmlReport()
    (out / "index.html").write_text(report.render(summary), "utf-8")
    written = []
    for place, page in report.pages(summary):
        (out / place).write_text(page, "utf-8")
        written.append(out / place)
    return written[0]


@contextmanager
def chromium(dark: bool = False) -> Iterator[Any]:
    """A real Chromium without a network, or a skipped test where there is none."""
    browser, driver = (shutil.which(name) for name in ("chromium", "chromedriver"))
    if browser is None or driver is None:
        if os.environ.get("LORA_FORENSICS_COMPLETE"):
            pytest.fail("chromium and chromium-driver are not installed")
        pytest.skip("chromium and chromium-driver are not installed")
    webdriver = pytest.importorskip("selenium.webdriver")
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        options = webdriver.ChromeOptions()
        options.binary_location = browser
        background = ("background-networking", "component-update", "sync", "quic", "gpu", "dev-shm-usage")
        for switch in ("headless", "no-sandbox", "no-first-run", *(f"disable-{name}" for name in background)):
            options.add_argument(f"--{switch}")
        options.add_argument(f"--user-data-dir={profile}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        page = webdriver.Chrome(options=options, service=webdriver.ChromeService(driver))
        try:
            media = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
            page.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": media})
            # a dialog blocks everything, a flag does not
            source = "window.alerts = []; window.alert = (text) => window.alerts.push(String(text));"
            page.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": source})
            yield page
        finally:
            page.quit()


def visit(page: Any, path: Path, width: int = 1280, height: int = 720) -> None:
    """Open a file at a size, and wait until its charts are drawn."""
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    page.get(path.as_uri())
    for _ in range(300):
        if page.execute_script("return document.body.dataset.ready || !document.getElementById('data')"):
            return
        time.sleep(0.1)
    raise AssertionError(f"the charts were not drawn: {page.get_log('browser')}")
