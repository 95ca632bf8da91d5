"""Stored numbers become the weights that they stand for, by blocks of rows, or a clear refusal."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from lora_forensics.base_model import STORAGES, BaseModel, open_base
from lora_forensics.base_model.storage import refused, unpacked
from lora_forensics.errors import BaseModelError
from lora_forensics.records import WeightRef
from lora_forensics.tensors import SafetensorsFile

BITSANDBYTES = sorted((Path(__file__).parents[1] / "data" / "bitsandbytes").glob("*.safetensors"))
FP8 = [torch.float8_e4m3fn, torch.float8_e5m2]


def saved(folder: Path, tensors: dict[str, torch.Tensor]) -> BaseModel:
    """A base in one file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "base.safetensors")
    return open_base([folder / "base.safetensors"])


def read(base: BaseModel, module: str = "layer", start: int = 0, stop: int | None = None) -> torch.Tensor:
    """Rows of the weight of a module."""
    ref = base.resolve({module: (None, None)})[module]
    assert isinstance(ref, WeightRef), ref
    return base.rows(ref, start, base.shape(ref)[0] if stop is None else stop)


@pytest.mark.parametrize("storage", STORAGES.values(), ids=list(STORAGES))
def test_every_storage(storage: object, tmp_path: Path) -> None:
    """Each says what it is and where that is laid down, and finds nothing in plain weights."""
    assert storage.description
    assert storage.source.startswith("https://")
    save_file({"a.weight": torch.ones(2, 2), "a.bias": torch.ones(2)}, tmp_path / "plain.safetensors")
    assert list(storage.find(SafetensorsFile(tmp_path / "plain.safetensors"))) == []


def test_plain_files_are_read_as_they_are(tmp_path: Path) -> None:
    """16-bit and float32 weights keep their stored type and cost no wrapping."""
    save_file({"a.weight": torch.ones(2, 2).half()}, tmp_path / "plain.safetensors")
    file = SafetensorsFile(tmp_path / "plain.safetensors")
    assert unpacked(file) is file


@pytest.mark.parametrize("path", BITSANDBYTES, ids=lambda path: path.stem)
def test_bitsandbytes(path: Path, tmp_path: Path) -> None:
    """nf4, fp4 and int8, nested or not, equal what bitsandbytes itself makes of them; so do single rows."""
    tensors = load_file(path)
    true = tensors.pop("true")
    base = saved(tmp_path, tensors)
    assert base.shapes == {"layer.weight": tuple(true.shape)}
    whole = read(base)
    torch.testing.assert_close(whole, true, rtol=1e-6, atol=0)
    for start, stop in ((0, 1), (3, 9), (5, len(true)), (len(true) - 1, len(true))):
        assert torch.equal(read(base, start=start, stop=stop), whole[start:stop])


@pytest.mark.parametrize("companion", ["absmax", "quant_map", "nested_absmax"])
def test_bitsandbytes_without_a_part(companion: str, tmp_path: Path) -> None:
    """4-bit codes without their map or scales are an error that names what is missing."""
    tensors = load_file(BITSANDBYTES[0].with_name("nf4_nested.safetensors"))
    del tensors["true"], tensors[f"layer.weight.{companion}"]
    with pytest.raises(BaseModelError, match=companion):
        saved(tmp_path, tensors)


@pytest.mark.parametrize(
    "state", [b"not json", b"{}", json.dumps({"shape": [9, 9], "blocksize": 64}).encode(), b"\xff"]
)
def test_bitsandbytes_with_a_broken_state(state: bytes, tmp_path: Path) -> None:
    """A state that is no JSON or does not fit is an error, not numbers."""
    tensors = load_file(BITSANDBYTES[0].with_name("nf4.safetensors"))
    del tensors["true"]
    tensors["layer.weight.quant_state.bitsandbytes__nf4"] = torch.tensor(list(state), dtype=torch.uint8)
    with pytest.raises(BaseModelError, match="does not fit"):
        saved(tmp_path, tensors)


def test_int8_in_the_order_of_a_gpu(tmp_path: Path) -> None:
    """Old int8 files for one kind of GPU are refused."""
    tensors = load_file(BITSANDBYTES[0].with_name("int8.safetensors"))
    del tensors["true"]
    tensors["layer.weight_format"] = torch.tensor(1, dtype=torch.uint8)
    with pytest.raises(BaseModelError, match="order"):
        saved(tmp_path, tensors)


