"""Media tokens are found in a text and across texts."""

from __future__ import annotations

import pytest

from ep_serve.contract.media_tokens import MEDIA_TOKENS, find_media_token, find_split_media_token


@pytest.mark.parametrize("token", MEDIA_TOKENS)
def test_a_token_inside_a_text_is_found(token: str) -> None:
    assert find_media_token(f"What is {token} here?") == token


@pytest.mark.parametrize("text", ["", "<|im_start|>", "a < b | c > d", "<VIDEO>", "<|video|>"])
def test_other_text_is_let_through(text: str) -> None:
    assert find_media_token(text) is None


@pytest.mark.parametrize("token", MEDIA_TOKENS)
def test_a_token_is_found_at_every_split(token: str) -> None:
    for place in range(1, len(token)):
        pieces = [f"a {token[:place]}\n", f" \n{token[place:]} b"]
        assert find_split_media_token(pieces) == token


def test_a_token_in_three_pieces_is_found() -> None:
    assert find_split_media_token(["<|VI", "", "DE", "O|>"]) == "<|VIDEO|>"
