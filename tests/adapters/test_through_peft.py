"""Every type in peft's registry: measured to the change that peft itself makes, or left out for a reason."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft_models import Saved, move, trained
from safetensors.torch import save_file

from lora_forensics.adapters import KINDS
from lora_forensics.adapters.peft_types import TYPES, WEIGHTLESS

SETTINGS: dict[str, dict[str, Any]] = {
    "adamss": {"r": 4, "num_subspaces": 3},
    "boft": {"boft_block_size": 4},
    "c3a": {"block_size": 8},
    "deft": {"r": 4},
    "delora": {"r": 4},
    "fourierft": {"n_frequency": 30},
    "frod": {},
    "glora": {"r": 4},
    "gralora": {"r": 8, "gralora_k": 2},
    "hira": {"r": 4},
    "hra": {"r": 4},
    "lokr": {"r": 2, "alpha": 6},
    "miss": {"r": 8},
    "oft": {"oft_block_size": 8, "r": 0},
    "osf": {},
    "peanut": {"r": 4},
    "psoft": {"r": 4},
    "pvera": {"r": 4},
    "randlora": {"r": 4, "save_projection": True},
    "road": {"group_size": 8},
    "shira": {"r": 2},
    "supertuning": {"sparsity": 0.9},
    "unilora": {"r": 4, "save_indices": True},
    "vblora": {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2},
    "vera": {"r": 4, "save_projection": True},
    "waveft": {"n_frequency": 30},
}


def test_every_type_of_peft_is_read_or_left_out_with_a_reason() -> None:
    """A new release of peft with another type fails here."""
    own = {name for kind in KINDS.values() for name in kind.peft_types}
    registered = {peft_type.value for peft_type in PEFT_TYPE_TO_CONFIG_MAPPING}
    assert registered - own - {name.upper() for name in WEIGHTLESS} == set()
    assert set(SETTINGS) == set(TYPES)


def test_names_begin_as_in_peft() -> None:
    """What the kinds recognise is peft's own prefix."""
    for name in TYPES:
        assert PEFT_TYPE_TO_PREFIX_MAPPING[name.upper()].startswith(f"{name}_")


@pytest.mark.parametrize("name", sorted(WEIGHTLESS))
def test_what_changes_no_weight_is_skipped(name: str, tmp_path: Path) -> None:
    """The type alone decides, whatever the file holds."""
    assert name.upper() in PEFT_TYPE_TO_TUNER_MAPPING
    saved = Saved(tmp_path, *trained("LORA"))
    saved.set(peft_type=name.upper())
    measured = saved.measure()
    assert measured.layers.is_empty()
    assert [name.upper() in skipped.reason for skipped in measured.notes.skipped] == [True]


@pytest.mark.parametrize("name", TYPES)
def test_the_change_is_the_one_that_peft_merges(name: str, tmp_path: Path) -> None:
    """To the rounding of the saved numbers."""
    saved = Saved(tmp_path, *trained(name.upper(), **SETTINGS[name]))
    errors = saved.errors(saved.measure())
    assert len(errors) == 8
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vera", {"r": 4, "save_projection": False}),
        ("pvera", {"r": 4, "save_projection": False}),
        ("randlora", {"r": 4, "save_projection": False}),
        ("randlora", {"r": 4, "save_projection": False, "sparse": True}),
        ("fourierft", {"n_frequency": 30, "random_loc_seed": 5}),
        ("waveft", {"n_frequency": 30, "random_loc_seed": 5}),
        ("supertuning", {"sparsity": 0.9, "save_precomputed_indices": False}),
        ("psoft", {"r": 4, "random_seed": 3}),
        ("oft", {"oft_block_size": 8, "r": 0, "coft": True, "eps": 0.01}),
        ("miss", {"r": 8, "init_weights": "bat", "target_modules": ["q_proj", "up_proj"]}),
        ("waveft", {"n_frequency": 30, "proportional_parameters": True}),
        ("vblora", {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2, "save_only_topk_weights": True}),
    ],
)  # fmt: skip
def test_what_is_drawn_or_derived_is_made_again(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Seeds and choices stand in adapter_config.json."""
    saved = Saved(tmp_path, *trained(name.upper(), **settings))
    errors = saved.errors(saved.measure())
    assert errors
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("boft", {"boft_block_size": 4, "target_modules": ["conv"]}),
        ("oft", {"oft_block_size": 6, "r": 0, "target_modules": ["conv"]}),
        ("hra", {"r": 4, "target_modules": ["conv"]}),
        ("fourierft", {"n_frequency": 30, "target_modules": ["c_attn"]}),
        ("waveft", {"n_frequency": 30, "target_modules": ["c_attn"]}),
        ("vblora", {"r": 2, "num_vectors": 12, "vector_length": 8, "topk": 2, "target_modules": ["c_attn"]}),
    ],
)  # fmt: skip
def test_layers_as_the_base_stores_them(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Kernels, and weights stored in x out."""
    saved = Saved(tmp_path, *trained(name.upper(), **settings))
    errors = saved.errors(saved.measure())
    assert len(errors) == 1
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("name", "settings", "reason"),
    [
        ("unilora", {"r": 4}, "shared by all modules"),
        ("frod", {"save_projection": False}, "weights of all layers"),
    ],
)
def test_what_no_file_tells_is_named(name: str, settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    """Instead of a number that rests on a guess."""
    measured = Saved(tmp_path, *trained(name.upper(), **settings)).measure()
    assert measured.layers.is_empty()
    assert any(reason in finding.hint for finding in measured.notes.findings if finding.rule == "module-unread")


def test_without_its_settings_it_is_not_read(tmp_path: Path) -> None:
    """Rank and scale are in no tensor."""
    saved = Saved(tmp_path, *trained("DELORA", r=4))
    (saved.checkpoint / "adapter_config.json").unlink()
    measured = saved.measure()
    assert measured.layers.is_empty()
    assert any("adapter_config.json" in finding.hint for finding in measured.notes.findings)


@pytest.mark.parametrize("value", [3, -1, 0, "four", None, [4], 10**15])
def test_settings_that_do_not_fit_the_tensors_are_named(value: object, tmp_path: Path) -> None:
    """Another rank than the file's, or none."""
    saved = Saved(tmp_path, *trained("DELORA", r=4))
    saved.set(r=value)
    measured = saved.measure()
    assert measured.layers.is_empty()
    assert any("peft cannot rebuild it" in finding.hint for finding in measured.notes.findings)


def test_a_layer_that_the_base_lacks_is_named_where_layers_share(tmp_path: Path) -> None:
    """A projection as large as the largest layer cannot be drawn again without that layer's shape."""
    saved = Saved(tmp_path, *trained("VERA", r=4, save_projection=False))
    save_file({name: tensor for name, tensor in saved.weights.items() if "mlp.up_proj" not in name}, saved.base)
    measured = saved.measure()
    assert measured.layers["cosine"].is_null().all()
    assert any("no weight in the base model" in finding.hint for finding in measured.notes.findings)


def test_the_same_at_every_checkpoint(tmp_path: Path) -> None:
    """One tree serves all checkpoints of a module: none leaves a trace in it."""
    model, base = trained("PSOFT", r=4)
    first = Saved(tmp_path, model, base)
    move(model)
    model.save_pretrained(first.run / "checkpoint-20")
    together = first.measure().layers.filter(pl.col("step") == 20)["delta_norm"].to_list()
    shutil.rmtree(first.checkpoint)
    assert first.measure().layers["delta_norm"].to_list() == together
