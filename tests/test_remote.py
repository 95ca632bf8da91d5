"""Runs, base models and OUT at URLs: what a scan of the same files on this disk says, with few bytes and no secrets."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
from cli_runs import checkpoint, project
from click.testing import CliRunner, Result
from polars.testing import assert_frame_equal
from remote_servers import BUCKET, Bucket, downloaded, file_server, s3_server, undisturbed
from safetensors.torch import save_file
from wholes import REPOSITORY

from lora_forensics.cli import main
from lora_forensics.remote import RemotePath, fresh, local, place
from lora_forensics.remote.reading import BLOCK, session
from lora_forensics.tensors import open_tensors, read_header

TABLES = ("layers.parquet", "checkpoints.parquet", "series.parquet")


@pytest.fixture(scope="module")
def bucket() -> Iterator[Bucket]:
    """A running S3 server."""
    with s3_server() as found:
        yield found


@pytest.fixture(autouse=True)
def _mend(request: pytest.FixtureRequest) -> Iterator[None]:
    """What a test broke on the server works in the next one."""
    yield
    if "bucket" in request.fixturenames:
        found = request.getfixturevalue("bucket")
        found.refused, found.answer, found.before = Bucket.refused, Bucket.answer, undisturbed


def call(*arguments: str | Path) -> Result:
    """Run a command in this process; whatever it says, it is no traceback, and no place of ours."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert "Traceback" not in result.output
    assert "this is a bug" not in result.output
    assert str(session()) not in result.output
    return result


def program(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """The same in a process of its own."""
    known = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}
    return subprocess.run(
        [sys.executable, "-m", "lora_forensics", *arguments],
        env={**known, "PYTHONPATH": str(REPOSITORY), "NO_COLOR": "1", **environment},
        capture_output=True,
        text=True,
    )


def assert_same_tables(one: Path, two: Path) -> None:
    """Every number of two output folders is equal; only times and what depends on them are not."""
    folders = sorted(path.parent.relative_to(one) for path in one.rglob("layers.parquet"))
    assert folders == sorted(path.parent.relative_to(two) for path in two.rglob("layers.parquet"))
    assert folders
    for folder in folders:
        for name in TABLES:
            left, right = (pl.read_parquet(out / folder / name) for out in (one, two))
            aside = {"modified", "fingerprint"} & set(left.columns)
            assert_frame_equal(left.drop(aside), right.drop(aside), check_exact=True)
        keeps = [json.loads((out / folder / "verdict.json").read_text("utf-8"))["keep"] for out in (one, two)]
        assert keeps[0] == keeps[1]


def _verdict(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "verdict.json").read_text("utf-8"))


@pytest.fixture(scope="module")
def samples(bucket: Bucket) -> str:
    """The URL of real runs of kohya and of PEFT, with their base models."""
    return bucket.upload(REPOSITORY / "sample_runs", "samples")


def test_runs_reads_headers_by_ranges_and_no_tensors(bucket: Bucket, samples: str) -> None:
    """The listing is that of the disk; of each tensor file only its beginning is downloaded, and of a copy 64 KB."""
    here = call("runs", REPOSITORY / "sample_runs", "--json")
    with bucket.watched() as log:
        there = call("runs", samples, "--json")
    one, two = (json.loads(result.stdout) for result in (here, there))
    for run in (*one["runs"], *two["runs"]):
        run["path"] = Path(run["path"]).name
    assert one["runs"] == two["runs"]
    files = [f for f in (REPOSITORY / "sample_runs").rglob("*.safetensors") if "data" not in f.parts]
    assert len(files) > 90
    for file in files:
        key = f"/{BUCKET}/samples/{file.relative_to(REPOSITORY / 'sample_runs').as_posix()}"
        requests = [request for request in log if request.key == key]
        assert all(request.ranged for request in requests)
        copies = 0 if "checkpoint-" in file.as_posix() else 4 * 8 * 8192
        assert downloaded(requests) <= max(read_header(file).data_start, 16 << 10) + copies
    assert sum(request.key == f"/{BUCKET}" for request in log) == 1


