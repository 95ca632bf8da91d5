"""Experts, fused or apart, on disk and in adapters, against peft and transformers themselves."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lora_forensics.base_model import open_base, resolve
from lora_forensics.records import RowSlice, Unresolved, WeightRef

EXPERTS = 3
TINY = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2, "head_dim": 8,
    "num_key_value_heads": 2, "vocab_size": 40, "num_experts_per_tok": 2, "num_local_experts": EXPERTS,
}  # fmt: skip


def mixtral() -> Any:
    """Experts apart on disk, fused in memory, under another name of their block."""
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**TINY))


def qwen3_moe() -> Any:
    """Experts apart on disk as gate_proj, up_proj, down_proj."""
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**TINY, num_experts=EXPERTS, moe_intermediate_size=20))


def gpt_oss() -> Any:
    """Experts fused on disk too, each stored in x out."""
    from transformers import GptOssConfig, GptOssForCausalLM

    return GptOssForCausalLM(GptOssConfig(**TINY))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe, gpt_oss])
def test_target_parameters(family: Any, fused: bool, tmp_path: Path) -> None:
    """All experts of a parameter that peft adapts, stacked along their outputs, equal the parameter in memory."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = family()
    if fused:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "fused.safetensors"
        )
        base = open_base([tmp_path / "fused.safetensors"])
    else:
        model.save_pretrained(tmp_path / "base")
        base = open_base([tmp_path / "base"])
    parameters = {name: p.detach().clone() for name, p in model.named_parameters() if p.ndim == 3}
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about names of transformers
        get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    adapter = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    modules = {
        name.removesuffix(".lora_B.weight"): (
            EXPERTS * len(up),
            adapter[name.replace("lora_B", "lora_A")].shape[1],
        )
        for name, up in adapter.items()
        if name.endswith("lora_B.weight")
    }
    assert len(modules) == 4
    for module, ref in base.resolve(modules).items():
        assert isinstance(ref, WeightRef), (module, ref)
        layer = module.split(".")[4]
        role = "gate_up_proj" if module.endswith("base_layer") else "down_proj"
        true = parameters[f"model.layers.{layer}.mlp.experts.{role}"]
        if family is gpt_oss:
            true = true.mT
        stacked = true.flatten(0, 1)
        assert base.shape(ref) == tuple(stacked.shape)
        assert torch.equal(base.rows(ref, 0, len(stacked)), stacked)
        assert torch.equal(base.rows(ref, 11, len(stacked) - 7), stacked[11:-7])
        assert ref.label().count("+") == len({part.tensor for part in ref.parts}) - 1


@pytest.mark.parametrize("written", ["gate_proj up_proj down_proj", "w1 w3 w2"])
@pytest.mark.parametrize("family", [mixtral, qwen3_moe])
def test_one_expert_of_a_fused_base(family: Any, written: str, tmp_path: Path) -> None:
    """Gate is the first half of the rows, up the last; both spellings mean the same."""
    torch.manual_seed(0)
    model = family()
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, tmp_path / "base.safetensors")
    base = open_base([tmp_path / "base.safetensors"])
    experts = model.model.layers[1].mlp.experts
    gate, up = experts.gate_up_proj[2].chunk(2)
    wanted = dict(zip(written.split(), (gate, up, experts.down_proj[2]), strict=True))
    for name, true in wanted.items():
        module = f"base_model.model.model.layers.1.mlp.experts.2.{name}"
        ref = base.resolve({module: tuple(true.shape)})[module]
        assert isinstance(ref, WeightRef), ref
        assert [part.expert for part in ref.parts] == [2]
        assert torch.equal(base.rows(ref, 0, len(true)), true)
        assert torch.equal(base.rows(ref, 2, 5), true[2:5])


def test_experts_that_are_not_there() -> None:
    """An expert too many, a half that is stored in x out, and another shape have no weight."""
    layer = "model.layers.0.mlp.experts"
    tensors = {f"{layer}.gate_up_proj": (3, 8, 6), f"{layer}.down_proj": (3, 6, 4)}
    swapped = {f"{layer}.gate_up_proj": (3, 6, 8), f"{layer}.down_proj": (3, 4, 6)}
    module = f"base_model.model.{layer}"
    assert resolve({f"{module}.2.up_proj": (4, 6)}, tensors)[f"{module}.2.up_proj"] == WeightRef(
        (RowSlice(f"{layer}.gate_up_proj", (4, 8), 2),)
    )
    assert resolve({f"{module}.2.down_proj": (6, 4)}, swapped)[f"{module}.2.down_proj"] == WeightRef(
        (RowSlice(f"{layer}.down_proj", None, 2),), transposed=True
    )
    for name, shape, base in (
        ("3.up_proj", (4, 6), tensors),
        ("2.up_proj", (5, 6), tensors),
        ("2.up_proj", (4, 6), swapped),
    ):
        assert isinstance(resolve({f"{module}.{name}": shape}, base)[f"{module}.{name}"], Unresolved)
