"""Held-out texts against transformers and peft themselves, on a tiny Llama that was really trained."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from factories import library, tiny_llama, tiny_tokenizer
from safetensors.torch import load_file, save_file

import lora_forensics as lf
from lora_forensics.cli import main
from lora_forensics.errors import BaseModelError, ScoreError, UsageError
from lora_forensics.probe.interface import ProbeOptions, ScorerSettings
from lora_forensics.probe.language_model import LanguageModelScorer
from lora_forensics.probe.samples import read_texts
from lora_forensics.records import Run

TEXTS = ["w1 w2 w3 w4 w5 w6", "w7 w8 w9 w10", "w2 w4 w6 w8 w10 w12 w14"]


def train(folder: Path, base: Path, **config: Any) -> None:
    """A few steps of real training, saved every second one."""
    peft = library("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
        auto = library("transformers").AutoModelForCausalLM
        model = peft.get_peft_model(auto.from_pretrained(base), peft.LoraConfig(**{**settings, **config}))
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-2)
        random = torch.Generator().manual_seed(3)
        for step in range(1, 11):
            ids = torch.randint(3, 20, (4, 8), generator=random)
            optimizer.zero_grad()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            model.save_pretrained(folder / f"checkpoint-{10 * step}")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base with its tokenizer, a run of ten checkpoints, and held-out texts."""
    folder = tmp_path_factory.mktemp("language")
    tiny_llama().save_pretrained(folder / "base")
    tiny_tokenizer().save_pretrained(folder / "base")
    torch.manual_seed(1)
    train(folder / "run", folder / "base")
    (folder / "texts.txt").write_text("\n\n".join(TEXTS))
    return folder


def run_of(folder: Path) -> Run:
    """The run in a folder."""
    (run,) = [found for found in lf.discover_runs(folder) if isinstance(found, lf.Run)]
    return run


def scorer(project: Path, texts: Path | None = None, run: Run | None = None) -> LanguageModelScorer:
    """A scorer for the project's run."""
    options = ProbeOptions(held_out=texts or project / "texts.txt", device="cpu")
    base = (project / "base" / "model.safetensors",)
    return LanguageModelScorer(ScorerSettings(options, run or run_of(project / "run"), base))


