"""A process whose patches of vLLM's server are not in place refuses to serve, and says why."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat

from ep_serve.checkpoint.config import ARCHITECTURE
from ep_serve.engine.errors import ServeError
from ep_serve.engine.server import openai_patch, patches, patching
from ep_serve.engine.server.stat_logger import ReductionStatLogger


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "_applied", [])
    monkeypatch.setattr(patching, "_failures", [])


def build_the_client(architecture: str = ARCHITECTURE) -> None:
    """What vLLM does in every process that serves."""
    config = SimpleNamespace(
        model_config=SimpleNamespace(architecture=architecture),
        parallel_config=SimpleNamespace(_api_process_rank=1),
    )
    ReductionStatLogger(config, [0])


def test_a_process_with_all_patches_serves() -> None:
    patches.install()
    build_the_client()


def test_a_process_that_was_never_patched_refuses_to_serve() -> None:
    with pytest.raises(ServeError, match="none was installed"):
        build_the_client()


def test_a_patch_that_something_else_replaced_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    patches.install()
    name = "chat_completion_full_generator"
    monkeypatch.setattr(OpenAIServingChat, name, openai_patch._original_full)
    with pytest.raises(ServeError, match=f"OpenAIServingChat.{name}") as refusal:
        build_the_client()
    assert len(str(refusal.value).splitlines()) == 1


def test_a_vllm_without_what_is_patched_fails_servers_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm.entrypoints.launchers", None)
    monkeypatch.delitem(sys.modules, "ep_serve.engine.server.drain", raising=False)
    monkeypatch.delattr("ep_serve.engine.server.drain", raising=False)
    patches.install()  # all that `LLM` meets
    with pytest.raises(ServeError, match=r"vllm\.entrypoints\.launchers"):
        build_the_client()


def test_models_of_others_are_served_unpatched() -> None:
    build_the_client("LlamaForCausalLM")
