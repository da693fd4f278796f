"""What must be set in vLLM's configuration for the model to run.

vLLM calls this for our architecture while it builds its configuration, in every process that takes
requests (`LLM`, an API server, each of several), so no flag is needed.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from vllm import envs
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from ep_serve.checkpoint.config import ARCHITECTURE
from ep_serve.engine.class_names import CPU_WORKER, GPU_WORKER, SCHEDULER
from ep_serve.engine.input.connector import CONNECTOR
from ep_serve.engine.input.media_budget import map_large_blocks
from ep_serve.engine.input.request_memory import request_memory
from ep_serve.engine.server import patches
from ep_serve.engine.settings import Settings
from ep_serve.layout import MediaTokens, build_layout
from ep_serve.sieve import get_sieve

if TYPE_CHECKING:
    from vllm.config import ParallelConfig, VllmConfig

_NGRAM_METHODS = frozenset({"ngram", "ngram_gpu", "suffix"})
"""Speculative methods that read token ids only."""

_PRUNING_SWITCH = 0.5
"""Any rate above 0 makes the runners ask the model for positions; the value itself is not used."""


class ReducingConfig(VerifyAndUpdateConfig):
    """See the module."""

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        """Check the server's settings and switch on what the model relies on.

        Raises:
            ValueError: a setting that cannot work, in one sentence.
        """
        parallel = vllm_config.parallel_config
        _refuse_pipelines(parallel)
        _refuse_rust_server(parallel)
        settings = Settings.resolve(vllm_config)
        architecture = vllm_config.model_config.architecture
        if settings.refines != (architecture == ARCHITECTURE):
            raise ValueError(
                f"this checkpoint cannot be served as {architecture}: give an EchoingPixels model "
                "as a directory, or without --sieve"
            )
        _check_sieve(settings)
        _refuse_drafters(vllm_config)
        settings.attach(vllm_config.model_config)

        mm_config = vllm_config.model_config.multimodal_config
        assert mm_config is not None, "the architecture is multimodal"
        mm_config.video_pruning_rate = _PRUNING_SWITCH
        mm_config.mm_processor_kwargs = None  # read above; not for the Hugging Face processor
        _use_our_connector()
        _bound_requests(vllm_config, settings)
        patches.install()

        if vllm_config.scheduler_config.scheduler_cls is None:
            vllm_config.scheduler_config.scheduler_cls = SCHEDULER
        if current_platform.is_cpu():
            mm_config.skip_mm_profiling = True  # memory is not budgeted by a dry run here
            if parallel.worker_cls not in ("auto", CPU_WORKER):
                raise ValueError("--worker-cls cannot be set on a CPU: the model needs its own")
            parallel.worker_cls = CPU_WORKER
        elif current_platform.is_cuda_alike() and parallel.worker_cls == "auto":
            parallel.worker_cls = GPU_WORKER


def _check_sieve(settings: Settings) -> None:
    """Refuse an unknown sieve, or one without a budget for requests without options."""
    nothing = build_layout([], [], MediaTokens(1, 2, 3, 4, 5, 6, 7))
    get_sieve(settings.sieve).plan(nothing, settings.media.budget(settings.keep_ratio))


def _use_our_connector() -> None:
    """Let vLLM leave media encoded; API servers that it starts later inherit the variable."""
    if (connector := os.environ.setdefault("VLLM_MEDIA_CONNECTOR", CONNECTOR)) != CONNECTOR:
        raise ValueError(
            f"VLLM_MEDIA_CONNECTOR cannot be {connector!r}: media would be decoded without this "
            f"model's limits and frame rule; leave it unset or set it to {CONNECTOR!r}"
        )


def _bound_requests(vllm_config: VllmConfig, settings: Settings) -> None:
    """Set the limits of this process, and those of vLLM that were left at their defaults."""
    os.environ.setdefault("VLLM_MAX_N_SEQUENCES", str(settings.engine.max_n))
    map_large_blocks()
    request_memory.limit = int(settings.engine.request_memory_gib * 2**30)
    structured = vllm_config.structured_outputs_config
    if structured.backend == "auto":
        # An engine has one backend, that of its first request: the next client's schema would be
        # compiled by whatever the first one's needed, and tool calls by one that cannot.
        structured.backend = "xgrammar"


def _refuse_pipelines(parallel: ParallelConfig) -> None:
    if parallel.pipeline_parallel_size > 1:
        raise ValueError(
            f"--pipeline-parallel-size must be 1 (got {parallel.pipeline_parallel_size}): later "
            "stages would not know the positions of the tokens that the reduction keeps; use "
            "--tensor-parallel-size"
        )


def _refuse_rust_server(parallel: ParallelConfig) -> None:
    # vLLM's supervisor of API servers has rank -1; with this variable it starts one that is no
    # Python process.
    if envs.VLLM_USE_RUST_FRONTEND and parallel._api_process_rank == -1:
        raise ValueError(
            "VLLM_USE_RUST_FRONTEND must not be set: vLLM's Rust server would ignore this model's "
            "request fields and let media tokens in text pass"
        )


def _refuse_drafters(vllm_config: VllmConfig) -> None:
    speculative = vllm_config.speculative_config
    method = getattr(speculative, "method", None)
    if method is not None and method not in _NGRAM_METHODS:
        raise ValueError(
            f"speculative decoding with {method!r} is not supported: a draft model would need the "
            f"reduced prompt; use one of {', '.join(sorted(_NGRAM_METHODS))} or none"
        )
