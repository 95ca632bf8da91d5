"""The HTML report as text: what stands in it, how large it is, and where its images come from."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest
from click.testing import CliRunner
from reports.pages import HOSTILE, METRICS, verdict_of, write_pages, write_tables

from lora_forensics.cli import main
from lora_forensics.records import BaseModelSummary, Candidate, Finding, Keep, Skipped, Summary, TurningPoint
from lora_forensics.reports import available, text
from lora_forensics.reports.html import HtmlReport, samples
from lora_forensics.reports.html.charts import charts
from lora_forensics.reports.html.data import cells
from lora_forensics.reports.html.tables import RunTables

pytest.importorskip("vl_convert")
Image = pytest.importorskip("PIL.Image")


class Reader(HTMLParser):
    """Elements with their attributes, and the text of scripts and styles."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self._script: dict[str, str | None] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Remember the element."""
        self.elements.append((tag, dict(attrs)))
        self._script = dict(attrs) if tag in {"script", "style"} else None
        if self._script is not None:
            self._script["tag"] = tag

    def handle_data(self, data: str) -> None:
        """Remember what a script holds."""
        if self._script is not None:
            self.scripts.append((self._script, data))

    def handle_endtag(self, tag: str) -> None:  # noqa: ARG002 - the parser calls it so
        """Leave the script."""
        self._script = None

    def data(self) -> dict[str, Any]:
        """The document of the charts."""
        (found,) = (content for attrs, content in self.scripts if attrs.get("id") == "data")
        return json.loads(found)


@pytest.fixture
def page(tmp_path: Path) -> Reader:
    """The page of a run."""
    write_tables(tmp_path / "r")
    return Reader(write_pages(tmp_path, verdict_of("r")).read_text("utf-8"))


