"""vLLM entry points; nothing else."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the EchoingPixels architecture.

    vLLM calls it in every process it starts (`vllm.general_plugins`); again changes nothing.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ep_serve.checkpoint.config import ARCHITECTURE, register_config

    register_config()
    ModelRegistry.register_model(
        ARCHITECTURE, "ep_serve.engine.model:Qwen2_5OmniCompressForConditionalGeneration"
    )
    if ARCHITECTURE not in MODELS_CONFIG_MAP:
        from ep_serve.engine.config_hook import ReducingConfig

        MODELS_CONFIG_MAP[ARCHITECTURE] = ReducingConfig
