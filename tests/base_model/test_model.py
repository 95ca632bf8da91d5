"""Opening base models from real files, and reading their rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_forensics.base_model import BaseModel, open_base
from lora_forensics.errors import BaseModelError
from lora_forensics.records import RowSlice, WeightRef

OPEN_CLIP = "conditioner.embedders.1.model."


def weight(base: BaseModel, module: str) -> tuple[WeightRef, torch.Tensor]:
    """The reference for a module and all its rows."""
    ref = base.resolve({module: (None, None)})[module]
    assert isinstance(ref, WeightRef), ref
    return ref, base.rows(ref, 0, base.shape(ref)[0])


@pytest.fixture
def tensors() -> dict[str, torch.Tensor]:
    """Two matrices, a kernel and a vector."""
    torch.manual_seed(0)
    shapes = {"a.weight": (6, 4), "b.weight": (5, 4), "conv.weight": (6, 2, 3, 3), "norm.weight": (6,)}
    return {name: torch.randn(shape) for name, shape in shapes.items()}


def sharded(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One shard a tensor, and the index."""
    folder.mkdir(parents=True)
    shards = {name: f"model-{n:05}-of-{len(tensors):05}.safetensors" for n, name in enumerate(tensors, start=1)}
    for name, shard in shards.items():
        save_file({name: tensors[name]}, folder / shard)
    index = json.dumps({"metadata": {}, "weight_map": shards})
    (folder / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    return folder


def test_single_file(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shapes are those of the file; rows are read in the stored type, kernels flattened, vectors as one column."""
    save_file({name: tensor.half() for name, tensor in tensors.items()}, tmp_path / "base.safetensors")
    base = open_base([tmp_path / "base.safetensors"])
    assert base.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        ref = WeightRef((RowSlice(name),))
        wanted = tensor.half().reshape(len(tensor), -1)
        assert base.shape(ref) == tuple(wanted.shape)
        assert base.dtype(ref) == "F16"
        assert torch.equal(base.rows(ref, 1, 4), wanted[1:4])


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_rows_are_those_of_the_stacked_weight(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Any range of rows of any stack of slices, transposed or not, equals the same range of the dense weight."""
    dense = {"a.weight": torch.arange(24.0).reshape(6, 4), "b.weight": torch.arange(20.0).reshape(5, 4) + 100}
    file = tmp_path_factory.getbasetemp() / "stacked.safetensors"
    save_file(dense, file)
    parts = []
    for name in data.draw(st.lists(st.sampled_from(sorted(dense)), min_size=1, max_size=3)):
        start = data.draw(st.integers(0, len(dense[name]) - 1))
        rows = (start, data.draw(st.integers(start + 1, len(dense[name]))))
        parts.append(RowSlice(name, data.draw(st.sampled_from([None, rows]))))
    ref = WeightRef(tuple(parts), transposed=data.draw(st.booleans()))
    whole = torch.cat([dense[part.tensor][slice(*(part.rows or (None,)))] for part in parts])
    whole = whole.T if ref.transposed else whole
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.integers(start + 1, len(whole)))
    base = open_base([file])
    assert base.shape(ref) == tuple(whole.shape)
    assert torch.equal(base.rows(ref, start, stop), whole[start:stop])


def test_sharded_folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Shards are one model, whatever file a tensor lies in."""
    base = open_base([sharded(tmp_path / "model", tensors)])
    assert base.shapes.keys() == tensors.keys()
    assert torch.equal(weight(base, "b")[1], tensors["b.weight"])


def test_missing_shard(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The missing shard is named, with what to do."""
    folder = sharded(tmp_path / "model", tensors)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(BaseModelError, match=r"1 of 4 shards missing: model-00002-of-00004") as caught:
        open_base([folder])
    assert "download" in caught.value.hint


def test_truncated_shard(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The damaged shard is named, with what to do."""
    shard = sharded(tmp_path / "model", tensors) / "model-00002-of-00004.safetensors"
    shard.write_bytes(shard.read_bytes()[:-8])
    with pytest.raises(BaseModelError, match=r"model-00002-of-00004.safetensors: truncated") as caught:
        open_base([tmp_path / "model"])
    assert "again" in caught.value.hint


@pytest.mark.parametrize("text", ["[]", '{"weight_map": {"a": 5}}'])
def test_broken_index(text: str, tmp_path: Path) -> None:
    """An index that is no index is told."""
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(BaseModelError, match="not an index of shards"):
        open_base([tmp_path])


def test_pickle_folder(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A folder with pytorch_model.bin is read too."""
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    assert torch.equal(weight(open_base([tmp_path]), "a")[1], tensors["a.weight"])


def test_diffusers_folder(tmp_path: Path) -> None:
    """A real pipeline folder: names carry their component, and of several variants the plain one is read."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8, attention_head_dim=2,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )  # fmt: skip
    unet.save_pretrained(tmp_path / "unet")
    unet.half().save_pretrained(tmp_path / "unet", variant="fp16")
    (tmp_path / "safety_checker").mkdir()
    save_file({"x.weight": torch.zeros(1)}, tmp_path / "safety_checker" / "model.safetensors")
    (tmp_path / "model_index.json").write_text("{}", encoding="utf-8")
    base = open_base([tmp_path])
    assert base.shapes == {f"unet/{name}": tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    ref, rows = weight(base, "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q")
    assert base.dtype(ref) == "F32"
    assert torch.equal(rows.half(), unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight)
    for sgm, module in {
        "input_blocks_1_1_proj_in": "down_blocks.0.attentions.0.proj_in",
        "input_blocks_2_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_2_out_layers_3": "mid_block.resnets.1.conv2",
        "output_blocks_1_1_conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks_3_0_skip_connection": "up_blocks.1.resnets.1.conv_shortcut",
    }.items():
        rows = weight(base, f"lora_unet_{sgm}")[1]
        assert torch.equal(rows.half(), unet.get_submodule(module).weight.flatten(1)), module


def test_several_files(tmp_path: Path) -> None:
    """Denoiser and two CLIPs in files of their own are one model; equal names are told apart by the files' names."""
    name = "text_model.encoder.layers.0.mlp.fc1.weight"
    clips = {"clip_l": torch.randn(8, 2), "clip_g": torch.randn(8, 2)}
    for stem, tensor in clips.items():
        save_file({name: tensor}, tmp_path / f"{stem}.safetensors")
    save_file({"double_blocks.0.img_mlp.0.weight": torch.zeros(4, 4)}, tmp_path / "flux.safetensors")
    base = open_base([tmp_path / f"{stem}.safetensors" for stem in ("flux", "clip_l", "clip_g")])
    assert len(base.shapes) == 3
    assert torch.equal(weight(base, "lora_te2_text_model_encoder_layers_0_mlp_fc1")[1], clips["clip_g"])


def test_two_denoisers_in_files(tmp_path: Path) -> None:
    """Of two denoisers in files of their own the second is known by its file name, whatever the order."""
    name = "blocks.0.ffn.0.weight"
    files = {"wan2.2_low_noise_14B": 2.0, "wan2.2_high_noise_14B": 1.0}
    for stem, value in files.items():
        save_file(
            {name: torch.full((4, 2), value), "head.modulation": torch.ones(1, 2)}, tmp_path / f"{stem}.safetensors"
        )
    base = open_base([tmp_path / f"{stem}.safetensors" for stem in files])
    for number in (1, 2):
        rows = weight(base, f"diffusion_model.transformer_{number}.blocks.0.ffn.0")[1]
        assert torch.equal(rows, torch.full((4, 2), float(number)))


@pytest.mark.parametrize("transformer", ["file", "folder", "all"])
@pytest.mark.parametrize("encoders", ["files", "folders", "shards", "wan"])
def test_combinations_of_layouts(transformer: str, encoders: str, tmp_path: Path) -> None:
    """Denoiser and text encoders come together from files, folders and shards, however each names its weights."""
    block = "model.diffusion_model." if transformer == "all" else ""
    native = {f"{block}blocks.0.self_attn.q.weight": torch.randn(8, 8), f"{block}head.modulation": torch.randn(1, 2, 8)}
    wanted = {"diffusion_model.blocks.0.self_attn.q": next(iter(native.values()))}
    if transformer == "folder":
        (tmp_path / "transformer").mkdir()
        save_file(native, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
        paths = [tmp_path / "transformer"]
    else:
        save_file(native, tmp_path / "wan.safetensors")
        paths = [tmp_path / "wan.safetensors"]
    clip = {
        "embeddings.token_embedding.weight": torch.randn(9, 8),
        "encoder.layers.0.self_attn.q_proj.weight": torch.randn(8, 8),
    }
    t5 = {"shared.weight": torch.randn(9, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": torch.randn(6, 8)}
    umt5 = {"token_embedding.weight": torch.randn(9, 8), "blocks.0.attn.q.weight": torch.randn(8, 8)}
    wanted["lora_te1_text_model_encoder_layers_0_self_attn_q_proj"] = clip["encoder.layers.0.self_attn.q_proj.weight"]
    second = {"lora_te3_encoder_block_0_layer_0_SelfAttention_q": t5["encoder.block.0.layer.0.SelfAttention.q.weight"]}
    for stem, tensors in {"clip": clip, "t5": umt5 if encoders == "wan" else t5}.items():
        if encoders in ("files", "wan"):
            save_file(tensors, tmp_path / f"{stem}.safetensors")
            paths.append(tmp_path / f"{stem}.safetensors")
        elif encoders == "shards":
            paths.append(sharded(tmp_path / stem, tensors))
        else:
            (tmp_path / stem).mkdir()
            save_file(tensors, tmp_path / stem / "model.safetensors")
            paths.append(tmp_path / stem)
    if encoders == "wan":
        second = {"lora_te_blocks_0_attn_q": umt5["blocks.0.attn.q.weight"]}
    for order in (paths, paths[::-1]):
        base = open_base(order)
        for module, true in {**wanted, **second}.items():
            assert torch.equal(weight(base, module)[1], true), module


def test_conv1d_of_gpt2(tmp_path: Path) -> None:
    """GPT-2's Conv1D is read as out x in, in ranges too; its embedding stays vocabulary x width."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=11, n_positions=7))
    model.save_pretrained(tmp_path)
    base = open_base([tmp_path])
    block = model.transformer.h[0]
    for module, linear in (("attn.c_attn", block.attn.c_attn), ("attn.c_proj", block.attn.c_proj)):
        ref, rows = weight(base, f"base_model.model.transformer.h.0.{module}")
        assert ref.transposed
        assert torch.equal(rows, linear.weight.T)
        assert torch.equal(base.rows(ref, 2, 5), linear.weight.T[2:5])
    ref, rows = weight(base, "base_model.model.transformer.wte")
    assert ref.transposed
    assert ref.embedding
    assert base.shape(ref) == (11, 8)
    assert torch.equal(rows, model.transformer.wte.weight)


def test_open_clip_slices(tmp_path: Path) -> None:
    """Query, key and value of OpenCLIP are the rows of in_proj_weight that diffusers' converter puts there."""
    from types import SimpleNamespace

    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    block = f"{OPEN_CLIP}transformer.resblocks.0."
    shapes = {"attn.in_proj_weight": (24, 8), "attn.out_proj.weight": (8, 8), "mlp.c_fc.weight": (32, 8)}
    native = {block + name: torch.randn(shape) for name, shape in shapes.items()}
    native |= {f"{OPEN_CLIP}text_projection": torch.randn(8, 8), f"{OPEN_CLIP}ln_final.weight": torch.randn(8)}
    save_file(native, tmp_path / "sdxl.safetensors")
    base = open_base([tmp_path / "sdxl.safetensors"])
    converted = convert_open_clip_checkpoint(SimpleNamespace(config=SimpleNamespace()), native, prefix=OPEN_CLIP)
    for module in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"):
        path = f"text_model.encoder.layers.0.{module}"
        rows = weight(base, f"lora_te2_{path.replace('.', '_')}")[1]
        assert torch.equal(rows, converted[f"{path}.weight"]), module
    rows = weight(open_base(base.paths), "lora_te2_text_projection")[1]
    assert torch.equal(rows, converted["text_projection.weight"])


def test_fused_and_swapped_modules(tmp_path: Path) -> None:
    """A fused module on a split base is stacked in its own order; exchanged halves of a modulation are put back."""
    blocks = "transformer_blocks.0."
    names = [f"{blocks}attn.{name}.weight" for name in ("to_v", "to_q", "to_k")]
    split = {name: torch.randn(4, 4) for name in [*names, "norm_out.linear.weight", f"{blocks}ff.net.0.proj.weight"]}
    (tmp_path / "transformer").mkdir()
    save_file(split, tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    base = open_base([tmp_path])
    modules = {"lora_unet_double_blocks_0_img_attn_qkv": (12, 4), "lora_unet_final_layer_adaLN_modulation_1": (4, 4)}
    qkv, modulation = base.resolve(modules).values()
    assert isinstance(qkv, WeightRef)
    assert isinstance(modulation, WeightRef)
    wanted = torch.cat([split[f"{blocks}attn.to_{letter}.weight"] for letter in "qkv"])
    assert torch.equal(base.rows(qkv, 3, 9), wanted[3:9])
    assert torch.equal(base.rows(modulation, 0, 4), split["norm_out.linear.weight"].roll(2, 0))


def test_resolution_is_kept(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """A second adapter on the same base costs a look-up."""
    save_file(tensors, tmp_path / "base.safetensors")
    base = open_base([tmp_path / "base.safetensors"])
    modules: dict[str, tuple[int | None, int | None]] = {"a": (6, 4), "nowhere": (1, 1)}
    assert base.resolve(modules) == base.resolve(modules)


def test_fingerprint_follows_the_files(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """The fingerprint stays while the files do and changes when one does."""
    folder = sharded(tmp_path / "model", tensors)
    first = open_base([folder]).fingerprint
    assert open_base([folder]).fingerprint == first
    save_file({"a.weight": tensors["a.weight"].half()}, folder / "model-00001-of-00004.safetensors")
    assert open_base([folder]).fingerprint != first


def test_adapter_folder_is_no_base(tmp_path: Path) -> None:
    """A real PEFT folder given as base is called what it is."""
    from peft import LoraConfig

    LoraConfig(target_modules=["c_attn"]).save_pretrained(tmp_path)
    save_file({"base_model.model.c_attn.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(BaseModelError, match="this is an adapter") as caught:
        open_base([tmp_path])
    assert "diffusers folder" in caught.value.hint


@pytest.mark.parametrize("files", [(), ("a.safetensors", "b.safetensors"), ("readme.txt",)])
def test_other_folders_are_no_base(tmp_path: Path, files: tuple[str, ...]) -> None:
    """A folder of something else is an error that says what is expected."""
    for name in files:
        save_file({"x": torch.zeros(1)}, tmp_path / name)
    with pytest.raises(BaseModelError, match="not a base model") as caught:
        open_base([tmp_path])
    assert "expected" in caught.value.hint


def test_nothing_there(tmp_path: Path) -> None:
    """A path that does not exist, an unknown kind of file and an empty list are errors of the base model."""
    (tmp_path / "notes.txt").write_text("hello", encoding="utf-8")
    for paths in ([tmp_path / "missing"], [tmp_path / "notes.txt"], []):
        with pytest.raises(BaseModelError):
            open_base(paths)
