"""What this project relies on inside vLLM; a failure here says what to look at after an upgrade."""

from __future__ import annotations

import inspect

import vllm
from vllm.entrypoints.generate.base.protocol import validate_request_mm_kwargs
from vllm.entrypoints.launchers import app, launcher
from vllm.entrypoints.launchers.api_server import entry
from vllm.entrypoints.openai.chat_completion import protocol, serving
from vllm.entrypoints.serve.engine.protocol import UsageInfo
from vllm.entrypoints.serve.instrumentator import health as instrumentator_health
from vllm.model_executor.models.interfaces import SupportsMultiModalPruning
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerForConditionalGeneration as Stock,
)
from vllm.multimodal.media.connector import MEDIA_CONNECTOR_REGISTRY, MediaConnector
from vllm.renderers import chat_utils, online_renderer
from vllm.renderers.params import TokenizeParams
from vllm.sampling_params import SamplingParams
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.encoder_cache_manager import EncoderCacheManager
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutput, async_llm, core, core_client
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.structured_output.request import StructuredOutputRequest
from vllm.v1.worker import cpu_model_runner, gpu_model_runner, gpu_worker, worker_base
from vllm.v1.worker.gpu import model_runner as v2_runner
from vllm.v1.worker.gpu.mm import encoder_runner
from vllm.v1.worker.gpu.model_states import mm_pruning

from ep_serve.engine.input import connector
from ep_serve.engine.input.fused_item import MODALITY
from ep_serve.engine.server import (
    drain,
    health,
    openai_patch,
    patches,
    request_limits,
    tokenization,
)
from ep_serve.engine.worker.scheduler import ReducingAsyncScheduler


def parameters(function: object) -> list[str]:
    return list(inspect.signature(function).parameters)  # type: ignore[arg-type]


def test_the_version_is_the_one_this_was_written_for() -> None:
    assert vllm.__version__.startswith("0.32.")


def test_the_patched_functions_have_not_changed() -> None:
    preprocess = openai_patch._original_preprocess
    assert parameters(preprocess)[:3] == ["self", "request", "messages"]
    assert "validate_request_mm_kwargs(" in inspect.getsource(preprocess)
    assert set(parameters(validate_request_mm_kwargs)) == {
        "mm_processor_kwargs",
        "media_io_kwargs",
        "trust_request_mm_kwargs",
    }
    for generator in (openai_patch._original_full, openai_patch._original_stream):
        assert parameters(generator)[:3] == ["self", "request", "result_generator"]
    assert parameters(openai_patch._original_init)[:2] == ["self", "engine_client"]


def test_the_patch_takes_the_place_of_what_it_wraps() -> None:
    patches.install()
    patches.install()
    renderer = online_renderer.OnlineRenderer
    assert renderer.preprocess_chat is openai_patch._preprocess_chat
    assert openai_patch._original_preprocess is not openai_patch._preprocess_chat
    chat = serving.OpenAIServingChat
    assert chat.chat_completion_stream_generator is openai_patch._stream_generator


def test_requests_and_usage_take_fields_of_ours() -> None:
    request = protocol.ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "x"}], "keep_ratio": 0.1}
    )
    assert request.model_extra == {"keep_ratio": 0.1}
    usage = UsageInfo()
    usage.reduction = {"keep_ratio": 0.1}
    assert usage.model_dump()["reduction"] == {"keep_ratio": 0.1}


def test_media_are_fetched_through_the_connector_of_the_environment() -> None:
    assert "envs.VLLM_MEDIA_CONNECTOR" in inspect.getsource(chat_utils)
    loaded = MEDIA_CONNECTOR_REGISTRY.load(connector.CONNECTOR)
    assert isinstance(loaded, connector.EncodedMediaConnector)
    for name in ("load_from_url", "load_from_url_async"):
        assert parameters(getattr(MediaConnector, name)) == [
            "self",
            "url",
            "media_io",
            "fetch_timeout",
        ]


def test_the_cpu_runner_still_forgets_that_a_model_prunes() -> None:
    flag = "is_multimodal_pruning_enabled"
    assert flag in inspect.getsource(gpu_model_runner.GPUModelRunner.load_model)
    assert flag not in inspect.getsource(cpu_model_runner.CPUModelRunner.load_model)


def test_only_items_called_video_are_encoded_one_at_a_time() -> None:
    assert MODALITY != "video"
    source = inspect.getsource(gpu_model_runner.GPUModelRunner._execute_mm_encoder)
    assert 'modality == "video"' in source


def test_both_runners_ask_the_model_for_positions() -> None:
    expected = [
        "self",
        "input_ids",
        "multimodal_embeddings",
        "mrope_positions",
        "num_computed_tokens",
    ]
    assert parameters(SupportsMultiModalPruning.recompute_mrope_positions) == expected
    call = "recompute_mrope_positions("
    assert call in inspect.getsource(gpu_model_runner.GPUModelRunner._gather_mm_embeddings)
    assert call in inspect.getsource(mm_pruning.MultiModalPruner.recompute)


def test_the_towers_are_run_through_the_stock_model() -> None:
    assert parameters(Stock._process_video_input) == ["self", "video_input"]
    assert parameters(Stock._process_audio_input) == ["self", "audio_input"]


