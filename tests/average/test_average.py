"""Averaged adapters, loaded by the libraries that train and use them, against means of dense changes in float64."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import project
from click.testing import CliRunner, Result
from factories import (
    KOHYA_MODULES,
    kohya_base,
    kohya_run,
    library,
    lora_modules,
    mlx_run,
    peft_deltas,
    peft_run,
    tiny_llama,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lora_forensics import Run, discover_runs
from lora_forensics.adapters import read_layout, read_settings
from lora_forensics.average import Average, AverageOptions, average_run
from lora_forensics.average.saving import settings_with_ranks
from lora_forensics.cli import main
from lora_forensics.errors import BaseModelError, CheckpointError, LoraForensicsError, UsageError
from lora_forensics.pipeline import ScanOptions
from lora_forensics.tensors import open_tensors

STEPS = (10, 20, 30)


def averaged(run: Path, out: Path, steps: tuple[int, ...] = STEPS, base: Path | None = None, **options: Any) -> Average:
    """The mean of these checkpoints."""
    scan = ScanOptions(out=out, base=(base,) if base else ())
    return average_run(run, scan, AverageOptions(checkpoints=tuple(map(str, steps)), **options))


def call(*arguments: str | Path) -> Result:
    """The command line in this process."""
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def loaded(folder: Path, model: Any = None) -> Any:
    """The adapter of a folder on a model, by peft."""
    peft = library("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft and transformers warn about each other
        return peft.PeftModel.from_pretrained(tiny_llama() if model is None else model, folder)


def mean(deltas: list[dict[str, torch.Tensor]], weights: tuple[float, ...] = (1 / 3,) * 3) -> dict[str, torch.Tensor]:
    """Of the changes of each module."""
    return {
        name: sum(w * delta[name] for w, delta in zip(weights, deltas, strict=True))  # type: ignore[misc]
        for name in deltas[0]
    }


def relative(found: dict[str, torch.Tensor], true: dict[str, torch.Tensor]) -> float:
    """|found - true| / |true| over all modules."""
    assert found.keys() == true.keys()
    error = torch.stack([(found[name] - true[name]).norm() for name in true]).norm()
    return float(error / torch.stack([tensor.norm() for tensor in true.values()]).norm())


CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": {"rank_pattern": {"down_proj": 3}, "alpha_pattern": {"layers.1.*q_proj": 5}},
    "rslora patterns": {"use_rslora": True, "rank_pattern": {"down_proj": 3}, "alpha_pattern": {"q_proj": 5}},
    "embedding": {"target_modules": ["q_proj", "embed_tokens"]},
    "whole weights": {"modules_to_save": ["lm_head"]},
}


@pytest.mark.parametrize("rank", ["full", None, 7, 40])
@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_peft_loads_the_mean(tmp_path: Path, config: dict[str, Any], rank: int | str | None) -> None:
    """Its change is the mean where the rank allows, and what is stated is how far it is off where not."""
    written = peft_run(tmp_path, steps=STEPS, **config)
    done = averaged(written.path, tmp_path / "out", rank=rank)
    assert done.path.name == "adapter_model.safetensors"
    true = mean(written.deltas)
    error = relative(peft_deltas(loaded(done.path.parent)), true)
    assert done.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert error < 1e-6 if rank in ("full", 40) else error > 1e-4
    for name, own in done.errors().items():
        if name.removeprefix("base_model.model.") in true or name in true:
            assert own < 1e-6 if rank in ("full", 40) else own > 1e-6


def test_a_rank_of_its_own_is_not_that_of_names_that_end_alike() -> None:
    """As peft itself reads the patterns."""
    utils = library("peft.utils.other")
    scales = {f"base_model.model.{name}": (rank, 2.0) for name, rank in (("lin", 2), ("b.lin", 4), ("b.c", 4))}
    found = settings_with_ranks({}, scales)
    for name, (rank, scale) in scales.items():
        short = name.removeprefix("base_model.model.")
        known = [found[key].get(utils.get_pattern_key(found[key], short)) for key in ("rank_pattern", "alpha_pattern")]
        assert (known[0] or found["r"], known[1] or found["lora_alpha"]) == (rank, scale * rank)


def test_the_nearest_adapter_of_the_runs_rank(tmp_path: Path) -> None:
    """No adapter of this rank is nearer: the error is that of the dense singular values behind it."""
    written = peft_run(tmp_path, steps=STEPS)
    done = averaged(written.path, tmp_path / "out")
    for name, delta in mean(written.deltas).items():
        values = torch.linalg.svdvals(delta)
        assert done.errors()[name] == pytest.approx(float(values[4:].norm() / values.norm()), rel=1e-4)
    source = json.loads((written.path / "checkpoint-30" / "adapter_config.json").read_text())
    assert json.loads((done.path.parent / "adapter_config.json").read_text()) == source


def test_an_exponential_moving_average_starts_at_the_oldest(tmp_path: Path) -> None:
    """e_1 = D_1, e_k = d e_(k-1) + (1 - d) D_k."""
    written = peft_run(tmp_path, steps=STEPS)
    done = averaged(written.path, tmp_path / "out", ema=0.8, rank="full")
    state = written.deltas[0]
    for deltas in written.deltas[1:]:
        state = {name: 0.8 * state[name] + 0.2 * deltas[name] for name in state}
    assert relative(peft_deltas(loaded(done.path.parent)), state) < 1e-6
    assert sum(done.choice.weights) == pytest.approx(1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_runs_type_is_kept_and_its_rounding_is_in_the_error(tmp_path: Path, dtype: torch.dtype) -> None:
    """Also the type that is asked for."""
    written = peft_run(tmp_path, steps=STEPS, dtype=dtype, base_dtype=dtype)
    done = averaged(written.path, tmp_path / "out", rank="full")
    assert {tensor.dtype for tensor in load_file(done.path).values()} == {dtype}
    error = relative(peft_deltas(loaded(done.path.parent)), mean(written.deltas))
    assert done.relative_error == pytest.approx(error, rel=1e-3)
    assert error > 1e-5
    wide = averaged(written.path, tmp_path / "out", rank="full", dtype="float32", force=True)
    assert {tensor.dtype for tensor in load_file(wide.path).values()} == {torch.float32}
    assert wide.relative_error < 1e-6


@pytest.mark.parametrize("config", [{}, {"use_rslora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_a_mean_of_dora_is_dora(tmp_path: Path, config: dict[str, Any]) -> None:
    """With the base it is exact at the sum of ranks: merged weights are the mean of merged weights."""
    written = peft_run(tmp_path, steps=STEPS, use_dora=True, **config)

    def merged(folder: Path) -> dict[str, torch.Tensor]:
        model = loaded(folder).double()
        names = [name for name, _ in lora_modules(model)]
        whole = model.merge_and_unload()
        found = dict(whole.named_parameters())
        weights = {name: found[name.removeprefix("base_model.model.") + ".weight"].detach() for name in names}
        frozen = dict(tiny_llama().double().named_parameters())
        return {n: w - frozen[n.removeprefix("base_model.model.") + ".weight"].detach() for n, w in weights.items()}

    true = mean([merged(written.path / f"checkpoint-{step}") for step in STEPS])
    done = averaged(written.path, tmp_path / "out", rank="full")
    assert relative(merged(done.path.parent), true) < 1e-6
    assert done.relative_error < 1e-6
    near = averaged(written.path, tmp_path / "out")
    assert near.relative_error == pytest.approx(relative(merged(near.path.parent), true), rel=1e-3)
    shutil.rmtree(written.base)
    with pytest.raises(BaseModelError, match="mean of DoRA needs the base"):
        averaged(written.path, tmp_path / "out", force=True)


def test_convolutions_and_tucker_kernels(tmp_path: Path) -> None:
    """A kernel between the factors goes into the factor beside it: the change is the same, its form is plain."""
    module, rank = "lora_unet_down_blocks_0_resnets_0_conv1", 2
    generator = torch.Generator().manual_seed(0)
    changes = []
    for step in STEPS:
        down, up = torch.randn(rank, 6, 1, 1, generator=generator), torch.randn(8, rank, 1, 1, generator=generator)
        mid = torch.randn(rank, rank, 3, 3, generator=generator)
        tensors = {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": mid, "alpha": torch.tensor(1.0)}
        path = tmp_path / "run" / f"name-step{step:08d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file({f"{module}.{name}": tensor for name, tensor in tensors.items()}, path, {"ss_steps": str(step)})
        wide = [tensor.double() for tensor in (up[:, :, 0, 0], mid, down[:, :, 0, 0])]
        changes.append(torch.einsum("oa,abkl,bi->oikl", *wide) / rank)
    done = averaged(tmp_path / "run", tmp_path / "out", rank="full")
    saved = {name.removeprefix(f"{module}."): tensor.double() for name, tensor in load_file(done.path).items()}
    assert saved.keys() == {"lora_down.weight", "lora_up.weight", "alpha"}
    assert saved["lora_down.weight"].shape == (6, 6, 3, 3)
    scale = saved["alpha"] / 6
    found = scale * torch.einsum("oa,aikl->oikl", saved["lora_up.weight"][:, :, 0, 0], saved["lora_down.weight"])
    true = sum(changes) / 3
    assert float((found - true).norm() / true.norm()) < 1e-6


@pytest.mark.parametrize("columns", [False, True])
def test_magnitudes_of_lycoris_lie_on_either_axis(tmp_path: Path, columns: bool) -> None:
    """`dora_scale` is [out, 1] or [1, in]; both against g (W + D) - W written out."""
    name, axis = next(iter(KOHYA_MODULES)), int(not columns)
    base = kohya_base(tmp_path / "base")
    frozen = load_file(base / "unet" / "diffusion_pytorch_model.safetensors")
    weight = frozen["down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight"].double()

    def delta(path: Path) -> torch.Tensor:
        stored = {key.removeprefix(f"{name}."): tensor.double() for key, tensor in load_file(path).items()}
        down, up = stored["lora_down.weight"], stored["lora_up.weight"]
        moved = weight + stored["alpha"] / len(down) * (up @ down)
        return stored["dora_scale"] * moved / moved.norm(dim=axis, keepdim=True) - weight

    generator = torch.Generator().manual_seed(0)
    for step in STEPS:
        tensors = {
            f"{name}.lora_down.weight": torch.randn(2, 16, generator=generator),
            f"{name}.lora_up.weight": torch.randn(16, 2, generator=generator),
            f"{name}.dora_scale": weight.norm(dim=axis, keepdim=True).float() + torch.rand(1, generator=generator),
            f"{name}.alpha": torch.tensor(1.0),
        }
        path = tmp_path / "run" / f"name-step{step:08d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"ss_steps": str(step)})
    true = sum(delta(tmp_path / "run" / f"name-step{step:08d}.safetensors") for step in STEPS) / 3
    done = averaged(tmp_path / "run", tmp_path / "out", base=base, rank="full")
    assert float((delta(done.path) - true).norm() / true.norm()) < 1e-6
    near = averaged(tmp_path / "run", tmp_path / "out", base=base)
    assert near.relative_error == pytest.approx(float((delta(near.path) - true).norm() / true.norm()), rel=1e-5)


def test_the_bias_of_a_factor_is_scaled_like_it(tmp_path: Path) -> None:
    """PEFT's lora_bias, at another rank and scale."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = tiny_llama(attention_bias=True)
        written = peft_run(tmp_path, model, STEPS, target_modules=["q_proj"], lora_bias=True)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.bias"
    done = averaged(written.path, tmp_path / "out", rank=5)

    def biases(folder: Path) -> torch.Tensor:
        config = json.loads((folder / "adapter_config.json").read_text())
        return config["lora_alpha"] / config["r"] * load_file(folder / "adapter_model.safetensors")[name].double()

    true = sum(biases(written.path / f"checkpoint-{step}") for step in STEPS) / 3
    assert torch.allclose(biases(done.path.parent), true, rtol=1e-6)
    assert float(true.norm()) > 0


