"""Finding the base that a run recorded, on disk and in the Hugging Face cache."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora_forensics.base_model import check_hash, find_base, open_base
from lora_forensics.errors import BaseModelError
from lora_forensics.records import BaseReference

COMMIT = "0123456789abcdef" * 2 + "01234567"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder, four levels deep."""
    folder = tmp_path / "project" / "runs" / "group" / "one"
    folder.mkdir(parents=True)
    save_file({"lora_A.weight": torch.zeros(1, 1)}, folder / "checkpoint.safetensors")
    return folder


def put(path: Path, value: float = 0.0) -> Path:
    """A tiny base model in one file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"a.weight": torch.full((2, 2), value)}, path)
    return path


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("base.safetensors", "project/runs/group/one/base.safetensors"),
        ("../base.safetensors", "project/runs/group/base.safetensors"),
        ("models/base.safetensors", "project/models/base.safetensors"),
        ("/somewhere/else/base.safetensors", "project/runs/base.safetensors"),
        (r"C:\models\base.safetensors", "project/runs/group/base.safetensors"),
        ("org/tiny", "project/tiny/model.safetensors"),
    ],
)
def test_recorded_names(name: str, place: str, tmp_path: Path, run: Path) -> None:
    """A recorded name is looked for in the run's folder and above, as written and by its last step."""
    file = put(tmp_path / place)
    base = find_base(BaseReference(name), run, tmp_path / "project" / "runs")
    assert base.files[0].samefile(file)


def test_absolute_path(tmp_path: Path, run: Path) -> None:
    """An absolute path is taken as it is."""
    file = put(tmp_path / "elsewhere" / "base.safetensors")
    assert find_base(BaseReference(str(file)), run, None).files == (file,)


def test_parents_without_a_search_root(tmp_path: Path, run: Path) -> None:
    """Three levels up are looked at whatever was searched."""
    put(tmp_path / "project" / "base.safetensors")
    assert find_base(BaseReference("base.safetensors"), run, None).shapes == {"a.weight": (2, 2)}


def test_not_above_the_search_root(tmp_path: Path, run: Path) -> None:
    """What lies above the searched folder's parent is somebody else's."""
    put(tmp_path / "base.safetensors")
    with pytest.raises(BaseModelError, match="not found"):
        find_base(BaseReference("base.safetensors"), run, tmp_path / "project" / "runs")


def test_given_wins(tmp_path: Path, run: Path) -> None:
    """What the user passes overrules the record."""
    put(run / "base.safetensors", 1.0)
    other = put(tmp_path / "other.safetensors", 2.0)
    assert find_base(BaseReference("base.safetensors"), run, None, (other,)).files == (other,)


def test_the_runs_own_folder_is_no_base(tmp_path: Path, run: Path) -> None:
    """A run named like its base is not taken for it."""
    put(run / "model.safetensors")
    with pytest.raises(BaseModelError, match="not found"):
        find_base(BaseReference("one"), run, tmp_path)


