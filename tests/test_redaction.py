"""`--redact`: what is planted comes out of no report, and what a reader needs stays."""

from __future__ import annotations

import html
import platform
import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from cli_runs import base_model, checkpoint, peft_run
from click.testing import Result
from test_cli import LOSSES, call

from lora_forensics.records import Finding, Summary, Verdict
from lora_forensics.redaction import Redaction, label, redacted
from lora_forensics.reports import REPORTS, available

SECRETS = ("janedoe", "Jane Doe", "gpu-of-jane", "holiday", "portrait of", "hush", "/home/", "private base", "velvet")
REPORTED = [argument for name in available() for argument in ("--report", name)]


def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Result]]:
    """Runs with secrets in every place that a person names, their scan with --redact, and what was printed."""
    home = tmp_path / "home" / "janedoe"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("LOGNAME", "janedoe")
    monkeypatch.setattr(platform, "node", lambda: "gpu-of-jane.local")
    runs = home / "Jane Doe holiday"
    base_model(runs / "private base.safetensors")
    peft_run(runs / "hush_v2", base="../private base.safetensors", losses=LOSSES)
    peft_run(runs / "other holiday", base="/home/janedoe/gone/hush velvet <sofa> base.safetensors")
    (runs / "portrait of Jane Doe.safetensors").write_bytes(b"half a file")
    saved = runs / "hush_v2" / "checkpoint-70" / "adapter_model.safetensors"
    saved.write_bytes(saved.read_bytes()[:-9])
    checkpoint(runs / "hush_v2", 120, "../private base.safetensors")
    monkeypatch.chdir(runs)
    out = home / "out of janedoe"
    score = f"'{sys.executable}' -c 'print(1.5)' {{checkpoint}} --prompt 'portrait of janedoe'"
    probed = call("probe", runs / "hush_v2", "--out", out, "--score", score, "--evaluations", "2")
    assert probed.exit_code == 0, probed.output
    printed = [
        call("scan", runs, "--out", out, "--redact", *REPORTED),
        call("scan", runs, "--out", out, "--redact", "--strict", "-q"),
        call("scan", runs, "--out", out, "--redact", "--json"),
        call("report", out, "--redact", "-v", *REPORTED),
    ]
    return out, printed


