from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_serve.layout import (
    Audio,
    Image,
    Kind,
    Layout,
    MediumShape,
    PlaceholderError,
    Video,
    build_layout,
    video_tokens,
)
from tests.layout.prompts import ANY_PROMPT, TOKENS, Prompt, videos


def lay_out(prompt: Prompt) -> Layout:
    return build_layout(prompt.ids, prompt.media, TOKENS)


def token_counts(medium: MediumShape) -> dict[Kind, int]:
    if isinstance(medium, Audio):
        return {Kind.AUDIO: medium.tokens}
    if isinstance(medium, Image):
        return {Kind.IMAGE: video_tokens(medium.grid_thw, TOKENS.spatial_merge_size)}
    picture = video_tokens(medium.grid_thw, TOKENS.spatial_merge_size)
    return {Kind.VIDEO: picture, Kind.AUDIO: medium.audio_tokens}


# --- one prompt at a time ---------------------------------------------------------------------


def test_text_counts_up_on_all_rows() -> None:
    layout = build_layout([7, 8, 9], [], TOKENS)
    assert layout.token_ids.tolist() == [7, 8, 9]
    assert layout.positions.tolist() == [[0, 1, 2]] * 3
    assert (layout.num_text, layout.num_av, layout.next_position) == (3, 0, 3)


def test_an_empty_prompt_has_an_empty_layout() -> None:
    layout = build_layout([], [], TOKENS)
    assert (layout.length, layout.next_position, layout.positions.shape) == (0, 0, (3, 0))


def test_arrays_have_the_documented_types() -> None:
    layout = lay_out(Prompt().add(Video((2, 2, 2), 1.0, 30)))
    assert layout.token_ids.dtype == np.int64
    assert layout.kinds.dtype == np.int8
    assert layout.media.dtype == np.int32
    assert layout.positions.dtype == np.int64
    assert layout.is_av.dtype == np.bool_


def test_an_image_stands_still_in_time() -> None:
    layout = lay_out(Prompt().text(1).add(Image((1, 4, 6))).text(2))
    assert layout.positions.tolist() == [
        [0, 1, 2, 2, 2, 2, 2, 2, 5, 6],
        [0, 1, 2, 2, 2, 3, 3, 3, 5, 6],
        [0, 1, 2, 3, 4, 2, 3, 4, 5, 6],
    ]


def test_a_silent_clip_moves_25_positions_a_second() -> None:
    layout = lay_out(Prompt().add(Video((3, 2, 4), 0.5)))
    assert layout.token_ids.tolist() == [505, *[509] * 6, 506]
    assert layout.positions.tolist() == [
        [0, 1, 1, 13, 13, 26, 26, 27],
        [0, 1, 1, 1, 1, 1, 1, 27],
        [0, 1, 2, 1, 2, 1, 2, 27],
    ]


def test_picture_and_sound_alternate_every_two_seconds() -> None:
    layout = lay_out(Prompt().add(Video((4, 2, 2), 1.0, 103)))
    runs = [(509, 2), (502, 50), (509, 2), (502, 50), (502, 3)]
    expected = [token for token, n in runs for _ in range(n)]
    assert layout.token_ids.tolist() == [505, 503, *expected, 504, 506]


def test_picture_left_over_when_the_sound_ends_follows_in_chunks() -> None:
    layout = lay_out(Prompt().add(Video((6, 2, 2), 1.0, 10)))
    assert layout.token_ids.tolist() == [505, 503, 509, 509, *[502] * 10, *[509] * 4, 504, 506]


def test_picture_and_sound_of_a_clip_start_together() -> None:
    layout = lay_out(Prompt().text(1, 2).add(Video((4, 2, 2), 1.0, 100)))
    assert layout.positions[0, layout.slots(0, Kind.VIDEO)].tolist() == [3, 28, 53, 78]
    sound = layout.positions[:, layout.slots(0, Kind.AUDIO)]
    np.testing.assert_array_equal(sound, np.tile(np.arange(3, 103), (3, 1)))


def test_the_opening_pair_shares_a_position_and_so_does_the_closing_pair() -> None:
    layout = lay_out(Prompt().text(1).add(Video((1, 2, 2), 1.0, 2)).text(2))
    assert layout.positions[0].tolist() == [0, 1, 1, 2, 2, 3, 4, 4, 5]


def test_sound_shorter_than_picture_puts_the_tail_inside_the_clips_time() -> None:
    layout = lay_out(Prompt().add(Video((4, 2, 2), 1.0, 52)).text(1, 2))
    assert layout.positions[0, -4:].tolist() == [53, 53, 54, 55]
    assert layout.positions.max() == 76
    assert layout.next_position == 77