def test_a_scan_of_urls_gives_the_tables_of_the_same_files_on_this_disk(
    bucket: Bucket, samples: str, tmp_path: Path
) -> None:
    """Real runs of kohya and PEFT: every number equal; bytes are read once; all that is said is the URL."""
    roots = [REPOSITORY / "sample_runs" / name for name in ("text_peft", "digits_kohya")]
    assert call("scan", *roots, "--out", tmp_path / "here", "--no-plots").exit_code == 0
    urls = [f"{samples}/{root.name}" for root in roots]
    with bucket.watched() as log:
        result = call("scan", *urls, "--out", tmp_path / "there", "--no-plots", "-v")
    assert result.exit_code == 0
    assert_same_tables(tmp_path / "here", tmp_path / "there")
    size = sum(f.stat().st_size for root in roots for f in root.rglob("*.safetensors"))
    assert downloaded(log, ".safetensors") < 1.2 * size
    for file in (tmp_path / "there").rglob("*"):
        assert not file.is_file() or str(session()).encode() not in file.read_bytes()
    verdicts = json.loads((tmp_path / "there" / "summary.json").read_text("utf-8"))["runs"]
    assert {verdict["path"] for verdict in verdicts} == {f"{url}/output" for url in urls}
    assert {verdict["base_model"]["path"] for verdict in verdicts} >= {f"{samples}/text_peft/base"}
    whole = [path for path in session().rglob("*.safetensors") if path.is_file()]
    assert not whole  # headers and stretches of the base only
    with bucket.watched() as log:
        again = call("scan", *urls, "--out", tmp_path / "there", "--no-plots")
    assert "nothing new: 93 known before" in again.output
    assert downloaded(log, ".safetensors") < size / 3  # headers: these adapters are small
    found = call("pick", urls[0], "--out", tmp_path / "there")
    assert found.output == f"{urls[0]}/output/checkpoint-80/adapter_model.safetensors\n"


def test_one_new_checkpoint_costs_one_and_a_replaced_one_is_noticed(bucket: Bucket, tmp_path: Path) -> None:
    """Fingerprints are stable between scans, and change with the content, be size, header and second the same."""
    root = project(tmp_path / "runs", count=6)
    url, out = bucket.upload(root, "growing"), tmp_path / "out"
    assert "measured 6 checkpoints" in call("scan", url, "--out", out, "--no-plots").output
    assert "nothing new: 6 known before" in call("scan", url, "--out", out, "--no-plots").output
    checkpoint(root / "run/checkpoint-70", 70, "../base.safetensors")
    state = (root / "run/checkpoint-60/trainer_state.json").read_text("utf-8")
    (root / "run/checkpoint-70/trainer_state.json").write_text(state.replace('"global_step": 60', '"global_step": 70'))
    bucket.upload(root / "run/checkpoint-70", "growing/run/checkpoint-70")
    with bucket.watched() as log:
        assert "measured 1 new checkpoint; 6 known" in call("scan", url, "--out", out, "--no-plots").output
    data = {request.key for request in log if request.key.endswith("adapter_model.safetensors")}
    assert f"/{BUCKET}/growing/run/checkpoint-70/adapter_model.safetensors" in data
    other = checkpoint(tmp_path / "other", 65)
    bucket.put(other, "growing/run/checkpoint-70/adapter_model.safetensors")
    assert "measured 1 new checkpoint; 6 known" in call("scan", url, "--out", out, "--no-plots").output


def test_out_at_a_url_is_that_on_the_disk(bucket: Bucket, tmp_path: Path) -> None:
    """Tables, reports and plots are uploaded; later commands find them; polars reads them lazily where they are."""
    root = project(tmp_path / "runs", ["a", "b"], count=10)
    url, out = bucket.upload(root, "two"), f"s3://{BUCKET}/results"
    assert call("scan", url, "--out", tmp_path / "here").exit_code == 0
    result = call("scan", url, "--out", out)
    assert result.exit_code == 0
    assert f"reports in {out}/" in result.output
    copy = bucket.download("results", tmp_path / "copy")
    names = [{f.relative_to(o).as_posix() for f in o.rglob("*") if f.is_file()} for o in (copy, tmp_path / "here")]
    assert names[0] == names[1]
    assert_same_tables(copy, tmp_path / "here")
    assert "nothing new: 20 known before" in call("scan", url, "--out", out).output
    assert call("report", out, "--window", "2").exit_code == 0
    assert _verdict(bucket.download("results", tmp_path / "again") / "a")["window"] == 2
    assert call("pick", f"{url}/a", "--out", out).stdout.startswith(f"{url}/a/checkpoint-")
    endpoint = {"aws_endpoint_url": bucket.environment["AWS_ENDPOINT_URL"], "aws_allow_http": "true"}
    rows = pl.scan_parquet(f"{out}/*/layers.parquet", storage_options=endpoint).filter(pl.col("step") == 50)
    assert rows.select("run", "module").collect().height == 2 * 3


