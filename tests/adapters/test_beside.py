"""What is trained beside the factors, in real peft files: biases, and whole weights of transposed layers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import TARGETS, Saved, move, trained
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import lora_forensics as lf
from lora_forensics.adapters import KINDS, AdapterConfig


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("LORA", {"lora_bias": True, "target_modules": ["k_proj"]}),
        ("LORA", {"bias": "lora_only"}),
        ("LORA", {"modules_to_save": ["k_proj"], "target_modules": ["q_proj"]}),
        ("BOFT", {"bias": "all", "boft_block_size": 4}),
        ("C3A", {"bias": "c3a_only", "block_size": 8}),
        ("IA3", {"feedforward_modules": ["down_proj"]}),
        ("LN_TUNING", {}),
        ("GLORA", {"r": 4}),
        ("GLORA", {"r": 4, "config_C": "vector", "config_D_E": "constant"}),
        ("ROAD", {"group_size": 8}),
    ],
)
def test_the_change_of_a_bias_is_told(name: str, settings: dict[str, Any], tmp_path: Path) -> None:
    """Its norm is peft's, in float64."""
    saved = Saved(tmp_path, *trained(name, **{"target_modules": TARGETS, **settings}))
    found = lf.inspect_file(saved.checkpoint, saved.base)
    told = {module.parts[0].tensor: module.metrics["bias_norm"] for module in found.modules if module.parts}
    for layer in range(2):
        change = saved.change[f"layers.{layer}.self_attn.k_proj.bias"].norm().item()
        assert change > 0
        assert told.pop(f"layers.{layer}.self_attn.k_proj.weight") == pytest.approx(change, rel=1e-6)
    assert set(told.values()) <= {None}


def test_without_a_base_only_what_the_file_tells(tmp_path: Path) -> None:
    """A bias of its own is a change, a new value and a factor are none yet."""
    saved = Saved(tmp_path, *trained("LORA", lora_bias=True, target_modules=["k_proj"]))
    norms = [module.metrics["bias_norm"] for module in lf.inspect_file(saved.checkpoint).modules]
    truth = [saved.change[f"layers.{layer}.self_attn.k_proj.bias"].norm().item() for layer in range(2)]
    assert norms == pytest.approx(truth, rel=1e-6)
    other = Saved(tmp_path, *trained("IA3", feedforward_modules=[]))
    assert {module.metrics["bias_norm"] for module in lf.inspect_file(other.checkpoint).modules} == {None}


def test_a_bias_of_another_size_is_no_traceback(tmp_path: Path) -> None:
    """It is left out, or its module is, with the reason."""
    saved = Saved(tmp_path, *trained("GLORA", r=4))
    path = saved.checkpoint / "adapter_model.safetensors"
    tensors = load_file(path)
    broken = {name: tensor[:-1].clone() if ".glora_D" in name else tensor for name, tensor in tensors.items()}
    save_file(broken, path)
    found = lf.inspect_file(saved.checkpoint, saved.base)
    assert len(found.modules) + len(found.unread) == 8
    assert all("fit" in reason for reason in found.unread.values())


class _Transposed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.q_proj = Conv1D(48, 16), Conv1D(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj"]}, {"target_modules": ["c_attn"]}])
def test_whole_weights_of_transposed_layers(settings: dict[str, Any], tmp_path: Path) -> None:
    """A square one shows by its shape neither how it is saved nor how the base stores it."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    net = _Transposed()
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    turned = settings["target_modules"] == ["c_attn"]
    others = ["c_proj"] if turned else ["c_proj", "c_attn"]
    model = get_peft_model(net, LoraConfig(r=2, fan_in_fan_out=turned, modules_to_save=others, **settings))
    move(model)
    saved = Saved(tmp_path, model, base)
    errors = saved.errors(saved.measure())
    assert len(errors) == 1 + len(others)
    assert max(errors.values()) < 1e-6


def test_lokr_on_kernels_of_one_axis_is_as_peft_merges_it(tmp_path: Path) -> None:
    """Its Kronecker product takes channels for rows there."""
    from peft import LoKrConfig, get_peft_model

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv1d(8, 8, 3))
    base = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    model = get_peft_model(net, LoKrConfig(r=3, alpha=5, target_modules=["0"], init_weights=False))
    saved = Saved(tmp_path, model, base)
    assert max(saved.errors(saved.measure()).values()) < 1e-6
    saved.set(alpha=1e300)
    assert "too large" in next(iter(lf.inspect_file(saved.checkpoint, saved.base).unread.values()))


@pytest.mark.parametrize(("alpha", "scale"), [(4.0, 1.0), (2**1.5, 2**0.5)])
def test_two_whole_sides_tell_rslora_by_their_alpha(alpha: float, scale: float) -> None:
    """LyCORIS stores the rank, a whole number, or rank^1.5: where the header's text was lost, that alone is left."""
    assert KINDS["lokr"].scale({"alpha": alpha}, AdapterConfig(), "lora_unet_a", None) == pytest.approx(scale)
