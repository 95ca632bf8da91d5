"""Kinds with a closed form: on features or singular vectors; TinyLoRA; against layers that compute them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft_models import Saved, trained
from safetensors.torch import save_file
from torch import Tensor, nn

from lora_forensics.adapters import KINDS, Stack, read_layout
from lora_forensics.adapters.algebra import between_singular_vectors, scaled_columns, scaled_rows, sparse_core
from lora_forensics.adapters.config import AdapterConfig
from lora_forensics.adapters.tinylora import group
from lora_forensics.moments import Moments, Weight
from lora_forensics.tensors import open_tensors


def _weight(matrix: Tensor) -> Weight:
    return Weight(*matrix.shape, lambda start, stop: matrix[start:stop])


def _moments(path: Path, tensors: dict[str, Tensor], module: str, weight: Tensor) -> Moments:
    """A module of a file, measured; scale 1."""
    save_file(tensors, path)
    found = read_layout(open_tensors(path).infos).modules[module]
    kind = KINDS[found.kind]
    stacked = {role: tensors[name][None] for role, name in found.keys.items() if role not in kind.aside}
    one = torch.ones(1, dtype=torch.float64)
    stack = Stack(module, found.layout, stacked, one, 0, AdapterConfig())
    return kind.change(stack).moments(_weight(weight), torch.device("cpu"))


def _assert_is(moments: Moments, change: Tensor, weight: Tensor) -> None:
    torch.testing.assert_close(moments.d2[0], change.square().sum(dim=1))
    torch.testing.assert_close(moments.dot[0], (change * weight.double()).sum(dim=1))


def test_scaled_features_are_a_scaled_weight() -> None:
    """Behind a layer its rows, before it its columns."""
    layer, x = nn.Linear(5, 3, bias=False).double(), torch.randn(7, 5, dtype=torch.float64)
    out, inner = torch.randn(3, dtype=torch.float64), torch.randn(5, dtype=torch.float64)
    weight = layer.weight.detach()
    torch.testing.assert_close(x @ (weight + scaled_rows(weight, out)).T, layer(x).detach() * out)
    torch.testing.assert_close(x @ (weight + scaled_columns(weight, inner)).T, layer(x * inner).detach())


def test_between_singular_vectors_stand_values_or_a_matrix() -> None:
    """SVFit's new values, and any core."""
    weight = torch.randn(6, 4, dtype=torch.float64)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    new = values + torch.randn(4, dtype=torch.float64)
    change = between_singular_vectors(left, new - values, right)
    torch.testing.assert_close(weight + change, left @ torch.diag(new) @ right)
    core = torch.randn(4, 4, dtype=torch.float64)
    torch.testing.assert_close(between_singular_vectors(left, core, right), left @ core @ right)


def test_entries_at_one_place_are_summed() -> None:
    """A random pattern may draw a place twice; the gate starts at a half."""
    rows, columns, values = torch.tensor([0, 1, 1]), torch.tensor([1, 0, 0]), torch.tensor([2.0, 3.0, 5.0])
    core = sparse_core(2, rows, columns, values, torch.zeros(1))
    assert core.tolist() == [[0.0, 1.0], [4.0, 0.0]]


@pytest.mark.parametrize("rank", [4, 2])
def test_svft(rank: int, tmp_path: Path) -> None:
    """Tensors named as the authors' layer names them."""
    weight = torch.randn(6, 4)
    left, values, right = torch.linalg.svd(weight, full_matrices=False)
    places = torch.tensor([[0, 0, 1], [0, 1, 0]])
    tensors = {
        "u": left[:, :rank].contiguous(), "v": right[:rank].contiguous(), "s": torch.randn(3), "gate": torch.randn(1),
        "s_row": places[0].clone(), "s_col": places[1].clone(), "s_pre": values[:rank].contiguous(),
        "s_pre_row": torch.arange(rank), "s_pre_col": torch.arange(rank),
    }  # fmt: skip
    core = torch.zeros(rank, rank, dtype=torch.float64)
    core[places[0], places[1]] = tensors["s"].double() * torch.sigmoid(tensors["gate"].double())
    named = {f"layers.0.q_proj.svft_layer.{role}": tensor for role, tensor in tensors.items()}
    moments = _moments(tmp_path / "model.safetensors", named, "layers.0.q_proj", weight)
    _assert_is(moments, left[:, :rank].double() @ core @ right[:rank].double(), weight)


@pytest.mark.parametrize(
    ("block", "number", "layer", "shape"),
    [
        ("blocks.0.attn", 1, "blocks.0.attn.qkv", (9, 3)),
        ("blocks.0.attn", 2, "blocks.0.attn.proj", (3, 3)),
        ("blocks.1.mlp", 1, "blocks.1.mlp.fc1", (12, 3)),
        ("blocks.1.mlp", 2, "blocks.1.mlp.fc2", (3, 12)),
        ("patch_embed", 1, "patch_embed.proj", (3, 48)),
        ("blocks.1", 2, "blocks.1.norm2", (3, 1)),
    ],
)
def test_ssf(block: str, number: int, layer: str, shape: tuple[int, int], tmp_path: Path) -> None:
    """A scale is named in its block, and changes the layer before it."""
    weight, scale = torch.randn(shape), torch.randn(shape[0])
    named = {f"{block}.ssf_scale_{number}": scale, f"{block}.ssf_shift_{number}": torch.randn(shape[0])}
    moments = _moments(tmp_path / "model.safetensors", named, layer, weight)
    _assert_is(moments, torch.diag(scale.double() - 1) @ weight.double(), weight)


@pytest.mark.parametrize("settings", [{}, {"weight_tying": 1.0}, {"weight_tying": 0.6}, {"projection_seed": 5, "u": 8}])
@pytest.mark.parametrize("targets", [["q_proj", "k_proj", "up_proj", "down_proj"], ["q_proj", "c_attn", "embed"]])
def test_tinylora(settings: dict[str, float], targets: list[str], tmp_path: Path) -> None:
    """Its vectors are numbered in the model's order, which the random matrices tell."""
    saved = Saved(tmp_path, *trained("TINYLORA", r=2, target_modules=targets, **settings))
    errors = saved.errors(saved.measure())
    assert len(errors) == (8 if "up_proj" in targets else 4)
    assert max(errors.values()) < 1e-6


@pytest.mark.parametrize(
    ("values", "reason"), [({"projection_seed": 1}, "seed"), ({"projection_seed": None}, "missing")]
)
def test_tinylora_without_its_seed(values: dict[str, int], reason: str, tmp_path: Path) -> None:
    """Then nothing says which vector a layer uses."""
    saved = Saved(tmp_path, *trained("TINYLORA", r=2))
    saved.set(**values)
    measured = saved.measure()
    assert measured.layers.is_empty()
    assert any(reason in finding.hint for finding in measured.notes.findings)


def test_tinylora_without_its_projections(tmp_path: Path) -> None:
    """They would tell the order."""
    measured = Saved(tmp_path, *trained("TINYLORA", r=2, save_projection=False)).measure()
    assert measured.layers.is_empty()
    assert any("order" in finding.hint for finding in measured.notes.findings)


def test_groups_of_layers() -> None:
    """None, all, and some together; what is left over goes to the last."""
    assert [group(n, 5, 0.0) for n in range(5)] == [0, 1, 2, 3, 4]
    assert [group(n, 5, 1.0) for n in range(5)] == [0, 0, 0, 0, 0]
    assert [group(n, 5, 0.6) for n in range(5)] == [0, 0, 1, 1, 1]