def test_a_killed_scan_into_a_url_goes_on(bucket: Bucket, tmp_path: Path) -> None:
    """What was uploaded before the kill is not measured again, and the end is that of a scan that was left alone."""
    names = [f"run{number}" for number in range(6)]
    root = project(tmp_path / "runs", names, count=8)
    url, out = bucket.upload(root, "many"), f"s3://{BUCKET}/killed"
    stored: list[str] = []
    bucket.before = lambda method, key: stored.append(key) if method == "PUT" and "layers" in key else None
    command = [sys.executable, "-m", "lora_forensics", "scan", url, "--out", out, "--no-plots"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(stored) < 3:
        time.sleep(0.005)
    process.kill()
    assert process.wait() < 0
    result = call("scan", url, "--out", out, "--no-plots")
    known = int(result.output.split(" known before")[0].split()[-1])
    assert 16 <= known < 48
    assert f"measured {48 - known} new checkpoints" in result.output
    assert call("scan", url, "--out", tmp_path / "calm", "--no-plots").exit_code == 0
    assert_same_tables(bucket.download("killed", tmp_path / "copy"), tmp_path / "calm")


@pytest.mark.parametrize("engine", ["processes", "ray"])
def test_workers_open_urls(engine: str, bucket: Bucket, tmp_path: Path) -> None:
    """The same numbers from worker processes, and from a Ray cluster on this machine."""
    pytest.importorskip(engine) if engine == "ray" else None
    url = bucket.upload(project(tmp_path / "runs", ["a", "b"], count=6), f"engine-{engine}")
    small = ("--no-plots", "--memory", "2KB")  # several units of work a run
    assert call("scan", url, "--out", tmp_path / "serial", *small).exit_code == 0
    work = ("--engine", engine, "--workers", "2", *small)
    result = program(bucket.environment, "scan", url, "--out", str(tmp_path / "parallel"), *work)
    assert result.returncode == 0, result.stderr
    assert_same_tables(tmp_path / "serial", tmp_path / "parallel")


def test_a_pickled_path_is_opened_on_another_machine(bucket: Bucket, tmp_path: Path) -> None:
    """It carries what was listed and how to connect; nothing of this machine's disk is needed."""
    url = bucket.upload(project(tmp_path / "runs", count=1), "elsewhere")
    path = fresh(place(url)) / "run/checkpoint-10/adapter_model.safetensors"
    here = str(session()).encode()
    (tmp_path / "path").write_bytes(pickle.dumps(path).replace(here, b"/gone".ljust(len(here), b"x")))
    code = (
        "import pickle, sys; from lora_forensics.tensors import open_tensors; from lora_forensics.remote import kept\n"
        "path = pickle.load(open(sys.argv[1], 'rb')); file = open_tensors(path)\n"
        "print(path, sum(float(file.read(name).double().sum()) for name in file.infos))"
    )
    found = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "path")], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    file = open_tensors(tmp_path / "runs/run/checkpoint-10/adapter_model.safetensors")
    said, total = found.stdout.split()
    assert said == str(path)
    assert float(total) == sum(float(file.read(name).double().sum()) for name in file.infos)


def test_a_base_is_downloaded_once_however_often_it_is_read(bucket: Bucket, tmp_path: Path) -> None:
    """One checkpoint at a time, so that the base is read ten times."""
    root = project(tmp_path / "runs", count=10)
    big = {f"layer.{number}.weight": torch.randn(256, 256) for number in range(8)}
    base = tmp_path / "runs/base.safetensors"
    save_file({**_tensors(base), **big}, base)
    url = bucket.upload(root, "based")
    with bucket.watched() as log:
        assert call("scan", url, "--out", tmp_path / "out", "--no-plots", "--memory", "1").exit_code == 0
    assert downloaded(log, "base.safetensors") <= base.stat().st_size + (16 << 10)


def _tensors(path: Path) -> dict[str, torch.Tensor]:
    file = open_tensors(path)
    return {name: file.read(name) for name in file.infos}