@pytest.mark.parametrize("dtype", FP8)
def test_fp8_without_scale(dtype: torch.dtype, tmp_path: Path) -> None:
    """fp8 numbers are themselves."""
    weight = torch.randn(7, 5).to(dtype)
    base = saved(tmp_path, {"layer.weight": weight, "layer.bias": torch.zeros(7)})
    assert torch.equal(read(base), weight.float())
    assert torch.equal(read(base, start=2, stop=5), weight.float()[2:5])


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 300),
    columns=st.integers(4, 300),
    name=st.sampled_from(["layer.weight_scale", "layer.weight_scale_inv", "layer.scale_weight"]),
    sort=st.sampled_from(["tensor", "scalar", "row", "row vector", "block", "groups", "transposed row"]),
    dtype=st.sampled_from([*FP8, torch.int8]),
    data=st.data(),
)
def test_scales(
    tmp_path_factory: pytest.TempPathFactory,
    rows: int,
    columns: int,
    name: str,
    sort: str,
    dtype: torch.dtype,
    data: st.DataObject,
) -> None:
    """Any range of rows is stored numbers times scales, whatever a scale is for."""
    torch.manual_seed(rows * 1000 + columns)
    weight = (torch.randn(rows, columns) * 9).to(dtype)
    blocks = -(-rows // 128), -(-columns // 128)
    if sort == "groups" and columns % 4:
        columns = 4 * columns
        weight = (torch.randn(rows, columns) * 9).to(dtype)
    scale, spread = {
        "tensor": lambda s: (s[:1, :1].reshape(1), s[:1, :1]),
        "scalar": lambda s: (s[0, 0], s[:1, :1]),
        "row": lambda s: (s[:, :1], s[:, :1]),
        "row vector": lambda s: (s[:, 0], s[:, :1]),
        "transposed row": lambda s: (s[:1], s[:1]),
        "block": lambda s: (
            s[: blocks[0], : blocks[1]],
            s[: blocks[0], : blocks[1]].repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns],
        ),
        "groups": lambda s: (s[:, :4, None], s[:, :4].repeat_interleave(columns // 4, 1)),
    }[sort](torch.rand(rows, columns) + 0.5)
    file = tmp_path_factory.getbasetemp() / "scaled.safetensors"
    extra = {"layer.scale_input": torch.ones(1), "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    save_file({"layer.weight": weight, name: scale.contiguous(), **extra}, file)
    base = open_base([file])
    assert base.shapes == {"layer.weight": (rows, columns)}
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    wanted = (weight.float() * spread)[start:stop]
    assert torch.equal(read(base, start=start, stop=stop), wanted)


def test_scales_of_fused_experts(tmp_path: Path) -> None:
    """Experts in one fp8 tensor have blocks of their own."""
    weight = torch.randn(3, 256, 130).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, 2) + 0.5
    stored = {"layers.0.mlp.experts.gate_up_proj": weight, "layers.0.mlp.experts.gate_up_proj_scale_inv": scale}
    base = saved(tmp_path, stored)
    dense = weight.float() * scale.repeat_interleave(128, 1).repeat_interleave(128, 2)[:, :, :130]
    module = "base_model.model.layers.0.mlp.experts.2.up_proj"
    assert torch.equal(read(base, module), dense[2, 128:])


def test_scale_of_another_shape(tmp_path: Path) -> None:
    """A scale that fits no rule is an error, not a guess."""
    weight = torch.randn(10, 6).to(torch.float8_e4m3fn)
    with pytest.raises(BaseModelError, match="the shape of its scale"):
        saved(tmp_path, {"layer.weight": weight, "layer.weight_scale": torch.ones(7, 5)})


def test_scales_in_another_shard(tmp_path: Path) -> None:
    """A shard may end between a weight and its scale."""
    weight = torch.randn(4, 4).to(torch.float8_e4m3fn)
    save_file({"layer.weight": weight}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"layer.weight_scale": torch.full((1,), 3.0)}, tmp_path / "model-00002-of-00002.safetensors")
    shards = {
        "layer.weight": "model-00001-of-00002.safetensors",
        "layer.weight_scale": "model-00002-of-00002.safetensors",
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}), encoding="utf-8")
    assert torch.equal(read(open_base([tmp_path])), weight.float() * 3)


@pytest.mark.parametrize("scheme", refused._SCHEMES, ids=lambda scheme: scheme.name)
def test_refused(scheme: refused._Scheme, tmp_path: Path) -> None:
    """Packed weights that are not read are called by their name, with what to pass instead."""
    with pytest.raises(BaseModelError, match=f"packed as {scheme.name} ") as caught:
        saved(tmp_path, {f"model.layers.0.mlp.gate_proj{end}": torch.zeros(2, 2) for end in scheme.ends})
    assert "--base" in caught.value.hint


class _Malicious:
    def __reduce__(self) -> tuple[object, ...]:
        return print, ("this ran",)


def test_pickles(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .ckpt of tensors is read; one that would run code is refused, says so, and runs nothing."""
    weight = torch.randn(3, 2)
    torch.save({"state_dict": {"layer.weight": weight}, "epoch": 1}, tmp_path / "good.ckpt")
    assert torch.equal(read(open_base([tmp_path / "good.ckpt"])), weight)
    (tmp_path / "evil.ckpt").write_bytes(pickle.dumps(_Malicious()))
    with pytest.raises(BaseModelError, match="weights-only") as caught:
        open_base([tmp_path / "evil.ckpt"])
    assert ".safetensors" in caught.value.hint
    assert "this ran" not in capsys.readouterr().out
