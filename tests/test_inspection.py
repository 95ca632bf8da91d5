"""One checkpoint looked at, two compared: what is told is what is true, in every form, and bad files cost one line."""

from __future__ import annotations

import json
import math
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from factories import KOHYA_MODULES, kohya_base, kohya_file, kohya_metadata, lora_factors, peft_run, tiny_llama
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import lora_forensics as lf
from lora_forensics.cli import main
from lora_forensics.formats import formats_text, sections
from lora_forensics.inspection.difference import compare_files
from lora_forensics.inspection.metadata import facts
from lora_forensics.inspection.values import BaseFacts, Difference, Inspection, ModuleFacts
from lora_forensics.records import RowSlice
from lora_forensics.reports.inspection import inspection_text

DAMAGED = Path(__file__).parent / "data" / "damaged"
HOSTILE = '<script>\x1b[31m\u202eevil\n# [red]x[/red]\x07\x9b2J "'
"""Terminal codes, direction marks, control characters, markup."""


MODULE = ModuleFacts(
    "m", "unet", "m", None, "q", "some", None, None, "unknown", (None, None), (), 0, math.nan, math.nan, {}
)
"""A module of which nothing is known."""


def call(*arguments: object) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments], env={"COLUMNS": "80"})


def document(*arguments: object) -> dict[str, Any]:
    """The JSON of a command that succeeds, and prints nothing else."""
    result = call(*arguments, "--json")
    assert (result.exit_code, result.stderr) == (0, ""), result.output
    found: dict[str, Any] = json.loads(result.stdout)
    return found


def kohya_adapter(path: Path, step: int = 20, **factors: Any) -> Path:
    """A kohya file with its base in names of diffusers in a folder `base` beside it."""
    kohya_base(path.parent / "base")
    return kohya_file(path, step, kohya_metadata(step, 1, path.stem, ss_sd_model_name="base"), **factors)


def rules(found: Inspection) -> list[str]:
    """Ids of the findings."""
    return [finding.rule for finding in found.findings]


def rewritten(path: Path, change: Any, target: str = "changed.safetensors") -> Path:
    """The same file with other tensors, beside it."""
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path.with_name(target))
    return path.with_name(target)


