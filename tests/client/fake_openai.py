"""A scripted HTTP server that streams completions as OpenAI's API does."""

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DONE = "[DONE]"


def chat_chunk(content: str | None, **choice: Any) -> dict[str, Any]:
    """A chunk of /chat/completions."""
    return {"choices": [{"index": 0, "delta": {"content": content}, **choice}]}


def text_chunk(text: str, **choice: Any) -> dict[str, Any]:
    """A chunk of /completions."""
    return {"choices": [{"index": 0, "text": text, **choice}]}


def usage_chunk(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    """The chunk at the end that counts tokens."""
    usage = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
    return {"choices": [], "usage": usage}


@dataclass
class FakeOpenAI:
    """What the server was asked and what it answers."""

    url: str = ""
    #: Path, headers and body of each request, newest last.
    requests: list[tuple[str, dict[str, str], dict[str, Any]]] = field(default_factory=list)
    #: Connections that clients opened.
    num_connections: int = 0
    #: Chunks of every answer; text is sent as it is.
    chunks: list[dict[str, Any] | str] = field(default_factory=list)
    #: Status and body of the next answers instead, oldest first.
    errors: list[tuple[int, str]] = field(default_factory=list)
    #: Closes the connection in the middle of every answer.
    breaks: bool = False

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["FakeOpenAI"]:
        """Serves on a loopback port."""
        fake = cls()

        class Handler(_Handler):
            service = fake

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        fake.url = f"http://127.0.0.1:{server.server_port}/v1"
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield fake
        finally:
            server.shutdown()
            thread.join()
            server.server_close()


class _Handler(BaseHTTPRequestHandler):
    service: FakeOpenAI
    protocol_version = "HTTP/1.1"
    wbufsize = -1

    def setup(self) -> None:
        super().setup()
        self.service.num_connections += 1

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.service.requests.append((self.path, dict(self.headers), body))
        if self.service.errors:
            status, text = self.service.errors.pop(0)
            self.send_response(status)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())
            return
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for chunk in [*self.service.chunks, DONE]:
            data = chunk if isinstance(chunk, str) else json.dumps(chunk)
            event = f"data: {data}\n\n".encode()
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            self.wfile.flush()
            if self.service.breaks:
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def log_message(self, format: str, *args: object) -> None:
        pass
