"""Ask a gateway what its clients ask: its models, a question about a clip, a streamed answer.

Runs in the gateway's image (`helm test`) and anywhere with Python 3.11 and PyAV.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

import av

DESCRIPTION = "Ask a gateway what its clients ask."
TIMEOUT_S = 300.0
FRAMES = 4
SIZE = 56


class WrongAnswerError(Exception):
    """An answer is not what it should be."""


def main() -> int:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("what", choices=CHECKS)
    parser.add_argument("--url", required=True, help="of the gateway, without /v1")
    parser.add_argument("--model", action="append", required=True, help="served name")
    arguments = parser.parse_args()
    try:
        CHECKS[arguments.what](arguments.url, arguments.model)
    except urllib.error.HTTPError as error:
        print(f"HTTP {error.code}: {error.read().decode(errors='replace')}", file=sys.stderr)
        return 1
    except (WrongAnswerError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print("ok")
    return 0


def check_models(url: str, models: list[str]) -> None:
    """Every model is listed."""
    with ask(f"{url}/v1/models") as answer:
        listed = {entry["id"] for entry in json.load(answer)["data"]}
    if missing := sorted(set(models) - listed):
        raise WrongAnswerError(
            f"not listed: {', '.join(missing)} (listed: {', '.join(sorted(listed))})"
        )


def check_clip(url: str, models: list[str]) -> None:
    """Every model answers a question about a clip, and says how it was reduced."""
    for model in models:
        with ask(f"{url}/v1/chat/completions", question(model)) as answer:
            usage = json.load(answer)["usage"]
        reduction = usage.get("reduction")
        if not usage["completion_tokens"] or not reduction:
            raise WrongAnswerError(f"{model}: no tokens or no reduction in {usage}")
        if not 0 < reduction["av_tokens_kept"] <= reduction["av_tokens_full"]:
            raise WrongAnswerError(f"{model}: the reduction makes no sense: {reduction}")


def check_stream(url: str, models: list[str]) -> None:
    """Every model streams an answer about a clip to its end."""
    for model in models:
        body = question(model) | {"stream": True}
        with ask(f"{url}/v1/chat/completions", body) as answer:
            events = list(events_of(answer))
        if not events or events[-1] != "[DONE]":
            raise WrongAnswerError(f"{model}: the stream did not end with [DONE] but {events[-1:]}")
        pieces = [json.loads(event) for event in events[:-1]]
        finished = [p for p in pieces if p["choices"] and p["choices"][0]["finish_reason"]]
        if len(finished) != 1:
            raise WrongAnswerError(
                f"{model}: {len(finished)} events with a finish_reason instead of one"
            )


CHECKS = {"models": check_models, "clip": check_clip, "stream": check_stream}


def ask(url: str, body: dict[str, Any] | None = None) -> Any:
    """Open an answer; raises HTTPError for one that is not 2xx."""
    headers = {"content-type": "application/json"}
    if key := os.environ.get("EP_SERVE_API_KEY"):
        headers["authorization"] = f"Bearer {key}"
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data=data, headers=headers)
    return urllib.request.urlopen(request, timeout=TIMEOUT_S)


def events_of(answer: Any) -> Iterator[str]:
    for line in answer:
        if line.startswith(b"data:"):
            yield line[5:].strip().decode()


def question(model: str) -> dict[str, Any]:
    """A question about a clip, as the body of a request."""
    url = "data:video/mp4;base64," + base64.b64encode(make_clip()).decode()
    content = [
        {"type": "video_url", "video_url": {"url": url}},
        {"type": "text", "text": "What happens?"},
    ]
    messages = [{"role": "user", "content": content}]
    return {"model": model, "messages": messages, "max_tokens": 8, "temperature": 0}


def make_clip() -> bytes:
    """Two seconds that get brighter, without sound."""
    out = io.BytesIO()
    with av.open(out, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=FRAMES // 2)
        stream.width = stream.height = SIZE
        stream.pix_fmt = "yuv420p"
        for number in range(FRAMES):
            frame = av.VideoFrame(SIZE, SIZE, "yuv420p")
            for index, plane in enumerate(frame.planes):
                level = 128 if index else 40 + 40 * number
                plane.update(bytes([level]) * plane.buffer_size)
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(main())
