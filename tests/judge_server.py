"""A chat-completions server on 127.0.0.1, for tests: it prefers kind words, or misbehaves as it is told."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from megapref.online.rewards import KIND_WORDS, UNKIND_WORDS


class JudgeServer(ThreadingHTTPServer):
    """`behave(n, request)` says what the n-th request (from 0) is answered with: text, or a function that is given the handler."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, behave: Callable[[int, dict], str | Callable[[Handler], None]]):
        super().__init__(("127.0.0.1", 0), Handler)
        self.behave, self.requests, self.lock = behave, [], threading.Lock()
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: JudgeServer
    protocol_version = "HTTP/1.1"

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.requests)
            self.server.requests.append({"path": self.path, "key": self.headers.get("Authorization"), **request})
        reply = self.server.behave(number, request)
        if callable(reply):
            reply(self)
        else:
            content = {"choices": [{"message": {"content": reply}}], "usage": {"prompt_tokens": 100, "completion_tokens": 10}}
            self.respond(200, json.dumps(content))

    def respond(self, status: int, text: str, **headers: str):
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(text))}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *args):
        pass


@contextmanager
def serving(behave: Callable[[int, dict], str | Callable[[Handler], None]]) -> Iterator[JudgeServer]:
    server = JudgeServer(behave)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        thread.join()
        server.server_close()


def kinder(number: int, request: dict) -> str:
    """The letter of the answer in the question with more kind words."""
    answers = re.findall(r"<answer_[AB]>\n(.*?)\n</answer_[AB]>", request["messages"][-1]["content"], re.DOTALL)
    a, b = (sum((w in KIND_WORDS) - (w in UNKIND_WORDS) for w in re.findall(r"[a-z']+", answer.lower())) for answer in answers)
    return "A" if a > b else "B" if b > a else "C"


def status(code: int, **headers: str) -> Callable[[Handler], None]:
    return lambda handler: handler.respond(code, "no", **headers)


def silent(handler: Handler) -> None:
    """Never answers, until the server closes."""
    handler.server.closing.wait()
    handler.close_connection = True


def dying(handler: Handler) -> None:
    """Hangs up in the middle of an answer."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [{"mess')
    handler.close_connection = True


def no_json(handler: Handler) -> None:
    handler.respond(200, "<html>maintenance</html>")
