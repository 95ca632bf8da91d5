"""Headers, damaged files, pickles that are refused, equal contents."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from lora_forensics.errors import CheckpointError
from lora_forensics.tensors import TensorUnion, open_tensors, read_header, same_content


def _header(shape: list[int], offsets: list[int]) -> bytes:
    """A file that claims one tensor of this shape in 16 bytes."""
    text = json.dumps({"x": {"dtype": "F32", "shape": shape, "data_offsets": offsets}}).encode()
    return len(text).to_bytes(8, "little") + text + bytes(16)


DAMAGED = Path(__file__).parent / "data" / "damaged"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A small safetensors file with metadata."""
    path = tmp_path / "a.safetensors"
    save_file({"x": torch.arange(12.0).reshape(3, 4), "y": torch.ones(2, dtype=torch.bfloat16)}, path, {"who": "me"})
    return path


def test_a_header_tells_types_shapes_and_metadata(file: Path) -> None:
    """All that discovery needs, without torch."""
    header = read_header(file)
    assert {name: (info.dtype, info.shape) for name, info in header.infos.items()} == {
        "x": ("F32", (3, 4)),
        "y": ("BF16", (2,)),
    }
    assert header.metadata == {"who": "me"}


def test_slices_are_those_of_the_whole_tensor(file: Path) -> None:
    """Along both axes."""
    tensors = open_tensors(file)
    whole = tensors.read("x")
    assert torch.equal(tensors.read_slice("x", 0, 1, 3), whole[1:3])
    assert torch.equal(tensors.read_slice("x", 1, 1, 3), whole[:, 1:3])


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"", "empty"),
        (b"abc", "3 bytes"),
        (b"\xff" * 40, "does not start with"),
        (b"\x10" + bytes(7) + b"{}", "truncated inside its header"),
        ((2).to_bytes(8, "little") + b"[]", "not a safetensors header"),
        ((4).to_bytes(8, "little") + b"nope", "not a safetensors header"),
        ((13).to_bytes(8, "little") + b'{"x":{"a":1}}', "not a safetensors header"),
        *(
            (_header(shape, offsets), "not a safetensors header")
            for shape, offsets in (
                ([-2, -2], [0, 16]),
                ([2**62, 2**62], [0, 16]),
                ([2], [-16, 0]),
                ([99], [8, 16]),
                ([4], [16, 0]),
            )
        ),
    ],
)
def test_damage_is_named(content: bytes, word: str, tmp_path: Path) -> None:
    """Every kind of damage has its own words, with the file's name."""
    path = tmp_path / "broken.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=word) as caught:
        read_header(path)
    assert "broken.safetensors" in caught.value.message


