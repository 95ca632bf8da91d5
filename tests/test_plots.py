"""Figures: what is drawn where, checked on matplotlib's objects; how it looks was checked by eye."""

from __future__ import annotations

import itertools
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text

from lora_forensics import series as tables
from lora_forensics.plots import decomposition_figure, modules_figure, save_plots, similarity_figure
from lora_forensics.plots.names import drawable_text, elided, model_order, row_labels
from lora_forensics.plots.scales import below, log_floor
from lora_forensics.records import BaseModelSummary, Keep, Status, TurningPoint, Verdict

KOHYA = [
    f"lora_unet_{block}_attentions_{layer}_transformer_blocks_0_{part}"
    for block in ("down_blocks_0", "down_blocks_1", "down_blocks_2", "mid_block", "up_blocks_1", "up_blocks_2")
    for layer in range(4)
    for part in ("attn1_to_k", "attn1_to_out_0", "attn1_to_q", "attn1_to_v", "ff_net_0_proj", "ff_net_2", "proj_in")
] + [f"lora_te_text_model_encoder_layers_{layer}_mlp_fc{n}" for layer in range(12) for n in (1, 2)]


def make_verdict(status: Status = "turning_point", run: str = "runs/a", **changes: object) -> Verdict:
    """A verdict for 30 checkpoints at steps 20, 40, ..., 600."""
    full = Verdict(
        run=run,
        status=status,
        keep=Keep("checkpoint-160", 160, 4.0, "held_out_loss"),
        turning_point=TurningPoint(9, 200, 5.0, "checkpoint-200", 340),
        candidates=(),
        evidence={},
        last_is_past_turning_point=True,
        window=3,
        window_reason="one epoch",
        cadence_steps=20.0,
        detector="algorithm1",
        similarity="flat",
        components=("unet",),
        base_model=BaseModelSummary(None, 1, 1),
        checkpoints=30,
        findings=(),
        message="6 checkpoints are too few.",
    )
    return replace(full, **changes)  # type: ignore[arg-type]


def make_series(count: int = 30, valleys: Sequence[int] = (4, 9, 15)) -> pl.DataFrame:
    """A series with valleys at the given checkpoints, a gap in CS, and nulls at the tail of CS-Fluctuation."""
    rng = np.random.default_rng(0)
    fluctuation = [float(value) for value in 10 ** rng.uniform(-12, -9, count)]
    numbers = {place: order for order, place in enumerate(valleys, 1)}
    return pl.DataFrame(
        {
            "step": [20 * (n + 1) for n in range(count)],
            "cosine": [float("nan") if n == 12 else -1e-4 * np.exp(-n / 9) for n in range(count)],
            "cosine_rowwise": [3e-4] * count,
            "cs_fluctuation": [value if n < count - 7 else None for n, value in enumerate(fluctuation)],
            "valley": [numbers.get(n) for n in range(count)],
        },
        schema_overrides=tables.schema(tables.SERIES_COLUMNS),
    ).select(column.name for column in tables.SERIES_COLUMNS if column.name in NAMES)


NAMES = {"step", "cosine", "cosine_rowwise", "cs_fluctuation", "valley"}


def make_checkpoints(count: int = 30) -> pl.DataFrame:
    """Training loss at every checkpoint, held-out loss at every second one."""
    return pl.DataFrame(
        {
            "step": [20 * (n + 1) for n in range(count)],
            "held_out_loss": [2.0 + (n - 7) ** 2 / 100 if n % 2 else None for n in range(count)],
            "train_loss": [2.0 / (n + 1) for n in range(count)],
        }
    )


def make_layers(modules: Sequence[str], count: int = 30, component: str | None = None) -> pl.DataFrame:
    """Cosines of modules at steps 20, 40, ...; the first module has none at the first step."""
    steps = [20 * (n + 1) for n in range(count)]
    values = np.random.default_rng(1).normal(0, 1e-4, (len(modules), count))
    values[0, 0] = np.nan
    owners = [component or ("text_encoder" if "_te_" in name else "unet") for name in modules]
    return pl.DataFrame(
        {
            "step": steps * len(modules),
            "module": np.repeat(modules, count),
            "component": np.repeat(owners, count),
            "cosine": values.ravel(),
        }
    ).sample(fraction=1, shuffle=True, seed=3)


