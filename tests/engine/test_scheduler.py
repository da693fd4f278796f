from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.multimodal.inputs import MultiModalBatchedField, MultiModalFieldElem
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler

from ep_serve.engine.worker.scheduler import ReducingAsyncScheduler, reducing_scheduler


@pytest.mark.parametrize("asynchronous", [True, False])
def test_it_goes_with_the_servers_setting(
    monkeypatch: pytest.MonkeyPatch, asynchronous: bool
) -> None:
    for kind in (Scheduler, AsyncScheduler):
        monkeypatch.setattr(kind, "__init__", lambda self, **given: None)
    config: Any = SimpleNamespace(scheduler_config=SimpleNamespace(async_scheduling=asynchronous))
    assert isinstance(reducing_scheduler(vllm_config=config), AsyncScheduler) == asynchronous


def test_a_long_prompt_takes_all_of_a_steps_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    def of_vllm(*given: Any) -> tuple[list[int], int, int, list[int], list[int]]:
        return [0], 60, 400 - 60, [], []

    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", of_vllm)
    scheduler: Any = object.__new__(ReducingAsyncScheduler)
    field = MultiModalBatchedField(keep_on_cpu=True)
    for full, left in ((100, 300), (400, 0), (900, 0)):
        tokens = MultiModalFieldElem(data=torch.zeros(full, dtype=torch.int64), field=field)
        feature = SimpleNamespace(
            data={"token_ids": tokens}, mm_position=SimpleNamespace(get_num_embeds=lambda: 60)
        )
        request = SimpleNamespace(mm_features=[feature])
        chosen, _, budget, *_ = scheduler._try_schedule_encoder_inputs(request, 0, 60, 400)
        assert (chosen, budget) == ([0], left)


@pytest.mark.parametrize("data", [None, {"address": None, "monotonic_id": None}])
def test_an_item_in_shared_memory_counts_as_vllm_counts_it(
    monkeypatch: pytest.MonkeyPatch, data: dict[str, None] | None
) -> None:
    taken: Any = ([0], 60, 340, [], [])
    monkeypatch.setattr(Scheduler, "_try_schedule_encoder_inputs", lambda *given: taken)
    scheduler: Any = object.__new__(ReducingAsyncScheduler)
    request = SimpleNamespace(mm_features=[SimpleNamespace(data=data)])
    assert scheduler._try_schedule_encoder_inputs(request, 0, 60, 400) == taken
