"""The models that vLLM registers: Qwen2.5-Omni's thinker behind a sieve, with or without refiner.

One request is one fused item (`fused_item.py`). `embed_multimodal` runs towers, refiner and sieve
over it and returns as many embeddings as the reduced prompt has tokens, with their positions
beside them (`position_codec.py`); the causal decoder never sees anything else.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn
from vllm.distributed import get_pp_group, get_tp_group
from vllm.model_executor.models.interfaces import (
    MultiModalEmbeddings,
    SupportsMultiModal,
    SupportsMultiModalPruning,
)
from vllm.model_executor.models.qwen2 import Qwen2Attention
from vllm.model_executor.models.qwen2_5_omni_thinker import (
    Qwen2_5OmniThinkerDummyInputsBuilder,
    Qwen2_5OmniThinkerForConditionalGeneration,
)
from vllm.model_executor.models.utils import WeightsMapper, maybe_prefix
from vllm.multimodal import MULTIMODAL_REGISTRY

from ep_serve.checkpoint.config import ReductionConfig
from ep_serve.engine import outcomes
from ep_serve.engine.input.fused_item import PROFILING_KEY, FusedItem, unpack, unpack_cpu_fields
from ep_serve.engine.input.processor import (
    ReducingProcessingInfo,
    ReducingProcessor,
)
from ep_serve.engine.model import position_codec
from ep_serve.engine.model.refiner import Refiner
from ep_serve.engine.model.rotary import SyncRotaryEmbedding
from ep_serve.engine.model.statistics import WorkerStatistics
from ep_serve.engine.model.towers import ItemOutputs, TowerCache, Towers
from ep_serve.engine.settings import Settings
from ep_serve.layout import Kind
from ep_serve.sieve import Pool, Selection, checks, get_sieve

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm.config import VllmConfig
    from vllm.multimodal.inputs import MultiModalFeatureSpec

SCORE_HEADS = ("thinker.compressor.", "thinker.model.compressor.")
"""Weights of a sieve: OmniSIFT's and EchoingPixels'."""


def without_score_head(mapper: WeightsMapper) -> WeightsMapper:
    """The same names, but for the weights of a checkpoint's own sieve: another takes its place."""
    return mapper | WeightsMapper(orig_to_new_prefix=dict.fromkeys(SCORE_HEADS))