class TestOneFile:
    """Numbers and text of one file."""

    def test_json_has_what_the_contract_names(self, tmp_path: Path) -> None:
        """Per module: place, kind, rank, scale, weight and numbers, equal to peft's own change in float64."""
        run = peft_run(tmp_path, steps=[10, 20])
        found = document("inspect", run.path / "checkpoint-20", "--base", run.base)
        types = {
            "module": str, "component": str, "section": str, "block": int, "role": str, "adapter": str, "rank": int,
            "scale": float, "scale_from": str, "shape": list, "tensors": list, "entries": int, "parts": list,
            "transposed": bool, "tensor": str, "cosine": float, "cosine_rowwise": float, "delta_norm": float,
            "base_norm": float, "relative_norm": float, "spectral_norm": float, "stable_rank": float,
            "effective_rank": float, "down_norm": float, "up_norm": float, "nonfinite": int,
            "average_magnitude": float, "average_strength": float,
        }  # fmt: skip
        assert {module["module"] for module in found["modules"]} == set(run.deltas[1])
        for module in found["modules"]:
            assert {key: type(module[key]) for key in types} == types
            assert {"bias_norm", "rows", "reason"} <= set(module)
            assert (module["rows"], module["reason"], module["rank"], module["scale"]) == (None, None, 4, 2.0)
            assert module["parts"][0]["tensor"] == module["tensor"]
            delta, weight = run.deltas[1][module["module"]], run.weights[module["module"]]
            cosine = (delta * weight).sum() / delta.norm() / weight.norm()
            assert module["cosine"] == pytest.approx(cosine.item(), abs=2e-8)
            assert module["delta_norm"] == pytest.approx(delta.norm().item(), rel=1e-6)
            assert module["spectral_norm"] == pytest.approx(torch.linalg.svdvals(delta)[0].item(), rel=1e-6)
        assert (found["unresolved"], found["base_model"]["path"]) == ([], str(run.base))
        assert (found["trainer"], found["step"], found["epoch"]) == ("peft", 20, 1.0)
        assert found["held_out_loss"] == pytest.approx(2.6)
        assert found["config"]["r"] == 4
        assert found["facts"]["network"]["alpha"] == "8"
        assert {module["scale_from"] for module in found["modules"]} == {"configuration"}

    def test_rows_and_parts_of_a_weight_are_named(self) -> None:
        """A single part is repeated as `tensor` and `rows`; of several, in stacking order, it is not."""
        rows = RowSlice("qkv.weight", (3, 5))
        one, two = (replace(MODULE, parts=parts, transposed=False).to_dict() for parts in ((rows,), (rows, rows)))
        assert (one["tensor"], one["rows"]) == ("qkv.weight", (3, 5))
        assert one["parts"][0] == {key: one[key] for key in one["parts"][0]}
        assert (two["tensor"], two["rows"]) == (None, None)
        assert [part["rows"] for part in two["parts"]] == [(3, 5), (3, 5)]
        assert MODULE.to_dict()["parts"] is None

    def test_kohyas_text_is_told_in_plain_words(self, tmp_path: Path) -> None:
        """Base, resolution, rates, data, tags, dates and hashes; the base is found beside the file."""
        tags = {"10_cat": {"cat": 20, "sofa": 3}, "5_dog": {"dog": 8, "sofa": 1}}
        extra = {
            "modelspec.title": "Cats", "modelspec.author": "me", "modelspec.license": "CC0",
            "ss_resolution": "(512, 512)", "ss_training_started_at": "1700000000.5",
            "ss_tag_frequency": json.dumps(tags), "ss_sd_model_name": "base", "ss_new_sd_model_hash": "a" * 64,
            "ss_dataset_dirs": json.dumps({"10_cat": {"n_repeats": 10, "img_count": 4}}), "sshs_model_hash": "b" * 64,
        }  # fmt: skip
        kohya_base(tmp_path / "base")
        path = kohya_file(tmp_path / "a-step00000020.safetensors", 20, kohya_metadata(20, 1, "a", **extra))
        found = document("inspect", path)
        told = found["facts"]
        assert told["about"]["title"] == "Cats"
        assert told["about"]["started"] == "2023-11-14 22:13 UTC"
        assert (told["about"]["author"], told["about"]["licence"]) == ("me", "CC0")
        assert (told["base"]["model"], told["base"]["resolution"]) == ("base", "(512, 512)")
        assert told["training"]["optimizer"] == "AdamW"
        assert told["training"]["denoiser's rate"] == "0.0002"
        assert told["data"]["folders"] == "10_cat: 4 x 10 (images x repeats)"
        assert told["data"]["tags"] == "3 different: cat 20, dog 8, sofa 4"
        assert told["hashes"]["this file"] == "b" * 64
        assert (found["trainer"], found["step"], found["epoch"], found["learning_rate"]) == ("kohya", 20, 1.0, 2e-4)
        assert found["metadata"]["ss_tag_frequency"] == json.dumps(tags)
        assert {module["scale_from"] for module in found["modules"]} == {"tensor"}
        assert all(module["parts"] for module in found["modules"])

    def test_settings_of_diffusers_in_the_header_are_told(self, tmp_path: Path) -> None:
        """`lora_adapter_metadata`, by the part of the model; the scale comes from there."""
        held = {"unet.r": 2, "unet.lora_alpha": 8, "unet.target_modules": ["to_k"]}
        tensors = {
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_A.weight": torch.ones(2, 16),
            "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_k.lora_B.weight": torch.ones(16, 2),
        }
        save_file(tensors, tmp_path / "a.safetensors", {"lora_adapter_metadata": json.dumps(held)})
        found = document("inspect", tmp_path / "a.safetensors")
        assert found["facts"]["network"] == {"unet rank": "2", "unet alpha": "8", "unet targets": "to_k"}
        assert [(m["scale"], m["scale_from"]) for m in found["modules"]] == [(4.0, "configuration")]

    def test_without_a_base_the_rest_is_told(self, tmp_path: Path) -> None:
        """Norms and spectra need none; each module says why it has no cosine, and nothing counts as unresolved."""
        path = kohya_file(tmp_path / "a.safetensors", 20, None)
        found = document("inspect", path)
        assert "--base" in found["base_model"]["problem"]
        assert found["unresolved"] == []
        for module in found["modules"]:
            assert (module["cosine"], module["parts"], module["tensor"]) == (None, None, None)
            assert module["reason"] == "no base model"
            assert module["delta_norm"] > 0
        assert "without a base model" in call("inspect", path).stdout

    def test_a_module_without_a_weight_says_why(self, tmp_path: Path) -> None:
        """It is among the modules, measured without a weight, and unresolved."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        extra = lora_factors({"lora_unet_nothing_like_it": (16, 16)}, 20)
        save_file({**load_file(path), **extra}, tmp_path / "b.safetensors")
        found = document("inspect", tmp_path / "b.safetensors", "--base", tmp_path / "base")
        reasons = {entry["module"]: entry["reason"] for entry in found["unresolved"]}
        assert list(reasons) == ["lora_unet_nothing_like_it"]
        (module,) = [m for m in found["modules"] if m["module"] in reasons]
        assert (module["reason"], module["parts"]) == (reasons[module["module"]], None)
        assert module["delta_norm"] > 0

    @pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
    def test_statistics_of_tensors_are_those_of_float64(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """Key, size, mean, range, mean and least absolute value, of finite entries; zeros and the rest are counted."""
        tensor = torch.randn(7, 11, generator=torch.Generator().manual_seed(1)).to(dtype)
        tensor[0, :3] = torch.tensor([0.0, math.nan, math.inf])
        save_file({"a.lora_down.weight": tensor, "empty": torch.zeros(0)}, tmp_path / "x.safetensors")
        listed = document("inspect", tmp_path / "x.safetensors", "--keys")["tensors"]
        empty, told = sorted(listed, key=lambda entry: int(entry["entries"]))
        finite = tensor.double().flatten().numpy()
        finite = finite[np.isfinite(finite)]
        truth = {
            "mean": finite.mean(), "minimum": finite.min(), "maximum": finite.max(), "mean_abs": np.abs(finite).mean(),
            "min_abs": 0.0, "norm": np.linalg.norm(finite), "zeros": 1, "nonfinite": 2, "entries": 77,
        }  # fmt: skip
        assert {key: told[key] for key in truth} == pytest.approx(truth, rel=1e-12)
        assert told["shape"] == [7, 11]
        assert (empty["mean"], empty["entries"]) == (None, 0)

    def test_groups_are_means_over_their_modules(self, tmp_path: Path) -> None:
        """By component, role and block: the average magnitude and strength that other inspectors tell, and |D|."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        found = document("inspect", path)
        tensors = load_file(path)
        unet = [name for name in KOHYA_MODULES if name.startswith("lora_unet")]
        stored = [[tensors[f"{name}.lora_{side}.weight"].double() for side in ("down", "up")] for name in unet]
        magnitude = np.mean([np.mean([t.norm() for t in pair]) for pair in stored])
        strength = np.mean([torch.cat([t.flatten() for t in pair]).abs().mean() for pair in stored])
        (group,) = [g for g in found["components"] if g["component"] == "unet"]
        assert group["average_magnitude"] == pytest.approx(magnitude, rel=1e-9)
        assert group["average_strength"] == pytest.approx(strength, rel=1e-9)
        norms = [m["delta_norm"] for m in found["modules"] if m["component"] == "unet"]
        assert group["delta_norm"] == pytest.approx(np.mean(norms), rel=1e-12)
        assert [(g["role"], g["modules"]) for g in found["roles"]] == [("q", 1), ("k", 1), ("q", 1)]
        assert {g["section"] for g in found["sections"]} == {"down_blocks_0", "text_model_encoder_layers_0"}

    def test_pickles_and_folders_are_read(self, tmp_path: Path) -> None:
        """adapter_model.bin, and a folder with one file of any name."""
        run = peft_run(tmp_path, steps=[10])
        folder = run.path / "checkpoint-10"
        whole = document("inspect", folder)
        torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
        (folder / "adapter_model.safetensors").rename(tmp_path / "alone.safetensors")
        pickled = document("inspect", folder / "adapter_model.bin")
        assert pickled["modules"] == whole["modules"]
        assert document("inspect", folder)["file"].endswith("adapter_model.bin")
        (tmp_path / "one").mkdir()
        shutil.move(tmp_path / "alone.safetensors", tmp_path / "one" / "any name.safetensors")
        assert document("inspect", tmp_path / "one")["file"].endswith("any name.safetensors")

    def test_contents_of_a_file_without_an_adapter(self, tmp_path: Path) -> None:
        """--keys and --metadata read any tensor file, and only headers for the latter; JSON in the text is unfolded."""
        metadata = {"a": json.dumps({"b": {"c": [1, 2]}}), "broken": "{"}
        save_file({"x": torch.tensor([1.0, -3.0])}, tmp_path / "x.safetensors", metadata)
        keys = call("inspect", tmp_path / "x.safetensors", "--keys").stdout
        assert keys == "x\n  F32 2, mean -1, -3 to 1, abs mean 2, abs min 1\n1 tensor, 2 numbers, F32\n"
        text = call("inspect", tmp_path / "x.safetensors", "--metadata").stdout
        assert sorted(text.splitlines()) == sorted(["a", "  b", "    c: 1, 2", "broken: {"])
        both = document("inspect", tmp_path / "x.safetensors", "--keys", "--metadata")
        assert (both["metadata"], [t["name"] for t in both["tensors"]]) == (metadata, ["x"])
        assert "metadata" not in document("inspect", tmp_path / "x.safetensors", "--keys")

    def test_the_library_gives_the_same(self, tmp_path: Path) -> None:
        """`lf.inspect_file` gives the value whose document the command prints."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        found = lf.inspect_file(path, base=tmp_path / "base", device="cpu")
        assert found.to_dict()["modules"][0]["cosine"] == document("inspect", path)["modules"][0]["cosine"]
        assert "cosine" in inspection_text(found)


class TestHealth:
    """Damage is found, and health is not accused."""

    def test_a_healthy_file_has_no_finding(self, tmp_path: Path) -> None:
        """Nothing is wrong, and that is said."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        found = lf.inspect_file(path)
        assert rules(found) == []
        assert "no NaN or Inf" in inspection_text(found)

    @pytest.mark.parametrize(
        ("case", "expected"),
        [("nan/run", "nonfinite"), ("inf", "nonfinite"), ("zero_b", "zero-change")],
    )
    def test_damage_of_the_corpus(self, case: str, expected: str) -> None:
        """Diverged, overflowed and untrained files."""
        files = sorted((DAMAGED / case.partition("/")[0]).rglob("*.safetensors"))
        adapters = [path for path in files if "base" not in path.as_posix().partition(case)[2]]
        said = [rule for path in adapters for rule in rules(lf.inspect_file(path))]
        assert expected in said

    def test_a_dead_module(self, tmp_path: Path) -> None:
        """One of three changes nothing."""
        path = kohya_file(tmp_path / "a.safetensors", 20, None)
        name = next(iter(KOHYA_MODULES))
        found = lf.inspect_file(rewritten(path, lambda t: t[f"{name}.lora_up.weight"].zero_()))
        assert rules(found) == ["dead-modules"]
        assert name in found.findings[0].message

    @pytest.mark.parametrize(("factor", "expected"), [(5, []), (100, ["outlier-modules"])])
    def test_an_exploding_module(self, factor: int, expected: list[str], tmp_path: Path) -> None:
        """Far above the median of its family; not within it."""
        names = [f"lora_unet_down_blocks_0_attentions_{n}_transformer_blocks_0_attn1_to_q" for n in range(5)]
        save_file(lora_factors(dict.fromkeys(names, (16, 16)), 20), tmp_path / "a.safetensors")
        changed = rewritten(tmp_path / "a.safetensors", lambda t: t[f"{names[2]}.lora_up.weight"].mul_(factor))
        assert rules(lf.inspect_file(changed)) == expected

    def test_a_change_larger_than_its_weight(self, tmp_path: Path) -> None:
        """Only where the base is known."""
        path = kohya_adapter(tmp_path / "a.safetensors", alpha=1e5)
        assert rules(lf.inspect_file(path, tmp_path / "base")) == ["larger-than-weight"]

    def test_numbers_flushed_to_zero(self, tmp_path: Path) -> None:
        """fp16 that was too narrow; float32 may hold zeros, and a tensor of zeros is another matter."""
        for dtype, expected in ((torch.float16, ["flushed-to-zero"]), (torch.float32, [])):
            path = kohya_file(tmp_path / f"{dtype}.safetensors", 20, None, dtype=dtype)
            changed = rewritten(path, lambda t: [v.view(-1)[::3].zero_() for v in t.values() if v.numel() > 1])
            assert rules(lf.inspect_file(changed)) == expected

    def test_what_is_not_read_or_is_no_adapter_is_named(self, tmp_path: Path) -> None:
        """A module of tensors that no kind takes together, and a tensor beside them."""
        path = kohya_file(tmp_path / "a.safetensors", 20, None)
        strange = {"lora_unet_x.lora_down.weight": torch.ones(2, 4), "some_buffer": torch.ones(3, 3)}
        save_file({**load_file(path), **strange}, tmp_path / "b.safetensors")
        found = lf.inspect_file(tmp_path / "b.safetensors")
        assert "module-unread" in rules(found)
        assert list(found.unread) == ["lora_unet_x"]
        assert found.other_tensors == ("some_buffer",)
        assert "1 tensor of no adapter: some_buffer" in inspection_text(found)
        assert "not read: no adapter kind reads" in inspection_text(found, verbose=True)
        assert found.to_dict()["unresolved"][0]["module"] == "lora_unet_x"

    def test_a_damaged_base_is_said(self, tmp_path: Path) -> None:
        """NaN in the weight below."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        file = tmp_path / "base" / "unet" / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        next(iter(tensors.values()))[0, 0] = math.nan
        save_file(tensors, file)
        assert "base-nonfinite" in rules(lf.inspect_file(path))

    def test_another_base_than_the_recorded_is_said(self, tmp_path: Path) -> None:
        """The recorded hash is compared."""
        run = peft_run(tmp_path, steps=[10])
        meta = kohya_metadata(10, 1, "a", ss_new_sd_model_hash="0" * 64)
        path = kohya_file(tmp_path / "a.safetensors", 10, meta)
        assert "base-hash-differs" in rules(lf.inspect_file(path, run.base / "model.safetensors"))


BAD = {
    "nothing there": (lambda p: [p / "x.safetensors"], "does not exist"),
    "truncated": (lambda _: [next((DAMAGED / "truncated").rglob("adapter_model.safetensors"))], "truncated"),
    "no safetensors": (lambda p: [p / "text.safetensors"], "safetensors header"),
    "empty": (lambda p: [p / "empty.safetensors"], "empty"),
    "not a tensor file": (lambda p: [p / "notes.txt"], "not a tensor file"),
    "malicious pickle": (lambda _: [*(DAMAGED / "malicious_pickle").rglob("*.bin")], "refused"),
    "no adapter": (lambda p: [p / "model.safetensors"], "no adapter in it"),
    "an empty folder": (lambda p: [p / "folder"], "no .safetensors file"),
    "several files": (lambda p: [p], "name one file"),
    "three files": (lambda p: [p, p, p], "3 files"),
    "keys of two files": (lambda p: [p, p, "--keys"], "2 files"),
    "no base": (lambda p: [p / "good.safetensors", "--base", p / "nowhere"], "nowhere: no such file"),
    "no device": (lambda p: [p / "good.safetensors", "--device", "cuda:99"], "device"),
    "a base that is an adapter's folder": (lambda p: [p / "good.safetensors", "--base", p / "folder"], "base model"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_costs_one_line_and_exit_2(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is wrong and what to try, on stderr; no traceback, and no code of a pickle is run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.safetensors").write_text("<html>you need to log in</html>")
    (tmp_path / "empty.safetensors").touch()
    (tmp_path / "notes.txt").write_text("x")
    (tmp_path / "folder").mkdir()
    save_file({"x": torch.ones(2)}, tmp_path / "model.safetensors")
    kohya_file(tmp_path / "good.safetensors", 10, None)
    arguments, expected = BAD[case]
    result = call("inspect", *arguments(tmp_path))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    assert re.search(expected, result.stderr), result.stderr
    assert len(result.stderr.splitlines()) <= 2
    assert not (tmp_path / "PWNED").exists()


@pytest.mark.parametrize("path", sorted(DAMAGED.rglob("*.[sb][ai][fn]*")), ids=lambda path: path.parent.name)
def test_the_damaged_corpus_never_raises(path: Path) -> None:
    """Every file of it is told about or refused, in every form."""
    for options in ([], ["-v"], ["--json"], ["--keys"], ["--metadata"]):
        result = call("inspect", path, *options)
        assert result.exit_code in (0, 2), result.output
        assert "Traceback" not in result.output


def test_hostile_text_is_harmless(tmp_path: Path) -> None:
    """Names, metadata and settings that try to write on the terminal do not; JSON is data and stays one document."""
    name = f"lora_unet_{HOSTILE}".replace("\n", " ")
    keys = ("modelspec.title", "ss_sd_model_name", "ss_network_module", "ss_training_comment", HOSTILE)
    tags = {"ss_tag_frequency": json.dumps({HOSTILE: {HOSTILE: 3}}), "ss_datasets": json.dumps([{HOSTILE: HOSTILE}])}
    save_file(
        {**lora_factors({name: (16, 16)}, 10), HOSTILE: torch.ones(2)},
        tmp_path / "a.safetensors",
        {**dict.fromkeys(keys, HOSTILE), **tags},
    )
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": HOSTILE, "r": {HOSTILE: [HOSTILE]}}))
    for options in ([], ["-v"], ["--keys"], ["--metadata"], [tmp_path / "a.safetensors", "-v"]):
        result = call("inspect", tmp_path / "a.safetensors", *options)
        text = result.stdout
        assert "evil" in text, result.output
        assert not [c for c in text if c != "\n" and not c.isprintable()]
    assert document("inspect", tmp_path / "a.safetensors")["metadata"][HOSTILE] == HOSTILE


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
KEYS = ["ss_tag_frequency", "ss_dataset_dirs", "ss_datasets", "ss_bucket_info", "training_info", "ss_optimizer"]
KEYS += ["ss_training_started_at", "lora_adapter_metadata"]


@given(
    metadata=st.dictionaries(st.sampled_from(KEYS), JSON.map(json.dumps) | st.text(max_size=12)),
    config=st.dictionaries(st.sampled_from(["r", "lora_alpha", "target_modules", "peft_version", "bias"]), JSON),
)
@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_metadata_gives_facts_or_nothing(metadata: dict[str, str], config: dict[str, Any]) -> None:
    """Values of any type and shape: facts are short texts, and none is empty."""
    for fact in facts(metadata, config):
        assert fact.value
        assert len(fact.value) < 400


@pytest.mark.parametrize("width", [60, 80, 120])
@pytest.mark.parametrize("verbose", [False, True])
def test_lines_fit_the_terminal(width: int, verbose: bool, sample_runs: Path) -> None:
    """No line is wider; only names of modules, tensors and files are never broken."""
    found = lf.inspect_file(sample_runs / "text_peft" / "output" / "checkpoint-80")
    for found_ in (found, Difference(found, found, (), (), (), (), 1, 2)):
        lines = inspection_text(found_, width, verbose=verbose).splitlines()
        assert [line for line in lines if len(line) > width and len(line.split()) > 2] == []


class TestTwoFiles:
    """What differs between two."""

    def test_a_file_and_itself(self, tmp_path: Path) -> None:
        """All tensors identical, no distance, nothing to tell."""
        path = kohya_adapter(tmp_path / "a.safetensors")
        found = document("inspect", path, path)["difference"]
        assert (found["identical_tensors"], found["changed_tensors"]) == (9, 0)
        assert found["metadata"] == found["only_first"] == found["only_second"] == []
        for module in found["modules"]:
            assert module["cosine"] == pytest.approx(1, abs=1e-12)
            assert module["step_size"] == pytest.approx(0, abs=1e-6 * module["delta_norms"][0])

    def test_distance_and_cosine_are_those_of_the_dense_changes(self, tmp_path: Path) -> None:
        """Against peft's own changes in float64."""
        run = peft_run(tmp_path, steps=[10, 20, 30])
        found = compare_files(run.path / "checkpoint-10", run.path / "checkpoint-30", device="cpu")
        assert len(found.pairs) == 4
        for pair in found.pairs:
            one, two = run.deltas[0][pair.module], run.deltas[2][pair.module]
            assert pair.step_size == pytest.approx((two - one).norm().item(), rel=1e-6)
            cosine = (one * two).sum() / one.norm() / two.norm()
            assert pair.cosine == pytest.approx(cosine.item(), abs=1e-9)
            assert pair.changed == ()

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
    def test_other_ranks_and_types_are_compared(self, dtype: torch.dtype, tmp_path: Path) -> None:
        """A file that was resized or saved in another type: the same module with other sizes of its factors."""
        first = kohya_file(tmp_path / "a.safetensors", 20, None, rank=2)
        second = kohya_file(tmp_path / "b.safetensors", 20, None, rank=3, alpha=2.0, dtype=dtype)
        found = compare_files(first, second, device="cpu")
        deltas = [
            {n: t[f"{n}.lora_up.weight"].double() @ t[f"{n}.lora_down.weight"].double() * s for n in KOHYA_MODULES}
            for t, s in ((load_file(first), 1 / 2), (load_file(second), 2 / 3))
        ]
        for pair in found.pairs:
            one, two = (delta[pair.module] for delta in deltas)
            assert pair.step_size == pytest.approx((two - one).norm().item(), rel=1e-6)
            assert {entry.name: (entry.first, entry.second) for entry in pair.changed}["rank"] == (2, 3)
        assert len(found.pairs) == 3
        assert "rank: 2 -> 3 at 3 modules" in inspection_text(found)

    def test_what_cannot_be_compared_has_no_distance(self, tmp_path: Path) -> None:
        """Other shapes of the weight: two models."""
        first = kohya_file(tmp_path / "a.safetensors", 20, None)
        name = next(iter(KOHYA_MODULES))
        save_file(lora_factors({name: (24, 16)}, 20), tmp_path / "b.safetensors")
        (pair,) = compare_files(first, tmp_path / "b.safetensors").pairs
        assert math.isnan(pair.step_size)
        assert [entry.name for entry in pair.changed] == ["shape"]

    def test_modules_and_text_of_one_only(self, tmp_path: Path) -> None:
        """By name, and keys with both values; in the terminal as well."""
        first = kohya_file(tmp_path / "a.safetensors", 20, {"same": "x", "ss_seed": "1", "old": "y"})
        names = list(KOHYA_MODULES)
        save_file(
            lora_factors({names[0]: (16, 16), "lora_unet_new": (8, 8)}, 20),
            tmp_path / "b.safetensors",
            {"same": "x", "ss_seed": "2"},
        )
        found = document("inspect", first, tmp_path / "b.safetensors")["difference"]
        assert found["only_first"] == sorted(names[1:])
        assert found["only_second"] == ["lora_unet_new"]
        assert {entry["name"]: (entry["first"], entry["second"]) for entry in found["metadata"]} == {
            "ss_seed": ("1", "2"),
            "old": ("y", None),
        }
        text = call("inspect", first, tmp_path / "b.safetensors").stdout
        assert "ss_seed: 1 -> 2" in text
        assert "lora_unet_new" in text

    def test_settings_beside_the_files_are_compared(self, tmp_path: Path) -> None:
        """adapter_config.json of both: another alpha is another scale."""
        one = peft_run(tmp_path / "1", steps=[10], lora_alpha=8)
        two = peft_run(tmp_path / "2", model=tiny_llama(), steps=[10], lora_alpha=16)
        found = compare_files(one.path / "checkpoint-10", two.path / "checkpoint-10")
        assert ("adapter_config.json: lora_alpha", 8, 16) in [(m.name, m.first, m.second) for m in found.metadata]
        assert found.identical_tensors == 8
        for pair in found.pairs:
            assert [(entry.name, entry.first, entry.second) for entry in pair.changed] == [("scale", 2.0, 4.0)]
            assert pair.cosine == pytest.approx(1, abs=1e-9)


