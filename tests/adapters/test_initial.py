"""Adapters that start from the weight: what they changed is measured against the weight that they were given."""

from __future__ import annotations

import warnings
from pathlib import Path

import polars as pl
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft_models import Saved, move, trained

from lora_forensics.adapters.initial import leading, principal


@pytest.mark.parametrize("name", ["pissa", "olora"])
@pytest.mark.parametrize("scale", [{"lora_alpha": 8}, {"lora_alpha": 6, "use_rslora": True}])
def test_the_first_adapter_is_made_again_and_subtracted(name: str, scale: dict[str, int], tmp_path: Path) -> None:
    """Whatever the scale."""
    saved = Saved(tmp_path, *trained("LORA", r=4, init_lora_weights=name, **scale))
    measured = saved.measure()
    assert set(measured.layers["adapter"]) == {"svd-lora"}
    assert max(saved.errors(measured).values()) < 1e-6
    assert not [finding for finding in measured.notes.findings if finding.rule == "svd-initialised"]


@pytest.mark.parametrize("name", ["pissa", "pissa_niter_2", "olora"])
@pytest.mark.parametrize(
    ("folder", "told"),
    [
        ("{name}_init", True),
        ("{name}_init", False),
        ("run/{name}_init", False),
        ("run/checkpoint-10/init", True),
        ("run/checkpoint-0", True),
    ],
)
def test_a_first_adapter_at_hand_is_subtracted(name: str, folder: str, told: bool, tmp_path: Path) -> None:
    """As PEFT has it saved: with `init_lora_weights` true there and, if left at that, in all that is saved later."""
    model, base = trained("LORA", r=4, lora_alpha=8, init_lora_weights=name)
    move(model)
    saved = Saved(tmp_path, model, base)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again, _ = trained("LORA", move_it=False, r=4, lora_alpha=8, init_lora_weights=name)
        again.save_pretrained(tmp_path / folder.format(name=name))
    if not told:
        saved.set(init_lora_weights=True)
    measured = saved.measure()
    assert max(saved.errors(measured).values()) < 1e-6
    assert set(measured.layers["adapter"]) == {"svd-lora"}
    assert set(measured.layers.filter(pl.col("step") == 0)["delta_norm"]) <= {0.0}


@pytest.mark.parametrize("name", ["pissa_niter_2", "corda", "loftq", "lora_ga"])
def test_what_cannot_be_made_again_is_named(name: str, tmp_path: Path) -> None:
    """Random, or from data: without the first adapter the cosines are not the method's, and a finding says so."""
    saved = Saved(tmp_path, *trained("LORA", r=4))
    saved.set(init_lora_weights=name)
    measured = saved.measure()
    assert set(measured.layers["adapter"]) == {"lora"}
    assert "svd-initialised" in {finding.rule for finding in measured.notes.findings}


@pytest.mark.parametrize("name", ["eva", "gaussian", "orthogonal", "mica"])
def test_what_starts_at_nothing_is_plain(name: str, tmp_path: Path) -> None:
    """B @ A = 0 on the stock weight: the product is the change."""
    saved = Saved(tmp_path, *trained("LORA", r=4))
    saved.set(init_lora_weights=name)
    measured = saved.measure()
    assert max(saved.errors(measured).values()) < 1e-6
    assert not [finding for finding in measured.notes.findings if finding.rule == "svd-initialised"]


def test_a_converted_adapter_is_plain(tmp_path: Path) -> None:
    """PEFT writes twice the rank, and that it starts at nothing."""
    model, base = trained("LORA", move_it=False, r=4, lora_alpha=8, init_lora_weights="pissa")
    first = tmp_path / "pissa_init"
    model.peft_config["default"].init_lora_weights = True
    model.save_pretrained(first)
    model.peft_config["default"].init_lora_weights = "pissa"
    move(model)
    saved = Saved(tmp_path, model, base, path_initial_model_for_weight_conversion=str(first))
    measured = saved.measure()
    assert set(measured.layers["adapter"]) == {"lora"}
    assert set(measured.layers["rank"]) == {8}
    assert max(saved.errors(measured).values()) < 1e-6


def test_an_embedding_beside_starts_at_nothing(tmp_path: Path) -> None:
    """PEFT starts only linear layers from their weight."""
    saved = Saved(tmp_path, *trained("LORA", r=4, init_lora_weights="olora", target_modules=["embed", "q_proj"]))
    measured = saved.measure()
    assert set(measured.layers["adapter"]) == {"lora", "svd-lora"}
    assert max(saved.errors(measured).values()) < 1e-6


@settings(deadline=None, max_examples=30)
@given(st.integers(2, 9), st.integers(2, 9), st.data())
def test_first_factors_are_the_definitions(rows: int, columns: int, data: st.DataObject) -> None:
    """The best approximation of rank r, and the product of the leading parts of Q R."""
    rank = data.draw(st.integers(1, min(rows, columns)))
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(data.draw(st.integers(0, 99))))
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = principal(weight, rank, 3.0)
    torch.testing.assert_close(up @ down, (left[:, :rank] * values[:rank]) @ right[:rank], rtol=0, atol=1e-3)
    q, r = torch.linalg.qr(weight.double())
    up, down = leading(weight, rank, 3.0)
    torch.testing.assert_close(up @ down, 3 * q[:, :rank] @ r[:rank], rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(900, 1000), (1000, 900)])
def test_a_large_weight_goes_through_its_gram_matrix(shape: tuple[int, int]) -> None:
    """With a gap behind the leading part both ways agree."""
    generator = torch.Generator().manual_seed(0)
    part = torch.randn(shape[0], 4, generator=generator) @ torch.randn(4, shape[1], generator=generator)
    weight = part + 0.01 * torch.randn(shape, generator=generator)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    up, down = principal(weight, 4, 1.0)
    torch.testing.assert_close(up @ down, (left[:, :4] * values[:4]) @ right[:4], rtol=0, atol=1e-9)
