"""Held-out images against diffusers itself, on tiny random pipelines with LoRAs that were really trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from diffusion_runs import (
    CROSS,
    SIDE,
    checkpoint_at,
    clip_tokenizer,
    images,
    pipeline,
    text_encoder,
    train,
    unet,
    vae,
)
from factories import library, tiny_tokenizer
from safetensors.torch import load_file, save_file

from lora_forensics.cli import main
from lora_forensics.errors import BaseModelError, ScoreError, UsageError
from lora_forensics.probe.diffusion import DRAWS, PIPELINES, DiffusionScorer, Prompt
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings
from lora_forensics.records import Checkpoint, Run


@pytest.fixture(autouse=True)
def quietly() -> Iterator[None]:
    """Diffusers and transformers warn about each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def as_kohya(path: Path, target: Path, alpha: float = 2.0) -> Path:
    """The same LoRA under kohya's names, with diffusers' own module names flattened."""
    tensors = {}
    for name, tensor in load_file(path).items():
        module, part = name.split(".lora_A.") if ".lora_A." in name else name.split(".lora_B.")
        component, _, rest = module.partition(".")
        rest = rest.removeprefix("text_model.")
        prefix = "lora_unet_" if component == "unet" else "lora_te_text_model_"
        flat = prefix + rest.replace(".", "_")
        tensors[f"{flat}.{'lora_down' if '.lora_A.' in name else 'lora_up'}.{part}"] = tensor
        tensors[f"{flat}.alpha"] = torch.tensor(alpha)
    save_file(tensors, target, {"ss_network_dim": "2"})
    return target


