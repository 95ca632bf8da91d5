"""The measuring half on real files: peft's own writer, kohya's layout, the sample runs."""

from __future__ import annotations

import gzip
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from factories import (
    KOHYA_MODULES,
    WrittenRun,
    kohya_base,
    kohya_file,
    kohya_metadata,
    kohya_run,
    peft_run,
    tiny_llama,
    touch_later,
)
from polars.testing import assert_frame_equal
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import lora_forensics as lf
from lora_forensics import measure
from lora_forensics.analyses import ANALYSES
from lora_forensics.measure import MeasureOptions, Progress, measure_run, unmeasured
from lora_forensics.records import Run
from lora_forensics.tables import LAYER_COLUMNS, Measured
from lora_forensics.tensors import SafetensorsFile

KOHYA = Path(__file__).parent / "data" / "kohya"


def discover(path: Path) -> Run:
    """The only run below a folder."""
    (run,) = [found for found in lf.discover_runs(path) if isinstance(found, Run)]
    return run


def worst_error(written: WrittenRun, measured: Measured, column: str = "cosine") -> float:
    """Largest distance of a cosine from the dense float64 reference, over all modules and checkpoints."""
    worst = 0.0
    for step, deltas in zip(written.steps, written.deltas, strict=True):
        rows = measured.layers.filter(pl.col("step") == step)
        for name, delta in deltas.items():
            (found,) = rows.filter(pl.col("module") == f"base_model.model.{strip(name)}")[column]
            weight = written.weights[name]
            if column == "cosine":
                expected = (weight * delta).sum() / (weight.norm() * delta.norm())
            else:
                expected = torch.nn.functional.cosine_similarity(weight, delta, dim=1).mean()
            worst = max(worst, abs(found - float(expected)))
    return worst


def strip(name: str) -> str:
    """A module's name inside the peft wrapper."""
    return name.removeprefix("base_model.model.")


class ConvNet(torch.nn.Module):
    """Convolutions of all sorts, a linear layer and an embedding, for peft to adapt."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.wide = torch.nn.Conv2d(6, 10, 3)
        self.point = torch.nn.Conv2d(10, 8, 1)
        self.head = torch.nn.Linear(8, 5)
        self.words = torch.nn.Embedding(30, 12)


def gpt2() -> Any:
    """A real GPT-2 of one layer: its Conv1D stores weights in x out, square ones included."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(2)
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=16, n_embd=24, n_layer=1, n_head=2))


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "linear": (tiny_llama, {}),
    "all linear, rsLoRA": (tiny_llama, {"target_modules": "all-linear", "use_rslora": True}),
    "rank and alpha patterns": (
        tiny_llama,
        {"rank_pattern": {"layers.0.self_attn.q_proj": 2}, "alpha_pattern": {"down_proj": 3}},
    ),
    "embedding and head": (tiny_llama, {"target_modules": ["embed_tokens", "q_proj", "lm_head"]}),
    "convolutions": (ConvNet, {"target_modules": ["wide", "point", "head", "words"]}),
    "Conv1D": (gpt2, {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("column", ["cosine", "cosine_rowwise"])
def test_cosines_equal_the_dense_reference_of_peft(
    case: str, column: str, tmp_path: Path, device: torch.device
) -> None:
    """Every module of a run that peft saved is within 2e-8 of <D,W> on its own dense delta."""
    make, config = CASES[case]
    written = peft_run(tmp_path, make(), steps=range(10, 40, 10), **config)
    measured = measure_run(discover(written.path), written.base, device.type)
    assert measured.notes.base.matched == measured.notes.base.total == len(written.weights)
    assert worst_error(written, measured, column) < 2e-8


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_stored_sixteen_bit_numbers_lose_nothing_more(dtype: torch.dtype, tmp_path: Path, device: torch.device) -> None:
    """With base and adapter in 16 bits, cosines are those of the stored numbers."""
    written = peft_run(tmp_path, tiny_llama(), steps=[10, 20], dtype=dtype, base_dtype=dtype)
    assert worst_error(written, measure_run(discover(written.path), written.base, device.type)) < 2e-8


def test_norms_use_the_scale_of_the_configuration(tmp_path: Path) -> None:
    """delta_norm is the norm of peft's own delta: alpha, patterns and rsLoRA included."""
    config = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"down_proj": 3}, "use_rslora": True}
    written = peft_run(tmp_path, steps=[10], **config)
    layers = measure_run(discover(written.path), written.base).layers
    for name, delta in written.deltas[0].items():
        (norm,) = layers.filter(pl.col("module") == f"base_model.model.{strip(name)}")["delta_norm"]
        assert norm == pytest.approx(float(delta.norm()), rel=1e-6)