def test_nothing_is_fetched(page: Reader) -> None:
    """No element names anything outside of the page, and the policy allows each script and style by its hash only."""
    addresses = [v for _, attrs in page.elements for k, v in attrs.items() if k in {"src", "srcset", "action"} and v]
    addresses += [attrs["href"] or "" for tag, attrs in page.elements if tag != "a" and "href" in attrs]
    assert all(address.startswith("data:") for address in addresses)
    (policy,) = (a["content"] or "" for _, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    for attrs, content in page.scripts:
        if attrs.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
    handlers = [key for _, attrs in page.elements for key in attrs if key.startswith("on") or key == "style"]
    assert not handlers


def test_first_screen(page: Reader, tmp_path: Path) -> None:
    """The answer, its reason and what is wrong come before everything else."""
    markup = (tmp_path / "r/report.html").read_text("utf-8")
    answer = markup[: markup.index('id="step"')]
    for said in ("c100.safetensors", "alf of the way", "not shown to beat", "NaN in 2 checkpoints", "train again"):
        assert said in answer
    assert answer.index("NaN in 2") < answer.index("rests on saved weights alone")


def test_numbers_are_those_of_the_tables(tmp_path: Path) -> None:
    """Medians over modules, and heat-map cells within a 65,000th of the range."""
    write_tables(tmp_path / "r", steps=9, modules=5)
    tables = RunTables.read(tmp_path / "r")
    found = Reader(write_pages(tmp_path, verdict_of("r")).read_text("utf-8")).data()
    for metric in METRICS:
        at = tables.layers.filter(pl.col("step") == 30)[metric].median()
        assert found["table"][f"{metric}.mid"][2] == pytest.approx(at, rel=1e-4)
        low, high, _, _, packed = found["cells"]["maps"][metric]
        codes = np.frombuffer(base64.b64decode(packed), "<u2").reshape(5, 9)
        row = [name for _, name, _ in found["cells"]["rows"]].index("model.layer.0.q_proj")
        truth = tables.layers.filter(pl.col("module") == "model.layer.0.q_proj").sort("step")[metric].to_numpy()
        assert low + (high - low) * codes[row] / 65534 == pytest.approx(truth, abs=2e-5 * (high - low))


def test_groups_are_means(tmp_path: Path) -> None:
    """Many modules share rows by block and role, and a row is the mean of its modules."""
    write_tables(tmp_path / "r", steps=3, modules=400)
    tables = RunTables.read(tmp_path / "r")
    found = cells(tables)
    assert sum(many for _, _, many in found["rows"]) == 400
    assert len(found["rows"]) <= 160
    low, high, _, _, packed = found["maps"]["cosine"]
    codes = np.frombuffer(base64.b64decode(packed), "<u2").reshape(-1, 3)
    weights = np.array([many for _, _, many in found["rows"]])
    mean = np.average(low + (high - low) * codes[:, 1] / 65534, weights=weights)
    assert mean == pytest.approx(tables.layers.filter(pl.col("step") == 20)["cosine"].mean(), rel=1e-4)


def test_size(tmp_path: Path) -> None:
    """722 modules at 200 checkpoints with every column filled stay below 3 MB."""
    write_tables(tmp_path / "r", steps=200, modules=722)
    assert len(write_pages(tmp_path, verdict_of("r")).read_bytes()) < 3_000_000


@pytest.mark.parametrize("bad", HOSTILE)
def test_hostile_text(tmp_path: Path, bad: str) -> None:
    """Text from files adds no element and no attribute, and reads as text."""
    write_tables(tmp_path / "r")
    plain = Reader(write_pages(tmp_path, verdict_of("r")).read_text("utf-8"))
    tame = bad.encode("utf-8", "replace").decode()
    write_tables(tmp_path / "r", module=[f"{tame}{place % 12}" for place in range(288)], role=[tame] * 288)
    verdict = verdict_of("r")
    findings = tuple(replace(finding, rule=bad, message=bad, hint=bad) for finding in verdict.findings)
    candidates = tuple(Candidate(bad, entry.step, bad) for entry in verdict.candidates)
    hostile = replace(verdict, findings=findings, candidates=candidates, trainer=bad, adapter=bad, message=bad)
    hostile = replace(hostile, skipped=(Skipped(Path(bad), bad),), path=bad, window_reason=bad, step_unit=bad)
    markup = write_pages(tmp_path, hostile).read_text("utf-8")
    found = Reader(markup)
    wanted = {"script": 4, "style": 1, "img": 0}
    assert {tag: sum(t == tag for t, _ in found.elements) for tag in wanted} == wanted
    assert {key for _, attrs in found.elements for key in attrs} <= {
        *(key for _, attrs in plain.elements for key in attrs),
        "data-step",
    }
    assert html.escape(text.plain(bad)) in markup
    assert "\u202e" not in markup
    assert "\x1b" not in markup
    found.data()


def test_hostile_run_name_is_no_address(tmp_path: Path) -> None:
    """A run's name is a relative address, whatever it is called."""
    rendered = HtmlReport().render(Summary((verdict_of("javascript:alert(1)"),), folder=tmp_path))
    links = [attrs["href"] for tag, attrs in Reader(rendered).elements if tag == "a"]
    assert "./javascript%3Aalert%281%29/report.html" in links


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the extra the error names it, before any work; a report of everything leaves the pages out."""
    monkeypatch.setitem(sys.modules, "vl_convert", None)
    assert "html" not in available()
    done = CliRunner().invoke(main, ["scan", str(tmp_path), "--report", "html", "--out", str(tmp_path / "out")])
    assert done.exit_code == 2
    assert "lora-forensics[html]" in done.output
    assert not (tmp_path / "out").exists()


def test_many_steps(tmp_path: Path) -> None:
    """Steps are thinned, those that matter are not, and the page says so."""
    write_tables(tmp_path / "r", steps=900, modules=2)
    verdict = verdict_of("r", checkpoints=900, keep=Keep("c5710.safetensors", 5710, None, "weights"))
    page = write_pages(tmp_path, verdict).read_text("utf-8")
    steps = Reader(page).data()["table"]["step"]
    assert {5710, 90, 150, 240, 10, 9000} <= set(steps)
    assert len(steps) < 410
    assert "of 900 checkpoints" in page


def test_damaged_tables(tmp_path: Path) -> None:
    """A run whose tables are lost still has its answer, without charts."""
    (tmp_path / "r").mkdir()
    (tmp_path / "r/layers.parquet").write_bytes(b"PAR1 no table")
    page = write_pages(tmp_path, verdict_of("r")).read_text("utf-8")
    assert "c100.safetensors" in page
    assert 'id="step"' not in page


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("sample", "my_{step:06d}_00_20240101120000_42.png"),
        ("sample", "my_e{epoch:06d}_00_20240101120000.png"),
        ("samples", "1700000000000__{step:09d}_0.jpg"),
        ("samples/0 - a cat", "2024-01-01_12-00-00-training-sample-{step}-1-7.jpg"),
        ("validation_images", "step_{step}_cat_0_1024x1024.png"),
    ],
)
def test_samples(tmp_path: Path, folder: str, name: str) -> None:
    """Images of every trainer are found at their steps, and the nearest to a candidate is shown."""
    (tmp_path / folder).mkdir(parents=True)
    for step, shade in ((40, 10), (80, 120), (160, 250)):
        file = tmp_path / folder / name.format(step=step, epoch=step // 40)
        Image.new("RGB", (900, 600), (shade, shade, shade)).save(file)
    names = tuple(Candidate(f"my-{step}.safetensors", step, "why") for step in (80, 170))
    verdict = verdict_of("r", path=str(tmp_path), keep=None, turning_point=None, candidates=names)
    prompts, columns = samples.sample_columns(verdict, {1.0: 40, 2.0: 80, 4.0: 160})
    assert len(prompts) == 1
    assert [(column.step, column.images[0] and column.images[0][0]) for column in columns] == [(80, 80), (170, 160)]


def test_samples_of_another_run(tmp_path: Path) -> None:
    """Images of a run that shares the folder are not shown."""
    (tmp_path / "sample").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "sample/other_000100_00_20240101120000.png")
    assert samples.sample_columns(verdict_of("r", path=str(tmp_path)), {}) == ([], [])


def test_samples_are_small_and_real(tmp_path: Path) -> None:
    """Noise of any size stays small; a file that is no image is left out and said so."""
    (tmp_path / "samples").mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (2000, 1500, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "samples/1__000000100_0.png")
    (tmp_path / "samples/1__000000150_0.png").write_bytes(b"\x89PNG no image")
    write_tables(tmp_path / "r")
    page = write_pages(tmp_path, verdict_of("r", path=str(tmp_path))).read_text("utf-8")
    images = [attrs["src"] or "" for tag, attrs in Reader(page).elements if tag == "img"]
    assert images
    assert all(len(image) < 100_000 and image.startswith("data:image/webp;base64,") for image in images)
    assert "not readable" in page
    assert re.search(r'alt="Sample for prompt 0 at step 100"', page)


def answer_of(markup: str) -> str:
    """The first screen, as text."""
    part = markup[markup.index('<div class="answer">') : markup.index('id="step"')]
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", part)).split())


PROBE = {
    "scorer": "a command",
    "maximise": True,
    "samples": 4,
    "score": 0.5,
    "evaluations": [
        {"checkpoint": f"c{step}.safetensors", "step": step, "score": step / 400} for step in (50, 100, 240)
    ],
    "flat": [{"checkpoint": "c50.safetensors", "step": 50}, {"checkpoint": "c100.safetensors", "step": 100}],
}


@pytest.mark.parametrize(
    ("rests_on", "words"),
    [
        ("held_out_loss", ("evidence Measured : the trainer's own loss on data that was not trained on",)),
        ("weights", ("why Half of the way", "is covered at step 100", "evidence Weak : saved weights alone")),
        ("turning_point", ("evidence Weak : saved weights alone", "not better than the middle")),
        (
            "probe",
            (
                "evidence Measured : a probe of 3 checkpoints on 4 samples",
                "cannot tell it from step 50.",
                "step 50: 0.125, 100: 0.25, 240: 0.6 (higher is better)",
            ),
        ),
    ],
)
def test_evidence_is_weighed(tmp_path: Path, rests_on: Any, words: tuple[str, ...]) -> None:
    """The first screen says of each kind of evidence whether anything was measured, and what chance does."""
    write_tables(tmp_path / "r")
    verdict = verdict_of("r", keep=Keep("c100.safetensors", 100, 2.5, rests_on))
    verdict = replace(verdict, evidence={**verdict.evidence, "probe": PROBE})
    said = answer_of(write_pages(tmp_path, verdict).read_text("utf-8"))
    for part in (*words, "compare with step 150 (second valley), step 240 (the last)"):
        assert part in said, part
    assert "This is no evidence: random walks turn at steps 80-180, too." in said
    outside = replace(verdict, evidence={**verdict.evidence, "inside_null_band": False})
    assert "Random walks turn elsewhere" in answer_of(write_pages(tmp_path, outside).read_text("utf-8"))


def test_nothing_to_keep(tmp_path: Path) -> None:
    """Why there is no answer is told once, with what to do; files to look at are named, not only their steps."""
    write_tables(tmp_path / "r")
    finding = Finding("no-base-model", "warning", "base model 'x' not found", "give it with --base PATH")
    verdict = verdict_of("r", keep=None, turning_point=None, status="no_base_model", findings=(finding,))
    verdict = replace(verdict, message="base model 'x' not found; looked at: /a/x")
    said = answer_of(write_pages(tmp_path, verdict).read_text("utf-8"))
    for part in (
        "None can be named",
        "Without the base model",
        "c150.safetensors (second valley)",
        "give it with --base",
    ):
        assert part in said, part
    assert said.count("base model 'x' not found") == 1
    untold = replace(verdict, findings=())
    assert "base model 'x' not found; looked at" in answer_of(write_pages(tmp_path, untold).read_text("utf-8"))


def test_places_are_told_from_the_run(tmp_path: Path) -> None:
    """The run's own folder does not push the names of its files off the screen."""
    write_tables(tmp_path / "r")
    bad = Path("/data/runs/deep/r/c40.safetensors")
    verdict = verdict_of("r", path="/data/runs/deep/r", skipped=(Skipped(bad, "empty"),))
    verdict = replace(verdict, findings=(Finding("empty-file", "error", f"left out: {bad}: empty"),))
    markup = write_pages(tmp_path, verdict).read_text("utf-8")
    assert "left out: c40.safetensors: empty" in answer_of(markup)
    assert "<span class=file>c40.safetensors</span>: empty" in markup


def test_probe_and_candidates_are_drawn(tmp_path: Path) -> None:
    """The scores of a probe are the first chart where the answer rests on them; candidates are lines in each chart."""
    write_tables(tmp_path / "r")
    verdict = verdict_of("r", keep=Keep("c100.safetensors", 100, 2.5, "probe"))
    verdict = replace(verdict, evidence={**verdict.evidence, "probe": PROBE})
    found = Reader(write_pages(tmp_path, verdict).read_text("utf-8")).data()
    assert [chart["name"] for chart in found["charts"]][:3] == ["probe", "loss", "fluctuation"]
    assert [v for v in found["table"]["probe_score"] if v is not None] == [0.125, 0.25, 0.6]
    for chart in found["charts"]:
        rules = [layer["data"]["values"] for layer in chart["spec"]["layer"] if layer["mark"]["type"] == "rule"]
        assert [{"step": 240}] in rules  # neither kept nor the turning point
    broken = replace(verdict, evidence={"probe": {"evaluations": [3, {"step": "x", "score": None}], "flat": 1}})
    assert "probe_score" not in Reader(write_pages(tmp_path, broken).read_text("utf-8")).data()["table"]


def test_index_tells_a_reason_once(tmp_path: Path) -> None:
    """Runs without an answer for the same reason stand together."""
    runs = [verdict_of(f"r{n}", keep=None, message="no base" if n % 2 else "too few") for n in range(9)]
    page = HtmlReport().render(Summary(tuple(runs), folder=tmp_path))
    assert page.count("no base<br>") == page.count("too few<br>") == 1
    assert "5 runs: <code>r0</code>, <code>r2</code>" in page


@pytest.mark.parametrize("kind", ["TIFF", "GIF", "BMP", "EPS", "ICO", "SVG"])
def test_only_three_decoders_run(tmp_path: Path, kind: str) -> None:
    """What is called .png and is of another kind is not decoded, script or program as it may be."""
    target = tmp_path / "1__000000100_0.png"
    if kind == "SVG":
        target.write_text("<svg xmlns='http://www.w3.org/2000/svg' onload='alert(1)'><script>alert(2)</script></svg>")
    else:
        Image.new("RGB", (16, 16)).save(target, kind)
    assert samples._small(target) is None
    Image.new("RGB", (16, 16)).save(target, "PNG")
    assert samples._small(target)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("step_100_cat_0_1024x1024.png", "cat_0"),
        ("step_100_a_cat_1_512x768.png", "a_cat_1"),
        ("step_100_cat_(1024, 1024).png", "cat"),
        ("step_100_cat_1024.png", "cat"),
    ],
)
def test_names_of_simpletuner(tmp_path: Path, name: str, prompt: str) -> None:
    """Older versions numbered no images, and wrote sizes in other ways."""
    (tmp_path / "validation_images").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "validation_images" / name)
    assert samples.sample_columns(verdict_of("r", path=str(tmp_path)), {})[0] == [prompt]


