"""The reference numbers, and the engine's own figures, with the engine inside the test process."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.goldens import CASES, CHECKPOINT, GOLDENS, load_case

pytestmark = pytest.mark.engine

BLOCK_SIZE = 32
LOGIT_TOLERANCE = 1e-3
"""What the goldens' README allows another order of summation."""


class Engine:
    """vLLM's `LLM` with a look inside the model."""

    def __init__(self) -> None:
        from vllm import LLM

        self.llm = LLM(
            str(CHECKPOINT),
            dtype="float32",
            enforce_eager=True,
            max_model_len=2048,
            block_size=BLOCK_SIZE,
            kv_cache_memory_bytes=128 << 20,
            limit_mm_per_prompt={"video": 2, "image": 2, "audio": 2},
            mm_processor_kwargs={"min_pixels": 3136, "max_pixels": 200_704},
            max_logprobs=512,
            logprobs_mode="raw_logits",
            disable_log_stats=True,
        )
        self.core = self.llm.llm_engine.engine_core.engine_core
        worker = self.core.model_executor.driver_worker.worker
        self.runner = worker.model_runner
        self.model = self.runner.get_model()
        self._selected: list[torch.Tensor] = []
        self._runs: dict[str, tuple[Any, torch.Tensor | None]] = {}
        select = self.model._select

        def remember(*args: Any) -> torch.Tensor:
            coded: torch.Tensor = select(*args)
            self._selected.append(coded)
            return coded

        self.model._select = remember

    def run(self, name: str) -> tuple[Any, torch.Tensor | None]:
        """The output of a case, and what the model made of its media; each case runs once."""
        from vllm import SamplingParams

        if name not in self._runs:
            params = SamplingParams(max_tokens=8, temperature=0, logprobs=512, ignore_eos=True)
            self._selected.clear()
            (output,) = self.llm.generate(golden_prompt(name), params, use_tqdm=False)
            self._runs[name] = output, (self._selected[0] if self._selected else None)
        return self._runs[name]

    def close(self) -> None:
        from vllm.distributed import cleanup_dist_env_and_memory

        self.llm.llm_engine.engine_core.shutdown()
        cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    if not CHECKPOINT.is_dir():
        pytest.skip(f"the reference numbers are not at {CHECKPOINT.parent}")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
        patch.setenv("HF_HUB_OFFLINE", "1")
        engine = Engine()
        yield engine
        engine.close()


def golden_prompt(name: str) -> dict[str, Any]:
    """A case as vLLM's Python API takes it, its files as bytes."""
    case, _ = load_case(name)
    media: dict[str, list[bytes]] = {}
    for message in case["messages"]:
        for part in message["content"]:
            if part["type"] != "text":
                data = (GOLDENS / part[part["type"]]).read_bytes()
                media.setdefault(part["type"], []).append(data)
    if not media:
        return {"prompt": case["prompt_text"]}
    options = {"keep_ratio": case["compression_ratio"]}
    if "fps" in case["processor_kwargs"]:
        options["fps"] = case["processor_kwargs"]["fps"]
    return {
        "prompt": case["prompt_text"],
        "multi_modal_data": media,
        "mm_processor_kwargs": options,
    }


@pytest.mark.parametrize("name", CASES)
def test_tokens_and_logits_are_those_of_the_authors_code(engine: Engine, name: str) -> None:
    case, tensors = load_case(name)
    output = engine.run(name)[0].outputs[0]
    assert list(output.token_ids) == case["stats"]["generated_ids"]
    logits = torch.tensor([[row[t].logprob for t in range(512)] for row in output.logprobs])
    difference = (logits - tensors["out.step_logits"]).abs().max().item()
    assert difference <= LOGIT_TOLERANCE


@pytest.mark.parametrize("name", [n for n in CASES if n != "text_only"])
def test_survivors_and_positions_are_those_of_the_authors_code(engine: Engine, name: str) -> None:
    from ep_serve.engine.model import position_codec

    _, tensors = load_case(name)
    selected = engine.run(name)[1]
    assert selected is not None
    hidden, coded = position_codec.split(selected)
    reference = tensors["compressed.position_ids"]
    assert torch.equal(coded.positions, reference[:3])
    assert torch.equal(coded.places, torch.arange(reference.shape[1]))
    torch.testing.assert_close(hidden, tensors["compressed.hidden"], atol=1e-3, rtol=0)
    # The refined state of a token is its own: equal states are equal indices.
    kept = tensors["select.keep_indices"]
    torch.testing.assert_close(hidden, tensors["refine.hidden"][kept], atol=1e-3, rtol=0)
    first_decoded = tensors["rope.position_ids"].max().item() + 1
    assert coded.delta + reference.shape[1] == first_decoded


@pytest.mark.parametrize("name", ["aiv_a_r020", "aiv_a_then_aiv_b_r020", "aiv_a_r005"])
def test_a_request_holds_the_blocks_of_its_reduced_prompt(engine: Engine, name: str) -> None:
    from vllm import SamplingParams

    case, _ = load_case(name)
    reduced = case["stats"]["L_compressed"]
    params = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    vllm = engine.llm.llm_engine
    engine.llm.reset_prefix_cache()
    (prompt,) = engine.llm._preprocess_cmpl([golden_prompt(name)])
    request = vllm.add_request("blocks", prompt, params)
    vllm.step()
    (blocks,) = engine.core.scheduler.kv_cache_manager.get_block_ids(request)
    assert len(blocks) == -(-reduced // BLOCK_SIZE)
    while vllm.has_unfinished_requests():
        vllm.step()


def test_a_step_reduces_no_more_than_it_has_tokens_for(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Counted before the reduction: five prompts of 192 tokens leave 33 each, and 400 fit."""
    from vllm import SamplingParams

    from ep_serve.engine.input.fused_item import full_length

    scheduler = engine.core.scheduler
    monkeypatch.setattr(scheduler, "max_num_encoder_input_tokens", 400)
    steps: list[list[int | None]] = []
    schedule = scheduler.schedule

    def remember(*args: Any) -> Any:
        output = schedule(*args)
        steps.append(
            [
                full_length(scheduler.requests[request].mm_features[i].data)
                for request, chosen in output.scheduled_encoder_inputs.items()
                for i in chosen
            ]
        )
        return output

    monkeypatch.setattr(scheduler, "schedule", remember)
    prompts = [golden_prompt("aiv_a_r005") for _ in range(5)]
    for i, prompt in enumerate(prompts):
        prompt["mm_processor_kwargs"]["keep_ratio"] = 0.03 + i / 1000
    params = SamplingParams(max_tokens=2, temperature=0, ignore_eos=True)
    outputs = engine.llm.generate(prompts, params, use_tqdm=False)
    assert len(outputs) == 5
    assert [step for step in steps if step] == [[192, 192], [192, 192], [192]]
