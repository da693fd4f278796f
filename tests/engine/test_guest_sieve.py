"""A sieve of another package: what it does wrong fails a request, and nothing else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from tests.clips import make_clip, make_image
from tests.engine import guest_sieve
from tests.engine.client import MODEL, Client, golden_messages, image, text, user, video
from tests.engine.guest_sieve import SLOW_SECONDS
from tests.engine.test_other_sieves import installed, serving_stock

pytestmark = pytest.mark.engine

RIGHT = 0.2
FAILS = {
    0.11: "The sieve 'guest' failed: KeyError.",
    0.13: "The sieve 'guest' returned indices of shape",
    0.14: "The sieve 'guest' chose tokens outside of the pool, out of order or twice.",
    0.15: "The sieve 'guest' chose tokens outside of the pool, out of order or twice.",
    0.16: "The sieve 'guest' returned scores that are not finite.",
    0.17: "The sieve 'guest' returned states of dtype torch.float64, not torch.float32.",
}
CLIP = video(make_clip(4, seed=91))


@pytest.fixture(scope="module")
def mark(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("guest") / "mark"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, mark: Path) -> Iterator[Client]:
    source = Path(guest_sieve.__file__).read_text()
    path = installed(tmp_path_factory, "guest", "guest_sieve:GuestSieve", source)
    environment = {"PYTHONPATH": path, "GUEST_MARK": str(mark)}
    with serving_stock(
        tmp_path_factory, "--sieve", "guest", "--keep-ratio", "0.2", environment=environment
    ) as client:
        yield client


def answer(served: Client, keep_ratio: float, words: str = "What is it?") -> httpx.Response:
    body = {"messages": user(CLIP, text(words)), "keep_ratio": keep_ratio}
    return served.post({**body, "temperature": 0, "return_token_ids": True}, timeout=120)


def tokens(response: httpx.Response) -> list[int]:
    assert response.status_code == 200, response.text
    ids: list[int] = response.json()["choices"][0]["token_ids"]
    return ids


def test_a_sieve_from_another_package_is_served(served: Client) -> None:
    clip = golden_messages("video_c_r020")
    assert served.ask(clip, max_tokens=2).reduction["video"] == {"full": 36, "kept": 8}
    reduction = served.ask(clip, max_tokens=2, keep_ratio=0.5).reduction
    assert reduction["video"] == {"full": 36, "kept": 18}


@pytest.mark.parametrize(("keep_ratio", "message"), FAILS.items())
def test_a_choice_that_breaks_the_rules_fails_its_request_by_name(
    served: Client, keep_ratio: float, message: str
) -> None:
    for _ in range(2):  # the second finds nothing in a cache
        response = answer(served, keep_ratio)
        assert response.status_code == 500
        assert response.json()["error"]["message"].startswith(message)
        assert "secret" not in response.text
    assert tokens(answer(served, RIGHT))


def test_a_stream_ends_with_the_error_and_without_a_token(served: Client) -> None:
    stream = served.openai.chat.completions.create(
        model=MODEL,
        messages=user(CLIP, text("And this?")),
        stream=True,
        extra_body={"keep_ratio": 0.14},
    )
    with pytest.raises(openai.APIError, match="The sieve 'guest' chose tokens outside"):
        assert not [chunk for chunk in stream if chunk.choices[0].delta.content]


@pytest.mark.parametrize(
    ("keep_ratio", "status", "message"),
    [
        (0.91, 400, "the sieve 'guest' would keep none of"),
        (0.92, 500, "The sieve 'guest' plans to keep -1 of"),
        (0.93, 500, "The sieve 'guest' plans to keep"),
        (0.94, 500, "The sieve 'guest' made no plan: KeyError."),
    ],
)
def test_a_plan_that_breaks_the_rules_fails_its_request_by_name(
    served: Client, keep_ratio: float, status: int, message: str
) -> None:
    response = answer(served, keep_ratio)
    assert response.status_code == status
    assert response.json()["error"]["message"].startswith(message)
    assert "secret" not in response.text


def test_nothing_of_a_failed_choice_is_used_again(served: Client) -> None:
    # At this ratio the sieve fails once, and then keeps as many as at the one beside it.
    expected = answer(served, 0.1201).json()
    assert answer(served, 0.12).status_code == 500
    again = answer(served, 0.12).json()
    for name in ("video", "audio"):
        assert again["usage"]["reduction"][name] == expected["usage"]["reduction"][name]
    assert again["choices"][0]["token_ids"] == expected["choices"][0]["token_ids"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] < 32  # a block


def test_requests_of_the_same_step_are_none_the_worse(served: Client) -> None:
    words = [f"What is it? {number}" for number in range(12)]
    alone = [tokens(answer(served, RIGHT, some)) for some in words]
    ratios = [0.11, 0.21, 0.14, 0.22, 0.15, 0.23, 0.16, 0.24, 0.14, 0.21, 0.15, RIGHT]
    expected = {ratio: tokens(answer(served, ratio)) for ratio in ratios if ratio not in FAILS}
    assert len(alone) == len(ratios)
    with ThreadPoolExecutor(len(ratios)) as threads:
        for _ in range(3):
            responses = list(threads.map(lambda ratio: answer(served, ratio), ratios))
            for ratio, response in zip(ratios, responses, strict=True):
                if ratio in FAILS:
                    assert response.status_code == 500
                    assert FAILS[ratio] in response.text
                else:
                    assert tokens(response) == expected[ratio]
    assert [tokens(answer(served, RIGHT, some)) for some in words] == alone


def test_an_answer_waits_for_no_step_of_another_request(served: Client, mark: Path) -> None:
    def ask(keep_ratio: float, **body: Any) -> tuple[float, Any]:
        """When the answer came, and its usage."""
        picture = image(make_image(number=int(keep_ratio * 100)))
        found = served.ask(user(picture, text("?")), max_tokens=1, keep_ratio=keep_ratio, **body)
        return time.monotonic(), found.reduction

    with ThreadPoolExecutor(2) as threads:
        short = threads.submit(ask, 0.18, return_selection=True)
        while not mark.exists():  # its step has begun and takes a moment
            assert not short.done()
            time.sleep(0.05)
        long = threads.submit(ask, 0.19)
        short_end, reduction = short.result()
        long_end, _ = long.result()
    assert long_end - short_end > SLOW_SECONDS / 2
    assert reduction["image"]["kept"] == reduction["av_tokens_kept"] > 0
    assert reduction["video"] == reduction["audio"] == {"full": 0, "kept": 0}
    (picture,) = reduction["selection"]
    assert picture["video"]["kept"] == list(range(reduction["av_tokens_kept"]))