def drawn(axes: Axes, gid: str) -> tuple[list[float], list[float]]:
    """The data of a line, by its id."""
    (line,) = [line for line in axes.lines if line.get_gid() == gid]
    x, y = line.get_data()
    return list(map(float, x)), list(map(float, y))


def words(figure: Figure) -> str:
    """All text of a figure."""
    return "\n".join(text.get_text() for text in figure.findobj(Text) if isinstance(text, Text))


class TestSimilarity:
    """CS, CS-Fluctuation and losses over the steps."""

    def test_panels(self) -> None:
        """Three panels share the steps; the third is there only with a loss."""
        figure = similarity_figure(make_series(), make_checkpoints(), make_verdict())
        assert len(figure.axes) == 3
        assert len({axes.get_xlim() for axes in figure.axes}) == 1
        assert len(similarity_figure(make_series(), pl.DataFrame(), make_verdict()).axes) == 2

    def test_valleys(self) -> None:
        """Every valley is marked at its step, and the first ones are numbered."""
        panel = similarity_figure(make_series(), pl.DataFrame(), make_verdict()).axes[1]
        assert drawn(panel, "valleys")[0] == [100, 200, 320]
        assert {text.get_text() for text in panel.texts} == {"1", "2", "3"}

    def test_second_valley_keeps_its_number(self) -> None:
        """Where numbers would collide, the second valley's stays."""
        panel = similarity_figure(make_series(300, (4, 6, 8)), pl.DataFrame(), make_verdict()).axes[1]
        assert [text.get_text() for text in panel.texts] == ["2"]
        assert len(drawn(panel, "valleys")[0]) == 3

    def test_marks(self) -> None:
        """The turning point, what it rests on, and the checkpoint to keep stand in all panels."""
        for axes in similarity_figure(make_series(), make_checkpoints(), make_verdict()).axes:
            assert drawn(axes, "turning-point")[0] == [200, 200]
            assert drawn(axes, "keep")[0] == [160, 160]
            (span,) = [patch for patch in axes.patches if patch.get_gid() == "support"]
            assert (span.get_extents().x0, span.get_extents().x1) == pytest.approx(
                tuple(axes.transData.transform([(200, 1), (340, 1)])[:, 0])
            )

    def test_kept_is_on_the_curves(self) -> None:
        """The checkpoint to keep is marked on CS and on the held-out loss."""
        figure = similarity_figure(make_series(), make_checkpoints(), make_verdict())
        assert drawn(figure.axes[0], "kept")[0] == [160]
        assert drawn(figure.axes[2], "kept") == ([160], [2.0])

    def test_words(self) -> None:
        """The window, the turning point with its support, and what the answer rests on can be read."""
        text = words(similarity_figure(make_series(), make_checkpoints(), make_verdict()))
        assert "CS-Fluctuation, window 3 checkpoints" in text
        assert "turning point: step 200, computed up to 340" in text
        assert "kept: step 160, lowest held-out loss" in text

    def test_values_are_scaled(self) -> None:
        """The power of ten stands in the title and is taken out of the values."""
        axes = similarity_figure(make_series(), pl.DataFrame(), make_verdict()).axes[0]
        assert axes.get_title(loc="left").endswith("×10⁻⁴")
        assert drawn(axes, "cs")[1][0] == pytest.approx(-1.0)

    def test_rowwise(self) -> None:
        """With row-wise similarity the row-wise cosine is drawn."""
        axes = similarity_figure(make_series(), pl.DataFrame(), make_verdict(similarity="rowwise")).axes[0]
        assert "row-wise" in axes.get_title(loc="left")
        assert drawn(axes, "cs")[1] == pytest.approx([3.0] * 30)

    def test_gaps_stay_gaps(self) -> None:
        """A checkpoint without a cosine interrupts the line; a loss that was not logged does not."""
        figure = similarity_figure(make_series(), make_checkpoints(), make_verdict())
        assert np.isnan(drawn(figure.axes[0], "cs")[1][12])
        assert len(drawn(figure.axes[2], "held-out")[0]) == 15

    @pytest.mark.parametrize("status", ["too_few_checkpoints", "no_base_model", "unhealthy", "no_second_valley"])
    def test_missing_data(self, status: Status) -> None:
        """Without data the figure is drawn, with a sentence in each empty panel and no marks over it."""
        verdict = make_verdict(status, turning_point=None)
        figure = similarity_figure(pl.DataFrame(), pl.DataFrame(), verdict)
        for axes in figure.axes:
            (sentence,) = axes.texts
            assert sentence.get_gid() == "sentence"
            assert not axes.lines
        assert "no turning point" in words(figure)

    def test_one_checkpoint(self) -> None:
        """One checkpoint is a point, and only its own step is a tick."""
        verdict = make_verdict("too_few_checkpoints", turning_point=None, keep=None, window=None)
        figure = similarity_figure(make_series(1, ()), pl.DataFrame(), verdict)
        assert "6 checkpoints are too few." in words(figure)
        low, high = figure.axes[0].get_xlim()
        assert [tick for tick in figure.axes[0].get_xticks() if low <= tick <= high] == [20]

    def test_zero_fluctuation(self) -> None:
        """Zeros and a constant CS are drawn, though they have no logarithm."""
        flat = make_series().with_columns(cs_fluctuation=pl.lit(0.0), cosine=pl.lit(0.0))
        assert drawn(similarity_figure(flat, pl.DataFrame(), make_verdict()).axes[1], "cs-fluctuation")[1][0] == 0


