from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ep_serve.checkpoint.config import load_config
from ep_serve.layout import Kind
from ep_serve.training.data.conversations import (
    ConversationError,
    ExampleBuilder,
    FrozenTowers,
    read_conversations,
)
from tests.clips import make_clip, make_image, make_wav
from tests.goldens import CHECKPOINT, GOLDENS, load_case, needs_goldens

VIDEO_PIXELS = (4 * 28 * 28, 16 * 28 * 28)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "a.mp4").write_bytes(make_clip(4))
    (folder / "silent.mp4").write_bytes(make_clip(4, sound_rate=None))
    (folder / "s.wav").write_bytes(make_wav(2))
    (folder / "i.png").write_bytes(make_image())
    return folder


def line(*media: tuple[str, str], answer: str = "Waves.") -> dict[str, Any]:
    parts = [{"type": kind, kind: name} for kind, name in media]
    question = {"role": "user", "content": [*parts, {"type": "text", "text": "What?"}]}
    return {"messages": [question, {"role": "assistant", "content": answer}]}


def write(folder: Path, *lines: Any) -> Path:
    path = folder / "conversations.jsonl"
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


def test_every_line_with_media_is_read(folder: Path) -> None:
    path = write(folder, line(("video", "a.mp4")), line(("audio", "s.wav"), ("image", "i.png")))
    first, second = read_conversations(path, folder)
    assert first.answer == "Waves."
    assert first.files == [("video", folder / "a.mp4")]
    assert [kind for kind, _ in second.files] == ["audio", "image"]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (line(("video", "b.mp4")), "there is no file 'b.mp4'"),
        (line(), "no video, audio or image"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "must be the assistant's"),
        ({}, "messages"),
        ([], "indices"),
    ],
)
def test_a_bad_line_is_named(folder: Path, bad: Any, message: str) -> None:
    path = write(folder, line(("video", "a.mp4")), bad)
    with pytest.raises(ConversationError, match=f"line 2: .*{message}"):
        read_conversations(path, folder)


def test_a_file_without_conversations_is_refused(folder: Path) -> None:
    with pytest.raises(ConversationError, match="holds no conversation"):
        read_conversations(write(folder), folder)


@pytest.fixture(scope="module")
def reader(embedded: Path) -> ExampleBuilder:
    towers = FrozenTowers(embedded, torch.float32)
    return ExampleBuilder(embedded, towers, fps=2.0, video_pixels=VIDEO_PIXELS)


@pytest.mark.parametrize(
    ("media", "counts"),
    [
        ([("video", "a.mp4")], {Kind.VIDEO: 64, Kind.AUDIO: 101, Kind.IMAGE: 0}),
        ([("video", "silent.mp4")], {Kind.VIDEO: 64, Kind.AUDIO: 0, Kind.IMAGE: 0}),
        (
            [("audio", "s.wav"), ("image", "i.png")],
            {Kind.VIDEO: 0, Kind.AUDIO: 50, Kind.IMAGE: 20},
        ),
    ],
)
def test_media_become_tokens_of_the_towers(
    folder: Path,
    embedded: Path,
    reader: ExampleBuilder,
    media: list[tuple[str, str]],
    counts: dict[Kind, int],
) -> None:
    (conversation,) = read_conversations(write(folder, line(*media)), folder)
    example = reader.build(conversation)
    assert example.layout.counts() == counts
    assert example.av.shape == (sum(counts.values()), 256)
    assert example.av.isfinite().all()
    assert example.answer[-1] == load_config(embedded).thinker_config.eos_token_id


def test_a_damaged_medium_is_named(folder: Path, reader: ExampleBuilder) -> None:
    (folder / "broken.mp4").write_bytes(b"no video")
    (conversation,) = read_conversations(write(folder, line(("video", "broken.mp4"))), folder)
    with pytest.raises(ConversationError, match="line 1: "):
        reader.build(conversation)


@needs_goldens
def test_the_towers_are_the_authors() -> None:
    _, tensors = load_case("aiv_a_r020")
    towers = FrozenTowers(CHECKPOINT, torch.float32)
    (grid,) = tensors["proc.video_grid_thw"].tolist()
    seen = towers.encode_visual(tensors["proc.pixel_values_videos"], tuple(grid))
    torch.testing.assert_close(seen, tensors["tower.video_embeds"], atol=1e-4, rtol=1e-4)
    heard = towers.encode_audio(tensors["proc.input_features.0"])
    torch.testing.assert_close(heard, tensors["tower.audio_features"], atol=1e-4, rtol=1e-4)


@needs_goldens
def test_a_file_becomes_the_prompt_of_the_authors(tmp_path: Path) -> None:
    case, tensors = load_case("aiv_a_r020")
    (conversation,) = read_conversations(
        write(
            tmp_path,
            {"messages": [*case["messages"], {"role": "assistant", "content": "This."}]},
        ),
        GOLDENS,
    )
    pixels = case["processor_kwargs"]
    reader = ExampleBuilder(
        CHECKPOINT,
        FrozenTowers(CHECKPOINT, torch.float32),
        fps=2.0,
        video_pixels=(pixels["min_pixels"], pixels["max_pixels"]),
    )
    example = reader.build(conversation)
    np.testing.assert_array_equal(example.layout.token_ids, tensors["proc.input_ids"][0].numpy())
    expected = tensors["llm.inputs_embeds"][torch.from_numpy(example.layout.is_av)]
    torch.testing.assert_close(example.av, expected, atol=2e-3, rtol=1e-2)
