from __future__ import annotations

import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from vllm.v1.engine import EngineCoreOutput
from vllm.v1.outputs import EMPTY_MODEL_RUNNER_OUTPUT, AsyncModelRunnerOutput, ModelRunnerOutput

from ep_serve.engine import outcomes
from ep_serve.engine.class_names import CPU_WORKER, GPU_WORKER, SCHEDULER
from ep_serve.engine.input.processor import Reduction
from ep_serve.engine.input.selection_report import PoolShape
from ep_serve.engine.metrics import metrics
from ep_serve.engine.model.statistics import Totals
from ep_serve.engine.outcomes import OUTCOME_FIELD, WORK_FIELD, Outcome, ReportingOutput
from ep_serve.engine.server.reduction_reports import RequestReport, receive
from ep_serve.engine.worker.base_worker import OutcomeWorkerMixin
from ep_serve.layout import Kind, Video
from ep_serve.sieve import Budget

KEPT = {"video": 2, "audio": 1, "image": 0}
OUTCOME: Outcome = {"kept": KEPT, "error": None, "indices": None, "scores": None}
WORK = Totals(tower_hits=2, tower_cache_bytes=-7).as_work()


# -- worker -------------------------------------------------------------------------------------


class Later(AsyncModelRunnerOutput):  # type: ignore[misc]  # vLLM's classes are Any
    def get_output(self) -> ModelRunnerOutput:
        return ModelRunnerOutput(req_ids=["r"], req_id_to_index={"r": 0})


class Runner:
    """Stands in for vLLM's worker: returns what a test wants as the output of a step."""

    def __init__(self, output: Any, pending: list[str]) -> None:
        statistics = SimpleNamespace(
            take=lambda: [pending.pop()] if pending else [],
            read=lambda taken: (dict.fromkeys(taken, OUTCOME), WORK),
        )
        model = SimpleNamespace(statistics=statistics)
        self.model_runner = SimpleNamespace(get_model=lambda: model)
        self.output = output

    def sample_tokens(self, grammar: Any) -> Any:
        return self.output

    def execute_model(self, scheduled: Any) -> Any:
        return self.output


class Worker(OutcomeWorkerMixin, Runner):
    pass


@pytest.mark.parametrize("method", ["execute_model", "sample_tokens"])
def test_the_output_of_a_step_tells_what_became_of_its_items(method: str) -> None:
    worker = Worker(EMPTY_MODEL_RUNNER_OUTPUT, ["key"])
    first, second = (getattr(worker, method)(None) for _ in range(2))
    assert (first.outcomes, first.work) == ({"key": OUTCOME}, WORK)
    assert pickle.loads(pickle.dumps(first)) == first  # it goes to another process
    assert second is EMPTY_MODEL_RUNNER_OUTPUT
    assert not isinstance(EMPTY_MODEL_RUNNER_OUTPUT, ReportingOutput)


def test_an_output_that_waits_for_the_device_tells_it_too() -> None:
    output = Worker(Later(), ["key"]).sample_tokens(None).get_output()
    assert output.outcomes == {"key": OUTCOME}
    assert output.req_ids == ["r"]


def test_a_step_that_has_no_output_yet_keeps_its_outcomes() -> None:
    worker = Worker(None, ["key"])
    assert worker.execute_model(None) is None
    worker.output = EMPTY_MODEL_RUNNER_OUTPUT
    assert worker.sample_tokens(None).outcomes == {"key": OUTCOME}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, True),
        ({"worker_cls": CPU_WORKER}, True),
        ({"worker_cls": "some.Worker"}, False),
        ({"scheduler_cls": "some.Scheduler"}, False),
        ({"kv_transfer_config": object()}, False),
        ({"ec_transfer_config": object()}, False),
    ],
)
def test_outcomes_are_collected_where_all_parts_are_ours(
    changes: dict[str, Any], expected: bool
) -> None:
    given: dict[str, Any] = {
        "worker_cls": GPU_WORKER,
        "scheduler_cls": SCHEDULER,
        "kv_transfer_config": None,
        "ec_transfer_config": None,
        **changes,
    }
    config: Any = SimpleNamespace(
        parallel_config=SimpleNamespace(worker_cls=given["worker_cls"]),
        scheduler_config=SimpleNamespace(scheduler_cls=given["scheduler_cls"]),
        kv_transfer_config=given["kv_transfer_config"],
        ec_transfer_config=given["ec_transfer_config"],
    )
    assert outcomes.collected(config) == expected


