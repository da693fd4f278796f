"""The API-process side: a prompt and its media become one fused item and a reduced prompt.

`apply` of vLLM's processor is replaced whole (vLLM 0.32, `multimodal/processing/processor.py`): the
prompt is expanded here, its positions and the budget are computed on the CPU, and vLLM is handed a
placeholder that is exactly as long as the reduced prompt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from vllm.exceptions import VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.inputs.engine import mm_input
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerProcessingInfo,
)
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.transformers_utils.processor import cached_processor_from_config

from ep_serve.engine.features import MediaProcessor, MediumFeatures, set_current
from ep_serve.engine.item import MODALITY, PATCH_VALUES, PROFILING_KEY, pack
from ep_serve.engine.media_io import MediumParser
from ep_serve.engine.metrics import metrics
from ep_serve.engine.settings import MediaOptions, Settings
from ep_serve.layout import (
    Kind,
    Layout,
    MediaTokens,
    PlaceholderError,
    Video,
    build_layout,
    spread,
)
from ep_serve.sieve import get_sieve

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from vllm.multimodal.cache import BaseMultiModalProcessorCache
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

POSITIONS_PER_MAX_LENGTH = 4
"""vLLM's rotary table has this many rows for each position of `max_position_embeddings`."""


@dataclass(frozen=True)
class Reduction:
    """What a request's reduction is, as far as the CPU knows it beforehand."""

    key: bytes
    keep_ratio: float
    prompt_ids: list[int]
    """Stand-in for the reduced prompt: its text, and AV tokens where survivors may be."""
    full: dict[str, int]
    """AV tokens by modality before reduction."""
    full_length: int
    kept: int
    """AV tokens after reduction."""

    @property
    def reduced_length(self) -> int:
        return len(self.prompt_ids)


class ReducedInput(MultiModalInput):
    """vLLM's processed prompt, and what was done to it."""

    reduction: Reduction


class ReducingProcessingInfo(Qwen2_5OmniThinkerProcessingInfo):
    """What vLLM asks about the model's inputs."""

    @cached_property
    def settings(self) -> Settings:
        return Settings.of(self.ctx.model_config)

    @cached_property
    def tokens(self) -> MediaTokens:
        vocabulary = self.get_tokenizer().get_vocab()
        return MediaTokens.from_config(
            self.get_hf_config(),
            vision_bos=vocabulary["<|vision_bos|>"],
            vision_eos=vocabulary["<|vision_eos|>"],
        )

    def get_hf_processor(self, **kwargs: object) -> Qwen2_5OmniProcessor:
        """The checkpoint's processor as it is on disk; server options are applied per medium."""
        return cached_processor_from_config(
            self.ctx.model_config, processor_cls=Qwen2_5OmniProcessor, tokenizer=self.ctx.tokenizer
        )

    def get_data_parser(self) -> MediumParser:
        return MediumParser(expected_hidden_size=self._get_expected_hidden_size())

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        return {"audio": None, "image": None, "video": None, MODALITY: 1}

    def get_mm_max_tokens_per_item(
        self, seq_len: int, mm_counts: Mapping[str, int] | None = None
    ) -> Mapping[str, int]:
        """One fused item may fill the whole (reduced) sequence."""
        return {MODALITY: seq_len}

    @property
    def hears(self) -> bool:
        """Whether the audio tower exists (`limit_mm_per_prompt`)."""
        return self.allowed_mm_limits["audio"] > 0

    @property
    def max_position(self) -> int:
        text_config = self.get_hf_config().text_config
        return POSITIONS_PER_MAX_LENGTH * int(text_config.max_position_embeddings)


class ReducingDummyInputs(Qwen2_5OmniThinkerDummyInputsBuilder[ReducingProcessingInfo]):
    """vLLM's dummy inputs; the profiling one is built by the processor itself."""


