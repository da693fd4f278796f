"""Two workers must choose the same survivors as one; here behind vLLM's own server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from ep_serve.engine.server.process import ServerProcess
from tests.engine.client import Client, golden_messages
from tests.engine.conftest import EXACT
from tests.goldens import CHECKPOINT, load_case

pytestmark = pytest.mark.engine

NAMES = ["aiv_a_r020", "aiv_b_r020", "audio_d_then_aiv_a_r020", "image_e_aiv_a_r020", "text_only"]


PLAIN_VLLM = ("-m", "vllm.entrypoints.openai.api_server", "--model")
"""vLLM's own server: the plug-in works by being installed."""


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    if not CHECKPOINT.is_dir():
        pytest.skip(f"the reference numbers are not at {CHECKPOINT.parent}")
    options = [
        *EXACT,
        *("--served-model-name", "golden"),
        *("--mm-processor-kwargs", '{"min_pixels": 3136, "max_pixels": 200704}'),
        *("--additional-config", '{"ep_serve": {"max_full_tokens": 2048}}'),
        *("--tensor-parallel-size", "2"),
        *("--max-model-len", "512"),
        *("--kv-cache-memory-bytes", str(64 << 20)),
        *("--mm-processor-cache-gb", "0"),
    ]
    with ServerProcess(
        CHECKPOINT,
        options,
        log=tmp_path_factory.mktemp("pair") / "log",
        module=PLAIN_VLLM,
        environment={"HF_HUB_OFFLINE": "1", "VLLM_CPU_OMP_THREADS_BIND": "0|1"},
    ) as process:
        yield Client(process)


@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_answer_as_one(pair: Client, name: str) -> None:
    case, _ = load_case(name)
    answer = pair.ask(golden_messages(name), keep_ratio=case["compression_ratio"])
    assert answer.token_ids == case["stats"]["generated_ids"]
    assert (answer.reduction is None) == (name == "text_only")
    if answer.reduction is not None:
        kept = {modality: answer.reduction[modality]["kept"] for modality in ("video", "audio")}
        stats = case["stats"]
        assert kept == {"video": stats["kept_video"], "audio": stats["kept_audio"]}