def test_large_files_are_read_in_large_blocks(bucket: Bucket, tmp_path: Path) -> None:
    """In the file's order a few requests are enough, and jumps fetch what is asked for; the numbers are the file's."""
    tensors = {f"t{number:02}": torch.randn(1 << 18) for number in range(40)}
    save_file(tensors, tmp_path / "large.safetensors")
    bucket.put(tmp_path / "large.safetensors", "large/large.safetensors")
    size = (tmp_path / "large.safetensors").stat().st_size
    path = place(f"s3://{BUCKET}/large/large.safetensors")
    file = open_tensors(path)
    with bucket.watched() as log:
        for name in file.infos:
            assert torch.equal(file.read(name), tensors[name])
    assert len([r for r in log if r.method == "GET"]) <= size // BLOCK + 3
    assert downloaded(log) <= size
    fresh(path)
    file = open_tensors(path)
    with bucket.watched() as log:
        for name in ("t30", "t02", "t17"):
            assert torch.equal(file.read_slice(name, 0, 1000, 2000), tensors[name][1000:2000])
    assert downloaded(log) < 100_000


def test_pickles_and_databases_are_copied_when_they_are_opened(bucket: Bucket, tmp_path: Path) -> None:
    """Libraries that open files by their names get a file; what is not opened is not downloaded."""
    torch.save({"a": torch.arange(5)}, tmp_path / "x.pt")
    bucket.put(tmp_path / "x.pt", "pickles/x.pt")
    path = place(f"s3://{BUCKET}/pickles/x.pt")
    assert torch.equal(open_tensors(path).read("a"), torch.arange(5))
    assert local(path).read_bytes() == (tmp_path / "x.pt").read_bytes()


@pytest.mark.parametrize(
    ("url", "said", "hint"),
    [
        ("s3://no-such-bucket/runs", "s3://no-such-bucket/runs does not exist", "check the path"),
        (f"s3://{BUCKET}/qqq", "does not exist", "check the path"),
        ("nonsense://x/y", "nonsense://x/y: Protocol not known", "s3://"),
        ("s3://", "does not exist", "check"),
    ],
)
def test_what_cannot_be_found_is_said(url: str, said: str, hint: str, bucket: Bucket) -> None:
    """Exit code 2, what is wrong, and what to do."""
    result = call("runs", url)
    assert result.exit_code == 2
    assert said in result.output
    assert hint in result.output


def test_a_place_beside_the_one_that_is_meant_is_offered(bucket: Bucket, tmp_path: Path) -> None:
    """As for folders of this machine."""
    bucket.upload(project(tmp_path / "runs", count=2), "tests/project")
    assert f"did you mean s3://{BUCKET}/tests/project?" in call("runs", f"s3://{BUCKET}/tests/projct").output
    single = call("scan", f"s3://{BUCKET}/tests/project/run/checkpoint-10").output
    assert f"lora-forensics scan s3://{BUCKET}/tests/project/run" in single


