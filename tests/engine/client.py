"""How the tests speak to a server: the official client, plain HTTP, and the server's metrics."""

from __future__ import annotations

import base64
import re
import urllib.request
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import httpx
from openai import OpenAI
from openai.types.chat import ChatCompletion

from ep_serve.engine.server.process import ServerProcess
from tests.goldens import GOLDENS, load_case

MODEL = "golden"
MEDIA_TYPES = {"mp4": "video/mp4", "wav": "audio/wav", "png": "image/png"}


def data_url(data: bytes, media_type: str) -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def part(modality: str, url: str) -> dict[str, Any]:
    """A content part that names a medium."""
    return {"type": f"{modality}_url", f"{modality}_url": {"url": url}}


def video(data: bytes) -> dict[str, Any]:
    return part("video", data_url(data, "video/mp4"))


def audio(data: bytes) -> dict[str, Any]:
    return part("audio", data_url(data, "audio/wav"))


def image(data: bytes) -> dict[str, Any]:
    return part("image", data_url(data, "image/png"))


def text(words: str) -> dict[str, Any]:
    return {"type": "text", "text": words}


def user(*parts: dict[str, Any]) -> list[Any]:
    """Messages of one turn."""
    return [{"role": "user", "content": list(parts)}]


def golden_messages(name: str) -> list[Any]:
    """The messages of a golden case, its files as data URLs."""
    case, _ = load_case(name)
    return [
        {**message, "content": [_golden_part(p) for p in message["content"]]}
        for message in case["messages"]
    ]


def _golden_part(content: dict[str, Any]) -> dict[str, Any]:
    modality = content["type"]
    if modality == "text":
        return content
    path = GOLDENS / content[modality]
    return part(modality, data_url(path.read_bytes(), MEDIA_TYPES[path.suffix[1:]]))


@dataclass(frozen=True)
class Answer:
    """What the tests look at."""

    token_ids: list[int]
    text: str
    reduction: Any
    prompt_tokens: int
    cached_tokens: int
    raw: ChatCompletion


class Client:
    """One running server."""

    def __init__(self, process: ServerProcess) -> None:
        self.process = process
        self.root = process.base_url.removesuffix("/v1")

    @cached_property
    def openai(self) -> OpenAI:
        return OpenAI(base_url=self.process.base_url, api_key="none", max_retries=0, timeout=120)

    def ask(self, messages: list[Any], *, max_tokens: int = 8, **body: Any) -> Answer:
        """A greedy answer of exactly `max_tokens` tokens; `body` goes into the request as it is."""
        completion = self.openai.chat.completions.create(
            model=MODEL,
            messages=messages,
            max_tokens=max_tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True, **body},
        )
        choice = completion.choices[0]
        usage = completion.usage
        assert usage is not None
        details = usage.prompt_tokens_details
        return Answer(
            token_ids=choice.token_ids,  # type: ignore[attr-defined]  # vLLM's addition
            text=choice.message.content or "",
            reduction=getattr(usage, "reduction", None),
            prompt_tokens=usage.prompt_tokens,
            cached_tokens=(details.cached_tokens or 0) if details else 0,
            raw=completion,
        )

    def post(self, body: dict[str, Any], **options: Any) -> httpx.Response:
        """A raw request with a time limit of 10 s, the promise for bad input."""
        body = {"model": MODEL, "max_tokens": 2, **body}
        options = {"timeout": 10, **options}
        return httpx.post(f"{self.root}/v1/chat/completions", json=body, **options)

    def metric(self, name: str, **labels: str) -> float:
        """The sum over the series of a metric that carry these labels."""
        return metric(self.root, name, **labels)


def metric(root: str, name: str, **labels: str) -> float:
    """The sum over the series of a metric of the server at `root` that carry these labels."""
    with urllib.request.urlopen(f"{root}/metrics", timeout=10) as response:
        lines = response.read().decode().splitlines()
    series = (re.fullmatch(r"([\w:]+)(?:\{(.*)\})? (\S+)", line) for line in lines)
    found = [
        float(match[3])
        for match in series
        if match
        and match[1] == name
        and all(f'{key}="{value}"' in (match[2] or "") for key, value in labels.items())
    ]
    assert found, f"the server has no series {name} {labels}"
    return sum(found)
