"""The HTML report in a real Chromium: it draws, links, asks nothing of a network, and runs no text of a file."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

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


@pytest.mark.parametrize("width", [390, 768, 1280])
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


@pytest.mark.parametrize("name", ["r/report.html", "index.html"])
@pytest.mark.parametrize("width", [390, 1280])
def test_accessible(browser: Any, out: Path, name: str, width: int) -> None:
    """Axe finds nothing serious or critical."""
    axe = pytest.importorskip("axe_core_python.selenium")
    visit(browser, out / name, width)
    found = axe.Axe().run(browser)
    bad = [v for v in found["violations"] if v["impact"] in {"serious", "critical"}]
    assert not [(v["id"], [node["html"][:200] for node in v["nodes"]][:3]) for v in bad]
    assert found["passes"]
