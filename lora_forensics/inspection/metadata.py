"""What the text in a checkpoint says, in plain words: kohya's `ss_*`, the modelspec, diffusers and PEFT settings.

All of it was written by whoever made the file: values are data, of any type and size, and may be wrong.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from lora_forensics.inspection.values import Changed, Fact
from lora_forensics.values import as_count, as_number, parse_object

_NOTHING = ("", "None", "null", "[]", "{}")
"""How trainers write that there is nothing to say."""
_TAGS = 12
"""Tags that are named, the most frequent first."""
_LONGEST = 300
"""Characters of one fact; the raw metadata is whole."""


def _same(value: str) -> str:
    return value


def _date(value: str) -> str:
    """Seconds since 1970 as a date; anything else stays."""
    try:
        return datetime.fromtimestamp(float(value), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return value


def _last(value: str) -> str:
    """The last step of a dotted name: torch.optim.adamw.AdamW(...) is AdamW(...)."""
    name, bracket, settings = value.partition("(")
    return name.rpartition(".")[2] + bracket + settings


def _folders(value: str) -> str:
    """Folders of a data set with images and repeats."""
    entries = (parse_object(value) or {}).items()
    told = [
        f"{name}: {_number(entry.get('img_count'))} x {_number(entry.get('n_repeats'))}"
        for name, entry in entries
        if isinstance(entry, dict)
    ]
    return f"{', '.join(told)} (images x repeats)" if told else ""


def _data_sets(value: str) -> str:
    """Sizes and batches of kohya's configured data sets."""
    told = []
    for entry in _list(value):
        size = "x".join(map(_number, entry["resolution"])) if isinstance(entry.get("resolution"), list) else ""
        parts = [size, f"batch size {_number(entry.get('batch_size_per_device'))}"]
        told.append(", ".join(part for part in [*parts, f"{_number(entry.get('num_train_images'))} images"] if part))
    return "; ".join(told)


def _tags(value: str) -> str:
    """The most frequent tags of all folders."""
    counted: Counter[str] = Counter()
    for tags in (parse_object(value) or {}).values():
        for tag, times in tags.items() if isinstance(tags, dict) else ():
            counted[str(tag).strip()] += as_count(times) or 0
    named = ", ".join(f"{tag} {times}" for tag, times in counted.most_common(_TAGS))
    return f"{len(counted)} different: {named}" if counted else ""


def _buckets(value: str) -> str:
    """Resolutions of the buckets with their images."""
    buckets = (parse_object(value) or {}).get("buckets")
    return ", ".join(
        f"{'x'.join(map(_number, entry['resolution']))}: {_number(entry.get('count'))}"
        for entry in (buckets.values() if isinstance(buckets, dict) else ())
        if isinstance(entry, dict) and isinstance(entry.get("resolution"), list)
    )


def _progress(value: str) -> str:
    """ai-toolkit's step and epoch."""
    entry = parse_object(value) or {}
    return ", ".join(f"{key} {_number(entry[key])}" for key in ("step", "epoch") if key in entry)


_HEADER: tuple[tuple[str, str, tuple[str, ...], Callable[[str], str]], ...] = (
    ("about", "title", ("modelspec.title", "ss_output_name", "name"), _same),
    ("about", "author", ("modelspec.author",), _same),
    ("about", "licence", ("modelspec.license",), _same),
    ("about", "description", ("modelspec.description",), _same),
    ("about", "tags", ("modelspec.tags",), _same),
    ("about", "trigger phrase", ("modelspec.trigger_phrase",), _same),
    ("about", "usage", ("modelspec.usage_hint",), _same),
    ("about", "merged from", ("modelspec.merged_from",), _same),
    ("about", "comment", ("ss_training_comment",), _same),
    ("about", "date", ("modelspec.date",), _same),
    ("about", "started", ("ss_training_started_at",), _date),
    ("about", "finished", ("ss_training_finished_at",), _date),
    ("about", "software", ("software", "ot_branch"), _same),
    ("base", "model", ("ss_sd_model_name",), _same),
    ("base", "family", ("ss_base_model_version",), _same),
    ("base", "architecture", ("modelspec.architecture",), _same),
    ("base", "prediction", ("modelspec.prediction_type",), _same),
    ("base", "resolution", ("ss_resolution", "modelspec.resolution"), _same),
    ("base", "clip skip", ("ss_clip_skip", "modelspec.encoder_layer"), _same),
    ("base", "vae", ("ss_vae_name",), _same),
    ("network", "module", ("ss_network_module",), _same),
    ("network", "rank", ("ss_network_dim",), _same),
    ("network", "alpha", ("ss_network_alpha",), _same),
    ("network", "arguments", ("ss_network_args",), _same),
    ("network", "dropout", ("ss_network_dropout",), _same),
    ("training", "step", ("ss_steps",), _same),
    ("training", "all steps", ("ss_max_train_steps",), _same),
    ("training", "epoch", ("ss_epoch",), _same),
    ("training", "all epochs", ("ss_num_epochs",), _same),
    ("training", "progress", ("training_info",), _progress),
    ("training", "optimizer", ("ss_optimizer",), _last),
    ("training", "learning rate", ("ss_learning_rate",), _same),
    ("training", "denoiser's rate", ("ss_unet_lr",), _same),
    ("training", "text encoder's rate", ("ss_text_encoder_lr",), _same),
    ("training", "schedule", ("ss_lr_scheduler",), _same),
    ("training", "warm-up steps", ("ss_lr_warmup_steps",), _same),
    ("training", "batch size", ("ss_total_batch_size", "ss_batch_size_per_device"), _same),
    ("training", "gradient accumulation", ("ss_gradient_accumulation_steps",), _same),
    ("training", "precision", ("ss_mixed_precision",), _same),
    ("training", "loss", ("ss_loss_type",), _same),
    ("training", "min SNR gamma", ("ss_min_snr_gamma",), _same),
    ("training", "noise offset", ("ss_noise_offset",), _same),
    ("training", "max norm", ("ss_scale_weight_norms",), _same),
    ("training", "seed", ("ss_seed",), _same),
    ("data", "images", ("ss_num_train_images", "ss_num_train_items"), _same),
    ("data", "regularisation images", ("ss_num_reg_images",), _same),
    ("data", "folders", ("ss_dataset_dirs",), _folders),
    ("data", "sets", ("ss_datasets",), _data_sets),
    ("data", "buckets", ("ss_bucket_info",), _buckets),
    ("data", "tags", ("ss_tag_frequency",), _tags),
    ("hashes", "base model", ("ss_new_sd_model_hash", "ss_sd_model_hash"), _same),
    ("hashes", "vae", ("ss_new_vae_hash", "ss_vae_hash"), _same),
    ("hashes", "this file", ("sshs_model_hash", "modelspec.hash_sha256", "sshs_legacy_hash"), _same),
    ("hashes", "session", ("ss_session_id",), _same),
)
"""Topic, label, the keys that may tell it (the first counts), and how it is read."""