def test_refused_places_are_said_and_refused_files_are_skipped(bucket: Bucket, tmp_path: Path) -> None:
    """403 on the bucket is an error with a hint; on one file the rest is scanned; on OUT nothing is measured."""
    url = bucket.upload(project(tmp_path / "runs", count=10), "closed")
    bucket.refused = rf"^/{BUCKET}/?$"
    result = call("scan", url, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert f"{url}: access is denied" in result.output
    assert "credentials" in result.output
    bucket.refused = "checkpoint-50/adapter_model"
    result = call("scan", url, "--out", tmp_path / "out", "--no-plots", "-v")
    assert result.exit_code == 0
    assert "access is denied" in " ".join(result.output.split())
    assert "measured 9 checkpoints" in result.output
    bucket.refused = "forbidden"
    result = call("scan", url, "--out", f"s3://{BUCKET}/forbidden")
    assert result.exit_code == 2
    assert f"s3://{BUCKET}/forbidden: access is denied" in result.output


def test_files_that_change_or_vanish_during_the_scan_are_skipped(bucket: Bucket, tmp_path: Path) -> None:
    """The rest is measured; the next scan measures what changed."""
    root = project(tmp_path / "runs", count=10)
    url = bucket.upload(root, "moving")
    changed, gone = (f"moving/run/checkpoint-{step}/adapter_model.safetensors" for step in (30, 60))
    other = checkpoint(tmp_path / "other", 33)

    def disturb(method: str, key: str) -> None:
        disturbed.append(key)
        if disturbed.count(f"/{BUCKET}/moving/run/checkpoint-20/adapter_model.safetensors") == 2 and method == "GET":
            disturbed.clear()  # its header was read before, with all others
            bucket.put(other, changed)
            bucket.client.delete_object(Bucket=BUCKET, Key=gone)

    disturbed: list[str] = []
    bucket.before = disturb
    result = call("scan", url, "--out", tmp_path / "out", "--no-plots", "-v")
    said = " ".join(result.output.split())
    assert result.exit_code == 0
    assert "changed while it was read" in said
    assert "does not exist" in said
    assert "measured 8 new checkpoints" in said
    again = call("scan", url, "--out", tmp_path / "out", "--no-plots").output
    assert "new checkpoint" in again
    assert "changed" not in again


def test_a_server_that_fails_is_no_fault_of_a_file(bucket: Bucket, tmp_path: Path) -> None:
    """The scan ends with a message, no file is taken for damaged, and the next scan measures all of them."""
    url = bucket.upload(project(tmp_path / "runs", count=10), "outage")
    bucket.refused, bucket.answer = "checkpoint-50/adapter_model", ("501 Not Implemented", "NotImplemented")
    result = call("scan", url, "--out", tmp_path / "out", "--no-plots")
    assert result.exit_code == 2
    assert f"{url}/run/checkpoint-50/adapter_model.safetensors: " in result.output
    bucket.refused = Bucket.refused
    assert "measured 10 checkpoints" in call("scan", url, "--out", tmp_path / "out", "--no-plots").output


def test_without_credentials_or_network_there_is_a_message(bucket: Bucket, tmp_path: Path) -> None:
    """Not botocore's traceback."""
    environment = {**bucket.environment, "HOME": str(tmp_path)}
    nobody = {name: value for name, value in environment.items() if "KEY" not in name}
    result = program(nobody, "runs", f"s3://{BUCKET}/x")
    assert result.returncode == 2
    assert "no credentials were found" in result.stderr
    assert "AWS_PROFILE" in result.stderr
    alone = {**environment, "AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_MAX_ATTEMPTS": "1"}
    result = program(alone, "runs", f"s3://{BUCKET}/x")
    assert result.returncode == 2
    assert "no connection to the server" in result.stderr
    assert "AWS_ENDPOINT_URL" in result.stderr
    assert len(result.stderr.splitlines()) == 2


def test_a_missing_library_is_named_with_its_extra() -> None:
    """Fsspec and s3fs are no requirements."""
    for name, url in (("fsspec", "s3://x/y"), ("s3fs", "s3://x/y"), ("huggingface_hub", "hf://org/name")):
        code = f"import sys; sys.modules[{name!r}] = None; from lora_forensics.cli import main; main(['runs', {url!r}])"
        result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY)
        assert result.returncode == 2, result.stderr
        assert "pip install 'lora-forensics[remote]'" in result.stderr


def test_a_path_of_this_machine_imports_no_library_for_urls(tmp_path: Path) -> None:
    """Nobody pays for what is not used."""
    project(tmp_path / "runs", count=2)
    code = "import sys; from lora_forensics.discovery import discover_runs; list(discover_runs(sys.argv[1]))"
    code += "; assert not {'fsspec', 's3fs', 'aiohttp', 'botocore'} & set(sys.modules)"
    code = code.replace("import sys;", "import sys, lora_forensics.scan;")
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "runs")], check=True, cwd=REPOSITORY)


def test_files_of_this_machine_by_their_url(tmp_path: Path) -> None:
    """`file://` is the path that it names."""
    project(tmp_path / "runs", count=10)
    result = call("scan", f"file://{tmp_path}/runs", "--out", f"file://{tmp_path}/out", "--no-plots")
    assert "measured 10 checkpoints" in result.output
    assert (tmp_path / "out" / "summary.json").exists()


def test_any_file_system_of_fsspec(tmp_path: Path) -> None:
    """Here the one that keeps files in memory, for runs, base and OUT."""
    import fsspec

    memory = fsspec.filesystem("memory")
    root = project(tmp_path / "runs", count=10)
    memory.put(str(root), "/work/runs", recursive=True)
    assert call("scan", root, "--out", tmp_path / "here", "--no-plots").exit_code == 0
    arguments = ("--base", "memory://work/runs/base.safetensors", "--out", "memory://work/out", "--no-plots")
    assert "measured 10 checkpoints" in call("scan", "memory://work/runs", *arguments).output
    memory.get("/work/out", str(tmp_path / "copy"), recursive=True)
    assert_same_tables(tmp_path / "here", tmp_path / "copy")
    assert "nothing new: 10 known before" in call("scan", "memory://work/runs", *arguments).output
    assert "rank 2" in call("inspect", "memory://work/runs/run/checkpoint-10").output