def test_nothing_planted_comes_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither on the terminal nor in any file to share, names included; what a reader needs is there."""
    out, printed = planted(tmp_path, monkeypatch)
    shared = out / "redacted"
    files = [path for path in shared.rglob("*") if path.is_file()]
    assert {REPORTS[name]().filename for name in available()} - {None} <= {path.name for path in files}
    assert {path.suffix for path in files if path.parent.name == "plots"} == {".png", ".svg"}
    texts = {str(path.relative_to(shared)): path.read_bytes().decode("utf-8", "replace") for path in files}
    texts |= {str(number): result.output for number, result in enumerate(printed)}
    for name, text in texts.items():
        for secret in SECRETS:
            assert secret.lower() not in f"{name}\n{text}".lower(), (name, secret)
    page = (shared / "summary.md").read_text("utf-8")
    for part in ("peft, lora rank 2", label("run", "hush_v2"), "truncated", "Probe", "a command"):
        assert part in page, part
    assert re.search(r"step-\d+\.safetensors", page)
    assert [result.exit_code for result in printed] == [3, 2, 3, 0]
    assert label("run", "hush_v2") in printed[0].stdout
    assert "hush_v2" in (out / "summary.json").read_text("utf-8")  # the scan itself keeps its names


@pytest.mark.parametrize(
    ("sentence", "expected"),
    [
        ("the base /srv/x/y.safetensors is gone", "the base <path> is gone"),
        (r"C:\Users\Ann\x.pt is not there", "<path> is not there"),
        (r"\\server\share\x is away", "<path> is away"),
        ("see ~/lora/x and ../y and a/b/c", "see <path> and <path> and <path>"),
        ("give ann/my-model with --base", "give <path> with --base"),
        ("logged in 'portrait of ann' twice", "logged in '<text>' twice"),
        ("the run's log and the trainer's", "the run's log and the trainer's"),
        ("write ann@example.org or https://x.org/?token=1", "write <path> or <path>"),
        ("x-step00000400.safetensors = y.pt", "<file> = <file>"),
        ("'it's ann's dog' at step 4, 'x'", "'<text>' at step 4, '<text>'"),
        (r'{"tag \"ann\"": 3}', "{'<text>': 3}"),
        ("‘ann’ «ann» „ann“ “ann” 「ann」", " ".join(["'<text>'"] * 5)),
        ("no room: ann@gpu-box; 10.0.0.17:6379 and gpu.corp.example:80", "no room: <path>; <name> and <name>"),
        ("token=hf_abcdefghijklmnop was refused", "token=<name> was refused"),
        ("key 0123456789abcdef0123456789abcdef", "key <name>"),
        ("//nas/ann/x and smb:\\\\nas\\ann and file:///home/ann", "/<path> and smb:<path> and <path>"),
        (
            "versions 2.13.0 and 1.2:3, lora_unet_down_blocks_0_attn1",
            "versions 2.13.0 and 1.2:3, lora_unet_down_blocks_0_attn1",
        ),
        (
            "set --save_every_n_steps (or --save_last_n_steps/_epochs)",
            "set --save_every_n_steps (or --save_last_n_steps/_epochs)",
        ),
        ("see docs/rules.md", "see docs/rules.md"),
        ("alpha / rank of 3/4 at step 80", "alpha / rank of 3/4 at step 80"),
        ("model.layers.0.self_attn.q_proj changes nothing", "model.layers.0.self_attn.q_proj changes nothing"),
    ],
)
def test_sentences(sentence: str, expected: str) -> None:
    """Paths, files, addresses and quotations go; options, numbers, modules and our own words stay."""
    assert Redaction(Summary(())).text(sentence) == expected


def test_parts_of_known_names_go(verdict_of: Callable[[str], Verdict]) -> None:
    """A name is known by its parts, also without its number, in any case, inside of longer names."""
    hidden = Redaction(Summary((verdict_of("ann_smith-v3/output/Ann Smith-000004"),)))
    assert hidden.text("ann smith and Ann_Smith_x of output 4") == "<name> and <name>_x of output 4"


def test_labels_are_stable(verdict_of: Callable[[str], Verdict]) -> None:
    """The same name has the same label whatever else is there."""
    alone, beside = (redacted(Summary(tuple(map(verdict_of, names)))) for names in (["x"], ["y", "x"]))
    assert alone.runs[0].run == beside.runs[1].run == label("run", "x")
    assert alone.runs[0].path is None


@pytest.fixture
def verdict_of() -> Callable[[str], Verdict]:
    """Makes a small verdict for a name."""
    from tables import layers_of

    from lora_forensics.assess import assess_run

    def make(name: str) -> Verdict:
        from dataclasses import replace

        return replace(
            assess_run(layers_of({"m": [0.1, 0.2]})), run=name, findings=(Finding("x", "info", "x"),), path="/a/b"
        )

    return make


def test_pages_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages hold labels in tables and charts, and no image that the trainer sampled; the scan's own pages hold them."""
    image = pytest.importorskip("PIL.Image")
    pytest.importorskip("vl_convert")
    folder = tmp_path / "home" / "janedoe" / "Jane Doe holiday" / "hush_v2" / "samples" / "0 - portrait of Jane Doe"
    folder.mkdir(parents=True)
    image.new("RGB", (9, 9)).save(folder / "2024-01-01_12-00-00-training-sample-50-1-7.png")
    out, _ = planted(tmp_path, monkeypatch)
    own = (out / "hush_v2" / "report.html").read_text("utf-8")
    assert all(secret in own for secret in ("portrait of Jane Doe", "data:image/webp", "checkpoint-50/"))
    shared = (out / "redacted" / label("run", "hush_v2") / "report.html").read_text("utf-8")
    plain = html.unescape(re.sub(r"\\u([0-9a-f]{4})", lambda found: chr(int(found[1], 16)), shared)).lower()
    assert not [secret for secret in SECRETS if secret.lower() in plain]
    assert "data:image" not in shared.partition("</style>")[2].partition("<script>")[0]
    assert "checkpoint-50" not in shared
    assert "step-50.safetensors" in shared
    assert f'href="./{label("run", "hush_v2")}/report.html"' in (out / "redacted" / "index.html").read_text("utf-8")


def test_errors_without_a_report_are_redacted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that ends early says nothing that its report would not; without --redact it says where."""
    runs = tmp_path / "janedoe" / "hush hush"
    peft_run(runs / "one", base="../none.safetensors")
    out = tmp_path / "janedoe" / "out"
    for command in (
        ("scan", runs.parent / "missing", "--out", out),
        ("scan", runs, "--out", runs),
        ("scan", runs, "--out", out, "--base", runs / "private base.safetensors"),
        ("report", runs),
        ("compare", runs),
        ("scan", runs, "--out", out, "--baseline", runs / "none.json"),
    ):
        for secret in ("janedoe", "hush", "private"):
            result = call(*command, "--redact")
            assert result.exit_code == 2
            assert secret not in result.output
        assert "janedoe" in call(*command).output