def test_custom_samples_are_left_out(tmp_path: Path) -> None:
    """OneTrainer's samples/custom hold images at prompts of a moment."""
    for folder in ("custom", "0 - a cat"):
        (tmp_path / "samples" / folder).mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / "samples" / folder / "2024-training-sample-100-1-7.png")
    assert samples.sample_columns(verdict_of("r", path=str(tmp_path)), {})[0] == ["0 - a cat"]


@pytest.mark.parametrize(("run", "shown"), [("digit", False), ("digit-lora", True), ("lora", False)])
def test_samples_of_a_run_with_a_longer_name(tmp_path: Path, run: str, shown: bool) -> None:
    """A run whose name begins as this one's is another run."""
    (tmp_path / "sample").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / f"sample/{run}_000100_00_20240101120000.png")
    keep = Keep("digit-lora-step00000100.safetensors", 100, None, "weights")
    verdict = verdict_of("r", path=str(tmp_path), keep=keep, turning_point=None, candidates=())
    assert bool(samples.sample_columns(verdict, {})[1]) is shown


def test_page_without_tables_has_no_empty_parts(tmp_path: Path) -> None:
    """No legend without charts."""
    (tmp_path / "r").mkdir()
    page = write_pages(tmp_path, verdict_of("r")).read_text("utf-8")
    assert "Click or slide" not in page
    assert "c100.safetensors" in page


