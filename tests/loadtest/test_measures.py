from __future__ import annotations

import pytest

from loadtest.measures import ServiceLevel, figures, stages, summarize
from loadtest.records import Answer, Sample
from tests.loadtest.requests import run, whole


def test_percentiles_interpolate_linearly() -> None:
    found = summarize([float(n) for n in range(1, 101)])
    assert found is not None
    assert (found["p50"], found["p90"], found["p95"]) == pytest.approx((50.5, 90.1, 95.05))
    assert found["p99"] == pytest.approx(99.01)
    assert (found["min"], found["max"], found["count"]) == (1, 100, 100)


def test_empty_values_have_no_percentiles() -> None:
    assert summarize([]) is None


def test_rates_count_whole_answers_only() -> None:
    broken = Answer(number=9, sent_s=0, status="error", error="http 500")
    early = Answer(number=9, sent_s=0, chunk_s=[0.01], status="incomplete", output_tokens=1)
    cut = Answer(number=9, sent_s=0)
    found = figures(run(answers=[whole(1.0), whole(2.0), broken, early, cut]), ServiceLevel())
    assert found["requests_per_s"] == pytest.approx(0.2)
    assert found["output_tokens_per_s"] == pytest.approx(1.0)
    assert found["ttft_s"]["count"] == 2
    assert found["ttft_s"]["p50"] == pytest.approx(1.5)
    assert (found["whole"], found["incomplete"], found["cut"]) == (2, 1, 1)
    assert found["errors"] == {"http 500": 1}


def test_gaps_of_all_answers_are_pooled() -> None:
    found = figures(run(answers=[whole(1, 3, 0.1), whole(1, 5, 0.3)]), ServiceLevel())
    assert found["itl_s"]["count"] == 2 + 4
    assert found["tpot_s"]["p50"] == pytest.approx(0.2)
    assert found["itl_s"]["p50"] == pytest.approx(0.3)


def test_goodput_counts_requests_within_every_limit() -> None:
    level = ServiceLevel(ttft_s=1.5, tpot_s=0.2)
    answers = [whole(1.0, gap=0.1), whole(2.0, gap=0.1), whole(1.0, gap=0.3)]
    answers.append(Answer(number=4, sent_s=0, status="error", error="timeout"))
    answers.append(Answer(number=5, sent_s=0))
    found = figures(run(answers=answers), level)
    assert found["goodput_per_s"] == pytest.approx(0.1)
    assert found["attained"] == pytest.approx(1 / 4)


def test_a_run_without_answers_has_figures() -> None:
    found = figures(run(answers=[], wall_s=0.0), ServiceLevel(ttft_s=1))
    assert found["ttft_s"] is None
    assert found["requests"] == 0


def test_lateness_of_an_open_loop_is_reported() -> None:
    late = whole(1.0, sent=3.5).model_copy(update={"scheduled_s": 3.0})
    assert figures(run(answers=[late]), ServiceLevel())["latest_start_s"] == pytest.approx(0.5)


def test_kv_blocks_are_shared_by_the_requests_that_run() -> None:
    samples = [
        Sample(at_s=0, kv_use=0.0, running=0),
        Sample(at_s=1, kv_use=0.2, running=2),
        Sample(at_s=2, kv_use=0.05, running=1),
    ]
    found = run(answers=[whole(1)], samples=samples, kv_blocks=100).figures["server"]
    assert found["kv_blocks_per_request"] == pytest.approx(10)
    assert found["requests_that_fit"] == 10
    assert found["kv_use_peak"] == 0.2
    assert found["kv_use_mean"] == pytest.approx(0.25 / 3)


def test_the_exact_count_of_blocks_leaves_the_last_token_out() -> None:
    for tokens, blocks in ((29, 4), (30, 5)):  # 100 prompt tokens, blocks of 32
        found = run(answers=[whole(1, tokens)], block_size=32).figures["server"]
        assert found["kv_blocks_exact"] == blocks


def test_stages_add_up_to_the_whole_request() -> None:
    counters = {
        "vllm:request_queue_time_seconds_sum": 0.2,
        "vllm:request_prefill_time_seconds_sum": 1.2,
        'ep_serve_stage_seconds_total{stage="towers"}': 0.2,
        'ep_serve_stage_seconds_total{stage="refiner"}': 0.4,
    }
    answers = [whole(1.0, 5, 0.1), whole(1.0, 5, 0.1)]
    found = stages(run(answers=answers, counters=counters), answers)
    assert sum(found.values()) == pytest.approx(1.4)
    assert found["refiner"] == pytest.approx(0.2)
    assert found["prefill"] == pytest.approx(0.6 - 0.1 - 0.2)
    assert found["before the queue"] == pytest.approx(1.0 - 0.1 - 0.6)


def test_late_moments_of_the_event_loop_are_counted() -> None:
    name = "ep_serve_event_loop_late_seconds"
    counters = {f"{name}_count": 200.0, f'{name}_bucket{{le="0.05"}}': 198.0}
    found = run(answers=[whole(1)], counters=counters).figures["server"]
    assert found["event_loop_late_share"] == pytest.approx(0.01)


def test_answers_are_grouped_by_novelty() -> None:
    again = whole(0.5).model_copy(update={"novelty": "known clip"})
    found = figures(run(answers=[whole(1.0), again]), ServiceLevel())["by_novelty"]
    assert found["new"]["ttft_s"]["p50"] == pytest.approx(1.0)
    assert found["known clip"]["ttft_s"]["p50"] == pytest.approx(0.5)