# -- API process --------------------------------------------------------------------------------


def reduction(key: bytes = b"k", pool: PoolShape | None = None) -> Reduction:
    return Reduction(
        key=key,
        budget=Budget(0.3),
        prompt_ids=[0] * 5,
        full={"video": 6, "audio": 4, "image": 0},
        full_length=12,
        kept=3,
        pool=pool,
    )


def output_of(key: bytes = b"k", **changes: Any) -> EngineCoreOutput:
    told = {"key": key.hex(), **OUTCOME, **changes}
    return EngineCoreOutput("r", [1], ec_transfer_params={OUTCOME_FIELD: told})


def test_usage_tells_what_the_outputs_brought() -> None:
    report = RequestReport(reduction())
    receive([EngineCoreOutput("other", [1]), output_of()])
    assert report.error is None
    assert report.usage() == {
        "keep_ratio": 0.3,
        "prompt_tokens_full": 12,
        "prompt_tokens_reduced": 5,
        "av_tokens_full": 10,
        "av_tokens_kept": 3,
        "video": {"full": 6, "kept": 2},
        "audio": {"full": 4, "kept": 1},
        "image": {"full": 0, "kept": 0},
    }


def test_what_no_output_brought_is_null() -> None:
    pool = PoolShape([], np.zeros(0, dtype=np.int8), np.zeros(0, dtype=np.int32))
    usage = RequestReport(reduction(pool=pool)).usage()
    assert usage["video"] == {"full": 6, "kept": None}
    assert usage["selection"] is None
    assert usage["av_tokens_kept"] == 3


def test_clients_do_not_see_the_way_it_came() -> None:
    output = output_of()
    assert output.ec_transfer_params is not None
    output.ec_transfer_params["peer"] = 1
    receive([output])
    assert output.ec_transfer_params == {"peer": 1}
    receive([output := output_of()])
    assert output.ec_transfer_params is None


def test_requests_with_the_same_item_are_reported_by_either_output() -> None:
    reports = [RequestReport(reduction()) for _ in range(2)]
    other = RequestReport(reduction(b"other"))
    receive([output_of(error="The sieve 'guest' failed: KeyError.")])
    assert [report.error for report in reports] == ["The sieve 'guest' failed: KeyError."] * 2
    assert other.error is None


def test_an_outcome_is_kept_as_long_as_a_request_needs_it() -> None:
    report = RequestReport(reduction())
    receive([output_of()])
    assert report.usage()["video"]["kept"] == 2
    del report
    assert RequestReport(reduction()).usage()["video"]["kept"] is None


def test_a_selection_comes_as_bytes() -> None:
    kinds = np.array([Kind.VIDEO] * 4, dtype=np.int8)
    clip = Video((1, 4, 4), second_per_grid=1.0)
    report = RequestReport(reduction(pool=PoolShape([clip], kinds, np.zeros(4, dtype=np.int32))))
    scores = np.array([0.5, 0.25, 2.0, 1.0], dtype=np.float32)
    kept = np.array([2, 3], dtype=np.int32)
    receive([output_of(indices=kept.tobytes(), scores=scores.tobytes())])
    (found,) = report.usage()["selection"]
    assert found["video"]["kept"] == [2, 3]
    assert found["video"]["scores"] == [0.5, 0.25, 2.0, 1.0]


def test_work_is_counted_where_it_arrives() -> None:
    def counted() -> list[float]:
        series = (metrics().tower_hits, metrics().tower_misses, metrics().tower_bytes)
        return [next(iter(one.collect())).samples[0].value for one in series]

    before = counted()
    receive([output := EngineCoreOutput("r", [1], ec_transfer_params={WORK_FIELD: WORK})])
    assert output.ec_transfer_params is None
    assert [now - was for now, was in zip(counted(), before, strict=True)] == [2, 0, -7]