def expected(base: Path, adapter: Path | None, folder: Path) -> list[float]:
    """The losses by the book: one image and one noise level at a time, a fresh pipeline, no code of ours."""
    diffusers, image = library("diffusers"), library("PIL.Image")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(base, safety_checker=None)
    if adapter is not None:
        pipe.load_lora_weights(adapter.parent, weight_name=adapter.name)
    schedule = diffusers.DDPMScheduler.from_config(pipe.scheduler.config)
    found = []
    for number, path in enumerate(sorted(folder.glob("*.png"))):
        picture = image.open(path).convert("RGB")
        scale = min(1.0, SIDE / (picture.width * picture.height) ** 0.5)
        wide, high = (max(4, int(side * scale) // 4 * 4) for side in picture.size)
        picture = library("PIL.ImageOps").fit(picture, (wide, high))
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
        losses = []
        with torch.no_grad():
            clean = pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor
            words = pipe.tokenizer(path.with_suffix(".txt").read_text(), padding="max_length", return_tensors="pt")
            hidden = pipe.text_encoder(words.input_ids)[0]
            noises = torch.randn((DRAWS, *clean.shape[1:]), generator=torch.Generator().manual_seed(number))
            for draw in range(DRAWS):
                time = torch.tensor([int((draw + 0.5) / DRAWS * 1000)])
                noise = noises[draw : draw + 1]
                predicted = pipe.unet(schedule.add_noise(clean, noise, time), time, encoder_hidden_states=hidden).sample
                velocity = schedule.config.prediction_type == "v_prediction"
                target = schedule.get_velocity(clean, noise, time) if velocity else noise
                losses.append(float((predicted - target).square().mean()))
        found.append(float(np.mean(losses)))
    return found


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline, a run of four checkpoints, three images."""
    folder = tmp_path_factory.mktemp("diffusion")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pipeline(folder)
        train(folder / "base", folder / "run")
    images(folder / "images")
    return folder


def checkpoints(project: Path) -> list[Checkpoint]:
    """Those of the run, by step."""
    paths = sorted((project / "run").glob("*/*.safetensors"), key=lambda path: int(path.parent.name.split("-")[1]))
    return [checkpoint_at(path, project / "run", 10 * place) for place, path in enumerate(paths, start=1)]


def scorer(project: Path, base: Path | None = None, folder: Path | None = None) -> DiffusionScorer:
    """A scorer on the project's images."""
    options = ProbeOptions(held_out=folder or project / "images", device="cpu")
    files = ((base or project / "base") / "unet" / "diffusion_pytorch_model.safetensors",)
    return DiffusionScorer(ScorerSettings(options, Run("r", project, "diffusers", ()), files))


def test_losses_are_those_of_a_fresh_pipeline_each(project: Path) -> None:
    """UNet and text encoder swapped in one pipeline, in any order and again; noise and times are the same for all."""
    own = scorer(project)
    found = checkpoints(project)
    for place in (2, 0, 3, 2):
        wanted = expected(project / "base", found[place].path, project / "images")
        assert list(own.score(found[place])) == pytest.approx(wanted, rel=1e-4)
    assert expected(project / "base", None, project / "images") != pytest.approx(wanted, rel=1e-4)


def test_kohya_files_score_the_same(project: Path, tmp_path: Path) -> None:
    """The same LoRA under kohya's names, with half the alpha another one."""
    last = checkpoints(project)[3]
    own = scorer(project)
    wanted = list(own.score(last))
    same = as_kohya(last.path, tmp_path / "same.safetensors")
    half = as_kohya(last.path, tmp_path / "half.safetensors", alpha=1.0)
    assert list(own.score(checkpoint_at(same, tmp_path, 10))) == pytest.approx(wanted, rel=1e-5)
    assert list(own.score(checkpoint_at(half, tmp_path, 20))) != pytest.approx(wanted, rel=1e-5)


def test_peft_folders_are_adapters_of_the_denoiser(project: Path, tmp_path: Path) -> None:
    """adapter_model.safetensors with its configuration, alternating with diffusers' own files."""
    diffusers, peft = library("diffusers"), library("peft")
    torch.manual_seed(6)
    plain = diffusers.UNet2DConditionModel.from_pretrained(project / "base" / "unet")
    model = peft.get_peft_model(plain, peft.LoraConfig(r=2, lora_alpha=8, target_modules=["to_q"]))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        noisy, hidden = torch.randn(1, 4, 8, 8), torch.randn(1, 3, CROSS)
        wanted = model(noisy, 100, encoder_hidden_states=hidden).sample
    own = scorer(project)
    config = tmp_path / "adapter" / "adapter_config.json"
    entry = replace(checkpoint_at(tmp_path / "adapter" / "adapter_model.safetensors", tmp_path, 10), config=config)
    first = list(own.score(entry))
    with torch.no_grad():
        got = own._pipe.unet(noisy, 100, encoder_hidden_states=hidden).sample
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)
    other = checkpoints(project)[3]
    mixed = list(own.score(other))
    assert mixed == pytest.approx(expected(project / "base", other.path, project / "images"), rel=1e-4)
    assert list(own.score(entry)) == pytest.approx(first, rel=1e-5)


def test_velocity_is_predicted_where_the_scheduler_says_so(project: Path, tmp_path: Path) -> None:
    """As in SD 2 and v-prediction models."""
    base = pipeline(tmp_path, "v_prediction")
    last = checkpoints(project)[3]
    wanted = expected(base, last.path, project / "images")
    assert list(scorer(project, base).score(last)) == pytest.approx(wanted, rel=1e-4)
    config = base / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace("v_prediction", "other"))
    with pytest.raises(UsageError, match="prediction type"):
        scorer(project, base).score(last)