@MULTIMODAL_REGISTRY.register_processor(
    ReducingProcessor,
    info=ReducingProcessingInfo,
    dummy_inputs=Qwen2_5OmniThinkerDummyInputsBuilder,
)
class Qwen2_5OmniReducedForConditionalGeneration(  # noqa: N801  beside the official names
    Qwen2_5OmniThinkerForConditionalGeneration, SupportsMultiModalPruning
):
    """A stock Qwen2.5-Omni thinker behind a sieve that needs no refiner."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            **dict.fromkeys(SCORE_HEADS, "sieve."),
            **Qwen2_5OmniThinkerForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix,
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        self.settings = Settings.of(vllm_config.model_config)
        self.statistics = WorkerStatistics(collected=outcomes.collected(vllm_config))
        cache_bytes = int(self.settings.engine.tower_cache_gib * 2**30)
        sieve = get_sieve(self.settings.sieve)
        has_audio = self.multimodal_config.get_limit_per_prompt("audio") > 0
        self.towers = Towers(
            self,
            TowerCache(cache_bytes, self.statistics.totals),
            hooks_attention=sieve.uses_saliency and has_audio,
        )
        if get_pp_group().is_first_rank:
            self.sieve = sieve.for_model(self.config.text_config.hidden_size)
            if not isinstance(self.sieve, nn.Module):
                self.hf_to_vllm_mapper = without_score_head(self.hf_to_vllm_mapper)
        # The V1 runner asks for the decoding offset at every step, the V2 runner only with media.
        self._offset_column = not vllm_config.use_v2_model_runner
        # Room for the tower cache while device memory is profiled; given back by the first request.
        self._reserved: torch.Tensor | None = (
            torch.empty(cache_bytes, dtype=torch.uint8) if _on_cuda() else None
        )

    # -- from media to embeddings ---------------------------------------------------------------

    def embed_multimodal(self, **kwargs: object) -> MultiModalEmbeddings:
        """Reduce the fused items of a batch.

        Returns:
            For each item (text + K, D + position_codec.COLUMNS): embeddings of its reduced prompt,
            with their positions beside them.
        """
        items = unpack(kwargs)
        profiling = items[0].key == PROFILING_KEY
        if not profiling:
            self._reserved = None
        outputs: list[torch.Tensor] = []
        for group in _groups(items, self.settings.max_full_tokens):
            outputs += self._reduce(group)
        if profiling:
            self.towers.cache.clear()
        return outputs

    def _reduce(self, items: Sequence[FusedItem]) -> list[torch.Tensor]:
        """All requests of a group in one pass of each stage."""
        device = items[0].pixel_values.device
        with self.statistics.stage("towers", device):
            towers = self.towers.encode(items)
        with self.statistics.stage("refiner", device):
            hidden = torch.cat([self._embed(*pair) for pair in zip(items, towers, strict=True)])
            positions = torch.cat([item.positions for item in items], dim=1).to(device)
            lengths = [item.length for item in items]
            hidden = self._refine(hidden, positions, lengths)
        with self.statistics.stage("selection", device):
            return [
                self._select(*request)
                for request in zip(
                    items,
                    towers,
                    hidden.split(lengths),
                    positions.split(lengths, dim=1),
                    strict=True,
                )
            ]

    def _embed(self, item: FusedItem, towers: ItemOutputs) -> torch.Tensor:
        """(L, D) embeddings of an item: text from the table, the rest from the towers."""
        device = item.pixel_values.device
        hidden = self.language_model.model.embed_input_ids(item.token_ids.to(device))
        is_vision = (item.kinds == Kind.VIDEO) | (item.kinds == Kind.IMAGE)
        for mask, outputs in ((is_vision, towers.vision), (item.kinds == Kind.AUDIO, towers.audio)):
            if outputs:
                places = mask.nonzero().squeeze(1).to(device)
                hidden[places] = torch.cat([o.embeddings for o in outputs]).to(hidden.dtype)
        return hidden

    def _refine(
        self, hidden: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        """States of packed prompts (n, D) for the pool and the decoder: here, their embeddings."""
        return hidden

    def _select(
        self,
        item: FusedItem,
        towers: ItemOutputs,
        hidden: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Keep text and the sieve's choice of the pool, in prompt order."""
        device = hidden.device
        (av,) = (item.kinds != Kind.TEXT).nonzero(as_tuple=True)
        kinds = item.kinds[av].to(device)
        av = av.to(device)
        saliency = [output.saliency for output in towers.audio if output.saliency is not None]
        pool = Pool(
            hidden=hidden[av],
            kinds=kinds,
            positions=positions[:, av],
            media=item.media[item.kinds != Kind.TEXT].to(device),
            saliency=torch.cat(saliency) if saliency else None,
        )
        selection = self._choose(item, pool)
        survivors = av[selection.indices]
        if selection.hidden is not None:
            hidden[survivors] = selection.hidden
        keep = (item.kinds == Kind.TEXT).to(device)
        keep[survivors] = True
        # The count is known, so the device need not be waited for.
        (kept,) = torch.nonzero_static(keep, size=item.reduced_length).T
        return position_codec.append(hidden[kept], item.start, positions[:, kept], item.delta)

    def _choose(self, item: FusedItem, pool: Pool) -> Selection:
        """The sieve's selection; if it fails, evenly spaced tokens, and the request fails."""
        checked = checks.select(self.sieve, pool, item.layout, item.budget, item.keep)
        if item.key != PROFILING_KEY:
            kinds = pool.kinds[checked.selection.indices]
            self.statistics.record_item(item, self.settings.sieve, kinds, checked)
        elif checked.error is not None:
            raise checked.error  # a server that could answer nothing need not start
        return _same_on_all_ranks(checked.selection, pool)

    # -- positions ------------------------------------------------------------------------------

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[MultiModalFeatureSpec]
    ) -> tuple[torch.Tensor, int]:
        """Positions as far as they are known before the sieve has run.

        Those of a fused item follow with its embeddings. The text after it goes on where the clip
        ended, and generated tokens (when a request comes back after preemption) behind the largest
        position of the full prompt.

        Returns:
            (3, n) positions, or (3, n + 1) for the V1 runner, whose last column keeps the delta;
            and the delta: the first decoded position minus the length of the prompt.
        """
        length = len(input_tokens)
        positions = torch.arange(length + 1).repeat(3, 1)
        delta = 0
        if mm_features:
            data = mm_features[0].data
            assert data is not None, "vLLM keeps the CPU fields of items for M-RoPE models"
            item = unpack_cpu_fields(data)
            delta = item.delta
            end = item.start + item.reduced_length
            text = min(item.tail, length - end)
            positions[:, end : end + text] = item.after + torch.arange(text)
            positions[:, end + text :] += delta
        if not self._offset_column:
            return positions[:, :length], delta
        positions[:, length] = delta
        return positions, delta

    def recompute_mrope_positions(
        self,
        input_ids: list[int] | torch.Tensor,
        multimodal_embeddings: Sequence[torch.Tensor],
        mrope_positions: torch.Tensor,
        num_computed_tokens: int,
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor, int]:
        """Take the positions off the embeddings of this step and write them into the prompt's.

        Args:
            input_ids: not needed, the embeddings know their places.
            multimodal_embeddings: rows of fused items, (n, D + position_codec.COLUMNS) each.
            mrope_positions: (3, n) or (3, n + 1), see `get_mrope_input_positions`.
            num_computed_tokens: not needed either.
        """
        if not multimodal_embeddings:  # the V1 runner, a step without media
            return multimodal_embeddings, mrope_positions, int(mrope_positions[0, -1])
        embeddings = []
        delta = 0
        mrope_positions = mrope_positions.clone()
        for coded in multimodal_embeddings:
            embedding, (places, positions, delta) = position_codec.split(coded)
            embeddings.append(embedding)
            mrope_positions[:, places.to(mrope_positions.device)] = positions.to(mrope_positions)
        return embeddings, mrope_positions, delta

    def embed_input_ids(
        self,
        input_ids: torch.Tensor,
        multimodal_embeddings: MultiModalEmbeddings | None = None,
        *,
        is_multimodal: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Merge embeddings by place: fused items are never interleaved, whatever their ids say."""
        return SupportsMultiModal.embed_input_ids(
            self, input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )


class Qwen2_5OmniCompressForConditionalGeneration(  # noqa: N801  the checkpoint's name
    Qwen2_5OmniReducedForConditionalGeneration
):
    """EchoingPixels: the whole prompt refined first, and Sync-RoPE in refiner and decoder."""

    hf_to_vllm_mapper = WeightsMapper(
        orig_to_new_prefix={
            "thinker.model.bidir_encoder.": "refiner.",
            **Qwen2_5OmniReducedForConditionalGeneration.hf_to_vllm_mapper.orig_to_new_prefix,
        }
    )

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        reduction = ReductionConfig.from_hf(vllm_config.model_config.hf_config)
        rotary = _install_sync_rope(self.language_model.model, reduction.sync_rope_sections)
        if get_pp_group().is_first_rank:
            self.refiner = Refiner(
                self.config.text_config,
                reduction.refiner_layers,
                rotary,
                self.quant_config,
                maybe_prefix(prefix, "refiner"),
            )

    def _refine(
        self, hidden: torch.Tensor, positions: torch.Tensor, lengths: Sequence[int]
    ) -> torch.Tensor:
        return self.refiner(hidden, positions, lengths)


def _same_on_all_ranks(selection: Selection, pool: Pool) -> Selection:
    """Ranks hold the same states up to rounding; rank 0 decides, and its selection is reported."""
    group = get_tp_group()
    if group.world_size == 1:
        return selection
    hidden = selection.hidden
    # A sieve may have failed on some ranks only. This goes over the CPU.
    if group.broadcast_object(hidden is not None, src=0):
        if hidden is None:
            hidden = pool.hidden.new_empty(len(selection.indices), pool.hidden.shape[1])
        hidden = group.broadcast(hidden.contiguous(), src=0)
    else:
        hidden = None
    return Selection(group.broadcast(selection.indices, src=0), hidden)


def _install_sync_rope(decoder: nn.Module, sections: Sequence[int]) -> SyncRotaryEmbedding:
    """Replace the rotary embedding of every decoder layer by one with Sync-RoPE's sections."""
    attentions = [m for m in decoder.modules() if isinstance(m, Qwen2Attention)]
    rotary = SyncRotaryEmbedding(attentions[0].rotary_emb, sections)
    for attention in attentions:
        attention.rotary_emb = rotary
    return rotary


def _groups(items: Sequence[FusedItem], max_tokens: int) -> Iterator[list[FusedItem]]:
    """Batches of items whose full prompts add up to at most the profiled length."""
    group: list[FusedItem] = []
    size = 0
    for item in items:
        if group and size + item.length > max_tokens:
            yield group
            group, size = [], 0
        group.append(item)
        size += item.length
    if group:
        yield group


def _on_cuda() -> bool:
    return torch.get_default_device().type == "cuda"
