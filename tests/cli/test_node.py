from __future__ import annotations

from ep_serve.node import split_options


def test_options_are_parted_from_the_rest_with_their_values() -> None:
    words = ["--dtype", "float32", "--port", "80", "--host=::1", "--enforce-eager"]
    chosen, rest = split_options(words, ["--host", "--port"])
    assert chosen == ["--port", "80", "--host=::1"]
    assert rest == ["--dtype", "float32", "--enforce-eager"]


def test_a_name_without_its_value_is_left_to_the_one_who_reads_it() -> None:
    assert split_options(["--port"], ["--port"]) == (["--port"], [])
