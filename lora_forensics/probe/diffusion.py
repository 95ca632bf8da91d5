"""Denoising loss of a diffusers model on held-out images, at noise and times that are the same for every checkpoint."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from lora_forensics.errors import BaseModelError, CheckpointError, ScoreError, UsageError
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings, finite
from lora_forensics.probe.loading import PeftSlot, base_folder, base_mark, device_of, first_line, missing, quiet
from lora_forensics.probe.samples import mark, read_pictures
from lora_forensics.records import Checkpoint
from lora_forensics.tensors import read_header

DRAWS = 8
"""Noise levels for each image, evenly from least to most, each with a noise of its own."""
_INDEX = "model_index.json"
_DOWN = ("lora_down.weight", "lora_A.weight", "lora.down.weight")
_NEEDED = ("vae", "tokenizer", "text_encoder")


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the denoiser is told of an image."""

    embeds: Any
    pooled: Any = None
    ids: Any = None


@dataclass(frozen=True, slots=True)
class Denoising:
    """How a pipeline's denoiser is asked; functions take the pipeline first."""

    component: str
    prompt: Callable[[Any, str, Any], Prompt]
    """Pipeline, caption and device."""
    predict: Callable[[Any, Any, Any, Prompt], Any]
    """Pipeline, noisy latents (n, c, h, w), times (n,) and prompt."""
    flow: bool = False
    """Trained to match a flow from data to noise; else to undo a schedule's noise."""


def _encode_plain(pipe: Any, caption: str, device: Any) -> Prompt:
    return Prompt(pipe.encode_prompt(caption, device, 1, do_classifier_free_guidance=False)[0])


def _encode_pooled(pipe: Any, caption: str, device: Any) -> Prompt:
    embeds, _, pooled, _ = pipe.encode_prompt(caption, device=device, do_classifier_free_guidance=False)
    return Prompt(embeds, pooled)


def _encode_three(pipe: Any, caption: str, device: Any) -> Prompt:
    embeds, _, pooled, _ = pipe.encode_prompt(
        caption, caption, caption, device=device, do_classifier_free_guidance=False
    )
    return Prompt(embeds, pooled)


def _encode_flux(pipe: Any, caption: str, device: Any) -> Prompt:
    return Prompt(*pipe.encode_prompt(caption, None, device=device))


def _unet(pipe: Any, noisy: Any, times: Any, prompt: Prompt) -> Any:
    return pipe.unet(noisy, times, encoder_hidden_states=_rows(prompt.embeds, noisy)).sample


def _unet_sized(pipe: Any, noisy: Any, times: Any, prompt: Prompt) -> Any:
    """SDXL is told the size of the image, here as if it had not been cropped."""
    import torch

    high, wide = (side * pipe.vae_scale_factor for side in noisy.shape[-2:])
    sizes = torch.tensor([[high, wide, 0, 0, high, wide]], device=noisy.device, dtype=noisy.dtype)
    known = {"text_embeds": _rows(prompt.pooled, noisy), "time_ids": _rows(sizes, noisy)}
    embeds = _rows(prompt.embeds, noisy)
    return pipe.unet(noisy, times, encoder_hidden_states=embeds, added_cond_kwargs=known).sample


def _sd3(pipe: Any, noisy: Any, times: Any, prompt: Prompt) -> Any:
    embeds, pooled = _rows(prompt.embeds, noisy), _rows(prompt.pooled, noisy)
    return pipe.transformer(noisy, embeds, pooled, timestep=times).sample


