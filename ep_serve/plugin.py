"""vLLM entry points; nothing else."""

from __future__ import annotations


def register() -> None:
    """Make vLLM know the architectures of this project.

    vLLM calls it in every process it starts (`vllm.general_plugins`); again changes nothing.
    """
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from ep_serve.checkpoint.config import ARCHITECTURE, REDUCED_ARCHITECTURE, register_config

    register_config()
    for architecture in (ARCHITECTURE, REDUCED_ARCHITECTURE):
        ModelRegistry.register_model(
            architecture, f"ep_serve.engine.model.reducing_model:{architecture}"
        )
        if architecture not in MODELS_CONFIG_MAP:
            from ep_serve.engine.server.config_hook import ReducingConfig

            MODELS_CONFIG_MAP[architecture] = ReducingConfig