class TestFormats:
    """The tables of what is read."""

    def test_every_variant_says_what_it_is(self) -> None:
        """One line each; trainers also say how they are recognised, and their traps."""
        for section in sections():
            for entry in section.formats:
                assert entry.about, entry.name
                assert "\n" not in entry.about
        trainers, kinds = sections()[0].formats, sections()[1].formats
        assert all(trainer.recognised and trainer.traps for trainer in trainers)
        assert {"lora"} <= {kind.name for kind in kinds}

    def test_what_is_not_verified_is_marked(self) -> None:
        """In the terminal, on the page and in JSON."""
        open_traps = [t.text for section in sections() for f in section.formats for t in f.traps if not t.verified]
        text = " ".join(formats_text().split())
        assert text.count("(not verified)") == len(open_traps)
        assert all(f"{trap} (not verified)" in text for trap in open_traps)
        printed = document("formats")
        told = [t["text"] for trainer in printed["trainers"] for t in trainer["traps"] if not t["verified"]]
        assert told == open_traps

    def test_lines_fit_the_terminal(self) -> None:
        """At 80 columns."""
        assert max(map(len, formats_text(80).splitlines())) <= 80


def test_unknown_sizes_are_told_as_unknown() -> None:
    """Kinds that have no rank, scale or shape of their own."""
    found = Inspection(
        Path("x"), 0, 0.0, None, None, None, None, None, None, (), (MODULE,), {}, (), (),
        BaseFacts(), (), {}, {},
    )  # fmt: skip
    text = inspection_text(found, verbose=True)
    assert "rank ?" in text
    assert "? x ?" in text
    assert found.to_dict()["adapter"] == "some"


def test_an_adapter_that_changes_no_weight_is_described(tmp_path: Path) -> None:
    """A prompt is no change of a weight: that is said beside all that its file tells."""
    save_file({"prompt_embeddings": torch.ones(8, 16)}, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "gpt2"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    document = lf.inspect_file(tmp_path).to_dict()
    assert document["modules"] == []
    assert "changes no weight" in document["unresolved"][0]["reason"]
    assert [tensor["name"] for tensor in document["tensors"]] == ["prompt_embeddings"]
