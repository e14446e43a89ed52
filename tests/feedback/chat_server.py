"""A chat server on loopback: what it replies is a function of the request, or a list that is used up."""

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Said:
    """One HTTP reply."""

    body: Any
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    after_s: float = 0.0


class ChatServer:
    def __init__(self) -> None:
        self.replies: list[Said] = []
        """Used up first; the last is repeated."""
        self.reply: Callable[[dict[str, Any]], Said] = lambda request: self._next()
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body in one packet, or a client waits 40 ms for the second

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["content-length"])))
                outer.times.append(time.monotonic())
                outer.requests.append(request | {"path": self.path})
                outer.headers.append({name.lower(): value for name, value in self.headers.items()})
                said = outer.reply(request)
                time.sleep(said.after_s)
                content = (said.body if isinstance(said.body, str) else json.dumps(said.body)).encode()
                self.send_response(said.status)
                for name, value in {**said.headers, "content-length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _next(self) -> Said:
        return self.replies.pop(0) if len(self.replies) > 1 else self.replies[0]


@contextmanager
def serving() -> Iterator[ChatServer]:
    server = ChatServer()
    threading.Thread(target=server.http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    yield server
    server.http.shutdown()
    server.http.server_close()


def choice(*places: dict[str, float], usage: tuple[int, int] = (10, 1)) -> Said:
    """A reply of a token a place, the likeliest of {token: probability}."""
    content = []
    for place in places:
        listed = [
            {"token": token, "logprob": math.log(p)} for token, p in sorted(place.items(), key=lambda each: -each[1])
        ]
        content.append({**listed[0], "top_logprobs": listed})
    text = "".join(each["token"] for each in content)
    return Said(_completion(text, "length", content, usage))


def text(said: str, finish: str = "stop", usage: tuple[int, int] = (10, 5)) -> Said:
    """A reply whose every word is a token of probability 1/e."""
    content = [{"token": word, "logprob": -1.0, "top_logprobs": []} for word in said.split()]
    return Said(_completion(said, finish, content, usage))


def _completion(said: str, finish: str, content: list[dict[str, Any]], usage: tuple[int, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": said}
    return {
        "choices": [{"message": message, "finish_reason": finish, "logprobs": {"content": content}}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }
