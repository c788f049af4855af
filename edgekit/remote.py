"""Files of an artifact that lie elsewhere: on any static web server, or in a folder of this system.

Nothing a server says is believed: answers must be the bytes that were asked for, of a file that has
not changed since the first request, and what they hold is checked against hashes by the caller.
"""

import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import requests

from edgekit.checkpoint import contained
from edgekit.errors import EdgekitError, RefusedError, UsageError
from edgekit.manifest import MANIFEST_NAME
from edgekit.progress import Progress
from edgekit.sizes import format_size

BLOCK = 1 << 16  # bytes; what a cut connection may lose at most
TIMEOUT = (10.0, 30.0)  # seconds to connect, and between two packets
MAX_REDIRECTS = 10
BUSY = {408, 425, 429, 500, 502, 503, 504}  # may pass by itself


class CutError(EdgekitError):
    """The connection broke or the server is busy; what came so far is good."""


class Source(Protocol):
    """Where the files of one artifact are.

    Attributes:
        n_read: Bytes of content that came so far.
    """

    n_read: int

    def small(self, name: str, most: int) -> bytes:
        """All of the file ``name``, which has at most ``most`` bytes.

        Raises:
            UsageError: There is no such file.
            RefusedError: It is larger.
        """
        ...

    def blocks(self, name: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """Bytes ``start`` to ``stop`` of the file ``name``, which has at most ``size``.

        Raises:
            CutError: They did not all come.
            RefusedError: The answer is not these bytes.
        """
        ...


def open_source(url: str, progress: Progress) -> Source:
    """The folder at ``url``: ``http``, ``https`` or ``file``; ``edgekit.json`` in it will do too.

    Raises:
        UsageError: The URL is none of these.
    """
    parts = _split(url)
    if parts.scheme in ("http", "https") and parts.hostname:
        return HttpSource(url, progress)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileSource(Path(urllib.request.url2pathname(_folder(parts.path))))
    hint = f"; give {Path(url).resolve().as_uri()}" if Path(url).is_dir() else ""
    raise UsageError(f"{url!a} is no URL of the kind http://, https:// or file:///{hint}")


def _split(url: str) -> urllib.parse.SplitResult:
    try:
        parts = urllib.parse.urlsplit(url)
        assert parts.port is None or parts.port >= 0  # reading it checks it
    except ValueError as error:
        raise UsageError(f"{url!a} is no URL: {error}") from error
    return parts


def _folder(path: str) -> str:
    return path.removesuffix(f"/{MANIFEST_NAME}").rstrip("/") + "/"


class FileSource:
    """A folder that is mounted here: a stick, a share, another artifact."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet."""
        self._folder, self.n_read = folder, 0

    def small(self, name: str, most: int) -> bytes:
        """As `Source.small`."""
        data = b"".join(self._read(name, 0, most + 1))
        if len(data) > most:
            raise RefusedError(f"{self._folder / name} has more than {format_size(most)}; refused")
        return data

    def blocks(self, name: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """As `Source.blocks`."""
        path = self._path(name)
        check_size(str(path), path.stat().st_size, stop, size)
        return self._read(name, start, stop)

    def _path(self, name: str) -> Path:
        path = contained(self._folder, name)
        if path is None:
            raise UsageError(f"{self._folder} holds no {name}; check the URL")
        return path

    def _read(self, name: str, start: int, stop: int) -> Iterator[bytes]:
        with self._path(name).open("rb") as file:
            file.seek(start)
            while start < stop and (block := file.read(min(BLOCK, stop - start))):
                start += len(block)
                self.n_read += len(block)
                yield block


class HttpSource:
    """A folder on a web server; one connection, kept open while the server does."""

    def __init__(self, url: str, progress: Progress) -> None:
        """Connect to nothing yet; proxies and certificates are those of the environment."""
        parts = urllib.parse.urlsplit(url)
        self._base = parts._replace(path=_folder(parts.path), fragment="")
        self._session, self._progress = requests.Session(), progress
        self._versions: dict[str, str] = {}
        self._has_ranges = False
        self.n_read = 0

    def small(self, name: str, most: int) -> bytes:
        """As `Source.small`."""
        data = bytearray()
        with self._answer(name, None) as answer:
            if answer.status_code != 200:
                raise _refusal(answer, f"the answer is {answer.status_code}, not 200")
            for block in self._body(answer):
                data += block
                if len(data) > most:
                    reason = f"it has more than {format_size(most)}"
                    raise _refusal(answer, reason)
        return bytes(data)

    def blocks(self, name: str, start: int, stop: int, size: int) -> Iterator[bytes]:
        """As `Source.blocks`; without ranges the file is read from its start."""
        with self._answer(name, f"bytes={start}-{stop - 1}") as answer:
            if answer.status_code == 206:
                self._check_range(answer, start, stop, size)
                at, self._has_ranges = start, True
            else:
                self._check_whole(answer, name, start, stop, size)
                at = 0
            for block in self._body(answer):
                begin, at = at, at + len(block)
                if answer.status_code == 206 and at > stop:
                    raise _refusal(answer, f"more than {stop - start} bytes came")
                wanted = block[max(0, start - begin) : max(0, stop - begin)]
                if wanted:
                    yield wanted
                if at >= stop and answer.status_code == 200:
                    return  # the rest is not needed
        if at < stop:
            raise CutError(f"{without_secrets(answer.url)} ended early")

    @contextmanager
    def _answer(self, name: str, byte_range: str | None) -> Iterator[requests.Response]:
        """The answer to a request, redirects followed; its body is not read yet."""
        url = self._url(name)
        headers = {"Accept-Encoding": "identity"} | ({"Range": byte_range} if byte_range else {})
        for _ in range(MAX_REDIRECTS):
            with self._sent(url, headers) as answer:
                if not answer.is_redirect:
                    self._check_answer(answer, name)
                    yield answer
                    return
                url = self._redirected(answer)
        raise _refusal(answer, f"more than {MAX_REDIRECTS} redirects")

    @contextmanager
    def _sent(self, url: str, headers: dict[str, str]) -> Iterator[requests.Response]:
        try:
            answer = self._session.get(
                url, headers=headers, stream=True, timeout=TIMEOUT, allow_redirects=False
            )
        except requests.exceptions.SSLError as error:
            raise EdgekitError(f"{without_secrets(url)}: {_reason(error)}") from error
        except (requests.ConnectionError, requests.Timeout) as error:
            raise CutError(f"{without_secrets(url)}: {_reason(error)}") from error
        except (requests.RequestException, ValueError) as error:  # a redirect to no URL: ValueError
            raise EdgekitError(f"{without_secrets(url)}: {_reason(error)}") from error
        with answer:
            yield answer

    def _redirected(self, answer: requests.Response) -> str:
        """Where a redirect leads: never out of the web, never from TLS to plain text."""
        target = urllib.parse.urljoin(answer.url, answer.headers["Location"])
        scheme = urllib.parse.urlsplit(target).scheme
        if scheme != "https" and not (scheme == "http" and answer.url.startswith("http:")):
            reason = f"it redirects to {without_secrets(target)[:200]!a}"
            raise _refusal(answer, reason)
        return str(requests.utils.requote_uri(target))  # nothing in it that a terminal would obey

    def _check_answer(self, answer: requests.Response, name: str) -> None:
        """Status and encoding are right, and the file is the one that the last answer was of."""
        shown, code = without_secrets(answer.url), answer.status_code
        if code in (404, 410):
            raise UsageError(f"{shown} does not exist ({code}); check the URL")
        if code in BUSY:
            raise CutError(f"{shown}: the server answers {code} {_plain(answer.reason)}")
        if code == 416:
            raise _refusal(answer, "the file is shorter than the manifest says")
        if code not in (200, 206):
            raise EdgekitError(
                f"{shown}: the server answers {code} {_plain(answer.reason)}; check the URL and "
                "the permissions"
            )
        encoding = answer.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise _refusal(answer, f"it comes encoded as {encoding[:40]!a}")
        version = answer.headers.get("ETag") or answer.headers.get("Last-Modified", "")
        if version != self._versions.setdefault(name, version):
            raise _refusal(answer, "it changed on the server since the first request")

    def _check_range(self, answer: requests.Response, start: int, stop: int, size: int) -> None:
        told = answer.headers.get("Content-Range", "")
        head, _, total = told.partition("/")
        if head != f"bytes {start}-{stop - 1}":
            reason = f"bytes {start}-{stop - 1} were asked for, it sends {told[:80]!a}"
            raise _refusal(answer, reason)
        if total != "*":
            check_size(without_secrets(answer.url), _count(total), stop, size)
        n_bytes = answer.headers.get("Content-Length")
        if n_bytes is not None and _count(n_bytes) != stop - start:
            reason = f"{stop - start} bytes were asked for, it sends {n_bytes[:20]!a}"
            raise _refusal(answer, reason)

    def _check_whole(
        self, answer: requests.Response, name: str, start: int, stop: int, size: int
    ) -> None:
        """A server without ranges sends the whole file; one that has them must not."""
        if self._has_ranges or "bytes" in answer.headers.get("Accept-Ranges", ""):
            reason = "the server has byte ranges, but sends the whole file"
            raise _refusal(answer, reason)
        n_bytes = answer.headers.get("Content-Length")
        if n_bytes is not None:
            check_size(without_secrets(answer.url), _count(n_bytes), stop, size)
        if start:
            self._progress.note(
                f"the server has no byte ranges: {format_size(start)} of {name} that are here "
                "already come again"
            )

    def _body(self, answer: requests.Response) -> Iterator[bytes]:
        try:
            for block in answer.iter_content(BLOCK):
                self.n_read += len(block)
                yield block
        except (requests.RequestException, OSError) as error:
            raise CutError(f"{without_secrets(answer.url)}: {_reason(error)}") from error

    def _url(self, name: str) -> str:
        path = self._base.path + urllib.parse.quote(name)
        return urllib.parse.urlunsplit(self._base._replace(path=path))


def without_secrets(url: str) -> str:
    """The URL without user, password and query."""
    parts = urllib.parse.urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return urllib.parse.urlunsplit(parts._replace(netloc=host, query="", fragment=""))


def check_size(name: str, n_bytes: int, stop: int, size: int) -> None:
    """Check that a file of ``n_bytes`` may be what the manifest says has ``size`` at most.

    ``.levels`` may be cut anywhere, so it may have fewer; the bytes up to ``stop`` are needed.

    Raises:
        RefusedError: It has too many or too few.
    """
    if not stop <= n_bytes <= size:
        wanted = f"{size}" if stop == size else f"{stop} to {size}"
        raise RefusedError(f"{name} has {n_bytes} bytes, the manifest says {wanted}; refused")


def _refusal(answer: requests.Response, reason: str) -> RefusedError:
    return RefusedError(
        f"{without_secrets(answer.url)}: {reason}; refused, get the artifact from another server"
    )


def _plain(text: str) -> str:
    """What a server says, without what a terminal would obey."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text[:200])


def _count(text: str) -> int:
    return int(text) if text.isascii() and text.isdigit() and len(text) < 20 else -1


def _reason(error: BaseException) -> str:
    """The innermost reason of a failed request; requests and urllib3 wrap it in their own."""
    while error.args and isinstance(error.args[-1], BaseException):
        error = error.args[-1]
    inner = getattr(error, "reason", None)
    if isinstance(inner, BaseException):
        return _reason(inner)
    return _plain(str(error).rpartition(": ")[2]) or type(error).__name__