class TestModules:
    """The heat map."""

    def test_rows_and_columns(self) -> None:
        """Every module is a row, and each column shows the checkpoint nearest to its step."""
        figure = modules_figure(make_layers(KOHYA), make_verdict())
        (image,) = figure.axes[0].images
        picture = np.ma.filled(image.get_array(), np.nan)
        assert picture.shape[0] == len(KOHYA)
        assert len(np.unique(picture[5])) == 30
        assert np.isnan(picture[:, :5]).sum() == 5

    def test_colours_are_centred(self) -> None:
        """Zero is in the middle of the colours, and one wild value does not move them."""
        wild = make_layers(KOHYA).with_columns(
            pl.when(pl.int_range(pl.len()) == 7).then(1.0).otherwise("cosine").alias("cosine")
        )
        low, high = modules_figure(wild, make_verdict()).axes[0].images[0].get_clim()
        assert low == -high
        assert high == pytest.approx(2.3, abs=0.3)

    @pytest.mark.parametrize("count", [3, 30, 192, 1000])
    def test_labels_do_not_overlap(self, count: int) -> None:
        """Row labels keep their distance and stay on the page, for few modules and for many."""
        names = (
            (KOHYA * 6)[:count]
            if count <= len(KOHYA)
            else [f"layers.{n // 7}.very_long_name.{n}" for n in range(count)]
        )
        figure = modules_figure(make_layers(names, 4), make_verdict())
        figure.draw_without_rendering()
        boxes = [label.get_window_extent() for label in figure.axes[0].get_yticklabels()]
        assert all(upper.y0 >= lower.y1 for upper, lower in itertools.pairwise(boxes))
        assert min(box.x0 for box in boxes) >= 0

    @pytest.mark.parametrize("frame", [pl.DataFrame(), make_layers(["a"]).with_columns(cosine=pl.lit(None))])
    def test_missing_data(self, frame: pl.DataFrame) -> None:
        """Without values there is a sentence instead of a map."""
        figure = modules_figure(frame, make_verdict("no_base_model"))
        assert not figure.axes[0].images
        assert figure.axes[0].texts[0].get_gid() == "sentence"

    def test_any_column(self) -> None:
        """Another metric is drawn from its lowest to its highest values."""
        norms = make_layers(KOHYA).with_columns(delta_norm=pl.col("cosine").abs() + 1)
        low, high = modules_figure(norms, make_verdict(), "delta_norm").axes[0].images[0].get_clim()
        assert 1.0 <= low < high

    def test_constant_column(self) -> None:
        """A metric that never changes has a colour, too."""
        constant = make_layers(KOHYA).with_columns(rank=pl.lit(8))
        assert modules_figure(constant, make_verdict(), "rank").axes[0].images[0].get_clim() == (7.5, 8.5)

    def test_without_component(self) -> None:
        """A table with the four columns that every table has is enough."""
        figure = modules_figure(make_layers(KOHYA).drop("component"), make_verdict())
        assert figure.axes[0].images[0].get_array().shape[0] == len(KOHYA)