def test_every_column_of_the_contract_is_filled(tmp_path: Path) -> None:
    """For LoRA on a known base only what it does not have is null, and only what looks back is NaN, at the first."""
    written = peft_run(tmp_path, steps=[10, 20, 30])
    options = MeasureOptions(analyses=tuple(ANALYSES))
    layers = measure_run(discover(written.path), written.base, options=options).layers
    assert layers.columns == [column.name for column in LAYER_COLUMNS]
    null = [name for name in layers.columns if layers[name].null_count()]
    assert null == ["scale_mean", "scale_spread", "scale_carried", "changed_share", "zero_share"]
    floats = layers.select(pl.col(pl.Float64))
    nan = [name for name in floats.columns if floats[name].is_nan().any()]
    assert nan == ["rotation", "step_size", "step_alignment", "down_rotation", "up_rotation"]
    assert layers.filter(pl.col("step") > 10)["rotation"].is_finite().all()


def test_movement_is_that_of_the_dense_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Step size and rotation compare with the checkpoint before, also across units of work."""
    monkeypatch.setattr(measure, "_TOGETHER", 1)
    written = peft_run(tmp_path, steps=range(10, 70, 10))
    layers = measure_run(discover(written.path), written.base).layers
    for index, step in enumerate(written.steps[1:], start=1):
        for name, delta in written.deltas[index].items():
            row = layers.filter((pl.col("step") == step) & (pl.col("module") == f"base_model.model.{strip(name)}"))
            before = written.deltas[index - 1][name]
            assert row["step_size"][0] == pytest.approx(float((delta - before).norm()), rel=1e-6)
            cosine = (delta * before).sum() / (delta.norm() * before.norm())
            assert row["rotation"][0] == pytest.approx(1 - float(cosine), rel=1e-5, abs=1e-12)


@pytest.mark.parametrize("together", [1, 3])
def test_what_is_measured_together_changes_no_number(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, together: int
) -> None:
    """One unit of work and batches of many modules, or units of few checkpoints and a batch each: the same table."""
    run = discover(peft_run(tmp_path).path)
    whole = measure_run(run, tmp_path / "base").layers
    monkeypatch.setattr(measure, "_TOGETHER", together)
    parts = measure_run(run, tmp_path / "base", options=MeasureOptions(memory=1)).layers
    order = ["step", "module"]
    assert_frame_equal(whole.sort(order), parts.sort(order), abs_tol=1e-12, rel_tol=1e-9)


def test_a_file_that_cannot_be_read_inside_is_left_out_as_if_it_were_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The header is whole and a tensor is not, found in the middle of the work."""
    written = peft_run(tmp_path, steps=range(10, 70, 10))
    run = discover(written.path)
    broken = run.checkpoints[2].path
    plain = SafetensorsFile._fill

    def fill(self: SafetensorsFile, parts: Any) -> None:
        if self.path == broken and any("layers.1" in name for name in self.infos):
            raise OSError("Input/output error")
        plain(self, parts)

    monkeypatch.setattr(SafetensorsFile, "_fill", fill)
    measured = measure_run(run, written.base, options=MeasureOptions(memory=1))
    (skipped,) = measured.notes.skipped
    assert skipped.path == broken
    assert "Input/output error" in skipped.reason
    rest = replace(run, checkpoints=run.checkpoints[:2] + run.checkpoints[3:])
    monkeypatch.setattr(SafetensorsFile, "_fill", plain)
    expected = measure_run(rest, written.base).layers.filter(pl.col("step") != 40)
    assert_frame_equal(measured.layers.filter(pl.col("step") != 40), expected, abs_tol=1e-12, rel_tol=1e-9)
    assert measured.layers.filter(pl.col("step") == 40)["rotation"].is_nan().all()