@given(cut=st.integers(1, 100))
def test_every_truncation_is_noticed(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """However many bytes are missing."""
    path = tmp_path_factory.mktemp("cut") / "a.safetensors"
    save_file({"x": torch.ones(64)}, path)
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(CheckpointError):
        read_header(path)


@given(st.binary(max_size=200))
def test_any_bytes_give_a_header_or_the_one_error(content: bytes) -> None:
    """No other exception leaves the parser."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "any.safetensors"
        path.write_bytes(content)
        with contextlib.suppress(CheckpointError):
            read_header(path)


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    """JSON can spell lone surrogates; nothing behind could print or store them."""
    raw = json.dumps({"\udcff": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]}}).encode()
    path = tmp_path / "odd.safetensors"
    path.write_bytes(len(raw).to_bytes(8, "little") + raw)
    with pytest.raises(CheckpointError):
        read_header(path)


def test_pickles_are_read_with_weights_only(tmp_path: Path) -> None:
    """A plain state dict is fine, nested or not."""
    for number, saved in enumerate(({"x": torch.ones(2)}, {"state_dict": {"x": torch.ones(2)}, "step": 3})):
        path = tmp_path / f"{number}.bin"
        torch.save(saved, path)
        assert torch.equal(open_tensors(path).read("x"), torch.ones(2))


def test_a_pickle_that_would_run_code_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The payload of the corpus does not run."""
    monkeypatch.chdir(tmp_path)
    (path,) = (DAMAGED / "malicious_pickle").rglob("*.bin")
    with pytest.raises(CheckpointError, match="weights-only"):
        open_tensors(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("content", "word"),
    [
        ({"state_dict": [1]}, None),
        ([torch.ones(2)], None),
        ({"x": torch.eye(2).to_sparse()}, "sparse"),
        ({"x": torch.ones(2, device="meta")}, "without numbers"),
    ],
)
def test_pickles_of_something_else(content: object, word: str | None, tmp_path: Path) -> None:
    """Hold no tensors, or tensors that are refused."""
    torch.save(content, tmp_path / "a.pt")
    if word is None:
        assert open_tensors(tmp_path / "a.pt").infos == {}
    else:
        with pytest.raises(CheckpointError, match=word):
            open_tensors(tmp_path / "a.pt")


def test_equal_content_ignores_metadata_only(file: Path, tmp_path: Path) -> None:
    """Kohya writes one state twice with other metadata; another number is another content."""
    tensors = {"x": torch.arange(12.0).reshape(3, 4), "y": torch.ones(2, dtype=torch.bfloat16)}
    copy, other = tmp_path / "copy.safetensors", tmp_path / "other.safetensors"
    save_file(tensors, copy, {"who": "you, and longer"})
    save_file({**tensors, "y": torch.zeros(2, dtype=torch.bfloat16)}, other, {"who": "me"})
    assert same_content(file, copy)
    assert not same_content(file, other)
    assert not same_content(file, tmp_path / "missing.safetensors")


def test_a_change_between_the_sampled_blocks_is_noticed(tmp_path: Path) -> None:
    """The spread blocks are only the quick way to a no."""
    long = torch.zeros(1_000_000)
    save_file({"x": long}, tmp_path / "a.safetensors")
    long[12_345] = 1
    save_file({"x": long}, tmp_path / "b.safetensors")
    assert not same_content(tmp_path / "a.safetensors", tmp_path / "b.safetensors")


def test_a_union_reads_every_name_from_its_own_file(file: Path, tmp_path: Path) -> None:
    """Prefixes of components, shards without one."""
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    union = TensorUnion({"one/#0": open_tensors(file), "two/#1": open_tensors(tmp_path / "b.safetensors")})
    assert set(union.infos) == {"one/x", "one/y", "two/x"}
    assert union.read("two/x").shape == (1,)
    assert torch.equal(union.read_slice("one/x", 0, 0, 1), open_tensors(file).read("x")[:1])


def test_headers_need_no_torch() -> None:
    """Discovery reads headers; torch must not be loaded for it."""
    import subprocess

    code = "import sys, lora_forensics.discovery, lora_forensics.listing; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_tensors_are_the_same_where_the_system_reads_into_one_place_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows and old macOS have no `preadv`: the same numbers, and a file that ends too early is still told."""
    tensors = {name: torch.randn(3, size) for name, size in (("a", 5), ("b", 1), ("c", 0), ("d", 7))}
    save_file(tensors, tmp_path / "x.safetensors")
    monkeypatch.delattr(os, "preadv", raising=False)
    path = tmp_path / "x.safetensors"
    file = open_tensors(path)
    assert all(torch.equal(file.read(name), tensor) for name, tensor in tensors.items())
    whole = {name: bytearray(tensor.nbytes) for name, tensor in tensors.items()}
    file.read_into({name: memoryview(target) for name, target in whole.items()})
    assert all(whole[name] == tensor.numpy().tobytes() for name, tensor in tensors.items())
    with path.open("r+b") as cut:  # after its header was read
        cut.truncate(path.stat().st_size - 4)
    with pytest.raises(CheckpointError, match="ends inside"):
        file.read_into({name: memoryview(target) for name, target in whole.items()})