def test_a_server_that_stops_shuts_its_engine_down_from_a_thread() -> None:
    assert parameters(drain._original_shutdown) == ["self", "timeout"]
    source = inspect.getsource(launcher.serve_http)
    assert "None, partial(engine_client.shutdown, timeout=timeout)" in source
    patches.install()
    patches.install()
    assert async_llm.AsyncLLM.shutdown is drain._shutdown
    assert drain._original_shutdown is not drain._shutdown
    for name in ("abort", "errored", "get_num_unfinished_requests"):
        assert hasattr(async_llm.AsyncLLM, name)


def test_the_scheduler_asks_for_each_requests_share_of_the_encoders_budget() -> None:
    ask = Scheduler._try_schedule_encoder_inputs
    assert parameters(ask) == parameters(ReducingAsyncScheduler._try_schedule_encoder_inputs)
    assert "encoder_compute_budget -= num_encoder_embeds" in inspect.getsource(ask)
    assert inspect.getsource(Scheduler.schedule).count("= self._try_schedule_encoder_inputs(") == 2
    assert "scheduler_config.get_scheduler_cls()" in inspect.getsource(core.EngineCore.__init__)


def test_a_server_adds_its_middleware_through_the_function_that_is_patched() -> None:
    assert parameters(drain._original_middleware) == ["args", "app", "supported_tasks"]
    assert "init_entrypoints_middleware(args, app, " in inspect.getsource(app.build_app)


def test_health_asks_the_client_and_the_engine_answers_between_two_steps() -> None:
    assert parameters(health._original_check_health) == ["self"]
    assert "EngineDeadError" in inspect.getsource(instrumentator_health.health)
    assert "await client.check_health()" in inspect.getsource(instrumentator_health.health)
    assert parameters(getattr(core.EngineCore, health.PING_METHOD)) == ["self"]
    assert hasattr(core_client.AsyncMPClient, "call_utility_all_async")


def test_a_server_asks_for_signals_sets_up_loads_and_asks_again() -> None:
    source = inspect.getsource(entry.run_server)
    asked = source.index("signal.signal(signal.SIGTERM")
    assert asked < source.index("setup_server(") < source.index("await run_server_worker(")
    assert "loop.add_signal_handler(signal.SIGTERM" in inspect.getsource(launcher.serve_http)
    assert "loop.add_signal_handler(signal.SIGINT" in inspect.getsource(launcher.serve_http)


def test_a_requests_first_output_can_carry_what_became_of_its_item() -> None:
    assert "ec_transfer_params" in EngineCoreOutput.__struct_fields__
    assert parameters(openai_patch._original_process)[:2] == ["self", "engine_core_outputs"]
    assert parameters(Scheduler.update_from_output) == [
        "self",
        "scheduler_output",
        "model_runner_output",
    ]
    for method in ("execute_model", "sample_tokens"):
        assert callable(getattr(gpu_worker.Worker, method))
    extension = inspect.getsource(worker_base.WorkerWrapperBase.init_worker)
    assert "worker_class.__bases__ + (" in extension  # behind vLLM's methods: they win


def test_what_a_failed_sieve_left_can_be_taken_out_of_the_caches() -> None:
    assert parameters(Scheduler.finish_requests) == ["self", "request_ids", "finished_status"]
    assert parameters(BlockPool.get_cached_block) == ["self", "block_hash", "kv_cache_group_ids"]
    assert parameters(BlockPool.evict_blocks) == ["self", "block_ids"]
    manager = EncoderCacheManager(cache_size=8)
    for name in ("cached", "freeable", "num_embeds_by_hash", "num_free_slots"):
        assert hasattr(manager, name)
    # Both runners drop embeddings first; one computes none under a name that it has some for.
    prepare = inspect.getsource(encoder_runner.EncoderRunner.prepare_mm_inputs)
    assert "in self.encoder_cache.encoder_outputs" in prepare
    source = inspect.getsource(v2_runner.GPUModelRunner.execute_model)
    assert source.index("self.free_states(") < source.index("num_toks = ")
    source = inspect.getsource(gpu_model_runner.GPUModelRunner.execute_model)
    assert source.index("self._update_states(") < source.index("self._execute_mm_encoder(")


def test_every_route_validates_constraints_and_renders_prompts_where_it_is_patched() -> None:
    assert "self._validate_structured_outputs(" in inspect.getsource(SamplingParams.verify)
    assert "params.verify(" in inspect.getsource(InputProcessor._validate_params)
    render = request_limits._original_render
    assert parameters(render)[:3] == ["self", "prompts", "tok_params"]
    generate = request_limits._original_generate
    assert parameters(generate)[:4] == ["self", "prompt", "sampling_params", "request_id"]


def test_text_is_checked_before_it_is_tokenized_where_that_is_patched() -> None:
    assert parameters(tokenization._original_check) == ["self", "tokenizer", "text"]
    assert "self._text_len_check" in inspect.getsource(TokenizeParams._validate_text)
    scoring = tokenization._original_scoring
    assert parameters(scoring) == ["self", "request", "tokenizer", "max_model_len"]
    assert "await" not in inspect.getsource(scoring)  # it runs in another thread


def test_grammars_are_compiled_filled_and_reported_where_the_scheduler_is_extended() -> None:
    wait = inspect.getsource(Scheduler._handle_blocked_waiting_request)
    assert "WAITING_FOR_STRUCTURED_OUTPUT_GRAMMAR" in wait
    assert "struct_output_req.grammar" in wait
    assert "self.structured_output_manager.accept_tokens(" in inspect.getsource(
        Scheduler.update_from_output
    )
    assert "_grammar" in StructuredOutputRequest.__dataclass_fields__
    assert "stop_reason" in EngineCoreOutput.__struct_fields__
