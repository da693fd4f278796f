"""Two workers must choose the same survivors as one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.engine.client import Client, golden_messages
from tests.engine.conftest import serving
from tests.goldens import load_case

pytestmark = pytest.mark.engine

NAMES = ["aiv_a_r020", "aiv_b_r020", "audio_d_then_aiv_a_r020", "image_e_aiv_a_r020", "text_only"]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    with serving(
        tmp_path_factory,
        *("--tensor-parallel-size", "2"),
        *("--max-model-len", "512"),
        *("--max-full-tokens", "2048"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *("--mm-processor-cache-gb", "0"),
        environment={"VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as client:
        yield client


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_answer_as_one(pair: Client, name: str) -> None:
    case, _ = load_case(name)
    answer = pair.ask(golden_messages(name), keep_ratio=case["compression_ratio"])
    assert answer.token_ids == case["stats"]["generated_ids"]
    if answer.reduction is not None:
        kept = {modality: answer.reduction[modality]["kept"] for modality in ("video", "audio")}
        stats = case["stats"]
        assert kept == {"video": stats["kept_video"], "audio": stats["kept_audio"]}
