"""GGUF files, written by the gguf library itself."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch

from lora_forensics.base_model import BASE_LAYOUTS, find_base, open_base
from lora_forensics.errors import BaseModelError
from lora_forensics.records import BaseReference, Unresolved, WeightRef

TYPES = gguf.GGMLQuantizationType
HEADS, KV_HEADS = 4, 2


def write(path: Path, architecture: str, tensors: dict[str, tuple[np.ndarray, TYPES]], **fields: int) -> Path:
    """A GGUF file with each tensor in its type."""
    writer = gguf.GGUFWriter(path, architecture)
    for key, value in fields.items():
        writer.add_uint32(f"{architecture}.attention.{key}", value)
    for name, (values, kind) in tensors.items():
        writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def reordered(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rotary halves of each head side by side, as llama.cpp's converter puts them."""
    return rows.reshape(heads, 2, len(rows) // heads // 2, -1).swapaxes(1, 2).reshape(rows.shape)


@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q4_0, TYPES.Q5_1], ids=str)
def test_types(kind: TYPES, tmp_path: Path) -> None:
    """Rows equal the library's own dequantised ones, in any range."""
    values = np.random.default_rng(0).standard_normal((12, 64), dtype=np.float32)
    file = write(tmp_path / "m.gguf", "flux", {"double_blocks.0.img_attn.qkv.weight": (values, kind)})
    base = open_base([file])
    ref = base.resolve({"lora_unet_double_blocks_0_img_attn_qkv": (12, 64)})["lora_unet_double_blocks_0_img_attn_qkv"]
    assert isinstance(ref, WeightRef)
    wanted = torch.from_numpy(gguf.dequantize(gguf.quantize(values, kind), kind).reshape(12, 64).copy())
    assert base.dtype(ref) == kind.name
    assert torch.equal(base.rows(ref, 0, 12), wanted)
    assert torch.equal(base.rows(ref, 5, 8), wanted[5:8])


def test_reshaped_kernels(tmp_path: Path) -> None:
    """A kernel that was reshaped to fit blocks is read in the shape that the file notes."""
    values = np.random.default_rng(0).standard_normal((8, 4, 3, 3), dtype=np.float32)
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "sdxl")
    name = "input_blocks.0.0.weight"
    writer.add_array(f"comfy.gguf.orig_shape.{name}", list(values.shape))
    flat = values.reshape(-1, 32)
    writer.add_tensor(name, gguf.quantize(flat, TYPES.Q8_0), raw_dtype=TYPES.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    base = open_base([tmp_path / "m.gguf"])
    assert base.shapes == {name: (8, 4, 3, 3)}
    wanted = gguf.dequantize(gguf.quantize(flat, TYPES.Q8_0), TYPES.Q8_0).reshape(8, -1)
    ref = base.resolve({"lora_unet_input_blocks_0_0": (8, 36)})["lora_unet_input_blocks_0_0"]
    assert isinstance(ref, WeightRef)
    assert torch.equal(base.rows(ref, 3, 6), torch.from_numpy(wanted[3:6].copy()))


def test_llama(tmp_path: Path) -> None:
    """A PEFT adapter's modules find their weights under llama.cpp's names, query and key rows in the model's order."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=HEADS, vocab_size=40,
        num_key_value_heads=KV_HEADS, tie_word_embeddings=True,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
    tensors = {}
    for name, tensor in model.state_dict().items():
        heads = HEADS if name.endswith("q_proj.weight") else KV_HEADS if name.endswith("k_proj.weight") else 0
        values = reordered(tensor.numpy(), heads) if heads else tensor.numpy()
        if name != "lm_head.weight":
            tensors[names.get_name(name, (".weight",))] = (values, TYPES.F32)
    assert BASE_LAYOUTS["llama.cpp"].example in tensors
    write(tmp_path / "m.gguf", "llama", tensors, head_count=HEADS, head_count_kv=KV_HEADS)
    base = open_base([tmp_path])
    linear = {name: m for name, m in model.named_modules() if isinstance(m, (torch.nn.Linear, torch.nn.Embedding))}
    found = base.resolve({f"base_model.model.{name}": tuple(m.weight.shape) for name, m in linear.items()})
    for name, module in linear.items():
        ref = found[f"base_model.model.{name}"]
        assert isinstance(ref, WeightRef), name
        assert torch.equal(base.rows(ref, 0, len(module.weight)), module.weight), name
        assert torch.equal(base.rows(ref, 3, 14), module.weight[3:14]), name


def test_experts(tmp_path: Path) -> None:
    """llama.cpp keeps gate, up and down of all experts in a tensor each; adapters on one expert or on all find them."""
    rng = np.random.default_rng(0)
    shapes = {"gate": (3, 32, 64), "up": (3, 32, 64), "down": (3, 64, 32)}
    arrays = {role: rng.standard_normal(shape, dtype=np.float32) for role, shape in shapes.items()}
    tensors = {f"blk.0.ffn_{role}_exps.weight": (array, TYPES.F32) for role, array in arrays.items()}
    base = open_base([write(tmp_path / "m.gguf", "qwen3moe", tensors)])
    experts = "base_model.model.model.layers.0.mlp.experts"
    found = base.resolve({f"{experts}.1.up_proj": (32, 64), experts: (3 * 64, 64)})
    up, fused = found.values()
    assert isinstance(up, WeightRef)
    assert isinstance(fused, WeightRef)
    assert np.array_equal(base.rows(up, 0, 32).numpy(), arrays["up"][1])
    assert np.array_equal(base.rows(fused, 64, 128).numpy(), np.concatenate([arrays["gate"][1], arrays["up"][1]]))


def test_rows_that_cannot_be_put_back(tmp_path: Path) -> None:
    """Without the number of heads a reordered weight is an error; a fused one that was taken apart by heads is none."""
    values = np.zeros((24, 8), dtype=np.float32)
    llama = open_base([write(tmp_path / "llama.gguf", "llama", {"blk.0.attn_q.weight": (values, TYPES.F32)})])
    module = "base_model.model.model.layers.0.self_attn.q_proj"
    ref = llama.resolve({module: (24, 8)})[module]
    assert isinstance(ref, WeightRef)
    with pytest.raises(BaseModelError, match="attention heads"):
        llama.rows(ref, 0, 24)
    bloom = open_base([write(tmp_path / "bloom.gguf", "bloom", {"blk.0.attn_qkv.weight": (values, TYPES.F32)})])
    module = "base_model.model.transformer.h.0.self_attention.query_key_value"
    assert isinstance(bloom.resolve({module: (24, 8)})[module], Unresolved)


@pytest.mark.parametrize("keep", [0, 3, 40, 200])
def test_damaged(keep: int, tmp_path: Path) -> None:
    """A truncated or foreign file is an error that names it."""
    file = write(tmp_path / "m.gguf", "llama", {"blk.0.attn_v.weight": (np.ones((8, 32), np.float32), TYPES.Q8_0)})
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(BaseModelError, match=r"m\.gguf: damaged"):
        open_base([file])


def test_recorded_name(tmp_path: Path) -> None:
    """A run that recorded a GGUF file finds it beside its folder."""
    (tmp_path / "run").mkdir()
    file = write(tmp_path / "m.gguf", "wan", {"blocks.0.ffn.0.weight": (np.ones((8, 32), np.float32), TYPES.F16)})
    assert find_base(BaseReference("m.gguf"), tmp_path / "run", None).files == (file,)