def kohya_deltas(path: Path) -> dict[str, torch.Tensor]:
    """S B A of every module, in float64."""
    tensors = {name: tensor.double() for name, tensor in load_file(path).items()}
    found = {}
    for name in KOHYA_MODULES:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        found[name] = tensors[f"{name}.alpha"] / len(down) * (up @ down)
    return found


@pytest.mark.parametrize("rank", ["full", None, 5])
def test_kohya_files(tmp_path: Path, rank: int | str | None) -> None:
    """One file with kohya's keys; alphas hold the scale at any rank, header and hashes are those of this file."""
    run = kohya_run(tmp_path / "run", steps=range(10, 60, 10), sshs_model_hash="0" * 64, sshs_legacy_hash="0" * 8)
    done = averaged(run, tmp_path / "out", rank=rank)
    files = [run / f"name-step{step:08d}.safetensors" for step in STEPS]
    true = mean([kohya_deltas(path) for path in files])
    error = relative(kohya_deltas(done.path), true)
    assert done.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert error < 1e-6 if rank == "full" else error >= 0
    assert load_file(done.path).keys() == load_file(files[-1]).keys()
    with safe_open(done.path, "pt") as opened:
        header = opened.metadata()
    assert header["ss_network_dim"] == str({"full": 6, None: 2, 5: 5}[rank])
    raw = done.path.read_bytes()
    body = raw[8 + int.from_bytes(raw[:8], "little") :]
    assert header["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    told = json.loads(header["lora_forensics_average"])
    assert [entry["checkpoint"] for entry in told["checkpoints"]] == [path.name for path in files]
    assert told["relative_error"] == pytest.approx(done.relative_error)
    assert told["method"] == "mean"


def test_diffusers_loads_kohya_files_of_a_real_run(tmp_path: Path, sample_runs: Path) -> None:
    """Its UNet's changes are the mean of those that diffusers makes of the three checkpoints."""
    diffusers = library("diffusers")
    run = tmp_path / "run"
    run.mkdir()
    files = [f"digit-lora-step{step:08d}.safetensors" for step in (180, 200, 220)]
    for name in files:
        shutil.copy(sample_runs / "digits_kohya" / "output" / name, run)
    done = averaged(run, tmp_path / "out", (180, 200, 220), rank="full")

    def deltas(path: Path) -> dict[str, torch.Tensor]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            folder = sample_runs / "digits_kohya" / "tiny-sd" / "unet"
            unet = diffusers.UNet2DConditionModel.from_pretrained(folder)
            pipeline = diffusers.StableDiffusionPipeline(
                None, None, None, unet, None, None, None, requires_safety_checker=False
            )
            tensors = {n: t for n, t in load_file(path).items() if n.startswith("lora_unet_")}
            pipeline.load_lora_weights(tensors, adapter_name="default")
        return {name: delta.float() for name, delta in unet_deltas(unet).items()}

    assert relative(deltas(done.path), mean([deltas(run / name) for name in files])) < 1e-6


def unet_deltas(unet: Any) -> dict[str, torch.Tensor]:
    """The change of every adapted weight, from the factors and scales that peft holds."""
    from peft.tuners.lora import LoraLayer

    found = {}
    for name, module in unet.named_modules():
        if isinstance(module, LoraLayer):
            pair = (module.lora_B["default"].weight, module.lora_A["default"].weight)
            up, down = (tensor.detach().double().flatten(1) for tensor in pair)
            found[name] = module.scaling["default"] * (up @ down)
    return found


@pytest.mark.parametrize("rank", ["full", None])
def test_diffusers_loads_its_own_format(tmp_path: Path, sample_runs: Path, rank: str | None) -> None:
    """Checkpoints by save_lora_weights, with patterns in the header; the mean loads through load_lora_weights."""
    diffusers, peft = library("diffusers"), library("peft")
    from diffusers.utils import convert_state_dict_to_diffusers
    from peft.utils import get_peft_model_state_dict

    pipeline_class = diffusers.StableDiffusionPipeline

    def fresh() -> Any:
        return diffusers.UNet2DConditionModel.from_pretrained(sample_runs / "digits_kohya" / "tiny-sd" / "unet")

    changes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unet = fresh()
        unet.add_adapter(peft.LoraConfig(r=2, lora_alpha=3, target_modules=["to_q", "to_k"], rank_pattern={"to_k": 3}))
        generator = torch.Generator().manual_seed(1)
        for step in STEPS:
            for name, parameter in unet.named_parameters():
                if "lora_" in name:
                    parameter.data += torch.randn(parameter.shape, generator=generator) * 0.1
            pipeline_class.save_lora_weights(
                tmp_path / "run" / f"checkpoint-{step}",
                unet_lora_layers=convert_state_dict_to_diffusers(get_peft_model_state_dict(unet)),
                unet_lora_adapter_metadata=unet.peft_config["default"].to_dict(),
            )
            changes.append(unet_deltas(unet))
        done = averaged(tmp_path / "run", tmp_path / "out", rank=rank)
        assert done.path.name == "pytorch_lora_weights.safetensors"
        other = fresh()
        pipeline = pipeline_class(None, None, None, other, None, None, None, requires_safety_checker=False)
        pipeline.load_lora_weights(done.path.parent, adapter_name="default")
    error = relative(unet_deltas(other), mean(changes))
    assert done.relative_error == pytest.approx(error, rel=1e-4, abs=1e-9)
    assert error < 1e-6 if rank == "full" else error > 1e-3


def test_mlx_factors_are_turned(tmp_path: Path) -> None:
    """A is (in, rank), b (rank, out); the scale stands in the configuration, with the rank."""
    run = mlx_run(tmp_path / "run", [10, 20, 30])
    done = averaged(run, tmp_path / "out", rank="full")
    name = "model.layers.0.self_attn.q_proj"

    def product(path: Path) -> torch.Tensor:
        tensors = load_file(path)
        return tensors[f"{name}.lora_a"].double() @ tensors[f"{name}.lora_b"].double()

    true = sum(product(run / f"{step:07d}_adapters.safetensors") for step in STEPS) / 3
    assert float((product(done.path) - true).norm() / true.norm()) < 1e-6
    assert json.loads((done.path.parent / "adapter_config.json").read_text())["lora_parameters"]["rank"] == 6


def other_kind(folder: Path, step: int, tensors: dict[str, torch.Tensor], **config: Any) -> None:
    """A PEFT checkpoint with these tensors."""
    place = folder / f"checkpoint-{step}"
    place.mkdir(parents=True)
    save_file(tensors, place / "adapter_model.safetensors", {"format": "pt"})
    (place / "adapter_config.json").write_text(json.dumps(config))


def test_kinds_that_are_linear_are_averaged_as_they_are_stored(tmp_path: Path) -> None:
    """IA3's factors, differences, and biases."""
    prefix = "base_model.model.model.layers.0"
    for step in STEPS:
        tensors = {f"{prefix}.self_attn.k_proj.ia3_l": torch.full((8, 1), float(step))}
        other_kind(tmp_path / "ia3", step, tensors, peft_type="IA3", feedforward_modules=[])
    done = averaged(tmp_path / "ia3", tmp_path / "out")
    assert load_file(done.path)[f"{prefix}.self_attn.k_proj.ia3_l"].tolist() == [[20.0]] * 8
    assert done.relative_error == 0
    for step in STEPS:
        tensors = {"lora_unet_conv_in.diff": torch.full((4, 3), float(step)), "lora_unet_conv_in.diff_b": torch.ones(4)}
        path = tmp_path / "full" / f"name-step{step:08d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"ss_steps": str(step)})
    done = averaged(tmp_path / "full", tmp_path / "out")
    assert load_file(done.path)["lora_unet_conv_in.diff"].tolist() == [[20.0] * 3] * 4


def test_biases_that_were_saved_beside_are_averaged(tmp_path: Path) -> None:
    """PEFT with bias="all" saves every bias of the model whole."""
    transformers = library("transformers")
    settings = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.BertModel(transformers.BertConfig(vocab_size=20, **settings))
        written = peft_run(tmp_path, model, STEPS, target_modules=["query"], bias="lora_only", task_type=None)
    path = written.path / "checkpoint-10" / "adapter_model.safetensors"
    (name,) = (name for name in load_file(path) if name.endswith(".bias"))
    for number, step in enumerate(STEPS):
        path = written.path / f"checkpoint-{step}" / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[name] = torch.full_like(tensors[name], float(number))
        save_file(tensors, path, {"format": "pt"})
    done = averaged(written.path, tmp_path / "out", rank="full")
    assert load_file(done.path)[name].tolist() == [1.0] * 16


def test_adalora_keeps_its_rank(tmp_path: Path) -> None:
    """Three factors again; another rank is refused."""
    peft, model = library("peft"), tiny_llama()
    changes = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft.get_peft_model(model, peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10))
        for step in STEPS:
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.data += torch.randn(parameter.shape) * 0.1
            adapted.save_pretrained(tmp_path / "run" / f"checkpoint-{step}")
            changes.append(adalora_deltas(adapted))
        done = averaged(tmp_path / "run", tmp_path / "out")
        found = adalora_deltas(loaded(done.path.parent))
    error = relative(found, mean(changes))
    assert done.relative_error == pytest.approx(error, rel=1e-3)
    assert 0 < error < 1
    with pytest.raises(UsageError, match="keeps its rank"):
        averaged(tmp_path / "run", tmp_path / "out", rank="full")


