"""OmniSIFT's CPU side: pairs, sound and counts, and what a keep ratio is mapped to."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from ep_serve.layout import Audio, Image, Kind, Layout, Video, keep_count
from ep_serve.sieve import Budget
from ep_serve.sieve.frame_pairs import find_pairs
from ep_serve.sieve.omnisift import OmniSiftSieve
from tests.layout.prompts import Prompt
from tests.sieve.pools import LAYOUTS, as_one_clip, clip_layout, lay_out

quick = settings(deadline=None)
ratios = st.floats(0, 1, exclude_min=True)


@quick
@given(layout=LAYOUTS, merged=st.booleans())
def test_every_av_token_has_one_place(layout: Layout, merged: bool) -> None:
    pairs = find_pairs(as_one_clip(layout) if merged else layout)
    parts = [a.ravel() for g in pairs.groups for a in (g.first, g.second, g.sound)]
    places = np.concatenate([*parts, *pairs.lone_sounds, pairs.images])
    assert sorted(places.tolist()) == list(range(layout.num_av))


@quick
@given(layout=LAYOUTS)
def test_pairs_are_consecutive_frames_of_one_clip_with_the_sound_between(layout: Layout) -> None:
    is_av = layout.is_av
    time, media = layout.positions[0, is_av], layout.media[is_av]
    video = layout.kinds[is_av] == Kind.VIDEO
    for group in find_pairs(layout).groups:
        for first, second, sound in zip(group.first, group.second, group.sound, strict=True):
            clip = media[first[0]]
            frames = np.unique(time[video & (media == clip)]).tolist()
            place = frames.index(time[first[0]])
            assert place % 2 == 0
            assert set(media[np.concatenate([first, second, sound])]) == {clip}
            assert set(time[first]) == {frames[place]}
            assert set(time[second]) == set(frames[place + 1 : place + 2])
            until = frames[place + 2] if place + 2 < len(frames) else np.inf
            assert ((time[sound] >= frames[place]) & (time[sound] < until)).all()


def test_counts_are_cut_as_the_authors_cut_them() -> None:
    # 100 * 0.29 is 28.999... as a Python float, so 28 of 100 tokens are dropped.
    plan = OmniSiftSieve.plan(clip_layout(2, 100, 100), Budget(rho_audio=0.29, rho_video=0.29))
    assert plan.keep == 3 * (100 - 28)


def test_a_pair_with_a_single_audio_token_keeps_it() -> None:
    layout = clip_layout(2, 10, 1)
    assert OmniSiftSieve.plan(layout, Budget(rho_audio=1, rho_video=0.5)).keep == 11


def test_sound_stays_where_no_picture_survives() -> None:
    layout = clip_layout(2, 10, 50)
    assert OmniSiftSieve.plan(layout, Budget(rho_audio=0.5, rho_video=1)).keep == 50


def test_a_last_frame_without_a_partner_is_pruned_by_itself() -> None:
    layout = clip_layout(3, 10, 0)
    assert OmniSiftSieve.plan(layout, Budget(rho_audio=0, rho_video=0.7)).keep == 9


def test_the_second_frame_is_kept_whole_where_it_has_another_size() -> None:
    # Frames 0.03 s apart: the first two fall on one position, the third has one for itself.
    layout = lay_out(Prompt().add(Video((3, 2, 8), 0.03)))
    (group,) = find_pairs(layout).groups
    assert (group.first.shape, group.second.shape) == ((1, 8), (1, 4))
    assert OmniSiftSieve.plan(layout, Budget(rho_video=0.5)).keep == 4 + 4


def test_the_last_pair_takes_all_that_is_heard_after_it() -> None:
    (group,) = find_pairs(clip_layout(2, 10, 500)).groups
    assert group.sound.shape == (1, 500)


def test_pairs_do_not_straddle_two_clips_unless_they_are_one() -> None:
    clip = Video((3, 2, 8), 1.0, 75)
    layout = lay_out(Prompt().add(clip).text(1).add(clip))
    assert [g.second.shape for g in find_pairs(layout).groups] == [(2, 0), (2, 4)]
    assert [len(g.first) for g in find_pairs(as_one_clip(layout)).groups] != [2, 2]
    assert sum(len(g.first) for g in find_pairs(as_one_clip(layout)).groups) == 3


def test_a_sound_of_its_own_falls_to_the_clip_before_it_only_if_they_are_one() -> None:
    layout = lay_out(Prompt().add(Video((2, 2, 8), 1.0)).add(Audio(30)))
    apart, together = find_pairs(layout), find_pairs(as_one_clip(layout))
    assert [len(sound) for sound in apart.lone_sounds] == [30]
    assert [group.sound.shape for group in together.groups] == [(1, 30)]


def test_a_sound_without_a_picture_keeps_evenly_spaced_tokens() -> None:
    plan = OmniSiftSieve.plan(lay_out(Prompt().add(Audio(10))), Budget(rho_audio=0.8))
    assert plan.fixed.tolist() == [2, 7]


def test_images_are_kept_on_top() -> None:
    prompt = Prompt().add(Image((1, 4, 6))).add(Video((4, 8, 8), 1.0))
    assert OmniSiftSieve.plan(lay_out(prompt), Budget(0.25)).keep == 6 + 16


@quick
@given(layout=LAYOUTS, keep_ratio=ratios)
def test_a_keep_ratio_is_met_to_within_one_token_per_pair(
    layout: Layout, keep_ratio: float
) -> None:
    images = layout.count(Kind.IMAGE)
    asked = keep_count(layout.num_av - images, keep_ratio)
    pairs = find_pairs(layout)
    tolerance = sum(len(group.first) for group in pairs.groups) + len(pairs.lone_sounds)
    assume(asked >= tolerance)  # one token of every frame stays
    assume(all(group.frames_match or not group.second.size for group in pairs.groups))
    assert abs(OmniSiftSieve.plan(layout, Budget(keep_ratio)).keep - images - asked) <= tolerance


@quick
@given(layout=LAYOUTS, keep_ratio=ratios)
def test_the_rates_of_a_keep_ratio_give_the_same_plan(layout: Layout, keep_ratio: float) -> None:
    plan = OmniSiftSieve.plan(layout, Budget(keep_ratio))
    rates = Budget(rho_audio=plan.rho_audio, rho_video=plan.rho_video)
    again = OmniSiftSieve.plan(layout, rates)
    assert (again.keep, again.fixed.tolist()) == (plan.keep, plan.fixed.tolist())


@quick
@given(layout=LAYOUTS, keep_ratio=ratios)
def test_no_frame_vanishes_at_a_keep_ratio(layout: Layout, keep_ratio: float) -> None:
    assert OmniSiftSieve.plan(layout, Budget(keep_ratio)).rho_video < 1


@pytest.mark.parametrize(("keep_ratio", "rates"), [(0.35, (0.4, 0.67)), (0.25, (0.5, 0.77))])
def test_the_published_ratios_are_mapped_to_the_published_rates(
    keep_ratio: float, rates: tuple[float, float]
) -> None:
    # 312 tokens a second of picture and 25 of sound: 2 of 27 tokens are sound.
    plan = OmniSiftSieve.plan(clip_layout(60, 312, 1500), Budget(keep_ratio))
    assert (plan.rho_audio, plan.rho_video) == pytest.approx(rates, abs=0.02)
