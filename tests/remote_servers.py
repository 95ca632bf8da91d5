"""Real servers on this machine for tests of URLs: S3 (moto's), a small Hugging Face hub, plain HTTP with ranges."""

from __future__ import annotations

import json
import logging
import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import pytest
from factories import library

BUCKET = "lora"


@dataclass(frozen=True)
class Request:
    """One line of a server's log."""

    method: str
    key: str
    ranged: bool
    status: int
    size: int
    """Bytes of the answer."""


def undisturbed(_method: str, _key: str) -> None:
    """Nothing goes wrong."""


@dataclass
class Bucket:
    """An S3 bucket, the log of its server, and what goes wrong there."""

    client: Any
    environment: dict[str, str]
    log: list[Request] = field(default_factory=list)
    refused: str = "nothing is called this"
    """Pattern of paths that are not served."""
    answer: tuple[str, str] = ("403 Forbidden", "AccessDenied")
    """What is said of them."""
    before: Callable[[str, str], None] = undisturbed
    """Called with every request, before it is answered."""

    def upload(self, folder: Path, prefix: str) -> str:
        """The URL of a copy of a folder."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and "data" not in path.relative_to(folder).parts:
                self.put(path, f"{prefix}/{path.relative_to(folder).as_posix()}")
        return f"s3://{BUCKET}/{prefix}"

    def put(self, path: Path, key: str) -> None:
        """Upload one file."""
        self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())

    def download(self, prefix: str, folder: Path) -> Path:
        """All below a prefix, as files."""
        for page in self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix + "/"):
            for entry in page.get("Contents", ()):
                path = folder / entry["Key"].removeprefix(prefix + "/")
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(self.client.get_object(Bucket=BUCKET, Key=entry["Key"])["Body"].read())
        return folder

    @contextmanager
    def watched(self) -> Iterator[list[Request]]:
        """The requests of a stretch of code."""
        self.log.clear()
        found: list[Request] = []
        yield found
        found.extend(self.log)


def downloaded(log: Iterable[Request], suffix: str = "") -> int:
    """Bytes of all files whose names end so."""
    return sum(r.size for r in log if r.method == "GET" and r.key.endswith(suffix) and r.key != f"/{BUCKET}")


@contextmanager
def s3_server() -> Iterator[Bucket]:
    """Moto's server with one bucket, and the environment in which clients find it."""
    library("moto")
    library("s3fs")
    import boto3
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server = ThreadedMotoServer("127.0.0.1", port=0, verbose=False)
    server.start()
    _, port = server.get_host_and_port()
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_MAX_ATTEMPTS": "1",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        bucket = Bucket(boto3.client("s3"), environment)
        answering: Any = server._server
        answering.app = _logged(answering.app, bucket)
        bucket.client.create_bucket(Bucket=BUCKET)
        yield bucket
        server.stop()


def _logged(application: Any, bucket: Bucket) -> Any:
    def answer(environ: dict[str, Any], start: Any) -> Any:
        method, key = environ["REQUEST_METHOD"], environ["PATH_INFO"]
        bucket.before(method, key)

        def begin(status: str, headers: list[tuple[str, str]], *rest: Any) -> Any:
            size = int(dict(headers).get("Content-Length", 0))
            bucket.log.append(Request(method, key, "HTTP_RANGE" in environ, int(status.split()[0]), size))
            return start(status, headers, *rest)

        if re.search(bucket.refused, key):
            body = f"<Error><Code>{bucket.answer[1]}</Code><Message>no</Message></Error>".encode()
            begin(bucket.answer[0], [("Content-Type", "application/xml"), ("Content-Length", str(len(body)))])
            return [] if method == "HEAD" else [body]
        return application(environ, begin)

    return answer


@contextmanager
def file_server(folder: Path, hub: bool = False) -> Iterator[tuple[str, list[str]]]:
    """A folder over HTTP with ranges, and all paths that are asked for; or as the repository `org/model` of a hub."""
    asked: list[str] = []
    commit = "0" * 40

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            asked.append(f"{self.command} {self.path} {self.headers.get('Range', '')}".strip())
            path = unquote(self.path.partition("?")[0])
            if hub and path.startswith("/api/models/org/model"):
                return self._say(200, _hub_answer(folder, path, commit), "application/json")
            if hub:
                path = re.sub(r"^/org/model/resolve/[^/]+", "", path)
            file = folder / path.strip("/")
            if not file.is_file():
                return self._say(404, b"{}", "application/json")
            return self._say(200, file.read_bytes(), "application/octet-stream")

        def _say(self, status: int, body: bytes, kind: str) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            headers = {"Content-Type": kind, "ETag": f'"{hash(body)}"', "Accept-Ranges": "bytes"}
            if wanted and status == 200:
                low, high = int(wanted[1]), min(int(wanted[2] or len(body)), len(body) - 1)
                headers["Content-Range"] = f"bytes {low}-{high}/{len(body)}"
                status, body = 206, body[low : high + 1]
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            """Quiet."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: Any, client_address: Any) -> None:
            """A client that goes away says nothing into the output of a test."""
            if not isinstance(sys.exc_info()[1], ConnectionError):
                super().handle_error(request, client_address)

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_address[1]}", asked
        server.shutdown()
        thread.join()


def _hub_answer(folder: Path, path: str, commit: str) -> bytes:
    """What a hub says of a repository and of its files."""
    listing = re.search(r"/tree/[^/]+/?(.*)", path)
    if listing is None:
        return json.dumps({"id": "org/model", "sha": commit, "siblings": [], "tags": [], "private": False}).encode()
    found: list[dict[str, Any]] = []
    for file in sorted((folder / listing[1]).rglob("*")):
        name = file.relative_to(folder).as_posix()
        kind = {"type": "directory", "size": 0} if file.is_dir() else {"type": "file", "size": file.stat().st_size}
        found.append({"path": name, "oid": f"{abs(hash(name)):040x}"[:40], **kind})
    return json.dumps(found).encode()
