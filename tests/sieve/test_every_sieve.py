"""What holds for every sieve, whatever it picks."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep_serve.layout import Audio, Kind, Layout, keep_count
from ep_serve.sieve import Budget, Sieve, get_sieve, known_sieves
from ep_serve.sieve.base import Plan
from tests.layout.prompts import Prompt
from tests.sieve.pools import (
    HIDDEN_SIZE,
    LAYOUTS,
    clip_layout,
    lay_out,
    make_layout,
    make_pool,
    pool_for,
    without_text,
)

NAMES = known_sieves()
COUNTING = ["cs2", "random", "uniform"]
"""Sieves that need to know nothing but how many tokens to keep."""
WITH_RHO = ["omnisift", "omnizip"]

ratios = st.floats(0, 1, exclude_min=True)
rhos = st.floats(0, 1)
ratio_budgets = st.builds(Budget, ratios)
rho_budgets = st.builds(
    Budget, keep_ratio=st.none(), rho_audio=st.none() | rhos, rho_video=st.none() | rhos
)


# A machine under load must not fail a test by taking its time.
quick = settings(deadline=None, max_examples=40)


@cache
def build(name: str) -> Sieve:
    torch.manual_seed(0)
    sieve = get_sieve(name).for_model(HIDDEN_SIZE)
    return sieve.requires_grad_(False) if isinstance(sieve, torch.nn.Module) else sieve


def check_budget(name: str, layout: Layout, budget: Budget) -> None:
    sieve, pool = build(name), pool_for(layout)
    plan = sieve.plan(layout, budget)
    kept = sieve.select(pool, plan)
    assert kept.indices.dtype == torch.int64
    assert kept.indices.shape == (plan.keep,)
    assert (kept.indices.diff() > 0).all()
    assert ((kept.indices >= 0) & (kept.indices < pool.size)).all()
    if kept.hidden is not None:
        assert kept.hidden.shape == (plan.keep, HIDDEN_SIZE)
        assert kept.hidden.isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@given(layout=LAYOUTS, budget=ratio_budgets)
@quick
def test_it_keeps_its_budget_in_prompt_order(name: str, layout: Layout, budget: Budget) -> None:
    check_budget(name, layout, budget)


@pytest.mark.parametrize("name", WITH_RHO)
@given(layout=LAYOUTS, budget=rho_budgets)
@quick
def test_it_keeps_its_budget_at_given_rates(name: str, layout: Layout, budget: Budget) -> None:
    check_budget(name, layout, budget)


@pytest.mark.parametrize("name", NAMES)
@given(layout=LAYOUTS, keep_ratio=ratios | st.sampled_from([1e-300, 1e-9, 0.01]))
@quick
def test_something_stays_at_any_ratio(name: str, layout: Layout, keep_ratio: float) -> None:
    assert get_sieve(name).plan(layout, Budget(keep_ratio)).keep >= min(1, layout.num_av)
    check_budget(name, layout, Budget(keep_ratio))


@pytest.mark.parametrize("name", WITH_RHO)
@given(layout=LAYOUTS, rho_audio=rhos | st.just(1.0), rho_video=rhos | st.just(1.0))
@quick
def test_something_stays_at_any_rates(
    name: str, layout: Layout, rho_audio: float, rho_video: float
) -> None:
    budget = Budget(rho_audio=rho_audio, rho_video=rho_video)
    assert get_sieve(name).plan(layout, budget).keep >= min(1, layout.num_av)
    check_budget(name, layout, budget)


@pytest.mark.parametrize("name", WITH_RHO)
@pytest.mark.parametrize(
    "layout",
    [
        clip_layout(4, 6, 0),
        clip_layout(3, 1, 0),
        lay_out(Prompt().add(Audio(1))),
        lay_out(Prompt().add(Audio(9)).add(Audio(9)).add(Audio(9))),
    ],
    ids=["silent clip", "tiny clip", "one token of sound", "three sounds"],
)
def test_one_token_stays_where_all_is_to_be_dropped(name: str, layout: Layout) -> None:
    budget = Budget(rho_audio=1.0, rho_video=1.0)
    assert get_sieve(name).plan(layout, budget).keep == 1
    check_budget(name, layout, budget)


@pytest.mark.parametrize("name", NAMES)
@given(layout=LAYOUTS, budget=ratio_budgets)
@quick
def test_it_answers_the_same_again(name: str, layout: Layout, budget: Budget) -> None:
    sieve = build(name)
    first = sieve.select(pool_for(layout), sieve.plan(layout, budget))
    torch.manual_seed(layout.length)  # as after other requests
    again = build.__wrapped__(name).select(pool_for(layout), sieve.plan(layout, budget))
    assert torch.equal(first.indices, again.indices)
    assert (first.hidden is None) == (again.hidden is None)
    if first.hidden is not None and again.hidden is not None:
        assert torch.equal(first.hidden, again.hidden)


@pytest.mark.parametrize("name", NAMES)
@given(layout=LAYOUTS)
@quick
def test_a_keep_ratio_of_one_keeps_all(name: str, layout: Layout) -> None:
    sieve, pool = build(name), pool_for(layout)
    kept = sieve.select(pool, sieve.plan(layout, Budget(1.0)))
    assert torch.equal(kept.indices, torch.arange(pool.size))
    assert kept.hidden is None or torch.equal(kept.hidden, pool.hidden)


@pytest.mark.parametrize("name", WITH_RHO)
@given(layout=LAYOUTS)
@quick
def test_rates_of_zero_keep_all(name: str, layout: Layout) -> None:
    sieve, pool = build(name), pool_for(layout)
    kept = sieve.select(pool, sieve.plan(layout, Budget(rho_audio=0, rho_video=0.0)))
    assert torch.equal(kept.indices, torch.arange(pool.size))
    assert kept.hidden is None


@pytest.mark.parametrize("name", NAMES)
@given(layout=LAYOUTS, budget=ratio_budgets)
@quick
def test_text_does_not_change_the_choice(name: str, layout: Layout, budget: Budget) -> None:
    sieve, pool = build(name), pool_for(layout)
    kept = sieve.select(pool, sieve.plan(layout, budget)).indices
    alone = sieve.select(pool, sieve.plan(without_text(layout), budget)).indices
    assert torch.equal(kept, alone)


@pytest.mark.parametrize("name", ["omnisift", "omnizip", "none"])
@given(layout=LAYOUTS, budget=ratio_budgets)
@quick
def test_images_stay_whole(name: str, layout: Layout, budget: Budget) -> None:
    sieve, pool = build(name), pool_for(layout)
    kept = sieve.select(pool, sieve.plan(layout, budget)).indices
    assert (pool.kinds[kept] == Kind.IMAGE).sum() == layout.count(Kind.IMAGE)


@pytest.mark.parametrize("name", WITH_RHO)
@given(layout=LAYOUTS, budget=ratio_budgets)
@quick
def test_a_medium_is_reduced_alike_wherever_it_stands(
    name: str, layout: Layout, budget: Budget
) -> None:
    # Shifted in time, as after another text, and with other media numbers.
    sieve, pool = build(name), pool_for(layout)
    moved = Layout(layout.token_ids, layout.kinds, layout.media + 3, layout.positions + 777)
    kept = sieve.select(pool, sieve.plan(layout, budget)).indices
    assert torch.equal(kept, sieve.select(pool, sieve.plan(moved, budget)).indices)


@pytest.mark.parametrize("name", COUNTING)
@pytest.mark.parametrize("k", [-1, 11])
def test_a_budget_outside_the_pool_is_refused(name: str, k: int) -> None:
    with pytest.raises(ValueError, match=f"between 0 and the pool's size 10, not {k}"):
        build(name).select(make_pool(10), Plan(k))


@pytest.mark.parametrize("name", ["omnisift", "omnizip"])
def test_the_plan_of_another_prompt_is_refused(name: str) -> None:
    sieve = build(name)
    plan = sieve.plan(clip_layout(4, 6, 100), Budget(0.5))
    with pytest.raises(ValueError, match="for 124 tokens, the pool has 62"):
        sieve.select(pool_for(clip_layout(2, 6, 50)), plan)


@pytest.mark.parametrize("name", COUNTING)
def test_the_budget_is_known_without_building_the_sieve(name: str) -> None:
    assert get_sieve(name).plan(make_layout(100), Budget(0.07)).keep == 8
    assert get_sieve(name).plan(make_layout(0), Budget(0.07)).keep == 0


@pytest.mark.parametrize("name", WITH_RHO)
def test_the_default_rates_are_the_published_ones(name: str) -> None:
    layout = clip_layout(8, 100, 200)
    rates = Budget(rho_audio=0.3, rho_video={"omnisift": 0.7, "omnizip": 0.6}[name])
    assert get_sieve(name).plan(layout, Budget()).keep == get_sieve(name).plan(layout, rates).keep


@pytest.mark.parametrize("name", COUNTING)
def test_rates_are_refused_where_they_mean_nothing(name: str) -> None:
    with pytest.raises(ValueError, match=f"are not supported by the sieve {name!r}"):
        get_sieve(name).plan(make_layout(10), Budget(rho_audio=0.3))


@pytest.mark.parametrize("name", COUNTING)
def test_a_ratio_is_needed_where_there_is_no_default(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name!r} needs a keep_ratio"):
        get_sieve(name).plan(make_layout(10), Budget())


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"rho_audio": 1.5}, "rho_audio must be a number from 0 to 1, not 1.5"),
        ({"rho_video": -0.1}, "rho_video must be a number from 0 to 1, not -0.1"),
        ({"rho_video": True}, "rho_video must be a number from 0 to 1, not True"),
        ({"rho_audio": float("nan")}, "rho_audio must be a number from 0 to 1, not nan"),
        ({"keep_ratio": 0}, "keep_ratio must be a number above 0"),
        ({"keep_ratio": 0.5, "rho_audio": 0.5}, "either keep_ratio or rho_audio, not both"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(budget: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(**budget)


@given(layout=LAYOUTS, keep_ratio=ratios)
@quick
def test_omnizip_meets_a_keep_ratio_exactly(layout: Layout, keep_ratio: float) -> None:
    images = layout.count(Kind.IMAGE)
    want = images + keep_count(layout.num_av - images, keep_ratio)
    assert get_sieve("omnizip").plan(layout, Budget(keep_ratio)).keep == want


@pytest.mark.parametrize("name", NAMES)
def test_a_sound_alone_is_reduced_to_the_ratio(name: str) -> None:
    layout = lay_out(Prompt().add(Audio(230)))
    assert get_sieve(name).plan(layout, Budget(0.2)).keep == (230 if name == "none" else 46)


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_states_are_reduced_as_well(name: str) -> None:
    layout = clip_layout(5, 12, 120)
    sieve, pool = build.__wrapped__(name), pool_for(layout)
    if isinstance(sieve, torch.nn.Module):
        sieve.bfloat16()
    plan = sieve.plan(layout, Budget(0.4))
    fields = {field: getattr(pool, field) for field in ("kinds", "positions", "media", "saliency")}
    kept = sieve.select(type(pool)(pool.hidden.bfloat16(), **fields), plan)
    assert len(kept.indices) == plan.keep
    assert kept.hidden is None or kept.hidden.dtype == torch.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_it_knows_its_own_name(name: str) -> None:
    assert get_sieve(name).name == name


def test_nothing_is_lost_of_the_text() -> None:
    # A sieve sees the pool alone; what it keeps, put back into the prompt, leaves text untouched.
    layout = clip_layout(6, 9, 150)
    for name in NAMES:
        sieve = build(name)
        kept = sieve.select(pool_for(layout), sieve.plan(layout, Budget(0.1))).indices
        (av,) = layout.is_av.nonzero()
        stays = ~layout.is_av
        stays[av[kept.numpy()]] = True
        assert np.array_equal(
            layout.token_ids[stays & ~layout.is_av], layout.token_ids[~layout.is_av]
        )
