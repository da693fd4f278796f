"""Read conversations with media from a JSONL file, as training examples for a real checkpoint.

A line is `{"messages": [...]}` in the form that Hugging Face's chat templates take: contents are
texts or lists of parts `{"type": "text", "text": ...}`, `{"type": "video", "video": PATH}`,
`{"type": "audio", "audio": PATH}` and `{"type": "image", "image": PATH}`. The last message is the
assistant's, a text; it is the training target. Paths are relative to a media folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen2_5OmniProcessor
from transformers.models.qwen2_5_omni.modeling_qwen2_5_omni import (
    Qwen2_5OmniAudioEncoder,
    Qwen2_5OmniVisionEncoder,
)

from ep_serve import media
from ep_serve.checkpoint.config import load_config
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.layout import (
    Audio,
    Image,
    Kind,
    MediaTokens,
    MediumShape,
    Video,
    audio_token_count,
    build_layout,
)
from ep_serve.preprocess.features import (
    TEMPORAL_PATCH,
    Bounds,
    Grid,
    image_patches,
    log_mel,
    shrunk,
    video_patches,
)
from ep_serve.training.model.batch import Example
from ep_serve.training.model.weights import TOWERS, read_named

MEDIA_PARTS = ("video", "audio", "image")


class ConversationError(CheckpointError):
    """A line of a JSONL file that is no valid training example."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """One line of the file.

    Attributes:
        line: Its number, from 1.
        messages: All but the answer.
        answer: The assistant's last message.
        files: (kind, path) of the media, in the order of the prompt.
    """

    line: int
    messages: list[dict[str, Any]]
    answer: str
    files: list[tuple[str, Path]]


def read_conversations(path: Path, folder: Path) -> list[Conversation]:
    """Read every line of a JSONL file, with media paths relative to `folder`.

    Raises:
        ConversationError: The number of the first bad line, and what is wrong with it.
    """
    conversations = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                conversations.append(_parse(number, json.loads(line), folder))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConversationError(f"{path}, line {number}: {error}") from None
    if not conversations:
        raise ConversationError(f"{path} holds no conversation")
    return conversations


def _parse(number: int, data: dict[str, Any], folder: Path) -> Conversation:
    *messages, last = data["messages"]
    if last["role"] != "assistant" or not isinstance(last["content"], str):
        raise ValueError("the last message must be the assistant's, with a text as its content")
    files = []
    for kind, name in _media_in(messages):
        if not (folder / name).is_file():
            raise ValueError(f"there is no file {name!r} in {folder}")
        files.append((kind, folder / name))
    if not files:
        raise ValueError("the messages have no video, audio or image")
    return Conversation(number, messages, last["content"], files)


def _media_in(messages: list[dict[str, Any]]) -> Iterator[tuple[str, str]]:
    for message in messages:
        if isinstance(message["content"], list):
            for part in message["content"]:
                if part["type"] in MEDIA_PARTS:
                    yield part["type"], part[part["type"]]


class FrozenTowers(nn.Module):
    """The towers of a checkpoint, without gradients."""

    def __init__(self, checkpoint: Path, dtype: torch.dtype) -> None:
        super().__init__()
        thinker = load_config(checkpoint).thinker_config
        self.visual = Qwen2_5OmniVisionEncoder(thinker.vision_config)
        self.audio_tower = Qwen2_5OmniAudioEncoder(thinker.audio_config)
        for name, prefix in TOWERS.items():
            tower = getattr(self, name)
            state = read_named(checkpoint, {prefix + key for key in tower.state_dict()})
            own = {key.removeprefix(prefix): value.to(dtype) for key, value in state.items()}
            tower.load_state_dict(own, assign=True)
        self.requires_grad_(False)
        self.eval()

    @torch.inference_mode()
    def encode_visual(self, patches: Tensor, grid: Grid) -> Tensor:
        """Encode the patches of one video or image to tokens (n, D)."""
        weight = self.visual.patch_embed.proj.weight
        grids = torch.tensor([grid], device=weight.device)
        tokens: Tensor = self.visual(patches.to(weight), grid_thw=grids).pooler_output
        return tokens.clone()

    @torch.inference_mode()
    def encode_audio(self, mel: Tensor) -> Tensor:
        """Encode one log-mel spectrogram (bins, frames) to tokens (n, D)."""
        weight = self.audio_tower.conv1.weight
        length = torch.tensor([mel.shape[1]], device=weight.device)
        halved = (length - 1) // 2 + 1
        tokens: Tensor = self.audio_tower(
            mel.to(weight), feature_lens=length, aftercnn_lens=halved
        ).last_hidden_state
        return tokens.clone()


class ExampleBuilder:
    """Builds examples from conversations, as the engine builds prompts from requests."""

    def __init__(
        self, checkpoint: Path, towers: FrozenTowers, *, fps: float, video_pixels: Bounds
    ) -> None:
        self._processor: Any = Qwen2_5OmniProcessor.from_pretrained(
            checkpoint, local_files_only=True
        )
        self._towers = towers
        self._rule = media.SamplingRule(fps=fps)
        self._limits = media.MediaLimits()
        self._bounds = video_pixels
        self._tokens = MediaTokens.from_config(load_config(checkpoint).thinker_config)
        self._end: int = self._processor.tokenizer.eos_token_id

    def build(self, conversation: Conversation) -> Example:
        """Decode the media, run the towers, build the prompt layout.

        Raises:
            ConversationError: The line, and what is wrong with one of its media.
        """
        try:
            parts = [self._medium(kind, path) for kind, path in conversation.files]
        except media.MediaError as error:
            raise ConversationError(f"line {conversation.line}: {error}") from None
        tokenizer = self._processor.tokenizer
        text = self._processor.apply_chat_template(
            conversation.messages, tokenize=False, add_generation_prompt=True
        )
        prompt = tokenizer(text).input_ids
        layout = build_layout(prompt, [medium for medium, _ in parts], self._tokens)
        first = next(iter(parts[0][1].values()))
        embeddings = torch.empty(layout.length, first.shape[1], dtype=first.dtype)
        for index, (_, outputs) in enumerate(parts):
            for kind, tokens in outputs.items():
                embeddings[torch.from_numpy(layout.slots(index, kind))] = tokens.cpu()
        return Example(
            layout=layout,
            av=embeddings[torch.from_numpy(layout.is_av)],
            answer=[*tokenizer(conversation.answer).input_ids, self._end],
        )

    def _medium(self, kind: str, path: Path) -> tuple[MediumShape, dict[Kind, Tensor]]:
        data = path.read_bytes()
        if kind == "audio":
            mel = log_mel(self._processor.feature_extractor, media.decode_sound(data, self._limits))
            return Audio(audio_token_count(mel.shape[1])), {
                Kind.AUDIO: self._towers.encode_audio(mel)
            }
        if kind == "image":
            own = self._processor.image_processor.size
            bounds = (own["shortest_edge"], own["longest_edge"])
            picture = media.decode_image(data, self._limits)
            patches, grid = image_patches(self._processor.image_processor, picture, bounds)
            return Image(grid), {Kind.IMAGE: self._towers.encode_visual(patches, grid)}
        clip = media.decode_clip(
            data, self._rule, self._limits, size=lambda h, w: shrunk(h, w, self._bounds)
        )
        patches, grid = video_patches(self._processor.video_processor, clip.frames, self._bounds)
        outputs = {Kind.VIDEO: self._towers.encode_visual(patches, grid)}
        audio_tokens = 0
        if clip.sound is not None:
            mel = log_mel(self._processor.feature_extractor, clip.sound)
            audio_tokens = audio_token_count(mel.shape[1])
            if audio_tokens:
                outputs[Kind.AUDIO] = self._towers.encode_audio(mel)
        return Video(grid, TEMPORAL_PATCH / clip.fps, audio_tokens), outputs
