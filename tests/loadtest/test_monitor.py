from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from pathlib import Path

import pytest

from loadtest.driver import Driver, Recording
from loadtest.monitor import LOOP_DELAY_METRIC, Monitor, cache_size, growth, memory_of, parse
from tests.loadtest.mock_server import BLOCKS_EACH, MockServer
from tests.loadtest.requests import requests

PAGE = """# HELP x help
vllm:prompt_tokens_total{engine="0",model_name="m"} 3.0
vllm:prompt_tokens_total{engine="1",model_name="m"} 4.0
ep_serve_stage_seconds_total{stage="towers"} 1.5
vllm:e2e_request_latency_seconds_bucket{le="1"} 9
vllm:cache_config_info{block_size="32",num_gpu_blocks="101"} 1.0
plain 2
"""


def test_engines_of_one_server_are_summed() -> None:
    assert parse(PAGE)["vllm:prompt_tokens_total"] == 7


def test_other_labels_are_kept_and_buckets_left_out() -> None:
    series = parse(PAGE)
    assert series['ep_serve_stage_seconds_total{stage="towers"}'] == 1.5
    assert series["plain"] == 2
    assert not any("bucket" in name for name in series)


def test_the_usable_blocks_are_all_but_one() -> None:
    assert cache_size(PAGE) == (100, 32)
    assert cache_size("") == (None, None)


def test_only_counters_grow() -> None:
    before = {"a_total": 1.0, "b_sum": 2.0, "gauge": 1.0}
    after = {"a_total": 4.0, "b_sum": 2.0, "gauge": 9.0, 'c_total{x="y"}': 1.0}
    assert growth(before, after) == {"a_total": 3.0, 'c_total{x="y"}': 1.0}


def test_the_memory_of_children_counts() -> None:
    code = "import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {!r}]); p.wait()"
    hungry = "x = bytes(80 << 20); y = bytearray(x); print('up', flush=True); input()"
    process = subprocess.Popen(
        [sys.executable, "-c", code.format(hungry)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"up\n"
        held = memory_of(process.pid)
        assert held is not None
        assert held > 80 << 20
    finally:
        process.communicate(b"\n")


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="needs /proc")
def test_a_process_that_is_gone_holds_nothing() -> None:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    assert memory_of(process.pid) is None


def watch(mock: MockServer, count: int) -> Monitor:
    # This process may have grown large, and have engines as children: reading that takes longer
    # than the answers.
    small = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    recording = Recording()
    monitor = Monitor(mock.url.removesuffix("/v1") + "/metrics", small.pid, recording.now)

    async def load() -> None:
        async with monitor:
            driver = Driver(
                f"{mock.url}/chat/completions", on_first=lambda answer: monitor.sample_now()
            )
            await driver.closed(requests(count), count, recording)

    try:
        asyncio.run(load())
    finally:
        small.communicate(b"\n")
    return monitor


def test_only_the_event_loop_keeps_its_buckets() -> None:
    line = '{name}_bucket{{le="0.05"}} 3\n'
    text = "".join(
        line.format(name=name) for name in (LOOP_DELAY_METRIC, "vllm:e2e_request_latency_seconds")
    )
    assert parse(text) == {f'{LOOP_DELAY_METRIC}_bucket{{le="0.05"}}': 3}
    assert growth({}, parse(text)) == parse(text)


def test_short_answers_do_not_slip_through(mock: MockServer) -> None:
    mock.first_s, mock.gap_s = 0.1, 0.07  # over before the second sample of a steady pace
    gc.collect()  # which may pause a large process for longer than an answer takes
    monitor = watch(mock, 2)
    assert monitor.kv_blocks == 100
    peak = max(sample.kv_use or 0 for sample in monitor.samples)
    assert peak == pytest.approx(2 * BLOCKS_EACH / 100)
    assert monitor.samples[0].memory_bytes is not None


def test_counters_are_those_of_the_run(mock: MockServer) -> None:
    watch(mock, 1)
    counters = watch(mock, 3).counters
    assert counters["vllm:request_queue_time_seconds_sum"] == pytest.approx(0.03)
    assert counters['ep_serve_stage_seconds_total{stage="towers"}'] == pytest.approx(0.03)


def test_a_server_without_metrics_is_measured_all_the_same() -> None:
    async def look() -> Monitor:
        async with Monitor("http://127.0.0.1:1/metrics", None, lambda: 0.0) as monitor:
            await asyncio.sleep(0.1)
        return monitor

    monitor = asyncio.run(look())
    assert monitor.counters == {}
    assert all(sample.kv_use is None for sample in monitor.samples)