class TestNames:
    """Short names and drawable text."""

    def test_model_order(self) -> None:
        """The denoiser comes first, numbers count, and FLUX's single blocks follow the double ones."""
        rows = [
            ("text_encoder", "te.layers.0"),
            ("transformer", "single_transformer_blocks.0"),
            ("transformer", "transformer_blocks.10"),
            ("transformer", "transformer_blocks.9"),
        ]
        assert sorted(rows, key=model_order) == [rows[3], rows[2], rows[1], rows[0]]

    def test_blocks(self) -> None:
        """Many modules are named by the block that they sit in."""
        rows = [("text_encoder" if "_te_" in name else "unet", name) for name in KOHYA]
        blocks = {"down 0", "down 1", "down 2", "mid 0", "mid 1", "mid 2", "mid 3", "up 1", "up 2"}
        assert set(row_labels(rows)) == blocks | {f"te {layer}" for layer in range(12)}

    def test_few_modules(self) -> None:
        """Few modules are named by what tells them apart."""
        rows = [("model", f"base_model.model.model.layers.{n}.self_attn.q_proj") for n in range(2)]
        assert row_labels(rows) == ["0.self_attn.q_proj", "1.self_attn.q_proj"]

    def test_hostile(self) -> None:
        """Dollars, line breaks, direction marks and signs that no font has are drawn as text, without a warning."""
        name = "$\\frac{1}{0}$_x^\u202e\x1b[31m\n層\u3042"
        figure = modules_figure(make_layers([name, "", "..", "$" * 200]), make_verdict(run=name, message=name))
        figure.draw_without_rendering()
        similarity_figure(pl.DataFrame(), pl.DataFrame(), make_verdict(run=name, message=name)).draw_without_rendering()
        assert drawable_text(name) == "$\\frac{1}{0}$_x^ [31m □□"

    def test_elided(self) -> None:
        """A long name keeps its beginning and more of its end."""
        assert elided("abcdefghijklmnopqrstuvwxyz", 10) == "abc…uvwxyz"


class TestDecomposition:
    """Magnitude against direction."""

    def test_points(self) -> None:
        """Every module of the verdict's components at six checkpoints, first and last among them; text encoders not."""
        layers = make_layers(KOHYA).with_columns(magnitude_change=pl.col("step") * 1e-4, direction_change=0.5)
        series = make_series().with_columns(magnitude_direction=pl.lit(0.8), directness=pl.lit(0.5))
        figure = decomposition_figure(series, layers, make_verdict())
        (points,) = figure.axes[0].collections
        offsets = np.asarray(points.get_offsets())
        assert len(offsets) == 6 * sum("_te_" not in name for name in KOHYA)
        assert {round(1e4 * y) for _, y in offsets} >= {20, 600}
        assert drawn(figure.axes[1], "magnitude_direction")[1] == [0.8] * 30
        assert figure.axes[0].get_xlim() != figure.axes[1].get_xlim() == figure.axes[2].get_xlim()
        assert drawn(figure.axes[2], "keep")[0] == [160, 160]

    def test_without_a_base_model(self) -> None:
        """Sentences stand where nothing is known; the path is drawn all the same."""
        series = make_series().with_columns(directness=pl.lit(0.5))
        figure = decomposition_figure(series, make_layers(KOHYA), make_verdict("no_base_model"))
        assert "base model" in words(figure)
        assert drawn(figure.axes[2], "directness")[1] == [0.5] * 30


