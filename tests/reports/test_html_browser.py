"""The HTML report in a real Chromium: it draws, links, asks nothing of a network, and runs no text of a file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from reports.pages import HOSTILE, chromium, verdict_of, visit, write_pages, write_tables

from lora_forensics.records import Candidate, Skipped

pytest.importorskip("vl_convert")
pytest.importorskip("selenium")


@pytest.fixture(scope="module", params=["light", "dark"])
def browser(request: pytest.FixtureRequest) -> Iterator[Any]:
    """A browser in each theme."""
    with chromium(dark=request.param == "dark") as page:
        yield page


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Index and pages: an ordinary run, and one in which every text is hostile."""
    place = tmp_path_factory.mktemp("out")
    write_tables(place / "r")
    tame = [text.encode("utf-8", "replace").decode() for text in HOSTILE]
    write_tables(
        place / "bad", module=[tame[row % 12] for row in range(288)], role=[tame[row % 12] for row in range(288)]
    )
    every = " ".join(HOSTILE)
    verdict = verdict_of("bad")
    bad = replace(
        verdict,
        findings=tuple(
            replace(finding, rule=text, message=text, hint=text) for text in HOSTILE for finding in verdict.findings
        ),
        candidates=tuple(Candidate(text, 10 * place + 10, text) for place, text in enumerate(HOSTILE)),
        skipped=tuple(Skipped(Path(text), text) for text in HOSTILE),
        **dict.fromkeys(("path", "message", "trainer", "adapter", "window_reason", "step_unit"), every),
    )
    write_pages(place, verdict_of("r"), bad)
    return place


def _rule(page: Any, chart: str) -> list[float]:
    """Where the band of the picked checkpoint stands in a chart, in pixels."""
    script = """return [...document.querySelectorAll(`#chart-${arguments[0]} svg .mark-rule line`)]
        .filter((line) => line.getAttribute("stroke-width") === "7")
        .map((line) => line.getBoundingClientRect().x)"""
    return page.execute_script(script, chart)


def test_draws(browser: Any, out: Path) -> None:
    """Every chart holds marks, and the heat map pixels of many colours."""
    visit(browser, out / "r/report.html")
    marks = browser.execute_script(
        """return Object.fromEntries([...document.querySelectorAll(".chart")].map((chart) =>
            [chart.id, chart.querySelectorAll("svg path, svg line").length]))"""
    )
    assert len(marks) >= 9
    assert all(many > 10 for name, many in marks.items() if name != "chart-map"), marks
    colors = browser.execute_script(
        """const map = document.querySelector("#chart-map canvas");
        const bytes = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
        const found = new Set();
        for (let i = 0; i < bytes.length; i += 4) found.add(bytes[i] << 16 | bytes[i + 1] << 8 | bytes[i + 2]);
        return found.size"""
    )
    assert colors > 50


