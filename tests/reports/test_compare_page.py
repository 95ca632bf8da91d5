"""`compare --html`: one page for all runs, in a real Chromium; what it says, what it draws, and what it must not do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from reports.pages import HOSTILE, chromium, verdict_of, visit, write_tables

from lora_forensics.comparison import compare_runs
from lora_forensics.comparison.page import write_page
from lora_forensics.errors import UsageError
from lora_forensics.records import BaseModelSummary, Keep, RunNotes, Skipped, Summary, Verdict
from lora_forensics.reports import to_json
from lora_forensics.series import CHECKPOINT_COLUMNS, SERIES_COLUMNS, read_table, write_table, write_text
from lora_forensics.store import save_measured
from lora_forensics.tables import Measured

pytest.importorskip("vl_convert")


def write_scan(out: Path, *runs: tuple[Verdict, dict[str, str], float | None], steps: int = 24) -> Path:
    """The output of a scan: tables of each run, its verdict, its settings, and the learning rate of a step."""
    for place, (verdict, settings, rate) in enumerate(runs):
        folder = out / verdict.run
        write_tables(folder, steps=steps)
        layers, checkpoints = (read_table(folder / f"{name}.parquet") for name in ("layers", "checkpoints"))
        dose = (pl.col("step") * rate) if rate else pl.lit(None, pl.Float64)
        checkpoints = checkpoints.with_columns(
            dose=dose, learning_rate=pl.lit(rate, pl.Float64), held_out_loss=pl.col("held_out_loss") + place
        )
        save_measured(folder, Measured(layers, checkpoints, RunNotes(settings=settings)))
        write_text(folder / "verdict.json", to_json(verdict.to_dict()))
    write_text(out / "summary.json", to_json(Summary(tuple(verdict for verdict, _, _ in runs)).to_dict()))
    return out


def page_of(*outs: Path, redact: bool = False, align: str = "step") -> Path:
    """The page of a comparison, beside the first folder."""
    path = outs[0].parent / "comparison.html"
    write_page(compare_runs(outs, align, redact), path)
    return path


def data_of(path: Path) -> dict[str, Any]:
    """The document of the charts."""
    (found,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"))
    return json.loads(found)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four runs: two of one rate, one of another, one whose rates are not known; the first has a report of its own."""
    out = tmp_path_factory.mktemp("compared") / "out"
    write_scan(
        out,
        (verdict_of("one"), {"optimizer": "AdamW", "alpha": "8"}, 1e-4),
        (verdict_of("two", keep=Keep("c50.safetensors", 50, None, "held_out_loss")), {"alpha": "16"}, 1e-4),
        (verdict_of("three", keep=None, status="no_second_valley"), {"alpha": "16"}, 1e-3),
        (verdict_of("four", trainer="kohya"), {"alpha": "16"}, None),
    )
    write_text(out / "one" / "report.html", "<!doctype html>")
    return page_of(out)


