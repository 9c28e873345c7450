"""A real HTTP server on this machine that answers like a chat endpoint, well or in every wrong way."""

import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

GOOD = {"tags": ["baking", "yeast"], "quality": 7, "difficulty": 3}


def completion(content: str) -> bytes:
    """A chat completion of 10 prompt tokens and 5 answer tokens."""
    message = {"choices": [{"message": {"role": "assistant", "content": content}}]}
    return json.dumps(message | {"usage": {"prompt_tokens": 10, "completion_tokens": 5}}).encode()


class ChatServer(ThreadingHTTPServer):
    """Answers `/v1/chat/completions` as `behave(text, attempt, request)` says: status, headers, body, or a fault.

    Faults: `hang` (no reply in time), `drip` (a byte now and then), `reset` (the connection is reset), `cut` (closes
    in the middle of the body).
    """

    daemon_threads = True
    # The default of 5 drops connections that come together; they return after a second, later than a client waits here.
    request_queue_size = 128

    def __init__(self, behave: Callable) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behave = behave
        self.requests: list[dict] = []
        self.headers_seen: list[dict] = []
        self.attempts: Counter[str] = Counter()
        self.lock = threading.Lock()
        self.now = self.most = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/v1"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that hang up are part of the game."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_POST(self) -> None:  # noqa: N802
        server: ChatServer = self.server
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = json.loads(request["messages"][1]["content"])
        text = tuple(text) if isinstance(text, list) else text
        with server.lock:
            attempt = server.attempts[text]
            server.attempts[text] += 1
            server.requests.append(request)
            server.headers_seen.append(dict(self.headers))
            server.now += 1
            server.most = max(server.most, server.now)
        reply = server.behave(text, attempt, request)
        # Before the reply: once a client has it, its next request may be here already.
        with server.lock:
            server.now -= 1
        self._reply(reply)

    def _reply(self, reply: str | tuple[int, dict, bytes]) -> None:
        if reply == "hang":
            time.sleep(2)
            self.close_connection = True
        elif reply == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
        elif reply in ("cut", "drip"):
            body = completion(json.dumps(GOOD))
            self._head(200, {}, len(body))
            for byte in body[: len(body) // 2]:
                self.wfile.write(bytes([byte]))
                time.sleep(0.05 if reply == "drip" else 0)
            self.close_connection = True
        else:
            status, headers, body = reply
            self._head(status, headers, len(body))
            self.wfile.write(body)

    def _head(self, status: int, headers: dict, length: int) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(length))
        self.end_headers()


def good(content: object = GOOD) -> tuple[int, dict, bytes]:
    """A reply whose message is the content, as JSON unless it is text."""
    return 200, {}, completion(content if isinstance(content, str) else json.dumps(content))


@contextmanager
def chat_server(behave: Callable) -> Iterator[ChatServer]:
    """A running server."""
    with ChatServer(behave) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
