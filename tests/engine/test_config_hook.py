from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from ep_serve.engine.input.connector import CONNECTOR
from ep_serve.engine.server.config_hook import (
    _bound_requests,
    _check_sieve,
    _refuse_drafters,
    _refuse_pipelines,
    _refuse_rust_server,
    _use_our_connector,
)
from ep_serve.engine.settings import EngineSettings, MediaSettings, Settings


def settings(sieve: str, keep_ratio: float | None = None, **media: Any) -> Settings:
    return Settings(
        media=MediaSettings(**media),
        engine=EngineSettings(),
        sieve=sieve,
        refines=False,
        keep_ratio=keep_ratio,
        max_full_tokens=100,
    )


@pytest.mark.parametrize("method", ["eagle", "eagle3", "mtp", "draft_model"])
def test_drafters_that_would_need_the_reduced_prompt_are_refused(method: str) -> None:
    config = SimpleNamespace(speculative_config=SimpleNamespace(method=method))
    with pytest.raises(ValueError, match=method):
        _refuse_drafters(config)


@pytest.mark.parametrize("speculative", [None, SimpleNamespace(method="ngram")])
def test_drafters_that_read_ids_only_are_fine(speculative: Any) -> None:
    _refuse_drafters(SimpleNamespace(speculative_config=speculative))


def test_an_unknown_sieve_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="must be one of"):
        _check_sieve(settings("colander"))


def test_a_sieve_without_a_budget_is_refused_at_the_start() -> None:
    with pytest.raises(ValueError, match="keep_ratio"):
        _check_sieve(settings("uniform"))


@pytest.mark.parametrize(
    "sound",
    [
        settings("cs2", keep_ratio=0.2),
        settings("uniform", **{"keep_ratio": 0.1}),
        settings("omnisift"),
        settings("omnisift", rho_audio=0.5),
        settings("omnizip"),
        settings("none"),
    ],
)
def test_sieves_that_know_enough_start(sound: Settings) -> None:
    _check_sieve(sound)


@pytest.mark.parametrize(("given", "used"), [("auto", "xgrammar"), ("guidance", "guidance")])
def test_all_requests_have_one_backend_of_structured_outputs(
    monkeypatch: pytest.MonkeyPatch, given: str, used: str
) -> None:
    monkeypatch.delenv("VLLM_MAX_N_SEQUENCES", raising=False)
    config = SimpleNamespace(structured_outputs_config=SimpleNamespace(backend=given))
    _bound_requests(config, settings("cs2"))
    assert config.structured_outputs_config.backend == used
    assert os.environ["VLLM_MAX_N_SEQUENCES"] == "8"
    monkeypatch.delenv("VLLM_MAX_N_SEQUENCES")


def parallel(pipelines: int = 1, rank: int = 0) -> Any:
    return SimpleNamespace(pipeline_parallel_size=pipelines, _api_process_rank=rank)


def test_pipeline_parallelism_is_refused_in_a_sentence() -> None:
    with pytest.raises(
        ValueError, match=r"--pipeline-parallel-size must be 1 \(got 2\)"
    ) as refusal:
        _refuse_pipelines(parallel(pipelines=2))
    assert len(str(refusal.value).splitlines()) == 1
    _refuse_pipelines(parallel())


def test_another_connector_for_media_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("VLLM_MEDIA_CONNECTOR", raising=False)
    _use_our_connector()
    _use_our_connector()
    assert os.environ["VLLM_MEDIA_CONNECTOR"] == CONNECTOR
    monkeypatch.setenv("VLLM_MEDIA_CONNECTOR", "http")
    with pytest.raises(ValueError, match="VLLM_MEDIA_CONNECTOR cannot be 'http'"):
        _use_our_connector()


def test_a_server_that_is_no_python_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_RUST_FRONTEND", "1")
    with pytest.raises(ValueError, match="VLLM_USE_RUST_FRONTEND"):
        _refuse_rust_server(parallel(rank=-1))
    _refuse_rust_server(parallel())  # `LLM`, which has no such process