def test_a_clip_of_less_than_one_position_goes_on_after_its_rows_and_columns() -> None:
    layout = lay_out(Prompt().add(Video((1, 8, 4), 1.0)).text(7))
    assert layout.positions[0, -2:].tolist() == [5, 6]


def test_times_are_rounded_in_float32() -> None:
    """The fifth step at 6.25 frames a second is at 40 exactly, and at 39.999996 in float32."""
    layout = lay_out(Prompt().add(Video((7, 2, 2), 2 / 6.25)))
    assert layout.positions[0, layout.is_av].tolist() == [1, 9, 17, 25, 33, 40, 49]


def test_several_turns_keep_their_own_media() -> None:
    prompt = Prompt().add(Image((1, 2, 2))).text(1).add(Audio(2)).text(2).add(Image((1, 2, 4)))
    layout = lay_out(prompt)
    assert layout.media.tolist() == [-1, 0, -1, -1, -1, 1, 1, -1, -1, -1, 2, 2, -1]
    assert layout.slots(2, Kind.IMAGE).tolist() == [10, 11]
    assert layout.slots(2, Kind.AUDIO).size == 0


def test_counts_name_every_kind() -> None:
    layout = lay_out(Prompt().add(Audio(3)))
    assert layout.counts() == {Kind.VIDEO: 0, Kind.AUDIO: 3, Kind.IMAGE: 0}
    assert layout.count(Kind.TEXT) == layout.num_text == 2


def test_a_placeholder_without_its_pair_is_laid_out() -> None:
    layout = build_layout([1, TOKENS.video, 2], [Video((1, 2, 2), 1.0, 2)], TOKENS)
    assert layout.token_ids.tolist() == [1, 503, 509, 502, 502, 504, 2]
    assert layout.positions[0].tolist() == [0, 1, 2, 2, 3, 4, 5]


def test_a_frame_that_float32_puts_into_another_chunk_keeps_its_own_time() -> None:
    """Step 99 at 1.98 frames a second is at 2500 exactly, on a border, and at 2499 in float32."""
    clip = Video((101, 2, 2), 2 / 1.98, 2600)
    layout = lay_out(Prompt().add(clip))
    slots = layout.slots(0, Kind.VIDEO)
    assert (layout.token_ids[slots[99] - 50 : slots[99]] == TOKENS.audio).all()
    assert layout.positions[0, slots[98:]].tolist() == [2475, 2500, 2526]


def test_a_hundred_thousand_tokens_are_laid_out_in_less_than_half_a_second() -> None:
    prompt = Prompt().text(*range(50)).add(Video((300, 36, 36), 2.0, 15_000)).text(*range(50))
    began = time.perf_counter()
    layout = lay_out(prompt)
    assert time.perf_counter() - began < 0.5
    assert layout.num_av == 300 * 18 * 18 + 15_000


# --- what is refused --------------------------------------------------------------------------


def test_a_placeholder_written_in_text_is_refused() -> None:
    prompt = Prompt().add(Video((1, 2, 2), 1.0)).text(TOKENS.video)
    with pytest.raises(PlaceholderError) as error:
        lay_out(prompt)
    assert "2 media placeholders (video, video)" in str(error.value)
    assert "1 media (video)" in str(error.value)
    assert "must not be written in a message's text" in str(error.value)


def test_a_placeholder_error_is_a_value_error() -> None:
    with pytest.raises(ValueError, match=r"1 media placeholders \(audio\).* 0 media \(none\)"):
        build_layout([TOKENS.audio], [], TOKENS)


def test_media_without_placeholders_are_refused() -> None:
    with pytest.raises(
        PlaceholderError, match=r"0 media placeholders \(none\).* 1 media \(audio\)"
    ):
        build_layout([1, 2], [Audio(5)], TOKENS)


def test_media_in_another_order_are_refused() -> None:
    prompt = Prompt().add(Audio(5)).add(Image((1, 2, 2)))
    with pytest.raises(PlaceholderError, match=r"\(audio, image\).*\(image, audio\)"):
        build_layout(prompt.ids, prompt.media[::-1], TOKENS)


def test_a_long_list_of_placeholders_is_cut_in_the_message() -> None:
    with pytest.raises(PlaceholderError, match=r"40 media placeholders \((video, ){8}\.\.\.\)"):
        build_layout([TOKENS.video] * 40, [], TOKENS)


def test_a_grid_that_cannot_be_merged_is_refused() -> None:
    with pytest.raises(ValueError, match=r"grid_thw \(1, 3, 2\)"):
        lay_out(Prompt().add(Image((1, 3, 2))))


