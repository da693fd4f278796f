from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    Qwen2_5OmniProcessor,
    Qwen2_5OmniThinkerForConditionalGeneration,
)

from ep_serve.checkpoint.config import load_config
from ep_serve.checkpoint.embedded import build
from ep_serve.checkpoint.embedded_text import READABLE
from ep_serve.checkpoint.errors import CheckpointError
from ep_serve.checkpoint.random_weights import random_tensor
from tests.goldens import CHECKPOINT, needs_goldens

# Of the weights built with seed 0: they must not change with the machine or with a new version of
# torch, numpy or transformers.
WEIGHTS_SHA256 = "d7d40d9af078"


def digests(directory: Path) -> dict[str, str]:
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in directory.iterdir()
    }


def test_two_builds_are_equal_byte_by_byte(embedded: Path, tmp_path: Path) -> None:
    assert digests(build(tmp_path / "again")) == digests(embedded)


def test_the_weights_never_change(embedded: Path) -> None:
    assert digests(embedded)["model.safetensors"].startswith(WEIGHTS_SHA256)


def test_another_seed_gives_other_weights(embedded: Path, tmp_path: Path) -> None:
    other, first = digests(build(tmp_path / "other", seed=1)), digests(embedded)
    assert [name for name in first if first[name] != other[name]] == ["model.safetensors"]


def test_a_directory_with_content_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("data")
    with pytest.raises(CheckpointError, match="not an empty directory"):
        build(tmp_path)


def test_it_is_small(embedded: Path) -> None:
    assert sum(file.stat().st_size for file in embedded.iterdir()) < 9e6


def test_random_numbers_depend_on_name_and_seed_alone() -> None:
    values = random_tensor("a", (500, 400), 0.5, seed=0)
    assert values.dtype == torch.float32
    assert values.mean().item() == pytest.approx(0, abs=0.01)
    assert values.std().item() == pytest.approx(0.5, rel=0.01)
    assert torch.equal(values, random_tensor("a", (500, 400), 0.5, seed=0))
    assert not torch.equal(values, random_tensor("a", (500, 400), 0.5, seed=1))
    assert not torch.equal(values, random_tensor("b", (500, 400), 0.5, seed=0))


@pytest.mark.parametrize(
    "text", ["What is heard?", "wörld 你好 🙂\n\t  x", "<|vision_bos|><|VIDEO|><|vision_eos|>ok"]
)
def test_the_tokenizer_writes_every_text_and_reads_it_back(embedded: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    assert tokenizer.is_fast
    assert tokenizer.decode(tokenizer(text).input_ids) == text


def test_special_tokens_are_one_token_each(embedded: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    ids = tokenizer("<|im_start|><|VIDEO|><|im_end|>").input_ids
    thinker = load_config(embedded).thinker_config
    assert ids == [thinker.bos_token_id, thinker.video_token_index, thinker.eos_token_id]
    assert tokenizer.eos_token_id == thinker.eos_token_id
    assert tokenizer.pad_token_id == thinker.pad_token_id


def test_the_processor_works_offline(embedded: Path) -> None:
    processor = Qwen2_5OmniProcessor.from_pretrained(embedded, local_files_only=True)
    batch = processor(
        text="<|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>",
        images=[np.zeros((112, 140, 3), np.uint8)],
        audio=[np.zeros(16000, np.float32)],
        return_tensors="pt",
    )
    ids = batch["input_ids"][0]
    thinker = load_config(embedded).thinker_config
    assert (ids == thinker.image_token_index).sum() == 4 * 5
    assert (ids == thinker.audio_token_index).sum() == 25
    assert batch["input_features"].shape[1] == 128


CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hello"}],
    [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "video"},
                {"type": "audio"},
                {"type": "image"},
                {"type": "text", "text": "What?"},
            ],
        },
        {"role": "assistant", "content": "This."},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ],
]


def render(directory: Path, chat: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = AutoTokenizer.from_pretrained(directory)
    text: str = tokenizer.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=True, **options
    )
    return text


@needs_goldens
@pytest.mark.parametrize("chat", CHATS)
def test_the_chat_template_gives_the_official_prompts(
    embedded: Path, chat: list[dict[str, Any]]
) -> None:
    assert render(embedded, chat) == render(CHECKPOINT, chat)


def test_the_chat_template_takes_the_parts_of_the_openai_api(embedded: Path) -> None:
    parts = ["video_url", "image_url", "input_audio", "audio_url"]
    chat = [{"role": "user", "content": [{"type": part} for part in parts]}]
    assert render(embedded, chat) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        "<|vision_bos|><|VIDEO|><|vision_eos|><|vision_bos|><|IMAGE|><|vision_eos|>"
        "<|audio_bos|><|AUDIO|><|audio_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
        "<|im_end|>\n<|im_start|>assistant\n"
    )


def test_the_chat_template_tolerates_tools(embedded: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    chat: list[dict[str, Any]] = [
        {"role": "developer", "content": "Use tools."},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "42", "tool_call_id": "1"},
    ]
    text = render(embedded, chat, tools=[{"type": "function", "function": {"name": "f"}}])
    assert text == (
        "<|im_start|>system\nUse tools.<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
        "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n"
    )


def test_greedy_answers_are_varied_readable_and_never_stop(embedded: Path) -> None:
    thinker = Qwen2_5OmniThinkerForConditionalGeneration(load_config(embedded).thinker_config)
    weights = {
        name.removeprefix("thinker."): value
        for name, value in load_file(embedded / "model.safetensors").items()
        if "bidir_encoder" not in name and "compressor" not in name
    }
    thinker.load_state_dict(weights)
    tokenizer = AutoTokenizer.from_pretrained(embedded)
    answers = []
    for question in ("What is heard?", "Hello", "Why does the dog bark at 3 a.m.?"):
        ids = tokenizer(render(embedded, [{"role": "user", "content": question}])).input_ids
        answer: list[int] = []
        with torch.no_grad():
            for _ in range(12):
                logits = thinker(input_ids=torch.tensor([ids + answer])).logits[0, -1]
                assert logits.isfinite().all()
                answer.append(int(logits.argmax()))
        assert set(answer) <= set(READABLE)
        answers.append(tokenizer.decode(answer))
    assert len(set(answers)) == 3
    assert min(len(set(answer)) for answer in answers) > 1