def test_what_diffusers_would_leave_out_is_no_score(project: Path, tmp_path: Path) -> None:
    """Truncated, foreign, DoRA, modules that the model does not have: a reason, and the next one is scored as ever."""
    last = checkpoints(project)[3]
    own = scorer(project)
    good = list(own.score(last))
    tensors = load_file(as_kohya(last.path, tmp_path / "k.safetensors"))
    module = next(name for name in tensors if "lora_down" in name).split(".")[0]
    cases = {
        "short": (None, "truncated"),
        "foreign": ({"weight": torch.ones(3)}, "cannot load"),
        "dora": ({**tensors, f"{module}.dora_scale": torch.ones(8, 1)}, "magnitudes of DoRA"),
    }
    for name, (content, said) in cases.items():
        path = tmp_path / f"{name}.safetensors"
        if content is None:
            path.write_bytes(last.path.read_bytes()[:100])
        else:
            save_file(content, path)
        with pytest.raises(ScoreError, match=said):
            own.score(checkpoint_at(path, tmp_path, 10))
        assert list(own.score(last)) == pytest.approx(good, rel=1e-6)


def test_pipelines_that_cannot_be_used_are_named(project: Path, tmp_path: Path) -> None:
    """Another class, a part that is missing, no folder, images without captions, a picture that is none."""
    base = tmp_path / "base"
    shutil.copytree(project / "base", base)
    index = base / "model_index.json"
    text = index.read_text()
    index.write_text(text.replace("StableDiffusionPipeline", "PixArtAlphaPipeline"))
    with pytest.raises(UsageError, match="does not know the pipeline PixArtAlphaPipeline"):
        scorer(project, base)
    document = json.loads(text)
    index.write_text(json.dumps({**document, "vae": [None, None]}))
    with pytest.raises(UsageError, match="has no vae"):
        scorer(project, base)
    index.unlink()
    with pytest.raises(BaseModelError, match=r"no folder with a model_index\.json"):
        scorer(project, base)
    bare = images(tmp_path / "bare")
    (bare / "1.txt").unlink()
    with pytest.raises(UsageError, match=r"1 images have no caption, 1\.png first"):
        scorer(project, folder=bare)
    (bare / "1.caption").write_text("b")
    (bare / "0.png").write_bytes(b"no picture")
    with pytest.raises(UsageError, match="no image that can be read"):
        scorer(project, folder=bare).score(checkpoints(project)[0])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no image"):
        scorer(project, folder=tmp_path / "empty")


def test_captions_may_stand_in_metadata(project: Path, tmp_path: Path) -> None:
    """The layout of Hugging Face's data sets: the same scores."""
    folder = images(tmp_path / "images")
    lines = [{"file_name": path.name, "text": path.with_suffix(".txt").read_text()} for path in folder.glob("*.png")]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    for path in folder.glob("*.txt"):
        path.unlink()
    last = checkpoints(project)[3]
    assert list(scorer(project, folder=folder).score(last)) == pytest.approx(list(scorer(project).score(last)))
    assert scorer(project, folder=folder).identity == scorer(project).identity


def flux() -> Any:
    """A tiny Flux, with a T5 and a CLIP."""
    diffusers, transformers = library("diffusers"), library("transformers")
    config = transformers.T5Config(vocab_size=63, d_model=12, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    return diffusers.FluxPipeline(
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(), vae=vae(), text_encoder=text_encoder(),
        tokenizer=None, text_encoder_2=transformers.T5EncoderModel(config), tokenizer_2=tiny_tokenizer(),
        transformer=diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=12, pooled_projection_dim=CROSS, axes_dims_rope=(4, 4, 8),
            guidance_embeds=True,
        ),
    )  # fmt: skip


def sdxl() -> Any:
    """A tiny SDXL."""
    diffusers = library("diffusers")
    return diffusers.StableDiffusionXLPipeline(
        vae=vae(), text_encoder=text_encoder(), text_encoder_2=text_encoder(projected=True), tokenizer=None,
        tokenizer_2=None, scheduler=diffusers.EulerDiscreteScheduler(),
        unet=unet(
            cross_attention_dim=2 * CROSS, addition_embed_type="text_time", addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + CROSS,
        ),
    )  # fmt: skip