def test_single_file_and_diffusers_folder_give_the_same(sample_runs: Path) -> None:
    """The sample UNet measured against its LDM-named file and its diffusers folder: one table up to tensor names."""
    run = discover(sample_runs / "digits_kohya")
    run = replace(run, checkpoints=run.checkpoints[:3])
    tables = [
        measure_run(run, sample_runs / "digits_kohya" / base).layers.drop("tensor")
        for base in ("tiny-sd.safetensors", "tiny-sd")
    ]
    assert tables[0]["cosine"].is_finite().all()
    assert_frame_equal(*tables, rel_tol=1e-9, abs_tol=1e-12)


def test_kohya_files_against_a_dense_reference(sample_runs: Path) -> None:
    """Alpha / rank * up @ down of the sample run, dense in float64, on the tensor that the table names."""
    run = discover(sample_runs / "digits_kohya")
    run = replace(run, checkpoints=run.checkpoints[-1:])
    layers = measure_run(run).layers
    base = load_file(sample_runs / "digits_kohya" / "tiny-sd.safetensors")
    with safe_open(run.checkpoints[0].path, "pt") as file:
        for row in layers.iter_rows(named=True):
            down = file.get_tensor(f"{row['module']}.lora_down.weight").double().flatten(1)
            up = file.get_tensor(f"{row['module']}.lora_up.weight").double().flatten(1)
            delta = file.get_tensor(f"{row['module']}.alpha").double() / len(down) * up @ down
            weight = base[row["tensor"]].double().flatten(1)
            assert abs(row["cosine"] - (weight * delta).sum() / (weight.norm() * delta.norm())) < 2e-8
            assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
    assert len(layers) == measured_modules(run)


