"""Modules of real adapters find their base weights, and never a wrong one."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_forensics.base_model import resolve
from lora_forensics.records import RowSlice, Unresolved, WeightRef

NAMES = sorted(
    path.name.removesuffix(".json.gz") for path in (Path(__file__).parents[1] / "data" / "inventories").glob("*.gz")
)
PARTIAL = [name for name in NAMES if name.startswith(("kohya_flux", "musubi", "kohya_sd35m", "kohya_sdxl"))]


def expected(truth: dict[str, Any]) -> WeightRef:
    """The truth of an inventory as the package states it."""
    parts = truth.get("parts") or [truth]
    slices = tuple(
        RowSlice(part["tensor"], tuple(part["rows"]) if part["rows"] else None, part.get("expert")) for part in parts
    )
    return WeightRef(slices, truth["transposed"], truth["kind"] == "embedding")


@pytest.mark.parametrize("name", NAMES)
def test_inventory(name: str, inventory: Callable[[str], Any]) -> None:
    """Every module of a real adapter gets its tensors, rows, order and orientation."""
    modules, tensors, truth = inventory(name)
    found = resolve(modules, tensors)
    assert list(found) == list(modules)
    for module, known in truth.items():
        assert found[module] == expected(known), module


@pytest.mark.parametrize("name", PARTIAL)
def test_partial_adapter(name: str, inventory: Callable[[str], Any]) -> None:
    """Each module alone is placed as it is among the others: adapters may cover a few layers only."""
    modules, tensors, truth = inventory(name)
    for module in list(modules)[-1 :: -(len(modules) // 3)]:
        assert resolve({module: modules[module]}, tensors)[module] == expected(truth[module]), module


@pytest.mark.parametrize("name", NAMES)
def test_unknown_shapes_are_never_wrong(name: str, inventory: Callable[[str], Any]) -> None:
    """Without shapes a module is right or unresolved."""
    modules, tensors, truth = inventory(name)
    for module, found in resolve(dict.fromkeys(modules, (None, None)), tensors).items():
        assert isinstance(found, Unresolved) or found == expected(truth[module]), module


@pytest.mark.parametrize("name", ["kohya_sdxl__ldm", "kohya_flux__diffusers", "peft_llama__hf"])
def test_wrong_shapes_are_no_match(name: str, inventory: Callable[[str], Any]) -> None:
    """A module that is one row too large has no base weight."""
    modules, tensors, _ = inventory(name)
    found = resolve({module: (rows + 1, columns) for module, (rows, columns) in modules.items()}, tensors)
    assert all(isinstance(ref, Unresolved) for ref in found.values())


def test_wrong_shape_is_said() -> None:
    """The reason names the tensor and both shapes."""
    found = resolve({"base_model.model.a": (4, 5)}, {"a.weight": (4, 6), "embed_tokens.weight": (9, 4)})
    assert found["base_model.model.a"] == Unresolved("wrong shape: the adapter is 4 x 5, a.weight is 4 x 6")


def test_unknown_name_is_said() -> None:
    """The reason says that no name fits."""
    found = resolve({"base_model.model.b": (4, 5)}, {"a.weight": (4, 5), "embed_tokens.weight": (9, 4)})
    assert found["base_model.model.b"] == Unresolved("no base tensor has this name")


def test_two_candidates_are_both_named() -> None:
    """Two weights of one name and shape are told, not chosen from."""
    tensors = {"transformer/blocks.0.q.weight": (4, 4), "transformer_2/blocks.0.q.weight": (4, 4)}
    found = resolve({"diffusion_model.blocks.0.q": (4, 4)}, tensors)["diffusion_model.blocks.0.q"]
    assert isinstance(found, Unresolved)
    assert all(tensor in found.reason for tensor in tensors)


def test_shape_tells_candidates_apart() -> None:
    """Of two text encoders with equal names the one of the right width is taken."""
    name = "text_model.encoder.layers.0.self_attn.k_proj"
    tensors = {f"text_encoder/{name}.weight": (768, 768), f"text_encoder_2/{name}.weight": (1280, 1280)}
    flat = f"lora_te_{name.replace('.', '_')}"
    assert resolve({flat: (1280, 1280)}, tensors)[flat] == WeightRef((RowSlice(f"text_encoder_2/{name}.weight"),))


@pytest.mark.parametrize(
    ("wanted", "stored"), [((4, 6), (4, 6, 1, 1)), ((4, 6), (4, 6)), ((4, 54), (4, 6, 3, 3)), ((4, 1), (4,))]
)
def test_kernels_are_flattened(wanted: tuple[int, int], stored: tuple[int, ...]) -> None:
    """1x1 kernels equal matrices, larger ones are out x in * kh * kw, vectors are one column."""
    found = resolve({"lora_unet_a_b": wanted}, {"unet/a.b.weight": stored})
    assert found["lora_unet_a_b"] == WeightRef((RowSlice("unet/a.b.weight"),))


@pytest.mark.parametrize("layout", ["text_model.", ""])
@pytest.mark.parametrize("written", ["text_model.", ""])
def test_text_model_comes_and_goes(layout: str, written: str) -> None:
    """Transformers 5 dropped `text_model.`: files and adapters from before and after it fit each other."""
    tensor = f"cond_stage_model.transformer.{layout}encoder.layers.0.mlp.fc1.weight"
    for module in (
        f"text_encoder.{written}encoder.layers.0.mlp.fc1",
        f"lora_te_{written}encoder_layers_0_mlp_fc1".replace(".", "_"),
    ):
        assert resolve({module: (8, 4)}, {tensor: (8, 4)})[module] == WeightRef((RowSlice(tensor),))


def test_tied_head() -> None:
    """A head that is not in the file is the input embedding, read as a matrix."""
    found = resolve({"base_model.model.lm_head": (32, 8)}, {"model.embed_tokens.weight": (32, 8)})
    assert found["base_model.model.lm_head"] == WeightRef((RowSlice("model.embed_tokens.weight"),))


def test_square_conv1d_is_transposed() -> None:
    """Square GPT-2 weights are told by their fused neighbour; linear models of the same names are not transposed."""
    module = "base_model.model.transformer.h.0.attn.c_proj"
    gpt2 = {"h.0.attn.c_attn.weight": (8, 24), "h.0.attn.c_proj.weight": (8, 8), "wte.weight": (9, 8)}
    bigcode = {**gpt2, "h.0.attn.c_attn.weight": (12, 8)}
    assert resolve({module: (8, 8)}, gpt2)[module] == WeightRef((RowSlice("h.0.attn.c_proj.weight"),), transposed=True)
    assert resolve({module: (8, 8)}, bigcode)[module] == WeightRef((RowSlice("h.0.attn.c_proj.weight"),))


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(st.text(max_size=40), st.tuples(st.integers(1, 9), st.integers(1, 9)), max_size=5))
def test_any_name_gets_an_answer(modules: dict[str, tuple[int, int]]) -> None:
    """Whatever stands in a file, each module is answered for."""
    tensors = {"model.layers.0.a.weight": (4, 4), "model.embed_tokens.weight": (9, 4)}
    assert resolve(modules, tensors).keys() == modules.keys()


def test_peft_path_imports_no_diffusers() -> None:
    """A language model is resolved without importing diffusers (seconds), even where a module is missing."""
    code = """
import gzip, json, sys
from lora_forensics.base_model import resolve
document = json.load(gzip.open(sys.argv[1]))
tensors = {name: tuple(info["shape"]) for name, info in document["base"].items()}
found = resolve({**dict.fromkeys(document["truth"], (None, None)), "base_model.model.score": (2, 64)}, tensors)
print(sum(hasattr(ref, "parts") for ref in found.values()), {"torch", "diffusers"} & set(sys.modules))
"""
    path = Path(__file__).parents[1] / "data" / "inventories" / "peft_llama__hf.json.gz"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True)
    assert done.stdout.strip() == "21 set()", done.stderr