@pytest.fixture(scope="module")
def bad(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs in which every text is hostile."""
    out = tmp_path_factory.mktemp("bad") / "out"
    every = " ".join(HOSTILE)
    runs = []
    for name in ("x", "y"):
        verdict = verdict_of(name, keep=Keep(every, 100, 2.5, "weights"))
        findings = tuple(replace(verdict.findings[0], rule=t, message=t, hint=t, severity="error") for t in HOSTILE)
        texts = dict.fromkeys(("path", "message", "trainer", "adapter", "window_reason", "step_unit"), every + name)
        base = BaseModelSummary(every, 1, 2)
        settings = {text: text + name for text in HOSTILE} | {every: every}
        runs.append((replace(verdict, findings=findings, base_model=base, **texts), settings, 1e-4))
    write_scan(out, *runs)
    named = compare_runs([out])
    named = replace(
        named,
        runs=tuple(replace(run, name=every + run.name) for run in named.runs),
        left_out=tuple(Skipped(Path(text), text) for text in HOSTILE),
        notes=dict.fromkeys(named.notes, every) | {"cosine": every},
    )
    path = out.parent / "comparison.html"
    write_page(named, path)
    return path


@pytest.fixture(scope="module", params=["light", "dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser in each theme."""
    pytest.importorskip("selenium")
    with chromium(dark=request.param == "dark") as page:
        yield page


def test_first_screen_says_what_differs_and_what_to_keep(page: Path) -> None:
    """Settings with their runs, each run's file, on what it rests, how strong that is, and which losses compare."""
    first = page.read_text("utf-8").partition('<section aria-label="Courses">')[0]
    assert "<dt>alpha</dt><dd><b>8</b> (A); <b>16</b> (B-D)</dd>" in first
    assert "told by some only</dt><dd>" in first
    assert "optimizer" in first
    for said in ("c100.safetensors", "c50.safetensors", "no answer: no second valley", "weak", "strong"):
        assert said in first
    losses = read_table(page.parent / "out/one/checkpoints.parquet")["held_out_loss"]
    assert f"held-out loss (if of the same data) is lowest in <b>A</b> (one): {losses.min():.4g}" in first
    assert "not comparable between runs (different trainer)" not in first  # one of four tells its trainer
    assert 'href="./out/one/report.html"' in first
    assert 'href="./out/two' not in first


def test_losses_of_other_data_are_not_ranked(tmp_path: Path) -> None:
    """Runs that are known to differ in trainer, base or data: no lowest loss is named, and the reason is."""
    base = BaseModelSummary("other.safetensors", 12, 12)
    write_scan(
        tmp_path / "out",
        (verdict_of("one", trainer="peft"), {"images": "20"}, 1e-4),
        (verdict_of("two", trainer="kohya", base_model=base), {"images": "30"}, 1e-4),
    )
    found = compare_runs([tmp_path / "out"])
    assert found.notes["held_out_loss"].startswith("not comparable between runs (different trainer, base, images)")
    assert "levels belong to each run" in found.notes["cosine"]
    text = page_of(tmp_path / "out").read_text("utf-8")
    assert "is lowest in" not in text
    assert "class=not>not comparable between runs (different trainer, base, images)" in text


def test_numbers_are_those_of_the_tables(page: Path) -> None:
    """Every axis and every measure, for each run; rates that are not known give no dose."""
    document = data_of(page)
    assert [run["name"] for run in document["runs"]] == ["one", "two", "three", "four"]
    for run in document["runs"]:
        checkpoints = read_table(page.parent / "out" / run["name"] / "checkpoints.parquet")
        assert run["course"]["step"] == checkpoints["step"].to_list()
        assert run["course"]["epoch"] == pytest.approx(checkpoints["epoch"].to_list())
        assert run["course"]["held_out_loss"] == pytest.approx(checkpoints["held_out_loss"].to_list(), rel=1e-4)
    assert document["runs"][3]["course"]["dose"] == [None] * 24
    assert document["ends"]["dose"] == pytest.approx([1e-3, 0.24])
    assert [(run["keep"], run["turn"]) for run in document["runs"]] == [(100, 150), (50, 150), (None, 150), (100, 150)]


def test_noise_does_not_stretch_an_axis(tmp_path: Path) -> None:
    """One value of 1e-17 stands on the edge of its chart, and the caption says so."""
    write_scan(tmp_path / "out", (verdict_of("one"), {}, 1e-4), (verdict_of("two"), {}, 1e-4))
    path = tmp_path / "out" / "one" / "series.parquet"
    noisy = read_table(path).with_columns(
        cs_fluctuation=pl.when(pl.col("step") == 50).then(1e-17).otherwise("cs_fluctuation")
    )
    write_table(noisy, path, SERIES_COLUMNS)
    written = page_of(tmp_path / "out").read_text("utf-8")
    assert written.count("The axis ends at a millionth of the median") == 1
    assert '"clamp":true' in written.replace(" ", "")
    assert "1e-17" in written


def test_redacted(tmp_path: Path) -> None:
    """No name of a person, of a run or of a file, and no way to them."""
    secret = verdict_of("alices_portrait", path="/home/alice/runs", trainer="peft")
    write_scan(tmp_path / "out", (secret, {"sets": "/home/alice/alices_portrait"}, 1e-4), (verdict_of("bob"), {}, 1e-4))
    write_text(tmp_path / "out/bob/report.html", "<!doctype html>")
    (tmp_path / "out/bob/series.parquet").rename(tmp_path / "out/bob/kept")
    write_scan(tmp_path / "more", (verdict_of("carol"), {}, 1e-4))
    text = page_of(tmp_path / "out", tmp_path / "more", redact=True).read_text("utf-8")
    shown = text.partition("<script")[0] + json.dumps(data_of(tmp_path / "comparison.html"))
    for name in ("alice", "bob", "carol", "c100.safetensors", "report.html", str(tmp_path)):
        assert name not in shown, name
    assert "step-100.safetensors" in shown


def test_large_sweeps_stay_small(tmp_path: Path) -> None:
    """40 runs of 200 checkpoints are below 3 MB, and so are 8 of 5000."""
    runs = [(verdict_of(f"run-{place}"), {"seed": str(place)}, 1e-4 * (place + 1)) for place in range(40)]
    write_scan(tmp_path / "out", *runs, steps=200)
    path = page_of(tmp_path / "out")
    assert path.stat().st_size < 3e6
    assert len(data_of(path)["runs"][39]["course"]["step"]) == 200
    random = np.random.default_rng(0)
    for place in range(8):
        folder = tmp_path / "out" / f"run-{place}"
        table = read_table(folder / "checkpoints.parquet").sample(5000, with_replacement=True, seed=1)
        table = table.with_columns(step=pl.Series(range(1, 5001)), held_out_loss=pl.Series(random.random(5000)))
        write_table(table, folder / "checkpoints.parquet", CHECKPOINT_COLUMNS)
    path = page_of(*(tmp_path / "out" / f"run-{place}" for place in range(8)))
    assert path.stat().st_size < 3e6
    assert 100 in data_of(path)["runs"][0]["course"]["place"]  # the kept one is never left out


def test_a_page_needs_a_file(page: Path, tmp_path: Path) -> None:
    """A folder is no file; a folder that is not there yet is made."""
    found = compare_runs([page.parent / "out"])
    with pytest.raises(UsageError, match="is a folder"):
        write_page(found, tmp_path)
    write_page(found, tmp_path / "new" / "c.html")
    assert (tmp_path / "new" / "c.html").exists()


def test_draws(browser: Any, page: Path) -> None:
    """A line a run in every chart, with a diamond for each checkpoint that is kept."""
    visit(browser, page)
    lines = browser.execute_script(
        """return Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) => [chart.id,
            [...chart.querySelectorAll("svg .mark-line path")].filter((path) => path.getAttribute("d").length > 100)
                .length]))"""
    )
    assert len(lines) == 4
    assert lines["chart-held_out_loss"] == 4, lines
    marks = "return document.querySelectorAll('#chart-held_out_loss svg .mark-symbol path').length"
    assert browser.execute_script(marks) == 3 + 4  # kept, turning points


@pytest.mark.parametrize("name", ["page", "bad"])
def test_asks_nothing_and_runs_nothing(browser: Any, name: str, request: pytest.FixtureRequest) -> None:
    """No error in the console, no request but for the page itself, no script of a file, and the texts are there."""
    path = request.getfixturevalue(name)
    browser.get_log("browser")
    browser.get_log("performance")
    visit(browser, path)
    browser.execute_script(
        """for (const chart of document.querySelectorAll(".chart")) for (const at of [0.3, 0.6]) {
            const box = chart.getBoundingClientRect();
            const place = { clientX: box.x + at * box.width, clientY: box.y + at * box.height, bubbles: true };
            chart.querySelector("svg").dispatchEvent(new PointerEvent("pointermove", place));
        }
        for (const button of document.querySelectorAll("[data-run]")) button.click();
        for (const radio of document.querySelectorAll("[name=align]")) radio.click();"""
    )
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [path.as_uri()]
    assert browser.execute_script("return window.alerts") == []
    assert browser.execute_script("return document.querySelectorAll('.tip *, script, img').length") == 4
    if name == "bad":
        shown = browser.execute_script("return document.body.textContent")
        assert all(said in shown for said in ("<script>alert(1)</script>", "{{constructor", "</style><style>"))


X_LABELS = """return [...document.querySelectorAll(`#chart-${arguments[0]} svg .role-axis-label text`)]
    .map((text) => text.textContent)"""


def test_the_axis_can_be_switched(browser: Any, page: Path) -> None:
    """By keyboard: other numbers on the axis, other places of the lines, and runs that it does not hold are named."""
    from selenium.webdriver import Keys

    visit(browser, page)
    lines = "return [...document.querySelectorAll('#chart-held_out_loss svg .mark-line path')].map(p => p.outerHTML)"
    before, drawn = browser.execute_script(X_LABELS, "held_out_loss"), browser.execute_script(lines)
    assert "200" in before
    browser.find_element("css selector", "input[value=step]").send_keys(Keys.ARROW_RIGHT)
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert browser.execute_script("return document.body.dataset.align") == "epoch"
    epochs = browser.execute_script(X_LABELS, "held_out_loss")
    assert "200" not in epochs
    assert "6" in epochs
    browser.find_element("css selector", "input[value=dose]").click()
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert "0.2" in browser.execute_script(X_LABELS, "held_out_loss")
    after = browser.execute_script(lines)
    assert after != drawn
    assert "no dose is known: D" in browser.find_element("id", "without").text
    assert browser.find_element("css selector", "[data-axis]").text == "dose (sum of the learning rates)"
    # at a dose of 0.12 only the run of the high rate has a checkpoint; the others ended at 0.024
    cells = browser.find_elements("css selector", "[data-measure=held_out_loss]")
    assert [cell.text != "–" for cell in cells] == [False, False, True, False]


def test_runs_are_highlighted(browser: Any, page: Path) -> None:
    """A press, by keyboard: its line is strong in all charts, the others fade; alone, they are gone."""
    from selenium.webdriver import Keys

    visit(browser, page, height=2000)
    faded = """return [...document.querySelectorAll(`#chart-${arguments[0]} svg .mark-line path`)]
        .filter((path) => path.getAttribute("d").length > 100)
        .map((path) => Number(path.getAttribute("opacity") ?? 1))"""
    assert set(browser.execute_script(faded, "held_out_loss")) == {0.9}
    button = browser.find_element("css selector", "button[data-run='1']")
    button.send_keys(Keys.ENTER)
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert button.get_attribute("aria-pressed") == "true"
    for chart in ("held_out_loss", "train_loss", "cosine"):
        assert sorted(browser.execute_script(faded, chart)) == [0.16, 0.16, 0.16, 0.9, 1], chart
    assert len(browser.find_elements("css selector", "#runs tr[aria-current]")) == 1
    browser.find_element("id", "only").click()
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert len(browser.execute_script(faded, "held_out_loss")) == 2
    browser.find_element("id", "clear").click()
    browser.execute_async_script("setTimeout(arguments[0], 400)")
    assert browser.execute_script(faded, "held_out_loss") == [0.9] * 4
    assert button.get_attribute("aria-pressed") == "false"


def test_hover_names_the_run_and_a_click_picks(browser: Any, page: Path) -> None:
    """The tip has the run's name and numbers; a click moves the band in all charts and fills the table."""
    from selenium.webdriver import ActionChains

    visit(browser, page, height=2000)
    place = """const path = [...document.querySelectorAll("#chart-held_out_loss svg .mark-symbol path")].at(-1);
        const box = path.getBoundingClientRect();
        return [box.x + box.width / 2, box.y + box.height / 2]"""
    x, y = browser.execute_script(place)
    before = browser.find_element("id", "place-label").text
    pointer = ActionChains(browser)
    pointer.w3c_actions.pointer_action.move_to_location(round(x), round(y))
    pointer.perform()
    tip = browser.find_element("css selector", ".tip").text
    assert re.match(r"D +four\nstep 100, epoch 2.5\nheld-out loss: [\d.]+\nthe checkpoint to keep", tip), tip
    ActionChains(browser).click().perform()
    assert before != browser.find_element("id", "place-label").text == "step 100"
    table = read_table(page.parent / "out/two/checkpoints.parquet")
    loss = table.filter(pl.col("step") == 100)["held_out_loss"][0]
    shown = browser.find_element("css selector", "[data-run='1'][data-measure=held_out_loss]").text
    assert float(shown) == pytest.approx(loss, rel=1e-3)


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", ["page", "bad"])
def test_fits_the_screen_and_is_accessible(browser: Any, name: str, width: int, request: pytest.FixtureRequest) -> None:
    """No sideways scroll; axe finds no violation at all."""
    axe = pytest.importorskip("axe_core_python.selenium")
    visit(browser, request.getfixturevalue(name), width, 720)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    found = axe.Axe().run(browser)
    assert not [(v["id"], v["impact"], [node["html"][:200] for node in v["nodes"]][:3]) for v in found["violations"]]


def test_first_screen_fits(browser: Any, page: Path) -> None:
    """What differs, what can be compared, and every answer are on a screen of 1280 x 720."""
    visit(browser, page)
    for place in (".answer section:last-of-type li", "#runs tbody tr:last-child"):
        box = browser.find_element("css selector", place).rect
        assert box["y"] + box["height"] <= 720, place


def test_charts_keep_their_words(browser: Any, page: Path) -> None:
    """A screen reader hears what each chart is, not what Vega calls its parts."""
    visit(browser, page)
    nodes = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = [(n["role"]["value"], n.get("name", {}).get("value")) for n in nodes if not n["ignored"] and "role" in n]
    assert "graphics-document" not in {role for role, _ in told}
    labels = [chart.get_attribute("aria-label") for chart in browser.find_elements("css selector", ".chart")]
    assert len(labels) > 3
    assert labels == [name for role, name in told if role == "image"]