def test_secrets_in_urls_are_sent_and_never_said(tmp_path: Path) -> None:
    """A token in the query reaches the server, and no table, report or message."""
    root = project(tmp_path / "runs", count=10)
    with file_server(root) as (address, asked):
        url = f"{address.replace('//', '//me:hunter2@')}/base.safetensors?token=s3cr3t"
        result = call("scan", root, "--base", url, "--out", tmp_path / "out", "--report", "markdown")
        missing = call("scan", root, "--base", url.replace("base.s", "nobase.s"), "--out", tmp_path / "o2")
    assert result.exit_code == 0
    assert missing.exit_code == 2
    assert any("token=s3cr3t" in line for line in asked)
    assert any("bytes=" in line for line in asked)
    for text in (result.output, missing.output):
        assert "s3cr3t" not in text
        assert "hunter2" not in text
    for file in (tmp_path / "out").rglob("*"):
        if file.is_file():
            content = file.read_bytes()
            assert b"s3cr3t" not in content
            assert b"hunter2" not in content
    verdict = _verdict(tmp_path / "out/run")
    assert verdict["base_model"]["path"] == f"{address}/base.safetensors"


def test_a_base_model_on_the_hub_is_read_by_ranges(tmp_path: Path) -> None:
    """Through huggingface_hub's own file system, with the token of the environment."""
    root = project(tmp_path / "runs", count=10)
    (tmp_path / "hub").mkdir()
    shutil.move(root / "base.safetensors", tmp_path / "hub" / "model.safetensors")
    shutil.copy(tmp_path / "hub/model.safetensors", root / "base.safetensors")
    assert call("scan", root, "--out", tmp_path / "here", "--no-plots").exit_code == 0
    with file_server(tmp_path / "hub", hub=True) as (address, asked):
        environment = {"HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HOME": str(tmp_path / "home")}
        arguments = ("--base", "hf://org/model", "--out", str(tmp_path / "there"), "--no-plots")
        result = program(environment, "scan", str(root), *arguments)
    assert result.returncode == 0, result.stderr
    assert_same_tables(tmp_path / "here", tmp_path / "there")
    assert any("/resolve/main/model.safetensors bytes=" in line for line in asked)
    assert not any("/resolve/" in line and "bytes=" not in line and line.startswith("GET") for line in asked)


def test_paths_behave_like_paths() -> None:
    """The part of pathlib that the package uses, without a server."""
    path = place("s3://user:pass@bucket/a//b/./c.safetensors?versionId=1")
    assert isinstance(path, RemotePath)
    assert str(path) == "s3://bucket/a/b/c.safetensors" == path.as_posix()
    assert str(path.parent) == "s3://bucket/a/b"
    assert [str(parent) for parent in path.parents] == ["s3://bucket/a/b", "s3://bucket/a", "s3://bucket"]
    assert path.parents[-1].parent == path.parents[-1]
    assert str(path / "../x") == "s3://bucket/a/b/c.safetensors/../x"
    assert str((path / "../../../../../../x").resolve()) == "s3://bucket/x"
    assert path.relative_to(path.parents[1]).as_posix() == "b/c.safetensors"
    assert path.is_relative_to(path.parent)
    assert path.with_suffix(".json").name == "c.json"
    assert path == place("s3://bucket/a/b/c.safetensors")
    assert hash(path) == hash(place("s3://bucket/a/b/c.safetensors"))
    assert path.is_absolute()
    elsewhere = path / "/home/trainer/logs"
    assert str(elsewhere) == "/home/trainer/logs"
    assert not elsewhere.exists()
    assert place("hf://org/name@refs/pr/1/x").as_posix() == "hf://org/name@refs/pr/1/x"
    assert os.path.commonpath([os.fspath(place("s3://bucket/../../../etc/passwd")), session()]) == str(session())
    assert isinstance(place("C:/runs"), Path)
    assert not isinstance(place("C:/runs"), RemotePath)
