"""A chat server without a model: it says what a function says, and keeps every fifth token."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

STEPS, SIDE, AUDIO = 4, 4, 100
VIDEO = STEPS * SIDE * SIDE


@dataclass
class MockServer:
    """Answers with `say(question, keep_ratio)`, after `failures` (status codes) were given."""

    say: Callable[[str, float], str] = lambda question, ratio: "red"
    failures: list[int] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str] = field(default_factory=set)
    url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def asked(self) -> list[tuple[str, float]]:
        return [(_words(body), body["keep_ratio"]) for body in self.bodies]

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self.bodies.append(body)
            if self.failures:
                return self.failures.pop(0), {"error": {"message": "not now"}}
        text = self.say(_words(body), body["keep_ratio"])
        reduction = usage(body["keep_ratio"])
        if not body.get("return_selection"):
            del reduction["selection"]
        choice = {"message": {"role": "assistant", "content": text}}
        return 200, {"choices": [choice], "usage": {"reduction": reduction}}


def usage(keep_ratio: float) -> dict[str, Any]:
    """`usage.reduction` of a clip of 4 s of which the first tokens survive."""
    video, audio = int(VIDEO * keep_ratio), int(AUDIO * keep_ratio)
    return {
        "keep_ratio": keep_ratio,
        "prompt_tokens_full": VIDEO + AUDIO + 20,
        "prompt_tokens_reduced": video + audio + 20,
        "av_tokens_full": VIDEO + AUDIO,
        "av_tokens_kept": video + audio,
        "video": {"full": VIDEO, "kept": video},
        "audio": {"full": AUDIO, "kept": audio},
        "image": {"full": 0, "kept": 0},
        "selection": [
            {
                "type": "video",
                "video": {
                    "grid": [STEPS, SIDE, SIDE],
                    "seconds_per_step": 1.0,
                    "kept": list(range(video)),
                    "scores": [1 - i / VIDEO for i in range(VIDEO)],
                },
                "audio": {
                    "tokens": AUDIO,
                    "seconds_per_token": 0.04,
                    "kept": list(range(audio)),
                    "scores": [1 - i / AUDIO for i in range(AUDIO)],
                },
            }
        ],
    }


def _words(body: dict[str, Any]) -> str:
    text: str = body["messages"][0]["content"][-1]["text"]
    return text


@contextmanager
def serving(mock: MockServer) -> Iterator[MockServer]:
    """The server in threads of its own, at `mock.url`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"data": [{"id": "mock"}]})

        def do_POST(self) -> None:
            mock.keys.add(self.headers["authorization"])
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self._send(*mock.answer(body))

        def _send(self, status: int, value: dict[str, Any]) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    mock.url = f"http://127.0.0.1:{server.server_address[1]}"
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