def expected(project: Path, adapter: Path, rows: Sequence[tuple[list[int], int]]) -> list[float]:
    """What a fresh model with this adapter says: transformers' own loss, in float64."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        auto = library("transformers").AutoModelForCausalLM
        model = library("peft").PeftModel.from_pretrained(auto.from_pretrained(project / "base"), adapter)
    model = model.double().eval()
    found = []
    with torch.no_grad():
        for tokens, prompt in rows:
            ids = torch.tensor([tokens])
            labels = torch.tensor([[-100] * prompt + tokens[prompt:]])
            found.append(float(model(input_ids=ids, labels=labels).loss))
    return found


def ids(text: str) -> list[int]:
    """Tokens of a text of the tiny tokenizer."""
    return [int(word[1:]) + 3 for word in text.split()]


def test_losses_are_those_of_a_fresh_model_each(project: Path) -> None:
    """Adapters are swapped in one base, in any order and again: every loss is as if it had been alone."""
    run = run_of(project / "run")
    own = scorer(project)
    for place in (3, 0, 9, 3):
        checkpoint = run.checkpoints[place]
        wanted = expected(project, checkpoint.path.parent, [(ids(text), 0) for text in TEXTS])
        assert list(own.score(checkpoint)) == pytest.approx(wanted, rel=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {"init_lora_weights": "pissa"},
        {"use_dora": True},
        {"modules_to_save": ["lm_head"]},
        {"target_modules": ["q_proj", "down_proj"], "rank_pattern": {"q_proj": 4}, "use_rslora": True},
    ],
    ids=lambda config: next(iter(config)),
)
def test_other_adapters_are_swapped_without_a_trace(project: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    """Adapters that change the base while they are loaded, magnitudes, whole layers, patterns."""
    torch.manual_seed(2)
    train(tmp_path / "run", project / "base", **config)
    run = run_of(tmp_path / "run")
    own = scorer(project, run=run)
    for checkpoint in (run.checkpoints[8], run.checkpoints[1], run.checkpoints[8]):
        wanted = expected(project, checkpoint.path.parent, [(ids(text), 0) for text in TEXTS])
        assert list(own.score(checkpoint)) == pytest.approx(wanted, rel=1e-4)


def test_prompts_are_not_scored(project: Path, tmp_path: Path) -> None:
    """Only the completion counts, and of a conversation the last message."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}w50 {{ m['content'] }} w51 {% endfor %}{% if add_generation_prompt %}w50 {% endif %}"
    )
    shutil.copytree(project / "base", tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lines = [
        {"prompt": "w1 w2 ", "completion": "w3 w4 w5"},
        {"messages": [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3"}]},
        {"prompt": [{"role": "user", "content": "w1"}], "completion": [{"role": "assistant", "content": "w3 w9"}]},
        {"text": "w1 w2"},
    ]
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    run = run_of(project / "run")
    rows = [
        (ids("w1 w2 w3 w4 w5"), 2),
        (ids("w50 w1 w2 w51 w50 w3 w51"), 5),
        (ids("w50 w1 w51 w50 w3 w9 w51"), 4),
        (ids("w1 w2"), 0),
    ]
    own = scorer(tmp_path, texts, run)
    wanted = expected(project, run.checkpoints[5].path.parent, rows)
    assert list(own.score(run.checkpoints[5])) == pytest.approx(wanted, rel=1e-4)


def test_long_texts_are_cut_and_that_is_said(project: Path, tmp_path: Path) -> None:
    """The model has 32 places."""
    texts = tmp_path / "texts.txt"
    texts.write_text(" ".join(f"w{n % 50}" for n in range(40)) + "\n\nw1 w2 w3\n")
    run = run_of(project / "run")
    own = scorer(project, texts, run)
    rows = [(ids(" ".join(f"w{n % 50}" for n in range(32))), 0), (ids("w1 w2 w3"), 0)]
    assert list(own.score(run.checkpoints[0])) == pytest.approx(
        expected(project, run.checkpoints[0].path.parent, rows), rel=1e-4
    )
    assert "1 of them cut at the model's length" in own.what
    texts.write_text(json.dumps({"prompt": " ".join(["w1"] * 40), "completion": "w2"}))
    with pytest.raises(UsageError, match="nothing to score"):
        scorer(project, texts.rename(tmp_path / "t.jsonl"), run).score(run.checkpoints[0])


def test_bytes_are_tokens_where_a_base_of_256_symbols_has_no_tokenizer(tmp_path: Path) -> None:
    """As in sample_runs/text_peft."""
    tiny_llama(vocab_size=256).save_pretrained(tmp_path / "base")
    train(tmp_path / "run", tmp_path / "base")
    (tmp_path / "texts.txt").write_text("grün und\nblau\n\n\nrot\n", "utf-8")
    run = run_of(tmp_path / "run")
    rows = [(list("grün und\nblau".encode()), 0), (list(b"rot"), 0)]
    wanted = expected(tmp_path, run.checkpoints[0].path.parent, rows)
    assert list(scorer(tmp_path).score(run.checkpoints[0])) == pytest.approx(wanted, rel=1e-4)


def test_a_broken_adapter_fails_alone(project: Path, tmp_path: Path) -> None:
    """Truncated, of another model, or with tensors missing: a reason, and the next one is scored as ever."""
    shutil.copytree(project / "run", tmp_path / "run")
    run = run_of(tmp_path / "run")
    own = scorer(project, run=run)
    good = list(scorer(project).score(run.checkpoints[4]))
    paths = [checkpoint.path for checkpoint in run.checkpoints]
    paths[0].write_bytes(paths[0].read_bytes()[:200])
    tensors = load_file(paths[1])
    save_file(dict(list(tensors.items())[:-1]), paths[1])
    save_file({name: torch.zeros(3, 3) for name in tensors}, paths[2])
    for place, said in ((0, "cannot load"), (1, "lacks 1 of"), (2, "cannot load")):
        with pytest.raises(ScoreError, match=said):
            own.score(run.checkpoints[place])
        assert list(own.score(run.checkpoints[4])) == pytest.approx(good, rel=1e-6)
    with pytest.raises(ScoreError, match=r"no adapter_config\.json"):
        own.score(replace(run.checkpoints[4], config=None))


def test_a_score_that_is_not_finite_is_none(project: Path, tmp_path: Path) -> None:
    """NaN in the adapter."""
    shutil.copytree(project / "run", tmp_path / "run")
    run = run_of(tmp_path / "run")
    path = run.checkpoints[0].path
    save_file({name: tensor * float("nan") for name, tensor in load_file(path).items()}, path)
    with pytest.raises(ScoreError, match="not finite"):
        scorer(project, run=run).score(run.checkpoints[0])


def test_a_sample_ends_where_its_line_does(tmp_path: Path) -> None:
    """As editors on Windows write files, and with separators of lines inside of a JSON text."""
    path = tmp_path / "t.jsonl"
    texts = ["w1\u2028w2", "w3\u0085w4"]
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(json.dumps({"text": t}, ensure_ascii=False) for t in texts).encode())
    assert [entry.text for entry in read_texts(path)] == texts
    path = tmp_path / "t.txt"
    path.write_bytes(b"\xef\xbb\xbfw1 w2\r\nw3\r\n\r\nw4")
    assert [entry.text for entry in read_texts(path)] == ["w1 w2\nw3", "w4"]


def test_tokens_that_the_base_does_not_have_are_no_score(project: Path, tmp_path: Path) -> None:
    """The tokenizer beside the checkpoints may know more than the base."""
    shutil.copytree(project / "run", tmp_path / "run")
    tiny_tokenizer(words=500).save_pretrained(tmp_path / "run")
    texts = tmp_path / "t.txt"
    texts.write_text("w1 w2 w400")
    run = run_of(tmp_path / "run")
    with pytest.raises(ScoreError, match="IndexError"):
        scorer(project, texts, run).score(run.checkpoints[0])


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", "\n \n", "holds no sample"),
        ("a.csv", "x", "neither"),
        ("a.jsonl", '{"text": "x"}\n{"prompt": "y"}', "line 2 is no sample"),
        ("a.jsonl", "{", "line 1 is no sample"),
        ("a.jsonl", '["x"]', "line 1 is no sample"),
        ("a.jsonl", '{"messages": []}', "line 1 is no sample"),
        ("a.jsonl", '{"text": ""}', "line 1 is no sample"),
        ("a.txt", b"\xff\xfe\x00", "not UTF-8"),
    ],
)
def test_files_that_hold_no_samples(project: Path, tmp_path: Path, name: str, content: str | bytes, said: str) -> None:
    """What is wrong, and where."""
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UsageError, match=said):
        scorer(project, tmp_path / name)


def test_a_base_that_transformers_cannot_load_is_named(project: Path, tmp_path: Path) -> None:
    """No folder of its own, or no tokenizer."""
    run = run_of(project / "run")
    options = ProbeOptions(held_out=project / "texts.txt")
    with pytest.raises(BaseModelError, match="not found"):
        LanguageModelScorer(ScorerSettings(options, run, ()))
    alone = tmp_path / "x" / "y" / "alone.safetensors"
    alone.parent.mkdir(parents=True)
    shutil.copy(project / "base" / "model.safetensors", alone)
    with pytest.raises(BaseModelError, match=r"no folder with a config\.json"):
        LanguageModelScorer(ScorerSettings(options, run, (alone,)))
    tiny_llama().save_pretrained(tmp_path / "base")
    with pytest.raises(UsageError, match="no tokenizer"):
        scorer(tmp_path, project / "texts.txt", run).score(run.checkpoints[0])


def test_the_identity_follows_texts_and_base(project: Path, tmp_path: Path) -> None:
    """Other texts or another base: other scores. The file's name does not matter."""
    shutil.copy(project / "texts.txt", tmp_path / "same.txt")
    assert scorer(project, tmp_path / "same.txt").identity == scorer(project).identity
    (tmp_path / "same.txt").write_text("w1 w2 w3")
    assert scorer(project, tmp_path / "same.txt").identity != scorer(project).identity


def test_the_command_finds_base_and_best(project: Path, tmp_path: Path) -> None:
    """From the command line: the checkpoint it keeps has the lowest mean loss of those that it scored."""
    arguments = ["probe", project / "run", "--base", project / "base", "--out", tmp_path / "out", "--device", "cpu"]
    result = CliRunner().invoke(main, [*map(str, arguments), "--held-out", str(project / "texts.txt"), "--json"])
    assert result.exit_code == 0, result.output
    (verdict,) = json.loads(result.stdout)["runs"]
    run = run_of(project / "run")
    rows = [(ids(text), 0) for text in TEXTS]
    truth = {c.name: sum(expected(project, c.path.parent, rows)) / len(rows) for c in run.checkpoints}
    scored = {entry["checkpoint"]: entry["score"] for entry in verdict["evidence"]["probe"]["evaluations"]}
    assert len(scored) == 6
    assert scored == pytest.approx({name: truth[name] for name in scored}, rel=1e-4)
    assert verdict["keep"]["checkpoint"] == min(scored, key=lambda name: truth[name])
    assert verdict["keep"]["rests_on"] == "probe"
