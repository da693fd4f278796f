"""Clients whose streams must complete while their server shuts down."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

CLIENTS = 4
SHORT, LONG = 32, 1_000
"""Tokens of an answer: one that is soon over, and one that is not when SIGTERM comes."""

TIMEOUT_S = 300
"""Seconds after which a stream that has not begun counts as lost: a busy machine is slow."""


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
    """Clients that stream answers from a gateway.

    No client depends on how fast the machine is: `wait_until_all_run` is called before the signal,
    so that every client has a stream that has begun, and the last one of them is not over yet.
    """

    def __init__(self, address: str, port: int, ready: Callable[[], bool]) -> None:
        self.outcome = Outcome()
        self._place = (address, port)
        self._ready = ready
        self._started: set[int] = set()
        self._running = 0
        self._change = threading.Condition()

    @property
    def nothing_lost(self) -> bool:
        """Every stream is complete, and some had to be finished after SIGTERM."""
        return not self.outcome.reasons and self.outcome.running_at_signal > 0

    def wait_until_all_run(self) -> None:
        """To be called just before SIGTERM."""
        with self._change:
            self._change.wait_for(lambda: len(self._started) == CLIENTS, timeout=TIMEOUT_S)
            self.outcome.running_at_signal = self._running

    def request_while_ready(self, action: Callable[[], None]) -> None:
        """Half of the clients request short answers until the pod is not ready."""
        self._run(action, self._ready, (SHORT, LONG))

    def request_once(self, action: Callable[[], None]) -> None:
        """Each client requests one long answer."""
        self._run(action, lambda: False, (LONG,))

    def _run(
        self, action: Callable[[], None], again: Callable[[], bool], lengths: tuple[int, ...]
    ) -> None:
        with ThreadPoolExecutor(CLIENTS) as pool:
            clients = [
                pool.submit(self._client, number, again, lengths[number % len(lengths)])
                for number in range(CLIENTS)
            ]
            action()
            for client in clients:
                client.result()

    def _client(self, number: int, again: Callable[[], bool], tokens: int) -> None:
        while True:
            try:
                self._stream(number, tokens)
            except ConnectionRefusedError as error:
                if not again():
                    return  # the Service would have routed this client to another pod
                self._lost(error)
            except (OSError, http.client.HTTPException, ValueError) as error:
                self._lost(error)
            else:
                with self._change:
                    self.outcome.complete += 1
            if not again():
                return

    def _lost(self, error: Exception) -> None:
        with self._change:
            self.outcome.reasons.append(f"{type(error).__name__}: {error}")

    def _stream(self, number: int, tokens: int) -> None:
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
        connection = http.client.HTTPConnection(*self._place, timeout=TIMEOUT_S)
        headers = {"content-type": "application/json"}
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        answer = connection.getresponse()
        if answer.status != 200:
            raise ValueError(f"status {answer.status}: {answer.read()[:200]!r}")
        with self._change:
            self._running += 1
            self._started.add(number)
            self._change.notify_all()
        try:
            events = [line[5:].strip() for line in answer if line.startswith(b"data:")]
        finally:
            connection.close()
            with self._change:
                self._running -= 1
        if not events or events[-1] != b"[DONE]":
            raise ValueError(f"the stream ended with {events[-1:]!r}")
        if any(b'"error"' in event for event in events):
            raise ValueError("the stream holds an error")