_SETTINGS = (
    ("base", "model", "base_model_name_or_path"),
    ("base", "revision", "revision"),
    ("network", "module", "peft_type"),
    ("network", "rank", "r"),
    ("network", "alpha", "lora_alpha"),
    ("network", "alpha", "alpha"),
    ("network", "rank patterns", "rank_pattern"),
    ("network", "alpha patterns", "alpha_pattern"),
    ("network", "targets", "target_modules"),
    ("network", "target parameters", "target_parameters"),
    ("network", "whole modules", "modules_to_save"),
    ("network", "dropout", "lora_dropout"),
    ("network", "initialisation", "init_lora_weights"),
    ("network", "rsLoRA", "use_rslora"),
    ("network", "DoRA", "use_dora"),
    ("network", "biases", "bias"),
    ("network", "task", "task_type"),
    ("about", "software", "peft_version"),
)
"""Topic, label and key of adapter_config.json, and of what diffusers puts into the header."""


def facts(metadata: Mapping[str, str], config: Mapping[str, Any]) -> tuple[Fact, ...]:
    """What the header and adapter_config.json say, topic by topic; what says nothing is left out."""
    found = [
        Fact(topic, label, read(value))
        for topic, label, keys, read in _HEADER
        if (value := next((v for key in keys if (v := metadata.get(key, "").strip()) not in _NOTHING), ""))
    ]
    found += [fact for settings, prefix in _settings(metadata, config) for fact in _told(settings, prefix)]
    topics = ("about", "base", "network", "training", "data", "hashes")
    found.sort(key=lambda fact: topics.index(fact.topic))
    return tuple(Fact(f.topic, f.label, _short(f.value)) for f in found if f.value)


_TOLD = {
    "base": ("family", "resolution", "clip skip"),
    "network": ("alpha", "dropout", "arguments", "targets", "initialisation", "rsLoRA", "DoRA"),
    "training": (
        "optimizer", "learning rate", "denoiser's rate", "text encoder's rate", "schedule", "warm-up steps",
        "batch size", "gradient accumulation", "precision", "loss", "min SNR gamma", "noise offset", "max norm", "seed",
    ),
    "data": ("images", "regularisation images", "sets"),
}  # fmt: skip
"""Topic to the facts that hold for a whole run and name nobody."""


def settings(metadata: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, str]:
    """What one file says of its whole training: 'optimizer' to 'AdamW'."""
    found = facts(metadata, config)
    return {fact.label: fact.value for fact in found if fact.label in _TOLD.get(fact.topic, ())}


def differing(first: Mapping[str, Any], second: Mapping[str, Any]) -> tuple[Changed, ...]:
    """Keys whose values differ or that only one has."""
    keys = [*first, *(key for key in second if key not in first)]
    pairs = [(key, first.get(key), second.get(key)) for key in keys]
    return tuple(Changed(key, one, two) for key, one, two in pairs if one != two)


def unfolded(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The metadata with JSON inside of its strings read."""
    return {key: _unfold(value) for key, value in metadata.items()}


def _unfold(value: str) -> Any:
    if not value.lstrip().startswith(("{", "[")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def _settings(metadata: Mapping[str, str], config: Mapping[str, Any]) -> Iterator[tuple[Mapping[str, Any], str]]:
    """Settings with the part of the model that they are for: adapter_config.json, then diffusers' in the header."""
    yield config, ""
    grouped: dict[str, dict[str, Any]] = {}
    for key, value in (parse_object(metadata.get("lora_adapter_metadata", "")) or {}).items():
        part, _, name = str(key).rpartition(".")
        grouped.setdefault(part, {})[name] = value
    yield from ((settings, f"{part} ") for part, settings in grouped.items())


def _told(settings: Mapping[str, Any], prefix: str) -> Iterator[Fact]:
    for topic, label, key in _SETTINGS:
        value = settings.get(key)
        if value in (None, False, True, "", "none", [], {}) and not (value is True and label in ("rsLoRA", "DoRA")):
            continue
        listed = sorted(map(str, value)) if isinstance(value, list) else None
        words = ", ".join(listed) if listed else "yes" if value is True else _text(value)
        yield Fact(topic, prefix + label, f"peft {words}" if key == "peft_version" else words)


def _list(value: str) -> Sequence[dict[str, Any]]:
    """The objects of a JSON list."""
    found = _unfold(value)
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _number(value: object) -> str:
    number = as_number(value)
    return "?" if number is None else f"{number:g}"


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]} ..."
