"""Clients whose streams must survive the end of what serves them."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

CLIENTS = 4
SHORT, LONG = 48, 1_500
"""Tokens of an answer: one that is soon over, one that outlasts the wait before SIGTERM."""


@dataclass
class Outcome:
    """Streams that came to their end, and those that did not."""

    complete: int = 0
    running_at_signal: int = 0
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lost = f"{len(self.reasons)} lost {self.reasons or ''}".strip()
        return f"{self.running_at_signal} ran at SIGTERM, {self.complete} complete, {lost}"


class Load:
    """Clients that stream answers from a gateway."""

    def __init__(self, address: str, port: int, ready: Callable[[], bool]) -> None:
        self.outcome = Outcome()
        self._place = (address, port)
        self._ready = ready
        self._began = threading.Semaphore(0)
        self._lock = threading.Lock()
        self._running = 0

    @property
    def nothing_lost(self) -> bool:
        """Every stream is complete, and some had to be finished after SIGTERM."""
        return not self.outcome.reasons and self.outcome.running_at_signal > 0

    def note(self) -> None:
        """SIGTERM comes now."""
        self.outcome.running_at_signal = self._running

    def go_on_while_ready(self, action: Callable[[], None]) -> None:
        """Half of the clients ask for short answers until readiness turns; then the action."""
        self._run(action, self._ready, (SHORT, LONG))

    def ask_once(self, action: Callable[[], None]) -> None:
        """Each client asks for one long answer; the action comes when all have begun."""
        self._run(action, lambda: False, (LONG,))

    def _run(
        self, action: Callable[[], None], again: Callable[[], bool], lengths: tuple[int, ...]
    ) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients: list[Future[None]] = [
                pool.submit(self._client, again, lengths[number % len(lengths)])
                for number in range(CLIENTS)
            ]
            for _ in range(CLIENTS):
                self._began.acquire(timeout=60)
            action()
            for client in clients:
                client.result()

    def _client(self, again: Callable[[], bool], tokens: int) -> None:
        while True:
            try:
                self._stream(tokens)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self.outcome.reasons.append(f"{type(error).__name__}: {error}")
            else:
                with self._lock:
                    self.outcome.complete += 1
            if not again():
                return

    def _stream(self, tokens: int) -> None:
        """Ask for an answer and read it to its end.

        Raises:
            ValueError: it is refused, cut short, or holds an error.
        """
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": "Count."}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection(*self._place, timeout=120)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        self._began.release()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {answer.read()[:200]!r}")
        with self._lock:
            self._running += 1
        try:
            events = [line[5:].strip() for line in answer if line.startswith(b"data:")]
        finally:
            connection.close()
            with self._lock:
                self._running -= 1
        if not events or events[-1] != b"[DONE]":
            raise ValueError(f"the stream ended with {events[-1:]!r}")
        if any(b'"error"' in event for event in events):
            raise ValueError("the stream holds an error")
