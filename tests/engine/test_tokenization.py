"""Text is bounded before it is tokenized, wherever vLLM's server does that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from vllm.exceptions import VLLMValidationError
from vllm.renderers.params import TokenizeParams

from ep_serve.engine.server import tokenization
from tests.engine.client import MODEL, Client, text, user

LONG = "ab" * 600_000


def check(given: str, side: str = "right", **options: Any) -> str:
    """What is tokenized of a text, by a tokenizer whose longest token has 4 characters."""
    params = TokenizeParams(**{"max_total_tokens": 100, **options})
    tokenizer = SimpleNamespace(max_chars_per_token=4, truncation_side=side)
    return tokenization._text_len_check(params, tokenizer, given)


# -- without an engine --------------------------------------------------------------------------


@pytest.mark.parametrize(("keep", "chars"), [(10, 44), (0, 4), (100, 404), (-1, 404)])
def test_only_what_truncation_can_keep_is_tokenized(keep: int, chars: int) -> None:
    given = "".join(chr(ord("a") + i % 26) for i in range(10_000))
    assert check(given, truncate_prompt_tokens=keep) == given[:chars]
    assert check(given, "left", truncate_prompt_tokens=keep) == given[-chars:]


def test_a_text_that_need_not_fit_is_bounded() -> None:
    assert check("x" * 10_000, max_total_tokens=None) == "x" * 10_000
    with pytest.raises(VLLMValidationError, match="has 1200000 characters; the limit is 1000000"):
        check(LONG, max_total_tokens=None)


def test_a_text_that_fits_is_left_as_it_is() -> None:
    assert check("x" * 30, truncate_prompt_tokens=10) == "x" * 30
    with pytest.raises(VLLMValidationError, match="maximum context length is 100"):
        check(LONG)


# -- at a server --------------------------------------------------------------------------------

LABELS = {"label_token_ids": [1, 2]}
REFUSED: dict[str, tuple[str, str, dict[str, Any]]] = {  # route, field, body
    "a text": ("tokenize", "prompt", {"prompt": LONG}),
    "a message": ("tokenize", "prompt", {"messages": user(text(LONG))}),
    "a question": ("generative_scoring", "items", {"query": LONG, "items": ["a"], **LABELS}),
    "items": ("generative_scoring", "items", {"query": "a", "items": [LONG[:100_000]] * 20}),
    "a question that does not fit": (
        "generative_scoring",
        "items[1]",
        {"query": "x " * 500, "items": ["a", "b " * 2_000], **LABELS},
    ),
    "tokens that do not fit": (
        "generative_scoring",
        "items[0]",
        {"query": [1] * 2_000, "items": [[1] * 47], **LABELS},
    ),
}


@pytest.mark.engine
@pytest.mark.xdist_group("server")
@pytest.mark.parametrize(("route", "field", "body"), REFUSED.values(), ids=REFUSED.keys())
def test_too_much_text_is_refused(
    server: Client, route: str, field: str, body: dict[str, Any]
) -> None:
    body = {"model": MODEL, **LABELS, **body}
    response = httpx.post(f"{server.root}/{route}", json=body, timeout=60)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == field


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_texts_that_fit_are_scored(server: Client) -> None:
    body = {"model": MODEL, "query": [1] * 2_000, "items": [[1] * 46, [2]], **LABELS}
    response = httpx.post(f"{server.root}/generative_scoring", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert len(response.json()["data"]) == 2


@pytest.mark.engine
@pytest.mark.xdist_group("server")
def test_a_truncated_prompt_is_the_one_that_was_kept(server: Client) -> None:
    answers = []
    for prompt in ("x y z " * 4_000, "x y z " * 400_000):
        body = {"model": MODEL, "prompt": prompt, "max_tokens": 2, "truncate_prompt_tokens": 50}
        given = {**body, "temperature": 0, "return_token_ids": True}
        response = httpx.post(f"{server.root}/v1/completions", json=given, timeout=60)
        assert response.status_code == 200, response.text
        answers.append(response.json()["choices"][0]["prompt_token_ids"])
    assert answers[0] == answers[1]
    assert len(answers[0]) == 50