def adalora_deltas(model: Any) -> dict[str, torch.Tensor]:
    """As peft computes them."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_E") and module.lora_E:
            a, b, e = (module.__getattr__(f"lora_{letter}")["default"].detach().double() for letter in "ABE")
            found[name] = b @ (a * e) * module.scaling["default"] / (float(module.ranknum["default"]) + 1e-5)
    return found


REFUSED = {
    "loha": {"hada_w1_a": (6, 2), "hada_w1_b": (2, 8), "hada_w2_a": (6, 2), "hada_w2_b": (2, 8)},
    "lokr": {"lokr_w1": (2, 2), "lokr_w2": (3, 4)},
    "boft": {"oft_blocks": (1, 2, 3, 3)},
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_kind_without_a_mean_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    """Nothing is written."""
    for step in STEPS:
        tensors = {f"lycoris_unet_mid_block_attn.{name}": torch.ones(shape) for name, shape in REFUSED[kind].items()}
        path = tmp_path / "run" / f"name-step{step:08d}.safetensors"
        path.parent.mkdir(exist_ok=True)
        save_file(tensors, path, {"ss_steps": str(step)})
    with pytest.raises(CheckpointError, match=kind):
        averaged(tmp_path / "run", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_together_is_refused(tmp_path: Path) -> None:
    """Other modules, and NaN."""
    written = peft_run(tmp_path / "a", steps=(10, 20))
    other = peft_run(tmp_path / "b", steps=(30,), target_modules=["v_proj"])
    shutil.move(other.path / "checkpoint-30", written.path / "checkpoint-30")
    with pytest.raises(CheckpointError, match="other modules"):
        averaged(written.path, tmp_path / "out")
    path = written.path / "checkpoint-20" / "adapter_model.safetensors"
    save_file({name: tensor * torch.nan for name, tensor in load_file(path).items()}, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"checkpoint-20.*holds NaN"):
        averaged(written.path, tmp_path / "out", (10, 20))


def test_pissa_keeps_its_rank(tmp_path: Path) -> None:
    """Loading it with another would take another part out of the weight."""
    written = peft_run(tmp_path, steps=STEPS, init_lora_weights="pissa")
    assert averaged(written.path, tmp_path / "out").relative_error > 0
    with pytest.raises(UsageError, match="pissa"):
        averaged(written.path, tmp_path / "out", rank=8)


@pytest.fixture(scope="module")
def scanned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A run whose held-out loss is lowest at step 60, scanned."""
    folder = tmp_path_factory.mktemp("scanned")
    runs = project(folder / "runs", losses=[abs(place - 5) + 1.0 for place in range(12)])
    assert call("scan", runs, "--out", folder / "out", "--no-plots").exit_code == 0
    return runs / "run", folder / "out"