@pytest.mark.parametrize(
    "name", ["..", ".", "/", "../../../../../../..", "x" * 5000, "a\0b", "~nobody/x", "a/b/c/d", "-", "é"]
)
def test_absurd_names(name: str, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No recorded string crashes the search."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match="not found"):
        find_base(BaseReference(name), run, run.parent)


def test_download_that_fails(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A download that does not come about says why, and what to pass instead."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(BaseModelError, match=r"'nobody/such-model' cannot be downloaded: .+") as caught:
        find_base(BaseReference("nobody/such-model"), run, run.parent, download=True)
    assert "--base PATH" in caught.value.hint


def test_nothing_recorded(run: Path) -> None:
    """A run that names no base asks for --base."""
    with pytest.raises(BaseModelError, match="does not say") as caught:
        find_base(BaseReference(), run, None)
    assert "--base PATH" in caught.value.hint


def test_not_found_says_where(run: Path) -> None:
    """The hint lists what was looked at and what to pass."""
    with pytest.raises(BaseModelError, match="'nobody/such-model' not found") as caught:
        find_base(BaseReference("nobody/such-model"), run, run.parent)
    for part in (str(run / "such-model"), "the Hugging Face cache", "--base PATH", "--download"):
        assert part in caught.value.hint


@pytest.mark.parametrize(
    ("revision", "answer"), [(None, f"snapshots/{COMMIT}"), (COMMIT, f"snapshots/{COMMIT}"), ("nope", "not found")]
)
def test_hugging_face_cache(revision: str | None, answer: str, tmp_path: Path, run: Path) -> None:
    """A repository in the cache under HF_HOME is found, at its revision, without the network."""
    cache = tmp_path / "home" / "hub" / "models--org--tiny"
    put(cache / "snapshots" / COMMIT / "model.safetensors")
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text(COMMIT, encoding="utf-8")
    code = """
import sys
from pathlib import Path
from lora_forensics.base_model import find_base
from lora_forensics.errors import BaseModelError
from lora_forensics.records import BaseReference
try:
    print(find_base(BaseReference("org/tiny", sys.argv[2] or None), Path(sys.argv[1]), None).path)
except BaseModelError as error:
    print(error)
"""
    environment = {"HF_HOME": str(tmp_path / "home"), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(run), revision or ""], capture_output=True, text=True, env=environment
    )
    assert answer in Path(done.stdout.strip()).as_posix(), done.stderr


def test_hashes(tmp_path: Path) -> None:
    """Equal hashes say nothing; another short or full hash is a finding, whichever was recorded."""
    file = tmp_path / "base.safetensors"
    save_file({"a.weight": torch.randn(600, 600)}, file)
    content = file.read_bytes()
    full = hashlib.sha256(content).hexdigest()
    short = hashlib.sha256(content[0x100000:0x110000]).hexdigest()[:8]
    base = open_base([file])
    for recorded in (
        BaseReference(),
        BaseReference(sha256=full.upper(), short_hash=short),
        BaseReference(sha256=full[:10]),
    ):
        assert check_hash(base, recorded) is None
    for recorded in (
        BaseReference(sha256="0" * 64),
        BaseReference(short_hash="0" * 8),
        BaseReference(sha256="0" * 64, short_hash=short),
    ):
        finding = check_hash(base, recorded)
        assert finding is not None
        assert (finding.rule, finding.severity) == ("base-hash-differs", "warning")
        assert "00000000" in finding.message


def test_hash_of_one_of_several_files(tmp_path: Path) -> None:
    """The recorded file may be any of those given; where none has its hash, that is a finding."""
    files = [put(tmp_path / "a.safetensors"), put(tmp_path / "b.safetensors", 1.0)]
    recorded = hashlib.sha256(files[1].read_bytes()).hexdigest()
    assert check_hash(open_base(files), BaseReference(sha256=recorded)) is None
    assert check_hash(open_base(files), BaseReference(sha256="0" * 64)) is not None


def test_folders_have_no_hash(tmp_path: Path) -> None:
    """A hash is that of a file: a folder is not compared."""
    put(tmp_path / "model" / "model.safetensors")
    assert check_hash(open_base([tmp_path / "model"]), BaseReference(sha256="0" * 64)) is None


@pytest.mark.parametrize(("recorded", "differs"), [(COMMIT, False), ("f" * 40, True), ("main", False), (None, False)])
def test_revisions(recorded: str | None, differs: bool, tmp_path: Path) -> None:
    """A snapshot of another commit than the recorded one is a finding; a branch says nothing."""
    file = put(tmp_path / "models--org--tiny" / "snapshots" / COMMIT / "model.safetensors")
    for path in (file.parent, file):
        finding = check_hash(open_base([path]), BaseReference("org/tiny", recorded))
        assert (finding is not None) == differs
        if finding is not None:
            assert recorded in finding.message