@pytest.mark.parametrize("name", ["r/report.html", "bad/report.html", "index.html"])
def test_asks_nothing_and_runs_nothing(browser: Any, out: Path, name: str) -> None:
    """No error in the console, no request but for the page itself, no script of a file, and the texts are there."""
    browser.get_log("browser")
    browser.get_log("performance")
    visit(browser, out / name)
    assert browser.get_log("browser") == []
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [e["params"]["request"]["url"] for e in events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [(out / name).as_uri()]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0
    assert browser.execute_script("return window.alerts") == []
    if name.startswith("bad"):
        shown = browser.execute_script("return document.body.textContent")
        assert all(said in shown for said in ("<script>alert(1)</script>", "{{constructor", "</style><style>"))
        assert browser.execute_script("return document.querySelectorAll('script').length") == 4
        # hover over everything: tooltips are text, too
        browser.execute_script(
            """for (const chart of document.querySelectorAll(".chart")) for (const at of [0.3, 0.6]) {
                const box = chart.getBoundingClientRect();
                const place = { clientX: box.x + at * box.width, clientY: box.y + at * box.height, bubbles: true };
                (chart.querySelector("svg, canvas") || chart).dispatchEvent(new PointerEvent("pointermove", place));
            }"""
        )
        assert browser.execute_script("return document.querySelectorAll('.tip *').length") == 0
        assert browser.execute_script("return window.alerts") == []


def test_policy_blocks_what_would_be_added(browser: Any, out: Path) -> None:
    """A script that got into the page would not run, and nothing would be fetched."""
    visit(browser, out / "r/report.html")
    blocked = browser.execute_async_script(
        """const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
        const script = document.createElement("script");
        script.textContent = "alert('inserted')";
        document.body.append(script);
        const image = new Image();
        image.src = "https://example.invalid/x.png";
        fetch("https://example.invalid/").catch(() => setTimeout(() => done([seen, window.alerts]), 300));"""
    )
    assert set(blocked[0]) == {"script-src-elem", "img-src", "connect-src"}
    assert blocked[1] == []
    browser.get_log("browser")


def test_picking_links_all_charts(browser: Any, out: Path) -> None:
    """A click in one chart moves the band in all charts and changes the numbers; so does the slider, by keyboard."""
    from selenium.webdriver import ActionChains, Keys

    visit(browser, out / "r/report.html", height=1400)
    charts = ["fluctuation", "cs", "loss", "norm", "rank", "sigma", "column"]
    before = {chart: _rule(browser, chart) for chart in charts}
    assert all(len(places) == 1 for places in before.values()), before
    assert browser.find_element("id", "step-label").text == "step 100"
    chart = browser.find_element("css selector", "#chart-cs svg")
    ActionChains(browser).move_to_element_with_offset(chart, 150, 0).click().perform()
    picked = browser.find_element("id", "step-label").text
    assert picked != "step 100"
    file = browser.find_element("css selector", ".numbers [data-column=checkpoint]").text
    assert file == f"c{picked.removeprefix('step ')}.safetensors"
    after = {chart: _rule(browser, chart) for chart in charts}
    assert all(after[chart][0] > before[chart][0] + 5 for chart in charts)
    slider = browser.find_element("id", "step")
    slider.send_keys(Keys.HOME)
    slider.send_keys(Keys.ARROW_RIGHT)
    assert browser.find_element("id", "step-label").text == "step 20"
    assert all(_rule(browser, chart)[0] < before[chart][0] for chart in charts)
    near = browser.find_element("id", "cloud-step").text
    assert near == "step 20"


def test_pointer_links_all_charts(browser: Any, out: Path) -> None:
    """The step at the pointer is a line in every chart on the screen, beside its numbers; no chart keeps it."""
    from selenium.webdriver import ActionChains

    lines = """const at = (line) => line.getAttribute("stroke-width") === "1";
        return [...document.querySelectorAll(".chart")]
            .filter(chart => [...chart.querySelectorAll(".role-mark line")].some(at)).map(chart => chart.id)"""
    visit(browser, out / "r/report.html", height=1400)
    chart = browser.find_element("css selector", "#chart-cs svg")
    ActionChains(browser).move_to_element_with_offset(chart, 60, 0).perform()
    assert {"chart-cs", "chart-fluctuation", "chart-loss", "chart-norm"} <= set(browser.execute_script(lines))
    told = browser.find_element("css selector", ".tip").text
    assert re.fullmatch(r"step \d+\nCS: 0\.\d+", told)
    browser.execute_script("scrollTo(0, document.body.scrollHeight)")
    ActionChains(browser).move_to_element(browser.find_element("css selector", "footer")).perform()
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.execute_script(lines) == []
    assert not browser.find_element("css selector", ".tip").is_displayed()


def test_zoom_is_shared(browser: Any, out: Path) -> None:
    """Dragging over a chart narrows the axis of all; the button undoes it."""
    from selenium.webdriver import ActionChains

    visit(browser, out / "r/report.html", height=1400)
    numbers = """return [...document.querySelectorAll(`#chart-${arguments[0]} .role-axis-label text`)]
        .map(text => text.textContent).sort()"""
    before = browser.execute_script(numbers, "loss")
    chart = browser.find_element("css selector", "#chart-cs svg")
    move = ActionChains(browser).move_to_element_with_offset(chart, -60, 0).click_and_hold()
    move.move_by_offset(120, 0).release().perform()
    narrowed = browser.execute_script(numbers, "loss")
    assert narrowed != before
    browser.find_element("id", "unzoom").click()
    assert browser.execute_script(numbers, "loss") == before


def test_column_can_be_chosen(browser: Any, out: Path) -> None:
    """Another column draws another line and another map."""
    from selenium.webdriver.support.ui import Select

    visit(browser, out / "r/report.html")
    drawn = """return [document.querySelector("#chart-map canvas").toDataURL(),
        document.querySelector("#chart-column svg").outerHTML]"""
    before = browser.execute_script(drawn)
    choice = Select(browser.find_element("id", "column"))
    choice.select_by_value("spectral_norm")
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    after = browser.execute_script(drawn)
    assert before[0] != after[0]
    assert before[1] != after[1]
    assert "singular" in browser.find_element("id", "column-meaning").text


def test_table_by_keyboard(browser: Any, out: Path) -> None:
    """A head sorts up and down with Enter and says so; words filter rows."""
    from selenium.webdriver import Keys

    visit(browser, out / "r/report.html")
    values = """return [...document.querySelectorAll("#modules tbody tr")].filter(row => !row.hidden)
        .map(row => Number(row.cells[5].textContent))"""
    head = browser.find_element("css selector", "#modules th:nth-child(6) button")
    for key, order in ((Keys.ENTER, "ascending"), (Keys.SPACE, "descending")):
        head.send_keys(key)
        assert browser.execute_script("return document.querySelector('#modules th:nth-child(6)').ariaSort") == order
        found = browser.execute_script(values)
        assert found == sorted(found, reverse=order == "descending")
        assert len(found) == 12
    word = browser.find_element("css selector", ".tools[data-for=modules] input")
    word.send_keys("layer.1 q_proj")
    assert len(browser.execute_script(values)) == 1
    assert browser.find_element("css selector", ".tools[data-for=modules] [role=status]").text == "1 of 12 shown"


def test_theme(browser: Any, out: Path) -> None:
    """The page follows the system until the button is pressed."""
    visit(browser, out / "r/report.html")
    ground = "return getComputedStyle(document.body).backgroundColor"
    line = "return getComputedStyle(document.querySelector('#chart-cs svg .mark-line path')).stroke"
    before = browser.execute_script(ground), browser.execute_script(line)
    toggle = browser.find_element("id", "theme")
    pressed = toggle.get_attribute("aria-pressed")
    assert (before[0] == "rgb(255, 255, 255)") == (pressed == "false")
    toggle.click()
    assert toggle.get_attribute("aria-pressed") != pressed
    assert browser.execute_script(ground) != before[0]
    assert browser.execute_script(line) != before[1]
    toggle.click()


@pytest.mark.parametrize("width", [360, 768, 1280])
@pytest.mark.parametrize("name", ["r/report.html", "bad/report.html", "index.html"])
def test_no_sideways_scroll(browser: Any, out: Path, name: str, width: int) -> None:
    """The page is as wide as the screen."""
    visit(browser, out / name, width, 720)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width


def test_first_screen(browser: Any, out: Path) -> None:
    """At 1280 x 720 the file, the reason, what is wrong with its fix, and the first chart are on the screen."""
    visit(browser, out / "r/report.html")
    for place in (".keep .file", ".keep .why", ".findings li .fix", "#step", "#chart-fluctuation svg"):
        box = browser.find_element("css selector", place).rect
        assert box["y"] + min(box["height"], 150) <= 720, place


@pytest.mark.parametrize("name", ["r/report.html", "bad/report.html", "index.html"])
@pytest.mark.parametrize("width", [360, 1280])
def test_accessible(browser: Any, out: Path, name: str, width: int) -> None:
    """Axe finds nothing at all."""
    axe = pytest.importorskip("axe_core_python.selenium")
    visit(browser, out / name, width)
    found = axe.Axe().run(browser)
    assert not [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in found["violations"]]
    assert found["passes"]


def test_charts_are_told_in_words(browser: Any, out: Path) -> None:
    """A screen reader hears what a chart shows, after the drawing, too, and nothing of what Vega calls its parts."""
    from selenium.webdriver.support.ui import Select

    visit(browser, out / "r/report.html")
    tree = browser.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    told = {
        node["role"]["value"]: [n["name"]["value"] for n in tree if n.get("role") == node["role"] and "name" in n]
        for node in tree
        if not node["ignored"] and "role" in node
    }
    assert "graphics-document" not in told
    words = told["image"]
    assert any("CS-Fluctuation" in word and "lowest" in word and "at step 10" in word for word in words)
    assert len(words) == browser.execute_script("return document.querySelectorAll('.chart').length")
    Select(browser.find_element("id", "column")).select_by_value("rotation")
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    label = browser.find_element("id", "chart-column").get_attribute("aria-label")
    assert label.startswith("rotation, median over modules: ")
    assert "at step 240" in label


def test_paper(browser: Any, out: Path) -> None:
    """On paper charts are as wide as it and no wider, the heat map's labels are dark, and long tables are cut."""
    visit(browser, out / "r/report.html")
    pixels = """const map = document.querySelector("#chart-map canvas");
        const bytes = map.getContext("2d").getImageData(0, 0, map.width, map.height).data;
        const pixels = new Uint32Array(bytes.buffer);
        return pixels.includes(0xff444444);"""
    assert not browser.execute_script(pixels)
    browser.execute_script("dispatchEvent(new Event('beforeprint'))")
    assert browser.execute_script(pixels)
    try:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        for width in (700, 1100):
            size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            sizes = browser.execute_script(
                """return [...document.querySelectorAll(".chart")].map(chart => [chart.getBoundingClientRect().width,
                    chart.querySelector("svg, canvas").getBoundingClientRect().width])"""
            )
            assert all(abs(place - drawn) < 2 for place, drawn in sizes), sizes
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        browser.execute_script("dispatchEvent(new Event('afterprint'))")
    assert not browser.execute_script(pixels)


def test_heat_map_follows_the_theme(browser: Any, out: Path) -> None:
    """The labels of a canvas are drawn again in the other theme."""
    visit(browser, out / "r/report.html")
    drawn = "return document.querySelector('#chart-map canvas').toDataURL()"
    before = browser.execute_script(drawn)
    browser.find_element("id", "theme").click()
    browser.execute_async_script("setTimeout(arguments[0], 300)")
    assert browser.execute_script(drawn) != before
    browser.find_element("id", "theme").click()


def test_escape(browser: Any, out: Path) -> None:
    """Escape takes away the numbers at the pointer first, and then the zoom."""
    from selenium.webdriver import ActionChains, Keys

    visit(browser, out / "r/report.html", height=1400)
    browser.find_element("id", "zoom").click()
    unzoom = browser.find_element("id", "unzoom")
    assert unzoom.is_enabled()
    ActionChains(browser).move_to_element(browser.find_element("css selector", "#chart-cs svg")).perform()
    assert browser.find_element("css selector", ".tip").is_displayed()
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not browser.find_element("css selector", ".tip").is_displayed()
    assert unzoom.is_enabled()
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    assert not unzoom.is_enabled()


def test_keyboard_alone(browser: Any, out: Path) -> None:
    """Tab reaches everything in the order of the page, and what has the focus is seen."""
    from selenium.webdriver import ActionChains, Keys

    visit(browser, out / "r/report.html")
    seen = []
    for _ in range(80):
        ActionChains(browser).send_keys(Keys.TAB).perform()
        found = browser.execute_script(
            """const at = document.activeElement, style = getComputedStyle(at);
            const every = [...document.querySelectorAll("*")];
            const seen = style.outlineStyle !== "none" && style.outlineWidth !== "0px";
            return [every.indexOf(at), at.id || at.tagName, seen]"""
        )
        if seen and found[0] <= seen[-1][0]:
            break
        seen.append(found)
    assert all(visible for _, _, visible in seen), seen
    assert {"theme", "step", "zoom", "column"} <= {name for _, name, _ in seen}
    assert len(seen) == browser.execute_script(
        """return [...document.querySelectorAll("a[href], button, input, select, summary, [tabindex='0']")]
            .filter(part => !part.disabled && part.checkVisibility()).length"""
    )


def test_names_of_objects(browser: Any, tmp_path: Path) -> None:
    """Columns, modules and runs may be called as JavaScript's own properties."""
    names = ["constructor", "__proto__", "toString", "hasOwnProperty"]
    write_tables(tmp_path / "__proto__", modules=4, module=names * 24, role=names * 24)
    layers = tmp_path / "__proto__/layers.parquet"
    pl.read_parquet(layers, memory_map=False).with_columns(constructor=pl.col("cosine")).write_parquet(layers)
    write_pages(tmp_path, verdict_of("__proto__"))
    browser.get_log("browser")
    visit(browser, tmp_path / "__proto__/report.html")
    browser.execute_script(
        """const choice = document.getElementById("column");
        choice.value = "constructor"; choice.dispatchEvent(new Event("change"));"""
    )
    browser.execute_async_script("setTimeout(arguments[0], 600)")
    assert browser.find_element("id", "chart-column").get_attribute("aria-label").startswith("constructor, median")
    assert browser.get_log("browser") == []
    rows = browser.execute_script(
        "return [...document.querySelectorAll('#modules tbody tr')].map(r => r.cells[1].textContent)"
    )
    assert sorted(rows) == sorted(names)
