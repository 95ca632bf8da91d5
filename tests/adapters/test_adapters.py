"""Adapter kinds: keys to modules, scales, names."""

from __future__ import annotations

from pathlib import Path

import pytest

from lora_forensics.adapters import KINDS, naming, read_layout, read_settings
from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.errors import CheckpointError
from lora_forensics.tensors import TensorInfo


def infos(**shapes: tuple[int, ...]) -> dict[str, TensorInfo]:
    """A header; '__' stands for a dot."""
    return {name.replace("__", "."): TensorInfo("F32", shape) for name, shape in shapes.items()}


SPELLINGS = {
    "kohya": ("lora_unet_x.lora_down.weight", "lora_unet_x.lora_up.weight", "lora_unet_x"),
    "peft": ("base_model.model.x.lora_A.weight", "base_model.model.x.lora_B.weight", "base_model.model.x"),
    "named adapter": ("x.lora_A.my-style.weight", "x.lora_B.my-style.weight", "x"),
    "old diffusers": ("unet.x.lora.down.weight", "unet.x.lora.up.weight", "unet.x"),
    "processor": ("x.processor.to_q_lora.down.weight", "x.processor.to_q_lora.up.weight", "x.processor.to_q_lora"),
    "x-flux": ("b.0.processor.qkv_lora1.down.weight", "b.0.processor.qkv_lora1.up.weight", "b.0.processor.qkv_lora1"),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_pair_is_read(spelling: str) -> None:
    """One module with rank and shape, whoever wrote it."""
    down, up, module = SPELLINGS[spelling]
    found = read_layout({down: TensorInfo("F32", (2, 8)), up: TensorInfo("F32", (6, 2))})
    assert list(found.modules) == [module]
    layout = found.modules[module].layout
    assert (layout.rank, layout.rows, layout.columns) == (2, 6, 8)


def test_kernels_count_as_columns() -> None:
    """A 3x3 convolution."""
    found = read_layout(infos(m__lora_A__weight=(2, 8, 3, 3), m__lora_B__weight=(6, 2, 1, 1)))
    assert found.modules["m"].layout.columns == 72


@pytest.mark.parametrize(
    "shapes",
    [
        {"m__lora_A__weight": (2, 8)},
        {"m__lora_A__weight": (2, 8), "m__lora_B__weight": (6, 3)},
        {"m__lora_A__weight": (0, 8), "m__lora_B__weight": (6, 0)},
        {"m__lora_A__weight": (2, 8), "m__lora_B__weight": (6, 2), "m__dora_scale": (5, 1)},
        {"m__lora_A__a__weight": (2, 8), "m__lora_B__a__weight": (6, 2), "m__lora_A__b__weight": (2, 8)},
        {"m__lora_down__weight": (2, 8), "m__lora_up__weight": (6, 2), "m__lora_mid__weight": (3, 2, 3, 3)},
    ],
    ids=["half a pair", "ranks differ", "rank 0", "shape of no magnitude", "two adapters", "Tucker ranks differ"],
)
def test_what_is_not_a_pair_is_listed_as_unread(shapes: dict[str, tuple[int, ...]]) -> None:
    """Never measured as something that it is not."""
    found = read_layout(infos(**shapes))
    assert not found.modules
    assert "no adapter kind reads" in found.unread["m"].reason


def test_a_bias_beside_a_pair_changes_nothing() -> None:
    """Peft's lora_bias: the change of the weight is B @ A all the same."""
    shapes = {"m__lora_A__weight": (2, 8), "m__lora_B__weight": (6, 2), "m__lora_B__bias": (6,)}
    assert list(read_layout(infos(**shapes)).modules) == ["m"]


def test_full_weights_are_told_apart() -> None:
    """modules_to_save beside the pairs are modules; the copy of a frozen embedding and loose parameters are not."""
    found = read_layout(
        infos(
            m__lora_A__weight=(2, 8),
            m__lora_B__weight=(6, 2),
            lm_head__weight=(6, 8),
            m__base_layer__weight=(6, 8),
            prompt=(6,),
        )
    )
    assert {name: module.kind for name, module in found.modules.items()} == {"m": "lora", "lm_head": "weights"}
    assert set(found.foreign) == {"m.base_layer.weight", "prompt"}


@pytest.mark.parametrize(
    ("values", "config", "module", "expected"),
    [
        ({"alpha": 2.0}, AdapterConfig(), "lora_unet_x", 0.5),
        ({"alpha": 0.0}, AdapterConfig(), "lora_unet_x", 1.0),
        ({}, AdapterConfig(), "lora_unet_x", 1.0),
        ({}, AdapterConfig(), "base_model.model.x", None),
        ({}, AdapterConfig(alpha=8), "base_model.model.x", 2.0),
        ({}, AdapterConfig(alpha=8, rank_stabilised=True), "base_model.model.x", 4.0),
        ({}, AdapterConfig(alpha=8, alpha_pattern={"x": 4}), "base_model.model.b.x", 1.0),
        ({}, AdapterConfig(alpha=8, alpha_pattern={"^b.x": 4}), "base_model.model.b.x", 1.0),
        ({}, AdapterConfig(alpha=8, alpha_pattern={"(": 4, "(a+)+": 4}), "base_model.model.b.x", 2.0),
    ],
)
def test_scales(values: dict[str, float], config: AdapterConfig, module: str, expected: float | None) -> None:
    """At rank 4: alpha in the file, in the configuration, by pattern, missing; patterns that are none do not fit."""
    assert KINDS["lora"].scale(values, config, module, 4) == expected


def test_patterns_are_those_of_peft() -> None:
    """The scale of every module of a real model, with anchored and partial patterns."""
    import warnings

    from factories import lora_modules, tiny_llama
    from peft import LoraConfig, get_peft_model

    patterns = {"^model.layers.0.self_attn.q_proj": 32, "layers.1.mlp.down_proj": 2, "v_proj": 3}
    settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"], "alpha_pattern": patterns}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(tiny_llama(), LoraConfig(**settings))
    config = AdapterConfig(alpha=8, alpha_pattern=patterns)
    for name, module in lora_modules(model):
        assert config.scale(name, 4) == module.scaling["default"], name


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "\x00\xff"])
def test_a_configuration_that_is_none_is_an_error(content: str, tmp_path: Path) -> None:
    """Whatever stands in the file."""
    path = tmp_path / "adapter_config.json"
    path.write_text(content, "utf-8")
    with pytest.raises(CheckpointError, match=r"adapter_config\.json"):
        read_settings(path, {})