def test_files_of_kohyas_own_network_code_against_its_own_deltas(tmp_path: Path) -> None:
    """A file that sd-scripts (48d368f) wrote, and the changes that its modules make, stored in float32."""
    truth = json.loads(gzip.decompress((KOHYA / "num_kohya_lora.json.gz").read_bytes()))["truth"]
    shutil.copy(KOHYA / "num_kohya_lora.safetensors", tmp_path / "a-step00000010.safetensors")
    measured = measure_run(discover(tmp_path), KOHYA / "shared_num_kohya_base.safetensors")
    base, deltas = (
        load_file(KOHYA / name) for name in ("shared_num_kohya_base.safetensors", "num_kohya_lora_delta.safetensors")
    )
    assert set(measured.layers["module"]) == set(truth)
    for row in measured.layers.iter_rows(named=True):
        tensor = truth[row["module"]]["tensor"]
        weight, delta = base[tensor].double(), deltas[tensor].double()
        assert row["tensor"] == tensor
        assert abs(row["cosine"] - (weight * delta).sum() / (weight.norm() * delta.norm())) < 2e-8
        assert row["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-6)


def measured_modules(run: Run) -> int:
    """Modules of the first file, counted by its keys."""
    with safe_open(run.checkpoints[0].path, "pt") as file:
        return sum(key.endswith(".lora_up.weight") for key in file.keys())  # noqa: SIM118 - no mapping


def test_a_second_scan_measures_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Known rows are reused, unless a version measured in another way; the result is that of measuring all."""
    written = peft_run(tmp_path)
    run = discover(written.path)
    first = measure_run(replace(run, checkpoints=run.checkpoints[:-1]), written.base)
    second = measure_run(run, written.base, known=first)
    assert (first.new, second.new) == (11, 1)
    assert_frame_equal(second.layers, measure_run(run, written.base).layers)
    assert measure_run(run, written.base, known=second).new == 0
    monkeypatch.setattr("lora_forensics.measure._NUMBERS", 1)
    assert measure_run(run, written.base, known=second).new == 12


def test_a_replaced_checkpoint_and_its_successor_are_measured_again(tmp_path: Path) -> None:
    """The successor's movement looks back at the replaced file."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    known = measure_run(discover(written.path), written.base)
    touch_later(written.path / "checkpoint-30" / "adapter_model.safetensors")
    assert unmeasured(discover(written.path), known) == [2, 3]


def test_a_changed_configuration_is_noticed(tmp_path: Path) -> None:
    """Alpha lies in adapter_config.json: the norms depend on it though the weights are the same."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    known = measure_run(discover(written.path), written.base)
    config = written.path / "checkpoint-50" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 16'))
    again = measure_run(discover(written.path), written.base, known=known)
    assert again.new == 1
    last = pl.col("step") == 50
    ratio = again.layers.filter(last)["delta_norm"] / known.layers.filter(last)["delta_norm"]
    assert ratio.to_list() == pytest.approx([2.0] * len(ratio))


def test_a_rescan_with_nothing_new_keeps_every_note(tmp_path: Path) -> None:
    """Findings, misfits and skipped files of the first scan are told again, from whatever folder it is run."""
    written = peft_run(tmp_path, steps=[10, 20])
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wrong")
    broken = written.path / "checkpoint-20" / "adapter_model.safetensors"
    run = discover(written.path)
    broken.write_bytes(broken.read_bytes()[:-10])
    first = measure_run(run, tmp_path / "wrong")
    second = measure_run(run, tmp_path / "wrong", known=first)
    assert second.new == 0
    assert second.notes == first.notes


def test_another_base_measures_everything_again(tmp_path: Path) -> None:
    """Stored cosines are those of the base that they were measured with."""
    written = peft_run(tmp_path, steps=[10, 20])
    run = discover(written.path)
    known = measure_run(run, written.base)
    other = shutil.copytree(written.base, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: -tensor for name, tensor in tensors.items()}, other / "model.safetensors", {"format": "pt"})
    again = measure_run(run, other, known=known)
    assert again.new == 2
    assert again.layers["cosine"][0] == pytest.approx(-known.layers["cosine"][0])


def test_what_needs_no_base_is_measured_without_one(tmp_path: Path) -> None:
    """Norms, spectra and movement are there; cosines are null, and the notes say where the base was looked for."""
    written = peft_run(tmp_path, steps=[10, 20])
    shutil.rmtree(written.base)
    measured = measure_run(discover(written.path))
    assert measured.layers["cosine"].null_count() == len(measured.layers)
    assert measured.layers["delta_norm"].is_finite().all()
    assert "base" in measured.notes.base_problem
    assert "--base" in measured.notes.base_problem


def test_a_base_of_another_shape_is_named_as_such(tmp_path: Path) -> None:
    """No module fits: the message names the base and a shape."""
    written = peft_run(tmp_path, steps=[10])
    tiny_llama(hidden_size=64).save_pretrained(tmp_path / "wrong")
    notes = measure_run(discover(written.path), tmp_path / "wrong").notes
    assert notes.base.matched == 0
    assert "does not fit" in notes.base_problem


def test_unmatched_modules_are_counted_and_listed(tmp_path: Path) -> None:
    """A module without a weight keeps its norms, has no cosine, and is named in a finding."""
    base = kohya_base(tmp_path / "base")
    (base / "text_encoder" / "model.safetensors").unlink()
    measured = measure_run(discover(kohya_run(tmp_path / "run", steps=[10, 20])), base)
    assert (measured.notes.base.matched, measured.notes.base.total) == (2, 3)
    (finding,) = [finding for finding in measured.notes.findings if finding.rule == "module-unresolved"]
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in finding.message


def test_a_recorded_hash_that_differs_is_a_finding(tmp_path: Path) -> None:
    """Kohya writes the hash of its base into every file."""
    base = kohya_base(tmp_path / "base")
    single = tmp_path / "base.safetensors"
    save_file(load_file(base / "unet" / "diffusion_pytorch_model.safetensors"), single)
    extra = {"ss_new_sd_model_hash": "0" * 64}
    run = discover(kohya_run(tmp_path / "run", steps=[10, 20], **extra))
    first = measure_run(run, single)
    assert "base-hash-differs" in {finding.rule for finding in first.notes.findings}
    again = measure_run(run, single, known=first)
    assert again.new == 0
    assert again.notes.findings == first.notes.findings


def test_a_checkpoint_that_breaks_while_it_is_read_is_skipped(tmp_path: Path) -> None:
    """Discovery saw a whole file, measuring does not: the rest is measured, and the next scan tries nothing again."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    run = discover(written.path)
    broken = written.path / "checkpoint-30" / "adapter_model.safetensors"
    broken.write_bytes(broken.read_bytes()[:-10])
    measured = measure_run(run, written.base)
    assert [skipped.path for skipped in measured.notes.skipped] == [broken]
    assert set(measured.layers["step"]) == {10, 20, 40, 50}
    assert measure_run(run, written.base, known=measured).new == 0


def test_a_module_of_an_unread_kind_is_left_out_and_named(tmp_path: Path) -> None:
    """Magnitudes of another size beside a pair of factors: not measured as plain LoRA."""
    base = kohya_base(tmp_path / "base")
    name = next(iter(KOHYA_MODULES))
    for step in (10, 20):
        path = kohya_file(tmp_path / "run" / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, 0, "a"))
        extra = {f"{name}.dora_scale": torch.ones(15, 1)}
        save_file({**load_file(path), **extra}, path, kohya_metadata(step, 0, "a"))
    measured = measure_run(discover(tmp_path / "run"), base)
    assert name not in set(measured.layers["module"])
    assert any(f.rule == "module-unread" and "dora_scale" in f.hint for f in measured.notes.findings)


