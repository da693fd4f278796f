"""Asking a server, as any client of the OpenAI API does."""

from __future__ import annotations

import base64
import mimetypes
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import httpx

from ep_serve.evaluation.errors import EvaluationError

TIMEOUT = httpx.Timeout(600, connect=10)
"""Seconds; an answer may wait behind many others."""
TRIES = 7
FIRST_PAUSE = 0.5
LONGEST_PAUSE = 30.0
"""Seconds between tries; each pause is twice the one before."""
BUSY = (429, 503)
REMEMBERED_FILES = 16
_MIME = {
    **{".mkv": "video/x-matroska", ".webm": "video/webm", ".webp": "image/webp"},
    **{".wav": "audio/wav", ".flac": "audio/flac", ".m4a": "audio/mp4", ".opus": "audio/ogg"},
}
"""Types that the tables of machines do not know, or know by several names."""


class NoAnswerError(Exception):
    """A request that was not answered; `hopeless` if no other one would be."""

    def __init__(self, message: str, *, hopeless: bool = False) -> None:
        super().__init__(message)
        self.hopeless = hopeless


@dataclass(frozen=True, slots=True)
class Answer:
    """What a server said: text, `usage`, and the seconds it took, pauses left out."""

    text: str
    usage: dict[str, Any]
    seconds: float

    @property
    def reduction(self) -> dict[str, Any] | None:
        """`usage.reduction`; None from servers that reduce nothing."""
        return self.usage.get("reduction")


class Server:
    """One server of the OpenAI API; several threads may ask at once.

    Args:
        url: With or without `/v1`.
        key: API key.
        model: Served model; the first one that the server lists if not given.
        name: In results; that of the model if not given.

    Raises:
        EvaluationError: The server does not tell its models.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "none",
        model: str | None = None,
        name: str | None = None,
        first_pause: float = FIRST_PAUSE,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._pause = first_pause
        self._http = httpx.Client(
            headers={"authorization": f"Bearer {key}"},
            timeout=TIMEOUT,
            limits=httpx.Limits(max_connections=None, max_keepalive_connections=None),
        )
        self.model = model or self._first_model()
        self.name = name or self.model

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def ask(
        self,
        media: Sequence[Path],
        words: str,
        keep_ratio: float,
        *,
        max_tokens: int,
        selection: bool = False,
    ) -> Answer:
        """The likeliest answer to a question about some files.

        Raises:
            NoAnswerError: The server refuses, or does not answer even after a while.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {
                    "role": "user",
                    "content": [*map(media_part, media), {"type": "text", "text": words}],
                }
            ],
            "temperature": 0,
            "max_tokens": max_tokens,
            "keep_ratio": keep_ratio,
        }
        if selection:
            body["return_selection"] = True
        response, seconds = self._send("POST", "chat/completions", body)
        try:
            found = response.json()
            text = found["choices"][0]["message"]["content"] or ""
            return Answer(text, found.get("usage") or {}, seconds)
        except (ValueError, LookupError, TypeError) as error:
            raise NoAnswerError(f"the answer is not a chat completion: {error!r}") from None

    def _first_model(self) -> str:
        try:
            response, _ = self._send("GET", "models")
            return str(response.json()["data"][0]["id"])
        except (NoAnswerError, ValueError, LookupError, TypeError) as error:
            raise EvaluationError(f"{self.url} does not tell its models: {error}") from None

    def _send(self, method: str, path: str, body: Any = None) -> tuple[httpx.Response, float]:
        """A good response and how long it took, after as many tries as it needs."""
        pause = self._pause
        for tries_left in reversed(range(TRIES)):
            began = time.perf_counter()
            try:
                response = self._http.request(method, f"{self.url}/{path}", json=body)
            except httpx.TransportError as error:
                reason, asked = f"{type(error).__name__}: {error}", ""
            else:
                if response.is_success:
                    return response, time.perf_counter() - began
                reason = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code not in BUSY:
                    raise NoAnswerError(reason, hopeless=response.status_code in (401, 403, 404))
                asked = response.headers.get("retry-after", "")
            if tries_left:
                wanted = float(asked) if asked.isdigit() else pause
                time.sleep(min(wanted, LONGEST_PAUSE))
                pause *= 2
        raise NoAnswerError(reason)


def _message(response: httpx.Response) -> str:
    """What a server says is wrong."""
    try:
        found = response.json()
        return str(found["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return response.text[:500]


def media_part(path: Path) -> dict[str, Any]:
    """A file as a part of a message; a clip's sound belongs to it.

    Raises:
        EvaluationError: The name does not say that it is video, sound or a picture.
    """
    kind, url = _data_url(path)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def media_type(path: Path) -> str:
    """The MIME type of a file, by its name.

    Raises:
        EvaluationError: It is neither video nor sound nor a picture.
    """
    mime = _MIME.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or "unknown"
    if mime.split("/")[0] not in ("video", "audio", "image"):
        raise EvaluationError(f"{path} must be video, audio or an image by its name, not {mime}")
    return mime


@lru_cache(REMEMBERED_FILES)
def _data_url(path: Path) -> tuple[str, str]:
    """Kind and data URL: the same clip is asked about many times in a row."""
    mime = media_type(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return mime.split("/")[0], f"data:{mime};base64,{data}"
