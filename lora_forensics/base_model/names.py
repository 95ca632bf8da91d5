"""How trainers and publishers spell the names of modules and of base tensors.

A name is split into a component (denoiser, text encoder, ...) and a path. Paths are compared with dots written as
underscores, as kohya writes them: that cannot be undone, but no two names of a known base become equal by it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

MAIN, MAIN_2, TEXT, CLIP_1, CLIP_2, VAE = "main", "main_2", "text", "clip_1", "clip_2", "vae"
"""Components: the denoiser or language model; the second denoiser of a pair (Wan 2.2, low noise); a text encoder
without a twin; two CLIP encoders of equal names; VAE."""

DENOISERS = (MAIN, MAIN_2)
LOW_NOISE = "low_noise"
"""Stands for a folder before the names of the second of two denoisers that are files of their own."""
_ANY = (*DENOISERS, CLIP_1, CLIP_2, TEXT)
_TEXTS = (CLIP_1, CLIP_2, TEXT)

_MODULE_PREFIXES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("lora_unet_", DENOISERS),
    ("lora_transformer_", DENOISERS),
    ("oft_unet_", DENOISERS),
    ("lora_te1_", (CLIP_1,)),
    ("lora_te1_", (TEXT,)),
    ("lora_te2_", (CLIP_2,)),
    ("lora_te2_", (TEXT,)),
    ("lora_te3_", (TEXT,)),
    ("lora_te_", _TEXTS),
    ("oft_te_", _TEXTS),
    ("lycoris_", _ANY),
    ("unet.", (MAIN,)),
    ("transformer.", (MAIN,)),
    ("transformer_2.", (MAIN_2,)),
    ("diffusion_model.transformer_1.", (MAIN,)),
    ("diffusion_model.transformer_2.", (MAIN_2,)),
    ("diffusion_model.", DENOISERS),
    ("model.diffusion_model.", DENOISERS),
    ("text_encoder.", (CLIP_1,)),
    ("text_encoder.", (TEXT,)),
    ("text_encoder_2.", (CLIP_2,)),
    ("text_encoder_2.", (TEXT,)),
    ("text_encoder_3.", (TEXT,)),
    ("vae.", (VAE,)),
)

_TENSOR_PREFIXES: tuple[tuple[str, str | None], ...] = (
    ("model.diffusion_model.", MAIN),
    ("diffusion_model.", MAIN),
    ("net.", MAIN),
    ("conditioner.embedders.0.transformer.", CLIP_1),
    ("conditioner.embedders.0.model.", CLIP_2),
    ("conditioner.embedders.1.model.", CLIP_2),
    ("cond_stage_model.transformer.", CLIP_1),
    ("cond_stage_model.model.", CLIP_1),
    ("text_encoders.clip_l.transformer.", CLIP_1),
    ("text_encoders.clip_g.transformer.", CLIP_2),
    ("first_stage_model.", VAE),
    ("vae.", VAE),
    ("unet.", MAIN),
    ("text_encoder.", CLIP_1),
    ("text_encoder_2.", CLIP_2),
    ("model_ema.", None),
)
"""Prefixes of single files; the EMA copy in old ones is not what an adapter was trained on."""

_FOLDERS: dict[str, str | None] = {
    "transformer_2": MAIN_2,
    LOW_NOISE: MAIN_2,
    "text_encoder": CLIP_1,
    "text_encoder_2": CLIP_2,
    "clip_l": CLIP_1,
    "clip_g": CLIP_2,
    "vae": VAE,
    "image_encoder": None,
    "safety_checker": None,
    "controlnet": None,
}

_ENCODER = re.compile(r"text_encoders\.[^.]+\.(transformer\.)?")
_CLIP = re.compile(r"(text_model\.)?(embeddings|encoder\.layers|final_layer_norm)\.|text_projection\.")
_LOOSE_TEXT = re.compile(
    r"text_model\.|encoder\.(block\.\d|final_layer_norm\.weight)|shared\.weight|model\.(layers|embed_tokens|norm)\."
)
"""Tensors of a text encoder (or language model) in a file of its own."""
_OLD_PROCESSOR = re.compile(r"\.processor\.to_(q|k|v|out)_lora$")
_WRAPPERS = frozenset(
    {
        "base_model", "model", "language_model", "transformer", "text_model", "backbone", "albert", "beit", "bert",
        "deberta", "deit", "dinov2", "distilbert", "electra", "esm", "gpt_neox", "hubert", "mpnet", "roberta", "swin",
        "vit", "wav2vec2",
    }
)  # fmt: skip
"""Leading steps of a path that come and go between a live model and its file on disk (`base_model_prefix`)."""
_FLAT_WRAPPERS = re.compile(r"^((text_|language_)?model_)+")

EMBEDDINGS = re.compile(
    r"(^|[._])(embed_tokens|wte|wpe|word_embeddings|token_embedding|position_embedding|position_embeddings"
    r"|token_type_embeddings|tok_embeddings|embed_in|shared|relative_attention_bias|token_embd|tokens_embed)$"
)
"""Modules that look rows up instead of multiplying: PEFT stores their change transposed."""

INPUTS = frozenset(
    {
        "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "tok_embeddings", "token_embd", "tokens_embed",
        "embeddings",
    }
)  # fmt: skip
"""Last steps of input embeddings, which heads and other embeddings may share."""
TIED = re.compile(
    r"(^|[._])(lm_head([._](decoder|out_proj))?|embed_out|output_projection|proj_out|generator_lm_head|vocab_projector"
    r"|decoder|pred_layer[._]proj|embed_tokens|word_embeddings)$"
)
"""Modules that may share them: then the file holds the input embedding alone."""

HEADS = frozenset({"lm_head", "embed_out", "output", "score", "classifier"})
"""What a language model has beside its body."""


@dataclass(frozen=True, slots=True)
class Reading:
    """One way to understand a module's name."""

    components: tuple[str, ...]
    path: str


