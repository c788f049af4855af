"""A static file server with byte ranges for tests, honest or with one fault."""

import http.server
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

CUT_AFTER = 70_000  # bytes of a body, where the fault is ``cut``


@dataclass
class Served:
    """What is served, how, and what was asked.

    Attributes:
        folder: The files.
        fault: Of every answer to a request for bytes of ``.levels``.
        requests: ``(name, Range or "")`` of every request.
        n_sent: Bytes of bodies.
    """

    folder: Path
    fault: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)
    n_sent: int = 0
    url: str = ""


class Handler(http.server.BaseHTTPRequestHandler):
    """Answers ``GET`` with 200, 206 or 404."""

    protocol_version = "HTTP/1.1"
    served: Served

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        served = self.served
        name = self.path.lstrip("/")
        wanted = self.headers.get("Range", "")
        served.requests.append((name, wanted))
        path = served.folder / name
        fault = served.fault if name.endswith(".levels") else ""
        if fault == "busy" and len(served.requests) % 2:
            return self.answer(503, {}, b"")
        if fault.startswith("redirect:"):
            return self.answer(302, {"Location": fault.partition(":")[2]}, b"")
        if fault == "rude":
            return self.answer(403, {}, b"", reason="\x1b[31mred")
        if fault == "no HTTP":
            self.close_connection = True
            self.wfile.write(b"\x1b[31mred\r\n\r\n")
            return None
        if not path.is_file():
            return self.answer(404, {}, b"")
        data = path.read_bytes()
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", wanted)
        if not found or fault in ("whole", "no ranges"):
            ranges = {} if fault == "no ranges" else {"Accept-Ranges": "bytes"}
            return self.answer(200, ranges, data)
        start, last = int(found[1]), int(found[2])
        told = lie(fault, data, start, last, len(served.requests))
        self.answer(*told, cut=fault in ("cut", "changes"))

    def answer(
        self,
        code: int,
        headers: dict[str, str],
        body: bytes,
        cut: bool = False,
        reason: str | None = None,
    ) -> None:
        self.send_response(code, reason)
        for key, value in ({"Content-Length": str(len(body))} | headers).items():
            if value:
                self.send_header(key, value)
        self.end_headers()
        if "Transfer-Encoding" in headers:
            body = b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)
        sent = body[:CUT_AFTER] if cut else body
        self.served.n_sent += len(sent)
        self.wfile.write(sent)
        if cut:
            self.close_connection = True


def lie(
    fault: str, data: bytes, start: int, last: int, n: int
) -> tuple[int, dict[str, str], bytes]:
    """Status, headers and body of the answer to a request for ``data[start : last + 1]``."""
    body, total = data[start : last + 1], len(data)
    headers = {"Content-Range": f"bytes {start}-{last}/{total}", "ETag": '"one"'}
    if fault == "other range":
        headers["Content-Range"] = f"bytes {start + 1}-{last + 1}/{total}"
    elif fault == "no range told":
        headers["Content-Range"] = ""
    elif fault == "other total":
        headers["Content-Range"] = f"bytes {start}-{last}/{total + 1}"
    elif fault == "short":
        body = body[:-1]
    elif fault == "long":
        body += b"x"
    elif fault == "long in chunks":
        body, headers = body + b"x", headers | {"Transfer-Encoding": "chunked"}
        headers["Content-Length"] = ""
    elif fault == "other bytes":
        body = body[:-1000] + bytes(1000)
    elif fault == "compressed":
        headers["Content-Encoding"] = "gzip"
    elif fault == "changes":
        headers["ETag"] = f'"{n}"'
    elif fault == "416":
        return 416, {}, b""
    return 206, headers, body


class Server(http.server.ThreadingHTTPServer):
    """Says nothing of clients that go away in the middle of an answer."""

    def handle_error(self, request: object, client_address: object) -> None:
        pass


@contextmanager
def serving(folder: Path, fault: str = "") -> Iterator[Served]:
    """Serve ``folder`` on loopback."""
    served = Served(folder, fault)
    handler = type("_Handler", (Handler,), {"served": served})
    with Server(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        served.url = f"http://127.0.0.1:{server.server_port}/"
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield served
        finally:
            server.shutdown()
            thread.join()