def test_many_of_one_rule_are_folded(tmp_path: Path) -> None:
    """Forty damaged files leave room on the first screen for another error, and none of them is lost."""
    write_tables(tmp_path / "r")
    damaged = [Finding("truncated-file", "error", f"left out: c{place}") for place in range(40)]
    verdict = verdict_of("r", findings=(*damaged, Finding("nonfinite", "error", "NaN everywhere")))
    markup = write_pages(tmp_path, verdict).read_text("utf-8")
    said = answer_of(markup)
    assert "38 more: truncated-file" in said
    assert all(f"left out: c{place} " in said for place in range(40))
    folded = re.sub(r"<details>.*?</details>", "", markup, flags=re.DOTALL)
    assert "NaN everywhere" in folded
    assert folded.count("left out: c") == 2


def test_a_verdict_changed_by_hand_adds_no_markup(tmp_path: Path) -> None:
    """Also where a number should stand."""
    write_tables(tmp_path / "r")
    verdict = verdict_of("r", base_model=BaseModelSummary("b", "<i>1</i>", "<i>2</i>"))
    verdict = replace(verdict, turning_point=TurningPoint(14, 150, 3.75, "c150.safetensors", "<i>4</i>"))
    spread = {"null_band": ["<i>5</i>", "<i>6</i>"], "layer_interval": {"low_step": "<i>7</i>", "high_step": None}}
    probe = {"samples": "<i>8</i>", "evaluations": [{"step": "<i>9</i>", "score": "<i>1</i>"}], "flat": ["<i>2</i>"]}
    verdict = replace(verdict, evidence={"inside_null_band": True, "probe": probe, **spread})
    for keep in (verdict.keep, replace(verdict.keep, rests_on="probe")):
        assert "<i>" not in write_pages(tmp_path, replace(verdict, keep=keep)).read_text("utf-8")


def test_noise_does_not_stretch_an_axis() -> None:
    """The axis ends at a millionth of the median, the caption says so, and the data is whole; else nothing is said."""
    lines = {"step": [1, 2, 3, 4], "cs_fluctuation": [1e-17, 1e-6, 2e-6, 1e-3]}
    (chart,) = (entry for entry in charts(verdict_of("r")) if entry.name == "fluctuation")
    scales = [
        layer["encoding"]["y"].get("scale")
        for layer in chart.spec(lines, verdict_of("r"))["layer"]
        if "y" in layer.get("encoding", {})
    ]
    assert {"type": "log", "domainMin": pytest.approx(1.5e-12), "clamp": True} in scales
    assert "1 value is smaller" in chart.caption(lines)
    lines["cs_fluctuation"][0] = 1e-7
    assert chart.caption(lines) == chart.note
    assert not re.search("domainMin.: 1e-07", str(chart.spec(lines, verdict_of("r"))))