class ReducingProcessor(BaseMultiModalProcessor[ReducingProcessingInfo]):
    """Builds the fused item of a request."""

    @cached_property
    def media(self) -> MediaProcessor:
        processor = MediaProcessor(
            self.info.get_hf_processor(), self.info.settings, self.info.ctx.model_config.dtype
        )
        set_current(processor)
        return processor

    def apply(self, inputs: ProcessorInputs, timing_ctx: TimingContext) -> MultiModalInput:
        """See the module.

        Raises:
            VLLMValidationError: an option, a file that cannot be used, a prompt that is too long.
            PlaceholderError: the prompt's media tokens do not match its media.
        """
        options = self._options(inputs)
        media = self._media_in_prompt_order(inputs)
        keys = [self.media.key(medium, content_id, options) for medium, content_id in media]
        key = self._item_key(inputs.prompt, keys, options)
        cached = self._look_up(inputs.cache, key)
        if cached is not None:
            item, reduction = cached
        else:
            with timing_ctx.record("media"):
                features = [
                    self.media.features(medium, medium_key, options)
                    for (medium, _), medium_key in zip(media, keys, strict=True)
                ]
            with timing_ctx.record("layout"):
                fused, reduction = self._fuse(key, inputs.prompt, features, options)
            item = self._register(inputs.cache, key, fused, reduction)
        metrics().request(reduction)
        metrics().media(self.media)
        return self._reduced_input(reduction, item)

    def _options(self, inputs: ProcessorInputs) -> MediaOptions:
        options = self.info.settings.merge(inputs.hf_processor_mm_kwargs)
        return options if self.info.hears else options.model_copy(update={"sound": False})

    def _media_in_prompt_order(self, inputs: ProcessorInputs) -> list[tuple[Any, str | None]]:
        """The media with their client-given ids, as their placeholders come in the prompt."""
        tokens = self.info.tokens
        modality_of = {tokens.video: "video", tokens.audio: "audio", tokens.image: "image"}
        order = [modality_of[t] for t in inputs.prompt if t in modality_of]
        given = inputs.mm_data_items.get_all_counts()
        for modality in ("video", "audio", "image"):
            found, expected = order.count(modality), given.get(modality, 0)
            if found != expected:
                raise PlaceholderError(
                    f"The prompt has {found} {modality} placeholder(s) for {expected} {modality} "
                    f"item(s). Media tokens such as <|{modality.upper()}|> cannot be text."
                )
        ids = inputs.mm_uuid_items or {}
        waiting = {
            modality: iter(zip(items, ids.get(modality) or [None] * len(items), strict=True))
            for modality, items in inputs.mm_data_items.items()
        }
        return [next(waiting[modality]) for modality in order]

    def _item_key(self, prompt: Sequence[int], keys: list[bytes], options: MediaOptions) -> bytes:
        parts = [
            str(self.info.model_id).encode(),
            self.info.settings.engine.sieve.encode(),
            repr(options.keep_ratio).encode(),
            b",".join(b"%d" % token for token in prompt),
            *keys,
        ]
        return hashlib.sha256(b"|".join(parts)).digest()

    def _fuse(
        self,
        key: bytes,
        prompt: Sequence[int],
        features: Sequence[MediumFeatures],
        options: MediaOptions,
    ) -> tuple[MultiModalKwargsItem, Reduction]:
        layout = build_layout(prompt, [f.shape for f in features], self.info.tokens)
        settings = self.info.settings
        if layout.length > settings.max_full_tokens:
            raise VLLMValidationError(
                f"The prompt has {layout.length} tokens before reduction, more than the limit of "
                f"{settings.max_full_tokens}. Send less media, or lower fps or max_pixels.",
                parameter="messages",
            )
        keep = get_sieve(settings.engine.sieve).budget(layout, options.keep_ratio)
        last = layout.next_position + self.info.ctx.model_config.max_model_len
        if last - layout.num_text - keep > self.info.max_position:
            raise VLLMValidationError(
                f"The media last too long: rotary positions would exceed {self.info.max_position}.",
                parameter="messages",
            )
        item = pack(key, layout, keep, features, self.info.ctx.model_config.dtype)
        return item, _describe(key, layout, keep, options.keep_ratio)

    @staticmethod
    def _look_up(
        cache: BaseMultiModalProcessorCache | None, key: bytes
    ) -> tuple[MultiModalKwargsItem | None, Reduction] | None:
        """An identical request in vLLM's cache: what to send for it, and what was done to it.

        What is sent is None where the engine has the item, else its address or the item itself.
        """
        if cache is None or not cache.is_cached_item(key.hex()):
            return None
        item, updates = _update(cache, key, None)
        return item, cast("Reduction", updates[0])

    @staticmethod
    def _register(
        cache: BaseMultiModalProcessorCache | None,
        key: bytes,
        item: MultiModalKwargsItem,
        reduction: Reduction,
    ) -> MultiModalKwargsItem | None:
        """Put a new item into vLLM's cache, which mirrors the engine's, and return what to send.

        vLLM keeps "prompt updates" beside an item; for a fused item that is its `Reduction`.
        """
        if cache is None:
            return item
        return _update(cache, key, (item, [reduction]))[0]

    @staticmethod
    def _reduced_input(reduction: Reduction, item: MultiModalKwargsItem | None) -> MultiModalInput:
        result = mm_input(
            prompt_token_ids=list(reduction.prompt_ids),
            mm_kwargs=MultiModalKwargsItems({MODALITY: [item]}),
            mm_hashes={MODALITY: [reduction.key.hex()]},
            mm_placeholders={
                MODALITY: [PlaceholderRange(offset=0, length=reduction.reduced_length)]
            },
        )
        cast("ReducedInput", result)["reduction"] = reduction
        return result

    def get_dummy_mm_inputs(
        self,
        mm_counts: Mapping[str, int],
        *,
        cache: BaseMultiModalProcessorCache | None = None,
        scheduler_config: Any = None,
    ) -> MultiModalInput:
        """The longest full prompt that is accepted, to profile memory with.

        Where vLLM only wants to warm the processor up (`scheduler_config` given), a short one.
        """
        tokens = self.info.tokens
        length = self.info.settings.max_full_tokens if scheduler_config is None else 256
        # The longest reduced prompt must fit the sequence, so profile at the ratio that just does.
        keep_ratio = min(1.0, (self.info.ctx.model_config.max_model_len - 8) / length)
        options = self.info.settings.merge({"keep_ratio": keep_ratio})
        features = _blank_video(length - 4, self.info.ctx.model_config.dtype)
        prompt = [tokens.vision_bos, tokens.video, tokens.vision_eos]
        item, reduction = self._fuse(PROFILING_KEY, prompt, [features], options)
        return self._reduced_input(reduction, item)

    # Never reached: `apply` is replaced. vLLM declares them abstract.

    def _get_mm_fields_config(self, *_: Any) -> Any:
        raise NotImplementedError

    def _get_prompt_updates(self, *_: Any) -> Any:
        raise NotImplementedError


