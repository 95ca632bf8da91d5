"""Every command that a page, a help text or an example of a pipeline shows is run as it stands there."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import click
import pytest
from diffusion_runs import images, pipeline, train
from remote_servers import file_server, s3_server
from wholes import REPOSITORY

from lora_forensics.cli import main

SHOWN = re.compile(r"^(?:    |\s*- (?:run: )?)(lora-forensics (?!--version).*)$", re.MULTILINE)
INLINE = re.compile(r"`(lora-forensics [^`]+)`")
PAGES = {page.name: page for page in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))}
SAMPLE = REPOSITORY / "sample_runs" / "text_peft"


def commands(text: str) -> list[str]:
    """Command lines of indented blocks and pipelines, without comments and redirections."""
    return [re.split(r"\s+#|\s+>\s", line)[0].strip() for line in SHOWN.findall(text)]


@pytest.fixture(scope="module")
def scans(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Scans of both runs and of one, made once."""
    folder = tmp_path_factory.mktemp("scans")
    run(f"lora-forensics scan {REPOSITORY}/sample_runs --no-plots -q", folder)
    run(f"lora-forensics scan {REPOSITORY}/sample_runs/digits_kohya --out other/forensics --no-plots -q", folder)
    return folder


@pytest.fixture
def workplace(tmp_path: Path, scans: Path) -> Path:
    """A folder with what the pages speak of: runs, scans of them, samples, a scorer."""
    shutil.copytree(scans, tmp_path, dirs_exist_ok=True)
    (tmp_path / "sample_runs").symlink_to(REPOSITORY / "sample_runs", target_is_directory=True)
    for name in ("runs", "RUN"):
        (tmp_path / name).symlink_to(SAMPLE, target_is_directory=True)
    shutil.copy(SAMPLE / "held_out.txt", tmp_path / "texts.txt")
    (tmp_path / "my_score.py").write_text("import os, sys\nprint(os.path.getsize(sys.argv[1]))\n")
    return tmp_path


def run(command: str, folder: Path, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    """A command as a person would type it; a gate may be shut, nothing else may go wrong."""
    words = [sys.executable, "-m", "lora_forensics", *shlex.split(command)[1:]]
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    known = {**os.environ, "PYTHONPATH": str(REPOSITORY), "PATH": path, **(environment or {})}
    done = subprocess.run(words, cwd=folder, env=known, capture_output=True, text=True, encoding="utf-8")
    gated = done.returncode == 1 and ("--fail-on" in command or "--baseline" in command)
    assert done.returncode == 0 or gated, f"{command}: {done.stderr}"
    if gated:
        assert re.search(r"lora-forensics: \S+: [a-z-]+ \((?:warning|error)\): ", done.stderr), done.stderr
    return done


def images_and_a_pipeline(folder: Path) -> dict[str, str]:
    """A run of an image model, its whole base and images with captions."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # diffusers and transformers warn about each other
        train(pipeline(folder), folder / "IMAGE_RUN")
    images(folder / "images")
    return {}


def buckets(folder: Path, servers: ExitStack) -> dict[str, str]:
    """An S3 server with runs at s3://bucket/trainings, and a hub with their base at org/model."""
    bucket = servers.enter_context(s3_server())
    bucket.client.create_bucket(Bucket="bucket")
    for path in sorted((SAMPLE / "output").rglob("*")):
        if path.is_file():
            key = f"trainings/portrait/{path.relative_to(SAMPLE / 'output').as_posix()}"
            bucket.client.put_object(Bucket="bucket", Key=key, Body=path.read_bytes())
    address, _ = servers.enter_context(file_server(SAMPLE / "base", hub=True))
    return {**bucket.environment, "HF_ENDPOINT": address, "HF_TOKEN": "hf_x", "HF_HOME": str(folder / "home")}


@pytest.fixture
def prepare(workplace: Path) -> Iterator[Callable[[str], dict[str, str]]]:
    """What a page needs besides; gives the environment of its commands."""
    with ExitStack() as servers:

        def ready(page: str) -> dict[str, str]:
            if page == "probe.md":
                return images_and_a_pipeline(workplace)
            return buckets(workplace, servers) if page == "remote.md" else {}

        yield ready


@pytest.mark.parametrize("page", [name for name, path in PAGES.items() if commands(path.read_text("utf-8"))])
def test_the_commands_of_a_page_work(page: str, workplace: Path, prepare: Callable[[str], dict[str, str]]) -> None:
    """In their order, from the words on the page."""
    environment = prepare(page)
    shown = commands(PAGES[page].read_text("utf-8"))
    for command in shown:
        run(command, workplace, environment)


def test_commands_in_sentences_exist() -> None:
    """With the options that they are shown with; and there are such sentences."""
    assert isinstance(main, click.Group)
    found = [command for page in PAGES.values() for command in INLINE.findall(page.read_text("utf-8"))]
    assert len(found) > 5
    for command in found:
        _, name, *rest = shlex.split(command)
        if name != "--help":
            known = [option for parameter in main.commands[name].params for option in parameter.opts]
            assert all(word in known for word in rest if word.startswith("-")), command


@pytest.mark.parametrize("name", [name for name in main.commands if name not in ("formats", "metrics")])  # type: ignore[attr-defined]
def test_the_example_of_every_command_works(name: str, workplace: Path) -> None:
    """The one in its help text."""
    (example,) = re.findall(r"Example: (lora-forensics .*)", main.commands[name].help)  # type: ignore[attr-defined]
    assert example.split()[1] == name
    if name == "prune":  # the samples may have been checked out a moment ago
        example += " --min-age 0"
    assert run(example, workplace).returncode == 0


def test_every_extra_that_is_named_exists() -> None:
    """`pip install 'lora-forensics[...]'` in pages and code."""
    extras = tomllib.loads((REPOSITORY / "pyproject.toml").read_text("utf-8"))["project"]["optional-dependencies"]
    sources = [*PAGES.values(), *(REPOSITORY / "lora_forensics").rglob("*.py"), REPOSITORY / "action.yml"]
    named = {extra for path in sources for extra in re.findall(r"lora-forensics\[(\w+)\]", path.read_text("utf-8"))}
    assert named
    assert named <= set(extras)