def test_absurd_values_are_nothing(tmp_path: Path) -> None:
    """Numbers that are none, too large, or of another type."""
    path = tmp_path / "adapter_config.json"
    path.write_text('{"lora_alpha": 1' + "0" * 400 + ', "r": NaN, "alpha_pattern": [1], "init_lora_weights": 3}')
    assert read_settings(path, {}).of("x") == AdapterConfig()


def test_settings_in_the_header_are_by_component() -> None:
    """Diffusers packs them into `lora_adapter_metadata`."""
    packed = '{"unet.lora_alpha": 8, "unet.r": 4, "text_encoder.lora_alpha": 2}'
    settings = read_settings(None, {"lora_adapter_metadata": packed})
    assert settings.of("unet.down.to_q").scale("unet.down.to_q", 4) == 2
    assert settings.of("text_encoder.q").scale("text_encoder.q", 4) == 0.5
    assert settings.of("transformer.q").scale("transformer.q", 4) is None


@pytest.mark.parametrize(
    ("module", "component", "block", "role"),
    [
        ("lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q", "unet", 1, "q"),
        ("lora_unet_input_blocks_4_1_transformer_blocks_0_ff_net_0_proj", "unet", 4, "ff_in"),
        ("lora_unet_up_blocks_3_attentions_1_transformer_blocks_0_ff_net_0_proj", "unet", 3, "ff_in"),
        ("lora_unet_double_blocks_7_img_attn_qkv", "transformer", 7, "qkv"),
        ("lora_unet_layers_3_attention_to_k", "transformer", 3, "k"),
        ("lora_te_text_model_encoder_layers_5_mlp_fc2", "text_encoder", 5, "ff_out"),
        ("lora_te2_text_model_encoder_layers_5_self_attn_out_proj", "text_encoder_2", 5, "out"),
        ("lora_te3_encoder_block_0_layer_0_SelfAttention_v", "text_encoder_3", 0, "v"),
        ("unet.up_blocks.2.resnets.0.conv1", "unet", 2, "conv"),
        ("transformer.single_transformer_blocks.11.attn.to_v", "transformer", 11, "v"),
        ("text_encoder.text_model.encoder.layers.3.self_attn.k_proj", "text_encoder", 3, "k"),
        ("base_model.model.model.layers.12.mlp.down_proj", "model", 12, "down"),
        ("base_model.model.transformer.h.2.attn.c_attn", "model", 2, "qkv"),
        ("base_model.model.lm_head", "model", None, "head"),
        ("base_model.model.model.embed_tokens", "model", None, "embedding"),
        ("base_model.model.down_blocks.0.attentions.0.proj_in", "unet", 0, "proj_in"),
        ("something", "other", None, "other"),
    ],
)
def test_names_tell_component_block_and_role(module: str, component: str, block: int | None, role: str) -> None:
    """The words that the tables and plots group by."""
    assert (naming.component(module), naming.block(module), naming.role(module)) == (component, block, role)