def _update(
    cache: BaseMultiModalProcessorCache,
    key: bytes,
    entry: tuple[MultiModalKwargsItem, list[Any]] | None,
) -> tuple[MultiModalKwargsItem | None, Sequence[Any]]:
    """One step of vLLM's cache protocol for one item (`_merge_mm_kwargs` in its processor)."""
    try:
        cache.touch_sender_cache_item(key.hex())
        updated: tuple[MultiModalKwargsItem | None, Sequence[Any]] = cache.get_and_update_item(
            entry, key.hex()
        )
    finally:
        cache.release_sender_touches()
    return updated


def _describe(key: bytes, layout: Layout, keep: int, keep_ratio: float) -> Reduction:
    stand_in = ~layout.is_av
    (av,) = layout.is_av.nonzero()
    stand_in[av[spread(layout.num_av, keep)]] = True
    return Reduction(
        key=key,
        keep_ratio=keep_ratio,
        prompt_ids=layout.token_ids[stand_in].tolist(),
        full={
            kind.name.lower(): layout.count(kind) for kind in (Kind.VIDEO, Kind.AUDIO, Kind.IMAGE)
        },
        full_length=layout.length,
        kept=keep,
    )


def _blank_video(tokens: int, dtype: torch.dtype) -> MediumFeatures:
    """A video without sound of nearly `tokens` tokens: 256 tokens a frame pair, at least one."""
    frames, side = max(1, tokens // 256), 32 if tokens >= 256 else 4
    grid = (frames, side, side)
    return MediumFeatures(
        key=PROFILING_KEY,
        shape=Video(grid, second_per_grid=0.04),
        pixel_values=torch.zeros(frames * side * side, PATCH_VALUES, dtype=dtype),
        grid_thw=grid,
        mel=None,
    )