def sd3() -> Any:
    """A tiny SD 3, without its third text encoder."""
    diffusers = library("diffusers")
    return diffusers.StableDiffusion3Pipeline(
        vae=vae(), text_encoder=text_encoder(projected=True), text_encoder_2=text_encoder(projected=True),
        text_encoder_3=None, tokenizer=None, tokenizer_2=None, tokenizer_3=None,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        transformer=diffusers.SD3Transformer2DModel(
            sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=32, caption_projection_dim=32, pooled_projection_dim=2 * CROSS, out_channels=4,
        ),
    )  # fmt: skip


@pytest.mark.parametrize("make", [sdxl, sd3, flux], ids=lambda make: make.__name__)
def test_larger_pipelines_are_asked_as_their_own_sampling_asks(make: Any, tmp_path: Path) -> None:
    """What the denoiser gives is what the pipeline's own call gets in its first step at the same time and latents."""
    torch.manual_seed(9)
    pipe = make()
    for name in ("tokenizer", "tokenizer_2"):
        if getattr(pipe, name, None) is None:
            pipe.register_modules(**{name: clip_tokenizer(tmp_path / name)})
    pipe.tokenizer_max_length = 12
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    pipe.set_progress_bar_config(disable=True)
    how = PIPELINES[type(pipe).__name__]
    denoiser = getattr(pipe, how.component)
    seen: list[tuple[dict[str, Any], Any]] = []

    def watch(_module: Any, given: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
        assert len(given) <= 2
        names = ("sample", "timestep")
        seen.append(({**dict(zip(names, given, strict=False)), **named}, result))

    hook = denoiser.register_forward_hook(watch, with_kwargs=True)
    torch.manual_seed(1)
    extra = {"max_sequence_length": 512} if make is flux else {}
    scale = {"guidance_scale": 1.0}
    pipe("abc", height=SIDE, width=SIDE, num_inference_steps=1, output_type="latent", **scale, **extra)
    hook.remove()
    given, result = seen[0]
    prompt = how.prompt(pipe, "abc", torch.device("cpu"))
    noisy = given.get("sample", given.get("hidden_states"))
    time = given["timestep"]
    if make is flux:
        noisy = pipe._unpack_latents(noisy, SIDE, SIDE, pipe.vae_scale_factor)
        time = time * 1000
    with torch.no_grad():
        found = how.predict(pipe, noisy, time.reshape(-1), prompt)
    wanted = result[0]
    if make is flux:
        wanted = pipe._unpack_latents(wanted, SIDE, SIDE, pipe.vae_scale_factor)
    assert isinstance(prompt, Prompt)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def test_a_flow_is_from_data_to_noise(tmp_path: Path) -> None:
    """The target of a flow is noise less data: a denoiser that gives exactly that has no loss."""
    own = object.__new__(DiffusionScorer)
    own._how = replace(PIPELINES["FluxPipeline"], predict=lambda pipe, noisy, times, _: pipe(noisy, times))
    clean = torch.full((DRAWS, 1, 2, 2), 3.0)
    noise = torch.randn(DRAWS, 1, 2, 2)
    own._pipe = lambda noisy, times: (noisy - clean) / (times / 1000).view(-1, 1, 1, 1)
    assert own._loss(clean, noise, Prompt(None)) == pytest.approx(0, abs=1e-8)


def test_the_command_finds_the_best_of_a_run(project: Path, tmp_path: Path) -> None:
    """From the command line, on diffusers' own checkpoints."""
    arguments = ["probe", project / "run", "--base", project / "base", "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--held-out", str(project / "images"), "--json"])
    assert result.exit_code == 0, result.output
    (verdict,) = json.loads(result.stdout)["runs"]
    truth = {c.step: np.mean(expected(project / "base", c.path, project / "images")) for c in checkpoints(project)}
    scored = {entry["step"]: entry["score"] for entry in verdict["evidence"]["probe"]["evaluations"]}
    assert scored == pytest.approx(truth, rel=1e-4)
    assert verdict["keep"]["step"] == min(truth, key=lambda step: truth[step])
