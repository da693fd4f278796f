"""Slots and room that tenants share."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ep_serve.gateway.media.store.in_use import PinnedMedia
from ep_serve.gateway.slots import FairSlots

pytestmark = pytest.mark.anyio


async def granted(slots: FairSlots, tenants: list[str]) -> Counter[str]:
    """How many slots each one gets at once, of those that ask in this order."""
    got: Counter[str] = Counter()

    async def one(tenant: str) -> None:
        await slots.acquire(tenant)
        got[tenant] += 1

    tasks = [asyncio.create_task(one(tenant)) for tenant in tenants]
    await asyncio.sleep(0)
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    return got


async def test_a_tenant_gets_two_thirds_of_the_slots_and_others_find_some() -> None:
    got = await granted(FairSlots(30), ["a"] * 100 + ["b"] * 100 + ["c"] * 100)
    assert got == {"a": 20, "b": 7, "c": 2}


async def test_one_slot_is_given_to_anybody() -> None:
    assert await granted(FairSlots(1), ["a", "b"]) == {"a": 1}


async def test_without_tenants_all_slots_are_used() -> None:
    assert await granted(FairSlots(4), [""] * 5) == {"": 4}


async def test_waiting_tenants_are_served_round_robin() -> None:
    slots = FairSlots(1)
    await slots.acquire("x")
    order: list[str] = []

    async def one(tenant: str) -> None:
        async with slots.slot(tenant):
            order.append(tenant)

    tasks = [asyncio.create_task(one(tenant)) for tenant in "aaaabbc"]
    await asyncio.sleep(0)
    slots.release("x")
    await asyncio.gather(*tasks)
    assert "".join(order) == "abcabaa"


@given(
    st.integers(1, 5),
    st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from(["work", "cancel", "both"]))),
)
async def test_no_slot_is_lost_when_work_is_cancelled(
    number: int, plan: list[tuple[str, str]]
) -> None:
    slots = FairSlots(number)
    running = 0

    async def one(tenant: str) -> None:
        nonlocal running
        async with slots.slot(tenant):
            running += 1
            assert running <= number
            try:
                await asyncio.sleep(0)
            finally:
                running -= 1

    tasks = []
    for tenant, what in plan:
        task = asyncio.create_task(one(tenant))
        tasks.append(task)
        if what != "cancel":
            await asyncio.sleep(0)
        if what != "work":
            task.cancel()
    async with asyncio.timeout(20):
        await asyncio.gather(*tasks, return_exceptions=True)
    assert slots._free == number
    assert not slots._held
    assert not slots._waiting


@given(st.lists(st.tuples(st.sampled_from("xyz"), st.sampled_from("ab"), st.integers(0, 9))))
def test_what_is_in_use_counts_once_and_for_each_tenant(
    steps: list[tuple[str, str, int]],
) -> None:
    in_use = PinnedMedia()
    held: Counter[tuple[str, str]] = Counter()
    sizes: dict[str, int] = {}

    def check() -> None:
        names = {name for name, _ in +held}
        assert {name for name in "xyz" if name in in_use} == names
        assert in_use.nbytes == sum(sizes.get(name, 0) for name in names)
        for tenant in "ab":
            mine = {name for name, owner in +held if owner == tenant}
            assert in_use.tenant_bytes(tenant) == sum(sizes.get(name, 0) for name in mine)

    for name, tenant, size in steps:
        if size < 5 or not held[name, tenant]:
            in_use.pin(name, tenant)
            held[name, tenant] += 1
            in_use.resize(name, size)
            sizes[name] = size
        else:
            in_use.unpin(name, tenant)
            held[name, tenant] -= 1
            if not any(held[name, owner] for owner in "ab"):
                sizes.pop(name)
        check()
    for name, tenant in held.elements():
        in_use.unpin(name, tenant)
    assert in_use.nbytes == in_use.tenant_bytes("a") == in_use.tenant_bytes("b") == 0