def test_two_models_in_one_folder_are_measured_each_on_its_own(tmp_path: Path) -> None:
    """A module of another shape takes nothing from its namesake, whatever the memory; and it is told."""
    good = peft_run(tmp_path / "a", tiny_llama(), steps=range(10, 60, 10))
    other = peft_run(tmp_path / "b", tiny_llama(hidden_size=32), steps=[60, 70])
    for step in other.steps:
        shutil.copytree(other.path / f"checkpoint-{step}", good.path / f"checkpoint-{step}")
    run = discover(good.path)
    for memory in (1, 1 << 30):
        measured = measure_run(run, good.base, options=MeasureOptions(memory=memory))
        assert worst_error(good, measured) < 2e-8
        late = measured.layers.filter(pl.col("step") > 50)
        assert late["cosine"].null_count() == len(late)
    verdict = lf.assess_run(measured.layers, measured.checkpoints, notes=measured.notes)
    (finding,) = [finding for finding in verdict.findings if finding.rule == "mixed-runs"]
    assert "step 60" in finding.message


def test_a_rank_that_changes_inside_a_run_is_measured(tmp_path: Path) -> None:
    """Checkpoints of another rank are a batch of their own; only the movement across the change is undefined."""
    base = kohya_base(tmp_path / "base")
    for step, rank in ((10, 2), (20, 2), (30, 4), (40, 4)):
        kohya_file(tmp_path / "run" / f"a-step{step:08d}.safetensors", step, kohya_metadata(step, 0, "a"), rank=rank)
    layers = measure_run(discover(tmp_path / "run"), base).layers
    assert layers["cosine"].is_finite().all()
    assert layers.group_by("step").agg(pl.col("rank").first()).sort("step")["rank"].to_list() == [2, 2, 4, 4]
    undefined = layers.filter(pl.col("step_size").is_nan())["step"].unique().sort().to_list()
    assert undefined == [10, 30]


def test_an_svd_initialised_adapter_is_named(tmp_path: Path) -> None:
    """CorDA changes the base weight by what data say: its cosines are not the method's."""
    written = peft_run(tmp_path, steps=[10])
    config = written.path / "checkpoint-10" / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "init_lora_weights": "corda"}))
    rules = {finding.rule for finding in measure_run(discover(written.path), written.base).notes.findings}
    assert "svd-initialised" in rules


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
def test_alpha_counts_in_every_shape(shape: tuple[int, ...], tmp_path: Path) -> None:
    """A scalar may be saved with axes; half the alpha is half the norm."""
    base = kohya_base(tmp_path / "base")
    norms = []
    for alpha in (1.0, 2.0):
        path = kohya_file(tmp_path / str(alpha) / "a-step00000010.safetensors", 10, kohya_metadata(10, 0, "a"))
        tensors = {k: torch.full(shape, alpha) if k.endswith(".alpha") else t for k, t in load_file(path).items()}
        save_file(tensors, path, kohya_metadata(10, 0, "a"))
        layers = measure_run(discover(tmp_path / str(alpha)), base).layers
        assert set(layers["scale"]) == {alpha / 2}
        norms.append(layers["delta_norm"][0])
    assert norms[1] == pytest.approx(2 * norms[0])