def _flux(pipe: Any, noisy: Any, times: Any, prompt: Prompt) -> Any:
    """Patches of 2 x 2 are the tokens."""
    import torch

    count, channels, high, wide = noisy.shape
    tokens = pipe._pack_latents(noisy, count, channels, high, wide)
    ids = pipe._prepare_latent_image_ids(count, high // 2, wide // 2, noisy.device, noisy.dtype)
    guided = pipe.transformer.config.guidance_embeds
    predicted = pipe.transformer(
        hidden_states=tokens,
        timestep=times / 1000,
        guidance=torch.ones(count, device=noisy.device, dtype=noisy.dtype) if guided else None,
        pooled_projections=_rows(prompt.pooled, noisy),
        encoder_hidden_states=_rows(prompt.embeds, noisy),
        txt_ids=prompt.ids,
        img_ids=ids,
    ).sample
    scale = pipe.vae_scale_factor
    return pipe._unpack_latents(predicted, high * scale, wide * scale, scale)


PIPELINES: dict[str, Denoising] = {
    "StableDiffusionPipeline": Denoising("unet", _encode_plain, _unet),
    "StableDiffusionXLPipeline": Denoising("unet", _encode_pooled, _unet_sized),
    "StableDiffusion3Pipeline": Denoising("transformer", _encode_three, _sd3, flow=True),
    "FluxPipeline": Denoising("transformer", _encode_flux, _flux, flow=True),
}
"""Class of a pipeline to how its denoiser is asked."""


class DiffusionScorer:
    """Mean squared error of what the denoiser predicts, for each image; its text encoder is part of what is scored."""

    name: ClassVar[str] = "held-out images"
    parallel: ClassVar[bool] = False

    @classmethod
    def wanted(cls, options: ProbeOptions) -> bool:
        """A folder was given."""
        return options.held_out is not None and options.held_out.is_dir()

    def __init__(self, settings: ScorerSettings) -> None:
        """Read the names of the samples.

        Raises:
            UsageError: there are none, or the pipeline is of another kind.
            BaseModelError: the base is no folder of diffusers.
        """
        self._folder = Path(settings.options.held_out or "")
        self._pictures = read_pictures(self._folder)
        self._files = settings.base
        self._base = base_folder(settings.base, _INDEX)
        self._device = settings.options.device
        self._how = self._known_pipeline()
        self._pipe: Any = None
        self._latents: list[Any] = []
        self._slot: PeftSlot | None = None
        self._last: str | None = None

    @property
    def identity(self) -> str:
        """Images, captions, base model and draws."""
        seen = [mark(picture.path.read_bytes().hex(), picture.caption) for picture in self._pictures]
        return mark(self.name, DRAWS, *seen, base_mark(self._files))

    @property
    def what(self) -> str:
        """Denoising loss on so many images of a folder."""
        number = len(self._pictures)
        return f"denoising loss on {number} held-out image{'' if number == 1 else 's'} of {self._folder.name}"

    def score(self, checkpoint: Checkpoint) -> Sequence[float]:
        """One loss for each image.

        Raises:
            ScoreError: diffusers cannot load the adapter, or a loss is not finite.
            UsageError: a library or a part of the pipeline is missing.
        """
        self._load()
        put = self._through_peft if checkpoint.config is not None else self._through_diffusers
        if self._last not in (None, put.__name__):  # what one of them put into the model, the other cannot take out
            self._pipe, self._slot = None, None
            self._load()
        self._last = put.__name__
        try:
            put(checkpoint)
            return finite(self._losses())
        except RuntimeError as error:
            raise ScoreError(first_line(error)) from error

    def stop(self) -> None:
        """Nothing runs beside."""

    def _known_pipeline(self) -> Denoising:
        try:
            index = json.loads((self._base / _INDEX).read_text("utf-8"))
            name = str(index["_class_name"])
            lacking = [part for part in _NEEDED if not any(index.get(part) or ())]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BaseModelError(f"{self._base / _INDEX} cannot be read: {first_line(error)}") from error
        if name not in PIPELINES:
            hint = f"it takes {', '.join(PIPELINES)}; score others with a command of your own: --score"
            raise UsageError(f"--held-out does not know the pipeline {name}", hint)
        if lacking:
            hint = "images and captions cannot be encoded without it; give a whole pipeline with --base"
            raise UsageError(f"{self._base} has no {lacking[0]}", hint)
        return PIPELINES[name]

    def _load(self) -> Any:
        """The pipeline and the latents, once."""
        if self._pipe is not None:
            return getattr(self._pipe, self._how.component)
        try:
            import torch
            from diffusers import DiffusionPipeline
        except ImportError as error:
            raise missing("diffusers") from error
        device = device_of(self._device)
        dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
        with quiet():
            try:
                pipe = DiffusionPipeline.from_pretrained(  # type: ignore[no-untyped-call]
                    self._base, local_files_only=True, torch_dtype=dtype, safety_checker=None
                )
            except (OSError, ValueError, ImportError, RuntimeError, TypeError) as error:
                raise UsageError(f"diffusers cannot load {self._base}: {first_line(error)}") from error
        self._pipe = pipe.to(device)
        with torch.inference_mode():
            self._latents = [_latents(pipe, picture.path, device, dtype) for picture in self._pictures]
        return getattr(pipe, self._how.component)

    def _through_peft(self, checkpoint: Checkpoint) -> None:
        """A file of peft's own, with its configuration beside it, is an adapter of the denoiser."""
        if self._slot is None:
            self._slot = PeftSlot(self._fresh, device_of(self._device))
        self._slot.put(checkpoint)

    def _fresh(self) -> Any:
        """The denoiser without an adapter; loaded again where one was left in it."""
        part = getattr(self._pipe, self._how.component)
        if any("lora_" in name for name, _ in part.named_modules()):
            self._pipe = None
            part = self._load()
        return part

    def _through_diffusers(self, checkpoint: Checkpoint) -> None:
        try:
            names = list(read_header(checkpoint.path).infos)
        except CheckpointError as error:
            raise ScoreError(error.message, error.hint) from error
        if any("dora_scale" in name for name in names):
            raise ScoreError("diffusers leaves out the magnitudes of DoRA: score with a command of your own")
        with quiet():
            try:
                self._pipe.unload_lora_weights()
                self._pipe.load_lora_weights(checkpoint.path.parent, weight_name=checkpoint.path.name)
            except (ValueError, LookupError, TypeError, AttributeError, OSError, ImportError, RuntimeError) as error:
                self._pipe = None  # half of it may be in the pipeline
                self._load()
                raise ScoreError(f"diffusers cannot load it: {first_line(error)}") from error
        there = sum(any(part in name for part in _DOWN) for name in names)
        loaded = sum(
            hasattr(module, "lora_A") and bool(module.lora_A)
            for part in self._pipe.components.values()
            if hasattr(part, "modules")
            for module in part.modules()
        )
        if loaded < max(there, 1):
            raise ScoreError(f"diffusers loads {loaded} of its {there} modules: score with a command of your own")

    def _losses(self) -> list[float]:
        import torch

        losses = []
        with torch.inference_mode():
            for number, (picture, latents) in enumerate(zip(self._pictures, self._latents, strict=True)):
                prompt = self._how.prompt(self._pipe, picture.caption, latents.device)
                # drawn on the CPU, so that a device has no say in it
                random = torch.Generator().manual_seed(number)
                noise = torch.randn((DRAWS, *latents.shape[1:]), generator=random).to(latents)
                losses.append(self._loss(latents.expand_as(noise), noise, prompt))
        return losses

    def _loss(self, latents: Any, noise: Any, prompt: Prompt) -> float:
        import torch

        share = (torch.arange(DRAWS, device=latents.device) + 0.5) / DRAWS
        if self._how.flow:
            level = share.view(-1, 1, 1, 1).to(latents)
            times, noisy, target = (share * 1000).to(latents), (1 - level) * latents + level * noise, noise - latents
        else:
            times, noisy, target = _scheduled(self._pipe.scheduler.config, share, latents, noise)
        predicted = self._how.predict(self._pipe, noisy, times, prompt)
        predicted = predicted[:, : target.shape[1]]  # some denoisers predict the variance, too
        return float((predicted.float() - target.float()).square().mean())


def _scheduled(config: Any, share: Any, latents: Any, noise: Any) -> tuple[Any, Any, Any]:
    """Times, noisy latents and what is to be predicted, by the scheduler that the model was trained with."""
    from diffusers import DDPMScheduler

    schedule = DDPMScheduler.from_config(config)  # type: ignore[no-untyped-call]
    times = (share * schedule.config.num_train_timesteps).long()
    kind = schedule.config.prediction_type
    targets = {"epsilon": lambda: noise, "sample": lambda: latents}
    targets["v_prediction"] = lambda: schedule.get_velocity(latents, noise, times)
    if kind not in targets:
        raise UsageError(f"--held-out does not know the prediction type {kind}", "score with a command: --score")
    return times, schedule.add_noise(latents, noise, times), targets[kind]()


def _latents(pipe: Any, path: Path, device: Any, dtype: Any) -> Any:
    """(1, c, h, w) of an image that is scaled down to the model's area, never up, and cut to whole patches."""
    from PIL import Image, ImageOps, UnidentifiedImageError

    denoiser = getattr(pipe, "unet", None) or pipe.transformer
    levels = len(getattr(denoiser.config, "down_block_types", ("", "")))
    unit = pipe.vae_scale_factor * 2 ** (levels - 1)
    side = pipe.vae_scale_factor * _side(pipe, denoiser)
    try:
        with Image.open(path) as opened:
            image = ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, UnidentifiedImageError, ValueError) as error:
        raise UsageError(f"{path} is no image that can be read: {first_line(error)}") from error
    scale = min(1.0, side / (image.width * image.height) ** 0.5)
    size = tuple(max(unit, int(length * scale) // unit * unit) for length in image.size)
    pixels = pipe.image_processor.preprocess(ImageOps.fit(image, size)).to(device, dtype)
    found = pipe.vae.encode(pixels).latent_dist.mode()
    return (found - (getattr(pipe.vae.config, "shift_factor", None) or 0.0)) * pipe.vae.config.scaling_factor


def _side(pipe: Any, denoiser: Any) -> int:
    size = getattr(pipe, "default_sample_size", None) or denoiser.config.sample_size
    return int(size if isinstance(size, int) else max(size))


def _rows(one: Any, noisy: Any) -> Any:
    """One row for each noisy latent."""
    return one.expand(len(noisy), *one.shape[1:]).to(noisy)