def flatten(path: str) -> str:
    """Dots become underscores."""
    return path.replace(".", "_")


def unwrap(path: str) -> str:
    """The path without leading wrappers; of a flattened path only few can be told."""
    if "." not in path:
        return _FLAT_WRAPPERS.sub("", path)
    steps = path.split(".")
    while len(steps) > 1 and steps[0] in _WRAPPERS:
        steps.pop(0)
    return ".".join(steps)


def readings(module: str) -> Iterator[Reading]:
    """What the name of an adapter's module may mean, likeliest first."""
    name = module.removeprefix("base_model.model.")
    name = _OLD_PROCESSOR.sub(lambda m: ".to_out.0" if m[1] == "out" else f".to_{m[1]}", name)
    for prefix, components in _MODULE_PREFIXES:
        if name.startswith(prefix):
            yield Reading(components, name.removeprefix(prefix))
    component, path = split_tensor(name)
    if component is not None and path != name and "/" not in name:  # under the name of an all-in-one file
        yield Reading((component,), path)
    yield Reading(_ANY, name)


def split_tensor(name: str) -> tuple[str | None, str]:
    """Component and path of a base tensor in a diffusers folder (`unet/...`) or a file; None is of no use here."""
    folder, slash, path = name.rpartition("/")
    if slash:
        component = _FOLDERS.get(folder, MAIN)
        if folder.startswith("text_encoder") and not _CLIP.match(path):
            component = TEXT
        return component, path
    for prefix, component in _TENSOR_PREFIXES:
        if name.startswith(prefix):
            return component, name.removeprefix(prefix)
    encoder = _ENCODER.match(name)
    if encoder:
        return TEXT, name[encoder.end() :]
    return (TEXT if _LOOSE_TEXT.match(name) else MAIN), name


def module_path(tensor_path: str) -> str | None:
    """The module that owns a tensor: without `.weight`; None for biases and buffers; other parameters are their own."""
    # OpenCLIP applies text_projection from the right: without its converter it would be read in the wrong orientation
    if tensor_path.endswith((".bias", "_bias", "position_ids", "text_projection")):
        return None
    return tensor_path.removesuffix(".weight")


def numbers_after(step: str, paths: Iterable[str]) -> set[int]:
    """The numbers N for which some path holds `<step>.N.`."""
    pattern = re.compile(rf"(?:^|\.){re.escape(step)}\.(\d+)\.")
    return {int(match[1]) for path in paths if (match := pattern.search(path))}
