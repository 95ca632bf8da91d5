"""mlx-lm's and torchtune's spellings of LoRA and DoRA: against mlx-lm's own formulas (`fuse`, read at d78bf58)."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lora_forensics.adapters import KINDS, Stack, read_layout, read_settings
from lora_forensics.moments import Weight, full_precision
from lora_forensics.tensors import TensorInfo

RANK, SCALE = 2, 20.0
CONFIG = f'{{"fine_tune_type": "lora", "lora_parameters": {{"rank": {RANK}, "scale": {SCALE}, "dropout": 0.0}}}}'


def random(*shape: int) -> torch.Tensor:
    """Some tensor of this shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def linear(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The change of a linear layer, (out, in)."""
    return (SCALE * b.T) @ a.T


WEIGHT = random(6, 8)
CASES = {
    "linear": ("model.layers.0.self_attn.q_proj", {"lora_a": random(8, 2), "lora_b": random(2, 6)}, "lora"),
    "embedding": ("model.embed_tokens", {"lora_a": random(6, 2), "lora_b": random(2, 8)}, "lora"),
    "experts": ("model.layers.0.mlp.up_proj", {"lora_a": random(3, 2, 8), "lora_b": random(3, 2, 2)}, "lora-experts"),
    "dora": (
        "model.layers.0.mlp.down_proj",
        {"lora_a": random(8, 2), "lora_b": random(2, 6), "m": random(6).abs()},
        "dora",
    ),
}


def expected(case: str, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """As mlx-lm's layers merge themselves."""
    a, b = tensors["lora_a"], tensors["lora_b"]
    if case == "embedding":
        return SCALE * a @ b
    if case == "experts":
        return torch.cat([SCALE * up @ down for down, up in zip(a, b, strict=True)])
    if case == "dora":
        merged = WEIGHT + linear(a, b)
        return (tensors["m"] / merged.norm(dim=1))[:, None] * merged - WEIGHT
    return linear(a, b)


@pytest.mark.parametrize("case", CASES)
def test_transposed_factors_give_the_change_of_mlx_lm(case: str, tmp_path: Path) -> None:
    """TRAP of mlx-lm: lora_a is [in, r] and lora_b [r, out], experts and embeddings are not; the scale is given."""
    module, tensors, name = CASES[case]
    (tmp_path / "adapter_config.json").write_text(CONFIG, "utf-8")
    settings = read_settings(tmp_path / "adapter_config.json", {})
    found = read_layout({f"{module}.{key}": TensorInfo("F64", tuple(t.shape)) for key, t in tensors.items()}, settings)
    assert list(found.modules) == [module]
    known = found.modules[module]
    assert (known.kind, known.layout.rank) == (name, RANK)
    assert (known.layout.rows, known.layout.columns) == tuple(WEIGHT.shape)
    kind = KINDS[known.kind]
    assert kind.scale({}, settings.of(module), module, RANK) == SCALE
    stack = Stack(
        module=module,
        layout=known.layout,
        tensors={role: tensors[key.removeprefix(f"{module}.")][None] for role, key in known.keys.items()},
        scale=torch.tensor([SCALE], dtype=torch.float64),
        lead=0,
        config=settings.of(module),
    )
    with full_precision():
        moments = kind.change(stack).moments(Weight(6, 8, lambda a, b: WEIGHT[a:b]), torch.device("cpu"))
    delta = expected(case, tensors)
    assert moments.norm2.sqrt()[0].item() == pytest.approx(delta.norm().item(), rel=1e-9)
    assert moments.dot[0].tolist() == pytest.approx((WEIGHT * delta).sum(dim=1).tolist(), rel=1e-6, abs=1e-6)


def test_torchtune_spells_factors_in_lower_case() -> None:
    """adapter_model.pt and adapter_<N>.pt: the orientation is that of PEFT."""
    module = "layers.0.attn.q_proj"
    shapes = {"lora_a.weight": (2, 8), "lora_b.weight": (6, 2), "magnitude": (6,)}
    found = read_layout({f"{module}.{key}": TensorInfo("F32", shape) for key, shape in shapes.items()})
    assert found.modules[module].kind == "dora"
    assert (found.modules[module].layout.rows, found.modules[module].layout.columns) == (6, 8)


@pytest.mark.parametrize("shapes", [((8, 2), (3, 6)), ((8, 0), (0, 6)), ((3, 2, 8), (2, 2, 6)), ((8,), (6,))])
def test_factors_that_do_not_fit_are_unread(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    """Never measured as something that it is not."""
    found = read_layout({f"m.lora_{x}": TensorInfo("F32", shape) for x, shape in zip("ab", shapes, strict=True)})
    assert list(found.unread) == ["m"]