class TestFiles:
    """Files on disk."""

    def test_reproducible(self, tmp_path: Path) -> None:
        """The same data gives the same bytes, in PNG and SVG that can be read."""
        data = (make_series(), make_layers(KOHYA), make_checkpoints(), make_verdict())
        first, second = save_plots(tmp_path / "1", *data), save_plots(tmp_path / "2", *data)
        names = ("similarity", "modules", "decomposition")
        assert [path.name for path in first] == [f"{name}.{kind}" for name in names for kind in ("png", "svg")]
        for one, other in zip(first, second, strict=True):
            assert one.read_bytes() == other.read_bytes()
        assert first[0].read_bytes().startswith(b"\x89PNG")
        assert ET.parse(first[1]).getroot().tag.endswith("svg")  # noqa: S314  written by this test

    def test_fast_enough(self, tmp_path: Path) -> None:
        """192 modules and 100 checkpoints take seconds at most, also on a busy machine."""
        data = (make_series(100), make_layers(KOHYA, 100), make_checkpoints(100), make_verdict())
        started = time.perf_counter()
        save_plots(tmp_path, *data)
        assert time.perf_counter() - started < 10

    def test_nothing_global(self) -> None:
        """Neither importing nor drawing changes matplotlib's settings, loads pyplot or torch."""
        program = (
            "import sys, polars as pl\n"
            "from lora_forensics import plots\n"
            "assert 'matplotlib' not in sys.modules\n"
            "import matplotlib\n"
            "settings = lambda: {key: matplotlib.rcParams[key] for key in matplotlib.rcParams if key != 'backend'}\n"
            "before = settings()\n"
            "from tests.test_plots import *\n"
            "plots.similarity_figure(make_series(), make_checkpoints(), make_verdict())\n"
            "assert settings() == before\n"
            "assert not {'matplotlib.pyplot', 'torch'} & set(sys.modules)\n"
        )
        subprocess.run([sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1])


NOISY = [1e-17, *(2e-6 * (1 + place) for place in range(60))]
"""A CS-Fluctuation with one value that is what arithmetic leaves."""


@pytest.mark.parametrize(
    ("values", "floor", "told"),
    [
        ([1.0, 50.0], None, ""),
        ([0.0, 1.0, 1000.0], None, ""),
        ([], None, ""),
        ([1e-6, 1e-3, 1.0], 1e-6, ""),
        ([1e-17, 1e-6, 1e-4], 1e-12, " The axis ends at a millionth of the median, 1e-12: 1 value is smaller"),
        ([1e-17, 1e-16, 1e-6, 1e-4, 1e-4], 1e-12, "2 values are smaller and stand on its edge."),
    ],
)
def test_where_a_logarithmic_axis_ends(values: list[float], floor: float | None, told: str) -> None:
    """Real values are never cut; the noise of arithmetic is, and the words say so."""
    assert log_floor(values) == (None if floor is None else pytest.approx(floor))
    assert told in below(values) if told else not below(values)


def test_noise_does_not_stretch_the_axis() -> None:
    """One value of 1e-17 leaves the others their room, and stays in the data."""
    series = make_series(61).with_columns(cs_fluctuation=pl.Series(NOISY))
    (axes,) = (
        a for a in similarity_figure(series, pl.DataFrame(), make_verdict()).axes if "CS-Fl" in a.get_title(loc="left")
    )
    assert 1e-12 < axes.get_ylim()[0] < 1e-10
    (line,) = (line for line in axes.lines if line.get_gid() == "cs-fluctuation")
    assert min(np.asarray(line.get_ydata(), float)) == 1e-17
