"""Client of an OpenAI-compatible server, with retries."""

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
"""Seconds; requests may queue behind many others."""
MAX_TRIES = 7
INITIAL_BACKOFF_S = 0.5
MAX_BACKOFF_S = 30.0
"""Seconds of exponential backoff between tries."""
RETRY_STATUSES = (429, 503)
CACHED_FILES = 16
_MIME = {
    **{".mkv": "video/x-matroska", ".webm": "video/webm", ".webp": "image/webp"},
    **{".wav": "audio/wav", ".flac": "audio/flac", ".m4a": "audio/mp4", ".opus": "audio/ogg"},
}
"""MIME types that `mimetypes` does not know everywhere."""


class RequestError(Exception):
    """A failed request; `is_fatal` if all others would fail too."""

    def __init__(self, message: str, *, is_fatal: bool = False) -> None:
        super().__init__(message)
        self.is_fatal = is_fatal


@dataclass(frozen=True, slots=True)
class Answer:
    """Text and `usage` of a completion, and its seconds without retries."""

    text: str
    usage: dict[str, Any]
    seconds: float

    @property
    def reduction(self) -> dict[str, Any] | None:
        """`usage.reduction`; None if the server does not report it."""
        return self.usage.get("reduction")


class Server:
    """An OpenAI-compatible server; thread-safe.

    Args:
        url: With or without `/v1`.
        key: API key.
        model: Served model; the first one that the server lists if not given.
        name: Name in results; the model's name by default.

    Raises:
        EvaluationError: The server does not list its models.
    """

    def __init__(
        self,
        url: str,
        *,
        key: str = "none",
        model: str | None = None,
        name: str | None = None,
        initial_backoff_s: float = INITIAL_BACKOFF_S,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1") + "/v1"
        self._pause = initial_backoff_s
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

    def complete(
        self,
        media: Sequence[Path],
        prompt: str,
        keep_ratio: float,
        *,
        max_tokens: int,
        selection: bool = False,
    ) -> Answer:
        """Complete a prompt about media files with greedy decoding.

        Raises:
            RequestError: The server refuses the request, or all tries failed.
        """
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [
                {
                    "role": "user",
                    "content": [*map(media_part, media), {"type": "text", "text": prompt}],
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
            raise RequestError(f"the answer is not a chat completion: {error!r}") from None

    def _first_model(self) -> str:
        try:
            response, _ = self._send("GET", "models")
            return str(response.json()["data"][0]["id"])
        except (RequestError, ValueError, LookupError, TypeError) as error:
            raise EvaluationError(f"{self.url} does not list its models: {error}") from None

    def _send(self, method: str, path: str, body: Any = None) -> tuple[httpx.Response, float]:
        """Send a request with retries; returns the response and its seconds."""
        pause = self._pause
        for tries_left in reversed(range(MAX_TRIES)):
            began = time.perf_counter()
            try:
                response = self._http.request(method, f"{self.url}/{path}", json=body)
            except httpx.TransportError as error:
                reason, retry_after = f"{type(error).__name__}: {error}", ""
            else:
                if response.is_success:
                    return response, time.perf_counter() - began
                reason = f"HTTP {response.status_code}: {_message(response)}"
                if response.status_code not in RETRY_STATUSES:
                    raise RequestError(reason, is_fatal=response.status_code in (401, 403, 404))
                retry_after = response.headers.get("retry-after", "")
            if tries_left:
                delay = float(retry_after) if retry_after.isdigit() else pause
                time.sleep(min(delay, MAX_BACKOFF_S))
                pause *= 2
        raise RequestError(reason)


def _message(response: httpx.Response) -> str:
    """The message of an error response."""
    try:
        found = response.json()
        return str(found["error"]["message"])[:500]
    except (ValueError, LookupError, TypeError):
        return response.text[:500]


def media_part(path: Path) -> dict[str, Any]:
    """The content part of a media file.

    Raises:
        EvaluationError: The file name is not that of a video, audio or image file.
    """
    kind, url = _data_url(path)
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


def media_type(path: Path) -> str:
    """The MIME type of a file, by its name.

    Raises:
        EvaluationError: It is not a video, audio or image type.
    """
    mime = _MIME.get(path.suffix.lower()) or mimetypes.guess_type(path.name)[0] or "unknown"
    if mime.split("/")[0] not in ("video", "audio", "image"):
        raise EvaluationError(f"{path} must be video, audio or an image by its name, not {mime}")
    return mime


@lru_cache(CACHED_FILES)
def _data_url(path: Path) -> tuple[str, str]:
    """Kind and data URL of a file; cached, as consecutive requests use the same clip."""
    mime = media_type(path)
    data = base64.b64encode(path.read_bytes()).decode()
    return mime.split("/")[0], f"data:{mime};base64,{data}"