def test_a_base_that_is_replaced_is_read_again(tmp_path: Path) -> None:
    """Twice in one process: the second result is that of the new weights."""
    written = peft_run(tmp_path, steps=[10])
    run = discover(written.path)
    first = measure_run(run, written.base)
    path = written.base / "model.safetensors"
    save_file({name: -tensor for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    second = measure_run(run, written.base)
    assert second.layers["cosine"].to_list() == pytest.approx([-c for c in first.layers["cosine"]])


def test_a_base_that_is_away_costs_no_row(tmp_path: Path) -> None:
    """An unmounted disk: known cosines stay, new checkpoints wait and are measured when it is back."""
    written = peft_run(tmp_path, steps=range(10, 60, 10))
    run = discover(written.path)
    known = measure_run(replace(run, checkpoints=run.checkpoints[:4]))
    shutil.move(written.base, tmp_path / "elsewhere")
    away = measure_run(run, known=known)
    assert_frame_equal(away.layers, known.layers)
    assert "base-missing" in {finding.rule for finding in away.notes.findings}
    assert away.new == 0
    shutil.move(tmp_path / "elsewhere", written.base)
    back = measure_run(run, known=away)
    assert back.new == 1
    assert "base-missing" not in {finding.rule for finding in back.notes.findings}
    assert_frame_equal(back.layers, measure_run(run).layers)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_one_byte_bases_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp8 without a scale tensor: the numbers as they are stored."""
    written = peft_run(tmp_path, steps=[10])
    path = written.base / "model.safetensors"
    narrow = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(narrow, path, {"format": "pt"})
    layers = measure_run(discover(written.path), written.base).layers
    for name, delta in written.deltas[0].items():
        weight = narrow[f"{strip(name)}.weight"].double()
        (found,) = layers.filter(pl.col("module") == f"base_model.model.{strip(name)}")["cosine"]
        assert abs(found - float((weight * delta).sum() / (weight.norm() * delta.norm()))) < 2e-8


def test_full_weights_beside_an_adapter_are_a_finding(tmp_path: Path) -> None:
    """A bias that was trained beside the pairs is not compared, and that is said."""
    written = peft_run(tmp_path, model=tiny_llama(attention_bias=True), steps=[10], bias="lora_only")
    (finding,) = [
        f for f in measure_run(discover(written.path), written.base).notes.findings if f.rule == "full-weights"
    ]
    assert "q_proj.base_layer.bias" in finding.message


def test_a_lone_final_adapter_is_scanned_twice(tmp_path: Path) -> None:
    """No step is known, nothing is measured, and nothing breaks at the second time."""
    written = peft_run(tmp_path, steps=[10])
    alone = shutil.copytree(written.path / "checkpoint-10", tmp_path / "alone")
    (alone / "trainer_state.json").unlink()
    run = discover(alone)
    first = measure_run(run, written.base)
    second = measure_run(run, written.base, known=first)
    assert (len(first.layers), len(second.layers), second.new) == (0, 0, 0)
    verdict = lf.assess_run(second.layers, second.checkpoints, notes=second.notes)
    assert verdict.status == "too_few_checkpoints"
    assert "step cannot be known" in verdict.message


def test_a_finding_goes_when_its_reason_does(tmp_path: Path) -> None:
    """The configuration is put back, all is measured again: the scale is known."""
    written = peft_run(tmp_path, steps=[10, 20])
    configs = {path: path.read_text() for path in written.path.rglob("adapter_config.json")}
    for path in configs:
        path.unlink()
    known = measure_run(discover(written.path), written.base)
    assert "scale-unknown" in {finding.rule for finding in known.notes.findings}
    for path, text in configs.items():
        path.write_text(text)
    again = measure_run(discover(written.path), written.base, known=known)
    assert again.new == 2
    assert "scale-unknown" not in {finding.rule for finding in again.notes.findings}


def test_progress_adds_up(tmp_path: Path) -> None:
    """A run begins once, and all of its checkpoints are advanced over."""
    heard: list[Any] = []

    class Listener(Progress):
        def begin(self, run: str, checkpoints: int) -> None:
            heard.append((run, checkpoints))

        def advance(self, checkpoints: float) -> None:
            heard.append(checkpoints)

    written = peft_run(tmp_path, steps=range(10, 60, 10))
    measure_run(discover(written.path), written.base, options=MeasureOptions(memory=1, progress=Listener()))
    assert heard[0] == ("run", 5)
    assert sum(heard[1:]) == pytest.approx(5)