@pytest.mark.parametrize("seconds", [1e6, 1e300])
def test_a_clip_whose_time_cannot_be_counted_is_refused(seconds: float) -> None:
    with pytest.raises(ValueError, match=r"second_per_grid .*the limit is 16777216"):
        lay_out(Prompt().add(Video((2, 2, 2), seconds)))


# --- whatever the prompt ----------------------------------------------------------------------


@settings(deadline=None)
@given(ANY_PROMPT)
def test_no_text_is_lost_and_its_order_stays(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    inserted = {TOKENS.audio_bos, TOKENS.audio_eos}
    placeholders = {TOKENS.audio, TOKENS.image, TOKENS.video}
    after = [t for t in layout.token_ids[~layout.is_av].tolist() if t not in inserted]
    before = [t for t in prompt.ids if t not in inserted | placeholders]
    assert after == before


@settings(deadline=None)
@given(ANY_PROMPT)
def test_every_medium_has_its_slots(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    found = []
    for index, medium in enumerate(prompt.media):
        for kind, n in token_counts(medium).items():
            slots = layout.slots(index, kind)
            assert slots.dtype == np.int64
            assert slots.size == n
            assert (np.diff(slots) > 0).all()
            assert (layout.token_ids[slots] == TOKENS.placeholder(kind)).all()
            found += slots.tolist()
    assert sorted(found) == np.flatnonzero(layout.is_av).tolist()


@settings(deadline=None)
@given(ANY_PROMPT)
def test_counts_add_up(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    assert sum(layout.counts().values()) == layout.num_av == int(layout.is_av.sum())
    assert layout.num_av + layout.num_text == layout.length == layout.kinds.size
    assert layout.media.shape == (layout.length,)
    assert layout.positions.shape == (3, layout.length)
    np.testing.assert_array_equal(layout.media >= 0, layout.is_av)


@settings(deadline=None)
@given(ANY_PROMPT)
def test_media_stand_in_the_order_of_the_prompt(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    assert (np.diff(layout.media[layout.is_av]) >= 0).all()


@settings(deadline=None)
@given(ANY_PROMPT)
def test_positions_start_at_zero_and_stay_below_the_next(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    assert (layout.positions >= 0).all()
    assert (layout.positions < layout.next_position).all()


@settings(deadline=None)
@given(ANY_PROMPT)
def test_text_has_one_position_on_all_rows_that_grows_but_for_the_shared_pairs(
    prompt: Prompt,
) -> None:
    layout = lay_out(prompt)
    text = layout.positions[:, ~layout.is_av]
    assert (text == text[0]).all()
    ids = layout.token_ids[~layout.is_av]
    pairs = [(TOKENS.vision_bos, TOKENS.audio_bos), (TOKENS.audio_eos, TOKENS.vision_eos)]
    shared = [pair in pairs for pair in zip(ids[:-1].tolist(), ids[1:].tolist(), strict=True)]
    neighbours = np.diff(np.flatnonzero(~layout.is_av)) == 1
    steps = np.diff(text[0])
    assert (steps[np.array(shared, dtype=bool) & neighbours] == 0).all()
    assert (steps[~np.array(shared, dtype=bool) & neighbours] == 1).all()


@settings(deadline=None)
@given(ANY_PROMPT)
def test_time_never_runs_backwards_inside_a_medium(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    for index, medium in enumerate(prompt.media):
        for kind in token_counts(medium):
            assert (np.diff(layout.positions[0, layout.slots(index, kind)]) >= 0).all()


@settings(deadline=None)
@given(ANY_PROMPT)
def test_a_medium_starts_one_after_the_text_before_it(prompt: Prompt) -> None:
    layout = lay_out(prompt)
    for index, medium in enumerate(prompt.media):
        firsts = [layout.slots(index, kind) for kind, n in token_counts(medium).items() if n]
        before = min(first[0] for first in firsts) - 1
        for first in firsts:
            assert (layout.positions[:, first[0]] == layout.positions[0, before] + 1).all()


@settings(deadline=None)
@given(videos(st.integers(1, 330)))
def test_sound_changes_where_pictures_stand_but_not_when(clip: Video) -> None:
    silent = lay_out(Prompt().add(Video(clip.grid_thw, clip.second_per_grid)))
    loud = lay_out(Prompt().add(clip))
    np.testing.assert_array_equal(
        silent.positions[:, silent.slots(0, Kind.VIDEO)],
        loud.positions[:, loud.slots(0, Kind.VIDEO)],
    )
