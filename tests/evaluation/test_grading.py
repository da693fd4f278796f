from __future__ import annotations

import string

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from ep_serve.evaluation.grading import chosen_option, is_correct, normalise

ANIMALS = {"A": "a dog", "B": "the cat", "C": "no animal"}
WORDS = st.lists(st.text(string.ascii_letters, min_size=2, max_size=8), min_size=1, max_size=4)


@pytest.mark.parametrize("got", ["Red", "red.", " RED ", "the red", "'red'", "**red**"])
def test_case_articles_and_marks_do_not_matter(got: str) -> None:
    assert is_correct(got, "red")


@pytest.mark.parametrize("got", ["", "reddish", "red circle", "not red", "blue"])
def test_other_words_are_other_answers(got: str) -> None:
    assert not is_correct(got, "red")


@pytest.mark.parametrize(
    "got",
    [
        *("B", "b", "B.", "(B)", "[B]", "B)", "B:", " B \n", "**B**"),
        *("The cat", "cat.", "B. the cat", "(B) cat", "B the cat", "B: The cat."),
        *("B. It sits on the mat", "The answer is B.", "Answer: (B) the cat", "Option B"),
    ],
)
def test_an_option_is_chosen_by_letter_by_text_or_by_both(got: str) -> None:
    assert chosen_option(got, ANIMALS) == "B"


@pytest.mark.parametrize(
    "got", ["", "D", "a cow", "B. a dog", "A cow is seen", "Both", "A or B", "I see a cat"]
)
def test_an_ambiguous_answer_chooses_no_option(got: str) -> None:
    assert chosen_option(got, ANIMALS) is None


@given(words=WORDS)
def test_normalising_twice_changes_nothing(words: list[str]) -> None:
    once = normalise(" ".join(words))
    assert normalise(once) == once


@given(
    texts=st.lists(WORDS.map(" ".join), min_size=2, max_size=5, unique_by=normalise),
    form=st.sampled_from(["{0}", "{0}.", "({0})", "({0}) {1}", "{0}. {1}", "{1}", "{1}."]),
    data=st.data(),
)
def test_every_form_of_an_option_chooses_it_and_no_other(
    texts: list[str], form: str, data: st.DataObject
) -> None:
    options = dict(zip(string.ascii_uppercase, texts, strict=False))
    letter = data.draw(st.sampled_from(sorted(options)))
    got = form.format(letter, options[letter])
    # A text such as "The answer" says by itself that a letter comes.
    assume(not got.casefold().startswith(("the", "answer", "option", "choice", "right")))
    for other in options:
        assert is_correct(got, other, options) == (other == letter)
