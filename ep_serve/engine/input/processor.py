"""The API-process side: a prompt and its media become one fused item and a reduced prompt.

`apply` of vLLM's processor is replaced whole (vLLM 0.32, `multimodal/processing/processor.py`): the
prompt is expanded here, its positions and the budget are computed on the CPU, and vLLM is handed a
placeholder that is exactly as long as the reduced prompt.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, cast

import torch
from transformers.models.qwen2_5_omni.processing_qwen2_5_omni import Qwen2_5OmniProcessor
from vllm.exceptions import VLLMServerError, VLLMValidationError
from vllm.inputs import MultiModalInput
from vllm.inputs.engine import mm_input
from vllm.model_executor.models.qwen2_5_omni_thinker import Qwen2_5OmniThinkerProcessingInfo
from vllm.multimodal.cache.lru import LruKeyReplicatedSenderCache
from vllm.multimodal.inputs import MultiModalKwargsItem, MultiModalKwargsItems, PlaceholderRange
from vllm.multimodal.processing import BaseMultiModalProcessor
from vllm.transformers_utils.processor import cached_processor_from_config

from ep_serve.engine.input.connector import MediumParser
from ep_serve.engine.input.fused_item import (
    MODALITY,
    PATCH_VALUES,
    PROFILING_KEY,
    Span,
    cover,
    pack,
)
from ep_serve.engine.input.media_budget import TokenBudget
from ep_serve.engine.input.media_features import MediaProcessor, MediumFeatures, set_current
from ep_serve.engine.input.media_ids import MediaId
from ep_serve.engine.input.media_tokens import count_media_tokens
from ep_serve.engine.input.selection_report import PoolShape
from ep_serve.engine.metrics import metrics
from ep_serve.engine.settings import MediaOptions, Settings
from ep_serve.layout import (
    Layout,
    MediaTokens,
    Video,
    build_layout,
    spread,
)
from ep_serve.sieve import Budget, get_sieve
from ep_serve.sieve.checks import SieveError, make_plan

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.multimodal.cache import BaseMultiModalProcessorCache
    from vllm.multimodal.processing import ProcessorInputs, TimingContext

    from ep_serve.engine.input.medium import Modality

POSITIONS_PER_MAX_LENGTH = 4
"""vLLM's rotary table has this many rows for each position of `max_position_embeddings`."""


@dataclass(frozen=True)
class Reduction:
    """The reduction of a request, as far as it is known before the sieve runs."""

    key: bytes
    """That of the fused item."""
    budget: Budget
    prompt_ids: list[int]
    """Stand-in for the reduced prompt: its text, and AV tokens where survivors may be."""
    full: dict[str, int]
    """AV tokens by modality before reduction."""
    full_length: int
    kept: int
    """AV tokens after reduction."""
    pool: PoolShape | None = None
    """The pool of the prompt, with `return_selection`."""

    @property
    def reduced_length(self) -> int:
        return len(self.prompt_ids)

    @property
    def keep_ratio(self) -> float:
        """The requested ratio, or the one that the rates resulted in."""
        if self.budget.keep_ratio is not None:
            return self.budget.keep_ratio
        return round(self.kept / max(1, sum(self.full.values())), 4)

    @property
    def rates(self) -> dict[str, float]:
        """The rates of the request, for sieves with separate rates."""
        rates = {"rho_audio": self.budget.rho_audio, "rho_video": self.budget.rho_video}
        return {name: rate for name, rate in rates.items() if rate is not None}


UNSENT = "unsent"
"""Entry of a processed prompt for `sent_items.py`: the key of an item that the engine may not have,
and the item."""


class ReducedInput(MultiModalInput):
    """vLLM's processed prompt, and what was done to it."""

    reduction: Reduction


