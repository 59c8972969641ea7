"""A web server for tests: ranges, a page of links, and whatever goes wrong with servers."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


@dataclass
class WebServer:
    """What it does and what it was asked.

    Attributes:
        failures: requests for content that are answered with an error yet.
        cut_off: answers that end in their middle yet.
        seconds: that every answer takes.
        has_ranges: whether it heeds them.
        asked: (path, range) of every request for content.
        most_at_once: requests for content that were answered at the same time.
    """

    folder: Path
    url: str = ""
    failures: int = 0
    cut_off: int = 0
    seconds: float = 0.0
    has_ranges: bool = True
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    at_once: int = 0
    most_at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


@contextmanager
def serving(folder: Path) -> Iterator[WebServer]:
    """Serve a folder on a free port."""
    server = WebServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            return

        def answer(self, status: int, content: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = folder / self.path.strip("/")
            if path.is_dir():
                links = "".join(f'<a href="{each.name}">{each.name}</a>' for each in sorted(path.iterdir()))
                return self.answer(200, links.encode(), Content_Type="text/html")
            if not path.is_file():
                return self.answer(404, b"")
            content, asked = path.read_bytes(), self.headers.get("Range")
            described = {
                "Accept_Ranges": "bytes" if server.has_ranges else "none",
                "ETag": f'"{path.stat().st_mtime_ns}"',
            }
            if self.command == "HEAD":
                return self.answer(200, content, **described)
            with server.lock:
                server.asked.append((self.path, asked))
                server.at_once += 1
                server.most_at_once = max(server.most_at_once, server.at_once)
            try:
                return self.content(content, asked, described)
            finally:
                with server.lock:
                    server.at_once -= 1

        def content(self, content: bytes, asked: str | None, described: dict[str, str]) -> None:
            time.sleep(server.seconds)
            with server.lock:
                fails, server.failures = server.failures > 0, max(server.failures - 1, 0)
                cuts, server.cut_off = server.cut_off > 0, max(server.cut_off - 1, 0)
            if fails:
                return self.answer(503, b"busy")
            if asked is None or not server.has_ranges:
                return self.answer(200, content, **described)
            first, last = asked.removeprefix("bytes=").split("-")
            part = content[int(first) : int(last) + 1]
            if cuts:
                part = part[: len(part) // 2]
            return self.answer(206, part, Content_Range=f"bytes {first}-{last}/{len(content)}", **described)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        http.daemon_threads = True
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        server.url = f"http://127.0.0.1:{http.server_address[1]}"
        try:
            yield server
        finally:
            http.shutdown()
            thread.join()
