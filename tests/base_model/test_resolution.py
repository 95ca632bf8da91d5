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


@pytest.mark.parametrize(
    ("head", "inputs", "others", "tied"),
    [
        ("lm_head", "model.decoder.embed_tokens", {}, True),
        ("cls.predictions.decoder", "bert.embeddings.word_embeddings", {}, True),
        ("proj_out", "model.decoder.embed_tokens", {"model.decoder.embed_positions.weight": (448, 8)}, True),
        ("encoder.embed_tokens", "shared", {}, True),
        ("lm_head", "model.decoder.embed_tokens", {"model.visual.table.weight": (32, 8)}, True),
        ("lm_head", "model.embed_tokens", {"head.decoder.weight": (32, 8)}, False),
        ("score", "model.embed_tokens", {}, False),
    ],
)
def test_shared_embeddings(head: str, inputs: str, others: dict[str, tuple[int, int]], tied: bool) -> None:
    """What shares the input embedding is found there; not where another tensor of its shape may be it."""
    module = f"base_model.model.{head}"
    found = resolve({module: (32, 8)}, {f"{inputs}.weight": (32, 8), **others})[module]
    assert (isinstance(found, WeightRef) and found.parts == (RowSlice(f"{inputs}.weight"),)) == tied


def test_two_denoisers() -> None:
    """Wan 2.2 has two: a file for both names them, in a folder and in files of their own."""
    first, second = "transformer/blocks.0.ffn.0.weight", "transformer_2/blocks.0.ffn.0.weight"
    for module, tensor in {
        "diffusion_model.transformer_1.blocks.0.ffn.0": first,
        "diffusion_model.transformer_2.blocks.0.ffn.0": second,
        "transformer.blocks.0.ffn.0": first,
        "transformer_2.blocks.0.ffn.0": second,
    }.items():
        assert resolve({module: (8, 4)}, {first: (8, 4), second: (8, 4)})[module] == WeightRef((RowSlice(tensor),))


def test_two_denoisers_in_another_layout(inventory: Callable[[str], Any]) -> None:
    """Publisher's names on a folder of two: each module goes through the converter to its own half."""
    modules, tensors, truth = inventory("musubi_wan21_i2v14b__diffusers")
    both = tensors | {name.replace("transformer/", "transformer_2/"): shape for name, shape in tensors.items()}
    module = "lora_unet_blocks_3_cross_attn_k"
    renamed = {f"diffusion_model.transformer_{n}.blocks.3.cross_attn.k": modules[module] for n in (1, 2)}
    one, two = resolve(renamed, both).values()
    assert one == expected(truth[module])
    assert isinstance(two, WeightRef)
    assert two.label() == one.label().replace("transformer/", "transformer_2/")


def test_names_of_an_all_in_one_file() -> None:
    """An adapter may name modules as the all-in-one file does."""
    tensor = "text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.weight"
    module = tensor.removesuffix(".weight")
    for base in (tensor, "text_encoder/text_model.encoder.layers.0.mlp.fc1.weight"):
        assert resolve({module: (8, 4)}, {base: (8, 4)})[module] == WeightRef((RowSlice(base),))


@pytest.mark.parametrize("family", ["ViT", "Beit", "DeiT", "Mixtral"])
def test_names_in_memory(family: str, tmp_path: Path) -> None:
    """Modules under the names that transformers 5 gives them find the weights on disk, by value."""
    import torch
    import transformers

    from lora_forensics.base_model import open_base

    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "image_size": 32,
        "patch_size": 16, "vocab_size": 40, "num_key_value_heads": 2,
    }  # fmt: skip
    task = "ForCausalLM" if family == "Mixtral" else "ForImageClassification"
    config = getattr(transformers, f"{family}Config")()
    for key, value in sizes.items():
        if hasattr(config, key):
            setattr(config, key, value)
    model = getattr(transformers, f"{family}{task}")(config)
    model.save_pretrained(tmp_path)
    base = open_base([tmp_path])
    linear = {name: m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and ".0." in name}
    found = base.resolve({f"base_model.model.{name}": tuple(m.weight.shape) for name, m in linear.items()})
    for name, module in linear.items():
        ref = found[f"base_model.model.{name}"]
        assert isinstance(ref, WeightRef), name
        assert torch.equal(base.rows(ref, 0, len(module.weight)), module.weight), name


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
