"""From a URL to the fsspec file system that serves it; what goes wrong there, in words; and what must not be said."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lora_forensics.errors import RemoteError, UsageError

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+)://(?P<rest>.*)", re.DOTALL)
_AT_IS_A_REVISION = ("hf",)
"""Schemes in which `name@...` is no user."""
_EXTRA = "pip install 'lora-forensics[remote]'"

_users: dict[str, str] = {}
"""Scheme and host to `user:password@`: needed to connect, never said."""
_queries: dict[str, str] = {}
"""URL to its `?query`, which may hold a token; for everything below it too."""

_SECRETS = (
    (re.compile(r"(://)[^/\s@'\"]+@"), r"\1"),
    (re.compile(r"(://[^\s?'\"]*)\?[^\s'\")]*"), r"\1"),
)

_CREDENTIALS = "check the credentials (AWS_PROFILE, AWS_ACCESS_KEY_ID, HF_TOKEN, ...), and what they may read and write"
_NETWORK = "check the network, and the endpoint if you set one (AWS_ENDPOINT_URL, HF_ENDPOINT)"
_AGAIN = "run the same command again: what is finished is kept"

_TROUBLES: tuple[tuple[frozenset[str], type[OSError] | None, int, str, str], ...] = (
    (
        frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError", "ProfileNotFound",
                   "TokenRetrievalError", "SSOTokenLoadError", "UnauthorizedSSOTokenError"}),
        PermissionError, errno.EACCES, "no credentials were found", _CREDENTIALS,
    ),
    (frozenset({"FileExpired"}), OSError, errno.EIO, "changed while it was read", _AGAIN),
    (
        frozenset({"RepositoryNotFoundError", "GatedRepoError"}),
        PermissionError, errno.EACCES, "there is no such repository, or it may not be read", _CREDENTIALS,
    ),
    (frozenset({"PermissionError"}), PermissionError, errno.EACCES, "access is denied", _CREDENTIALS),
    (frozenset({"FileNotFoundError"}), FileNotFoundError, errno.ENOENT, "does not exist", "check the URL"),
    (
        frozenset({"EndpointConnectionError", "ConnectionError", "ClientConnectorError", "ConnectTimeoutError",
                   "ReadTimeoutError", "TimeoutError", "TransportError", "HTTPClientError", "gaierror",
                   "FSTimeoutError", "ClientConnectionError", "ConnectionClosedError", "OfflineModeIsEnabled"}),
        None, 0, "no connection to the server", _NETWORK,
    ),
)  # fmt: skip
"""Names of other libraries' errors, by which these need not be imported, and what they mean; the first that fits.
None is a `RemoteError`: the file is not to blame, and is not skipped."""


def is_url(text: object) -> bool:
    """Whether it is written as `scheme://...`; a drive of Windows has one letter."""
    return isinstance(text, str) and _URL.match(text) is not None


def cleaned(url: str) -> str:
    """The URL as it may be said, and as a key: without user, password, query and a slash at its end.

    What is left out is remembered, and sent to the server again.
    """
    match = _URL.match(url)
    if match is None:
        raise UsageError(f"{said(url)} is no URL", "write it as s3://bucket/folder")
    scheme, rest = match["scheme"].lower(), match["rest"]
    rest, mark, query = rest.partition("?")
    host, slash, path = rest.partition("/")
    if "@" in host and scheme not in _AT_IS_A_REVISION:
        user, _, host = host.rpartition("@")
        _users[f"{scheme}://{host}"] = f"{user}@"
    path = "/".join(part for part in path.split("/") if part not in ("", "."))
    clean = f"{scheme}://{host}{slash if path else ''}{path}"
    if mark:
        _queries[clean] = mark + query
    return clean


def secrets_of(url: str) -> tuple[str, str]:
    """User and query that go with a clean URL, for a worker elsewhere."""
    head, _, rest = url.partition("://")
    user = _users.get(f"{head}://{rest.partition('/')[0]}", "")
    return user, next((query for known, query in _queries.items() if url == known or url.startswith(known + "/")), "")


def remember(url: str, user: str, query: str) -> None:
    """The inverse of `secrets_of`."""
    head, _, rest = url.partition("://")
    if user:
        _users[f"{head}://{rest.partition('/')[0]}"] = user
    if query:
        _queries[url] = query


def filesystem(url: str) -> tuple[Any, str]:
    """The fsspec file system of a clean URL, and the URL's path in it.

    Raises:
        UsageError: a library is missing, or the scheme is not known.
        OSError: it cannot be reached.
    """
    try:
        from fsspec.core import url_to_fs
    except ImportError as error:
        raise UsageError(f"{url}: URLs need the library fsspec", _EXTRA) from error
    head, _, rest = url.partition("://")
    user, query = secrets_of(url)
    with explained(url):
        try:
            found, path = url_to_fs(f"{head}://{user}{rest}{query}")
        except ImportError as error:
            raise UsageError(f"{url}: {said(str(error))}", _EXTRA) from error
        except ValueError as error:
            raise UsageError(f"{url}: {said(str(error))}", "s3://, hf://, gs://, ... are known") from error
    return found, path


def said(text: str) -> str:
    """Text of another library, in one line and without what URLs in it may carry."""
    for pattern, kept in _SECRETS:
        text = pattern.sub(kept, text)
    lines = text.strip().splitlines()
    return lines[0][:200] if lines else ""


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Whatever a file system raises says what is wrong: none of it is a bug of ours.

    Raises:
        OSError: about this file, with the reason in `strerror`; FileNotFoundError and PermissionError where it is that.
        RemoteError: about the server or the way to it.
    """
    try:
        yield
    except (UsageError, RemoteError):
        raise
    except OSError as error:
        if error.filename == url and error.strerror:  # one of ours
            raise
        raise _explain(url, error) from error
    except Exception as error:  # every file system, and each library below it, has errors of its own
        raise _explain(url, error) from error


def _explain(url: str, error: Exception) -> OSError | RemoteError:
    chain: list[BaseException] = [error]
    while (cause := chain[-1].__cause__) is not None and len(chain) < 8:
        chain.append(cause)
    names = [{kind.__name__ for kind in type(link).__mro__} for link in chain]
    status = getattr(error, "status", None) or getattr(getattr(error, "response", None), "status_code", None)
    for known, kind, number, message, hint in _TROUBLES:
        if any(known & link for link in names) or (kind is PermissionError and status in (401, 403)):
            if kind is None:
                return RemoteError(f"{url}: {message}", hint)
            found = kind(number, message, url)
            found.add_note(hint)
            return found
    return RemoteError(f"{url}: {type(error).__name__}: {said(str(error))}", _AGAIN)


def hint_of(error: OSError) -> str:
    """What to try, of an error that `explained` raised."""
    return next(iter(getattr(error, "__notes__", ())), "")