class ReducingProcessingInfo(Qwen2_5OmniThinkerProcessingInfo):
    """Information on the model's inputs for vLLM's processor."""

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
    def has_audio(self) -> bool:
        """Whether the audio tower exists (`limit_mm_per_prompt`)."""
        return self.allowed_mm_limits["audio"] > 0

    @property
    def max_position(self) -> int:
        text_config = self.get_hf_config().text_config
        return POSITIONS_PER_MAX_LENGTH * int(text_config.max_position_embeddings)


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
            VLLMServerError: the sieve has no plan that could be carried out.
            PlaceholderError: the prompt's media tokens do not match its media.
        """
        options = self._options(inputs)
        media = self._media_in_prompt_order(inputs)
        keys = [self.media.key(medium, name, options) for medium, name in media]
        given = [(medium, key, options) for (medium, _), key in zip(media, keys, strict=True)]
        with timing_ctx.record("media"):
            budget = TokenBudget()
            for one in given:
                self.media.check_tokens(*one, budget)
            shapes = [self.media.shape(*medium) for medium in given]
            for medium, name in media:
                self.media.remember_id(medium, name)
        with timing_ctx.record("layout"), metrics().timed("layout"):
            layout = build_layout(inputs.prompt, shapes, self.info.tokens)
            span = self._plan(layout, options.budget)
        key = self._item_key(span, options, keys)
        unsent = None
        if inputs.cache is not None and inputs.cache.is_cached_item(key.hex()):
            item = _update(inputs.cache, key, None)
        else:
            with timing_ctx.record("media"):
                features = [self.media.features(*medium) for medium in given]
            with timing_ctx.record("item"), metrics().timed("item"):
                fresh = pack(
                    key,
                    span,
                    options.budget,
                    features,
                    self.info.ctx.model_config.dtype,
                    return_selection=options.return_selection,
                )
                item = fresh
                if isinstance(inputs.cache, LruKeyReplicatedSenderCache):
                    unsent = (key.hex(), fresh)
                elif inputs.cache is not None:
                    item = _update(inputs.cache, key, fresh)
        reduction = _describe(key, layout, span, options.budget)
        if options.return_selection:
            av = layout.is_av
            pool = PoolShape(shapes, layout.kinds[av], layout.media[av])
            reduction = replace(reduction, pool=pool)
        saved = reduction.full_length - reduction.reduced_length
        metrics().request(reduction.keep_ratio, saved)
        metrics().media(self.media.hits, self.media.misses)
        result = _reduced_input(reduction, span, item)
        return result if unsent is None else cast("MultiModalInput", {**result, UNSENT: unsent})

    def _options(self, inputs: ProcessorInputs) -> MediaOptions:
        options = self.info.settings.merge(inputs.hf_processor_mm_kwargs)
        return options if self.info.has_audio else options.model_copy(update={"sound": False})

    def _media_in_prompt_order(self, inputs: ProcessorInputs) -> list[tuple[Any, MediaId | None]]:
        """The media with their client-given ids, as their placeholders come in the prompt."""
        tokens = self.info.tokens
        modality_of: dict[int, Modality] = {
            tokens.video: "video",
            tokens.audio: "audio",
            tokens.image: "image",
        }
        order = [modality_of[t] for t in inputs.prompt if t in modality_of]
        count_media_tokens(
            inputs.prompt, inputs.mm_data_items.get_all_counts(), self.info.get_tokenizer()
        )
        ids = inputs.mm_uuid_items or {}
        waiting = {
            modality: iter(zip(items, ids.get(modality) or [None] * len(items), strict=True))
            for modality, items in inputs.mm_data_items.items()
        }
        given = ((modality, *next(waiting[modality])) for modality in order)
        return [
            (medium, None if name is None else MediaId(modality, name))
            for modality, medium, name in given
        ]

    def _plan(self, layout: Layout, budget: Budget) -> Span:
        """Decide how much is kept, and which part of the prompt the item covers."""
        settings = self.info.settings
        if layout.length > settings.max_full_tokens:
            raise VLLMValidationError(
                f"The prompt has {layout.length} tokens before reduction, more than the limit of "
                f"{settings.max_full_tokens}. Send less media, or lower fps or max_pixels.",
                parameter="messages",
            )
        try:
            keep = int(make_plan(get_sieve(settings.sieve), layout, budget).keep)
        except ValueError as error:
            parameter = "rho_video" if budget.has_rho else "keep_ratio"
            raise VLLMValidationError(str(error), parameter=parameter) from None
        except SieveError as error:
            raise VLLMServerError(str(error)) from error
        span = cover(layout, keep, whole=settings.whole_prompt)
        if self.info.ctx.model_config.max_model_len + span.delta > self.info.max_position:
            raise VLLMValidationError(
                f"The media last too long: rotary positions would exceed {self.info.max_position}.",
                parameter="messages",
            )
        return span

    def _item_key(self, span: Span, options: MediaOptions, keys: list[bytes]) -> bytes:
        """Hash of all that the item's embeddings and positions depend on.

        Where the sieve does not read the text, questions about a clip share its item. One whose
        selection is to be told is another item: a remembered one has none.
        """
        parts = [
            str(self.info.model_id).encode(),
            self.info.settings.sieve.encode(),
            repr(
                (options.budget, options.return_selection, span.start, span.after, span.delta)
            ).encode(),
            span.layout.token_ids.tobytes(),
            span.layout.positions.tobytes(),
            *keys,
        ]
        return hashlib.sha256(b"|".join(parts)).digest()

    def get_dummy_mm_inputs(
        self,
        mm_counts: Mapping[str, int],
        *,
        cache: BaseMultiModalProcessorCache | None = None,
        scheduler_config: Any = None,
    ) -> MultiModalInput:
        """The longest full prompt that is accepted, to profile memory with.

        A short one where vLLM only warms the processor up (`scheduler_config` given).
        """
        settings, model_config = self.info.settings, self.info.ctx.model_config
        length = settings.max_full_tokens if scheduler_config is None else 256
        sequence = model_config.max_model_len
        prompt = [self.info.tokens.vision_bos, self.info.tokens.video, self.info.tokens.vision_eos]
        # A reduced prompt must fit the sequence: ask for what just does. Sieves that keep more than
        # they are asked for never see a full prompt longer than the sequence.
        for tokens, ratio in ((length, sequence / length / 2), (min(length, sequence) // 2, 1.0)):
            features = _blank_video(tokens - 4, model_config.dtype)
            layout = build_layout(prompt, [features.shape], self.info.tokens)
            budget = Budget(min(1.0, ratio))
            span = self._plan(layout, budget)
            if layout.num_text + span.keep <= sequence:
                break
        item = pack(PROFILING_KEY, span, budget, [features], model_config.dtype)
        return _reduced_input(_describe(PROFILING_KEY, layout, span, budget), span, item)

    # Never reached: `apply` is replaced. vLLM declares them abstract.

    def _get_mm_fields_config(self, *_: Any) -> Any:
        raise NotImplementedError

    def _get_prompt_updates(self, *_: Any) -> Any:
        raise NotImplementedError


def _update(
    cache: BaseMultiModalProcessorCache, key: bytes, item: MultiModalKwargsItem | None
) -> MultiModalKwargsItem | None:
    """One step of vLLM's cache protocol for one item (`_merge_mm_kwargs` in its processor).

    Returns:
        What to send: None where the engine has the item, else its address or the item itself.
    """
    try:
        cache.touch_sender_cache_item(key.hex())
        sent, _ = cache.get_and_update_item(None if item is None else (item, []), key.hex())
    finally:
        cache.release_sender_touches()
    return cast("MultiModalKwargsItem | None", sent)


def _describe(key: bytes, layout: Layout, span: Span, budget: Budget) -> Reduction:
    stand_in = ~layout.is_av
    (av,) = layout.is_av.nonzero()
    stand_in[av[spread(layout.num_av, span.keep)]] = True
    return Reduction(
        key=key,
        budget=budget,
        prompt_ids=layout.token_ids[stand_in].tolist(),
        full={kind.name.lower(): count for kind, count in layout.counts().items()},
        full_length=layout.length,
        kept=span.keep,
    )


def _reduced_input(
    reduction: Reduction, span: Span, item: MultiModalKwargsItem | None
) -> MultiModalInput:
    length = span.layout.num_text + span.keep
    result = mm_input(
        prompt_token_ids=list(reduction.prompt_ids),
        mm_kwargs=MultiModalKwargsItems({MODALITY: [item]}),
        mm_hashes={MODALITY: [reduction.key.hex()]},
        mm_placeholders={MODALITY: [PlaceholderRange(offset=span.start, length=length)]},
    )
    cast("ReducedInput", result)["reduction"] = reduction
    return result


def _blank_video(tokens: int, dtype: torch.dtype) -> MediumFeatures:
    """A video without sound of nearly `tokens` tokens: 256 tokens a frame pair, at least one."""
    frames, side = max(1, tokens // 256), 32 if tokens >= 256 else 4
    grid = (frames, side, side)
    return MediumFeatures(
        key=PROFILING_KEY,
        shape=Video(grid, second_per_grid=0.08),
        pixel_values=torch.zeros(frames * side * side, PATCH_VALUES, dtype=dtype),
        grid_thw=grid,
        mel=None,
    )
