"""Random prompts: text, media with their placeholders, and the tokens of an invented checkpoint."""

from __future__ import annotations

from dataclasses import dataclass, field

from hypothesis import strategies as st

from ep_serve.layout import Audio, Image, Kind, MediaTokens, MediumShape, Video

TOKENS = MediaTokens(
    audio=502,
    image=508,
    video=509,
    audio_bos=503,
    audio_eos=504,
    vision_bos=505,
    vision_eos=506,
)


@dataclass
class Prompt:
    """Prompt ids with one placeholder per medium, and the media."""

    ids: list[int] = field(default_factory=list)
    media: list[MediumShape] = field(default_factory=list)

    def text(self, *ids: int) -> Prompt:
        self.ids += ids
        return self

    def add(self, medium: MediumShape) -> Prompt:
        opens, closes = TOKENS.vision_bos, TOKENS.vision_eos
        if medium.kind is Kind.AUDIO:
            opens, closes = TOKENS.audio_bos, TOKENS.audio_eos
        self.media.append(medium)
        return self.text(opens, TOKENS.placeholder(medium.kind), closes)


def merged(most: int) -> st.SearchStrategy[int]:
    """Patches along one side of a grid."""
    return st.integers(1, most).map(lambda n: n * TOKENS.spatial_merge_size)


SECONDS = st.one_of(
    st.sampled_from([1.0, 2 / 3, 0.4, 0.5, 2 / 7, 2 / 6.25, 2 / 1.98, 2 / 29.97 * 15, 4.0, 7.5]),
    st.floats(0.05, 8),
)


def videos(audio_tokens: st.SearchStrategy[int]) -> st.SearchStrategy[Video]:
    grids = st.tuples(st.integers(1, 12), merged(6), merged(6))
    return st.builds(Video, grids, SECONDS, audio_tokens)


IMAGES = st.builds(Image, st.tuples(st.just(1), merged(9), merged(9)))
AUDIOS = st.builds(Audio, st.integers(1, 160))


def prompts(*media: st.SearchStrategy[MediumShape]) -> st.SearchStrategy[Prompt]:
    """Any number of media of these sorts in any order, with text before, between and after."""
    text = st.lists(st.integers(0, 400), max_size=5)

    def join(first: list[int], rest: list[tuple[MediumShape, list[int]]]) -> Prompt:
        prompt = Prompt().text(*first)
        for medium, after in rest:
            prompt.add(medium).text(*after)
        return prompt

    return st.builds(join, text, st.lists(st.tuples(st.one_of(*media), text), max_size=5))


ANY_PROMPT = prompts(videos(st.integers(0, 330)), IMAGES, AUDIOS)
