"""Tokenizer, chat template and processor settings of the embedded checkpoints.

The vocabulary has the 256 bytes and the special tokens, so every text can be encoded. That of the
trained checkpoint has whole words as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

from ep_serve.checkpoint.directory import write_json

LONGEST_TEXT = 32768  # tokens
MIN_PIXELS, MAX_PIXELS = 4 * 28 * 28, 256 * 28 * 28  # of one picture or frame; a token is 28 x 28

# Bytes first, in the order of the characters that stand for them; "!" to "~" come out as 0 to 93.
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|AUDIO|>",
    "<|audio_bos|>",
    "<|audio_eos|>",
    "<|vision_bos|>",
    "<|vision_eos|>",
    "<|vision_pad|>",
    "<|IMAGE|>",
    "<|VIDEO|>",
)
TOKEN_IDS = {token: number for number, token in enumerate([*BYTES, *SPECIALS])}
# The tokens that read as text one by one: printable ASCII, with the stand-in for a space.
READABLE = [TOKEN_IDS[char] for char in [*map(chr, range(0x21, 0x7F)), "\u0120"]]

MEDIA_TOKENS = {
    "audio_token": "<|AUDIO|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
}

CHAT_TEMPLATE = r"""
{%- for message in messages -%}
    {%- if loop.first and message['role'] not in ['system', 'developer'] -%}
        {{- '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' -}}
    {%- endif -%}
    {%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}
    {{- '<|im_start|>' + role + '\n' -}}
    {%- if message['content'] is string -%}
        {{- message['content'] -}}
    {%- elif message['content'] -%}
        {%- for part in message['content'] -%}
            {%- if part['type'] in ['image', 'image_url'] -%}
                {{- '<|vision_bos|><|IMAGE|><|vision_eos|>' -}}
            {%- elif part['type'] in ['video', 'video_url'] -%}
                {{- '<|vision_bos|><|VIDEO|><|vision_eos|>' -}}
            {%- elif part['type'] in ['audio', 'audio_url', 'input_audio'] -%}
                {{- '<|audio_bos|><|AUDIO|><|audio_eos|>' -}}
            {%- elif 'text' in part -%}
                {{- part['text'] -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""


def word_merges(words: Sequence[str]) -> dict[str, tuple[str, str]]:
    """The merges that make one token of each word, in order: {token: its two parts}.

    A word grows letter by letter from its beginning, so a longer one passes through all its
    beginnings. Words after a space come first: a text is cut into the longest known words from the
    left, and a word inside another cannot get in the way.
    """
    merges: dict[str, tuple[str, str]] = {}
    for word in sorted(words, key=lambda word: (not word.startswith(" "), word)):
        letters = _letters(word)
        for end in range(2, len(letters) + 1):
            merges.setdefault(letters[:end], (letters[: end - 1], letters[end - 1]))
    return merges


def _letters(word: str) -> str:
    """The bytes of a word, each as the character that stands for it."""
    bytes_of = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return bytes_of.pre_tokenize_str(word)[0][0]


def vocabulary_size(words: Sequence[str]) -> int:
    """Token ids of a tokenizer with this vocabulary."""
    return len(TOKEN_IDS) + len(word_merges(words))


def write_text_files(directory: Path, words: Sequence[str] = ()) -> None:
    """The tokenizer's files and the chat template.

    Args:
        directory: Where they go.
        words: What is one token beside the bytes, " word" or "word"; ids follow the special ones.
    """
    merges = word_merges(words)
    vocabulary = {token: TOKEN_IDS[token] for token in BYTES}
    if merges:
        tokens = [*TOKEN_IDS, *merges]  # ids must have no gaps, so the special ones are in it too
        vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges.values())))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in SPECIALS])
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(directory / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges.values())]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_json(directory / "added_tokens.json", {token: TOKEN_IDS[token] for token in SPECIALS})
    write_json(directory / "tokenizer_config.json", _tokenizer_config())
    (directory / "chat_template.jinja").write_text(CHAT_TEMPLATE.lstrip(), encoding="utf-8")


def _tokenizer_config() -> dict[str, Any]:
    plain = {
        "lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True
    }  # fmt: skip
    return {
        "added_tokens_decoder": {
            str(TOKEN_IDS[token]): {"content": token} | plain for token in SPECIALS
        },
        "additional_special_tokens": list(SPECIALS),
        "bos_token": None,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "extra_special_tokens": MEDIA_TOKENS,
        "model_max_length": LONGEST_TEXT,
        "pad_token": "<|endoftext|>",
        "processor_class": "Qwen2_5OmniProcessor",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
        **MEDIA_TOKENS,
    }


def write_processor_files(
    directory: Path, min_pixels: int = MIN_PIXELS, max_pixels: int = MAX_PIXELS
) -> None:
    """Settings of the image, video and audio processors, with the bounds of a frame's size."""
    pictures: dict[str, Any] = {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "max_pixels": max_pixels,
        "merge_size": 2,
        "min_pixels": min_pixels,
        "patch_size": 14,
        "processor_class": "Qwen2_5OmniProcessor",
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"longest_edge": max_pixels, "shortest_edge": min_pixels},
        "temporal_patch_size": 2,
    }
    sound = {
        "chunk_length": 300,
        "dither": 0.0,
        "feature_extractor_type": "WhisperFeatureExtractor",
        "feature_size": 128,
        "hop_length": 160,
        "n_fft": 400,
        "n_samples": 300 * 16000,
        "nb_max_frames": 300 * 100,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
        "sampling_rate": 16000,
    }
    write_json(
        directory / "preprocessor_config.json",
        {"image_processor_type": "Qwen2VLImageProcessor"} | pictures | sound,
    )
    write_json(
        directory / "video_preprocessor_config.json",
        {
            "do_sample_frames": False,
            "max_frames": 768,
            "min_frames": 4,
            "video_processor_type": "Qwen2VLVideoProcessor",
        }
        | pictures,
    )