def test_the_kept_checkpoint_and_its_neighbours_are_taken(scanned: tuple[Path, Path]) -> None:
    """By the stored verdict; the rescan does not take what was written for a checkpoint."""
    run, out = scanned
    result = call("average", run, "--out", out, "--json")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert [entry["step"] for entry in told["checkpoints"]] == [50, 60, 70]
    assert told["why"] == "the kept one (held_out_loss) and its neighbours"
    assert Path(told["path"]) == out / "run" / "average-50-70" / "adapter_model.safetensors"
    again = call("scan", run.parent, "--out", out, "--no-plots")
    assert again.stdout.strip().splitlines()[-1] == "nothing new: 12 known before"
    assert call("average", run, "--out", out).exit_code == 2
    assert "--force" in call("average", run, "--out", out).stderr
    assert call("average", run, "--out", out, "--force").exit_code == 0


def test_a_window_around_another_checkpoint(scanned: tuple[Path, Path], tmp_path: Path) -> None:
    """By its folder, its step or its file; at the end of a run it is cut."""
    run, out = scanned
    for around, window, steps in (
        ("checkpoint-30", 5, [10, 20, 30, 40, 50]),
        ("120", 4, [110, 120]),
        ("10", 2, [10, 20]),
    ):
        words = ["--around", around, "--window", window, "--output", tmp_path / around]
        told = json.loads(call("average", run, "--out", out, "--json", *map(str, words)).stdout)
        assert [entry["step"] for entry in told["checkpoints"]] == steps


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--around", "checkpoint-31"], 2, "no checkpoint of this run is called 'checkpoint-31'"),
        (["--checkpoints", "10,20", "--around", "30"], 2, "--around has no part"),
        (["--checkpoints", "10"], 2, "one checkpoint alone has no mean"),
        (["--ema", "1"], 2, "not between 0 and 1"),
        (["--rank", "0"], 2, "no whole number above 0"),
        (["--dtype", "int8"], 2, "no type is called"),
    ],
)
def test_bad_usage(scanned: tuple[Path, Path], words: list[str], code: int, part: str) -> None:
    """Exit 2 with what is wrong."""
    run, out = scanned
    result = call("average", run, "--out", out, *words)
    assert result.exit_code == code
    assert part in result.stderr


def test_without_a_verdict_nothing_is_chosen(tmp_path: Path) -> None:
    """Exit 1; a name is enough."""
    runs = project(tmp_path / "runs")
    result = call("average", runs / "run", "--out", tmp_path / "out")
    assert (result.exit_code, "no scan of it is stored" in result.stderr) == (1, True)
    assert call("average", runs / "run", "--out", tmp_path / "out", "--around", "50").exit_code == 0


def test_a_place_in_the_run_is_refused(tmp_path: Path) -> None:
    """There it would count as a checkpoint; OUT inside the run is no such place."""
    runs = project(tmp_path / "runs")
    result = call("average", runs / "run", "--around", "50", "--output", runs / "run" / "checkpoint-55")
    assert result.exit_code == 2
    assert "would count as a checkpoint" in result.stderr
    assert not (runs / "run" / "checkpoint-55").exists()
    assert call("average", runs / "run", "--around", "50", "--out", runs / "run" / "forensics").exit_code == 0
    (run,) = discover_runs(runs / "run", exclude=[runs / "run" / "forensics"])
    assert isinstance(run, Run)
    assert len(run.checkpoints) == 12


def test_old_pickles_become_safetensors(tmp_path: Path) -> None:
    """Of a run that saved adapter_model.bin."""
    written = peft_run(tmp_path, steps=STEPS)
    for step in STEPS:
        path = written.path / f"checkpoint-{step}" / "adapter_model.safetensors"
        torch.save(load_file(path), path.with_suffix(".bin"))
        path.unlink()
    done = averaged(written.path, tmp_path / "out", rank="full")
    assert relative(peft_deltas(loaded(done.path.parent)), mean(written.deltas)) < 1e-6


def test_our_own_reader_reads_it(tmp_path: Path) -> None:
    """Kind, rank and scale as of a checkpoint."""
    run = kohya_run(tmp_path / "run", steps=range(10, 60, 10))
    done = averaged(run, tmp_path / "out", rank=5)
    file = open_tensors(done.path)
    modules = read_layout(file.infos, read_settings(None, file.metadata)).modules
    assert {(module.kind, module.layout.rank) for module in modules.values()} == {("lora", 5)}


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    """An error with the path, no traceback."""
    run = kohya_run(tmp_path / "run", steps=range(10, 60, 10))
    (tmp_path / "file").write_text("")
    with pytest.raises(LoraForensicsError, match="cannot be written"):
        averaged(run, tmp_path / "out", output=tmp_path / "file" / "x.safetensors")
