"""What is trained on is what is served: the same features, layouts, choices and logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5OmniProcessor

from ep_serve.checkpoint.sections import scaled_sections
from ep_serve.engine.input.media_features import MediaProcessor
from ep_serve.engine.input.medium import EncodedMedium, Modality
from ep_serve.engine.settings import EngineSettings, MediaSettings, Settings
from ep_serve.layout import Kind
from ep_serve.rope import channel_rows
from ep_serve.scenes.encoding import Encoding, encode
from ep_serve.scenes.scene import make_scene
from ep_serve.sieve import Budget, Pool, get_sieve
from ep_serve.sieve.cs2 import CS2Sieve
from ep_serve.training.data.conversations import ExampleBuilder, FrozenTowers, read_conversations
from ep_serve.training.model.architecture import BOUNDS
from ep_serve.training.model.batch import Example, collate
from ep_serve.training.model.thinker import Thinker
from ep_serve.training.model.weights import load_thinker
from tests.clips import make_image, make_wav
from tests.reference_refiner import ReferenceRefiner

KEEP_RATIOS = (1.0, 0.2, 0.1, 0.05)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("media")
    (folder / "video").write_bytes(encode(make_scene(1, 6), Encoding(size=(240, 180))))
    (folder / "audio").write_bytes(make_wav(2))
    (folder / "image").write_bytes(make_image())
    return folder


@pytest.fixture(scope="module")
def reader(embedded: Path) -> ExampleBuilder:
    towers = FrozenTowers(embedded, torch.float32)
    return ExampleBuilder(embedded, towers, fps=2.0, video_pixels=BOUNDS)


def example(reader: ExampleBuilder, folder: Path, kind: Modality) -> Example:
    question = [{"type": kind, kind: kind}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": "Waves."},
    ]
    (folder / "c.jsonl").write_text(json.dumps({"messages": messages}))
    (conversation,) = read_conversations(folder / "c.jsonl", folder)
    return reader.build(conversation)


@pytest.mark.parametrize("kind", ["video", "audio", "image"])
def test_a_file_is_processed_as_the_engine_does(
    embedded: Path, reader: ExampleBuilder, folder: Path, kind: Modality
) -> None:
    settings = Settings(
        media=MediaSettings(min_pixels=BOUNDS[0], max_pixels=BOUNDS[1]),
        engine=EngineSettings(),
        sieve="cs2",
        refines=True,
        keep_ratio=0.2,
        max_full_tokens=10_000,
    )
    hf_processor: Any = Qwen2_5OmniProcessor.from_pretrained(embedded)
    if kind == "image":  # pictures have the bounds of the checkpoint, in both
        settings = settings.model_copy(update={"media": MediaSettings()})
    engine = MediaProcessor(hf_processor, settings, torch.float32)
    options = settings.merge({})
    medium = EncodedMedium(kind, (folder / kind).read_bytes())
    served = engine.features(medium, engine.key(medium, None, options), options)
    towers = FrozenTowers(embedded, torch.float32)
    trained = example(reader, folder, kind)
    expected = []
    if served.pixel_values is not None:
        expected.append(towers.encode_visual(served.pixel_values, served.grid_thw))
    if served.mel is not None:
        expected.append(towers.encode_audio(served.mel))
    kinds = trained.layout.kinds[trained.layout.is_av]
    in_order = trained.av[torch.from_numpy((kinds == Kind.AUDIO).argsort(kind="stable"))]
    assert torch.equal(in_order, torch.cat(expected))


@pytest.mark.parametrize("keep_ratio", KEEP_RATIOS)
@torch.inference_mode()
def test_the_same_tokens_survive_as_in_serving(
    embedded: Path, reader: ExampleBuilder, folder: Path, keep_ratio: float
) -> None:
    one = example(reader, folder, "video")
    thinker = load_thinker(embedded)
    output = thinker(collate([one], [keep_ratio]))
    refined, kept = served(embedded, thinker, one, keep_ratio)
    torch.testing.assert_close(output.refined[0], refined, atol=1e-3, rtol=1e-3)
    assert torch.equal(output.kept[0].nonzero().squeeze(1), kept)


def served(
    checkpoint: Path, thinker: Thinker, one: Example, keep_ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Refined states, and the positions that survive, by the serving refiner and sieve."""
    layout = one.layout
    is_av = torch.from_numpy(layout.is_av)
    embeddings = thinker.model.embed_tokens(torch.from_numpy(layout.token_ids))
    embeddings[is_av] = one.av
    positions = torch.from_numpy(layout.positions)
    refined = reference(checkpoint)(embeddings, positions)
    sieve = CS2Sieve(refined.shape[1])
    sieve.load_state_dict(thinker.model.compressor.state_dict())
    pool = Pool(
        hidden=refined[is_av],
        kinds=torch.from_numpy(layout.kinds)[is_av],
        positions=positions[:, is_av],
        media=torch.from_numpy(layout.media)[is_av],
    )
    plan = get_sieve("cs2").plan(layout, Budget(keep_ratio))
    chosen = is_av.nonzero().squeeze(1)[sieve.select(pool, plan).indices]
    return refined, torch.cat([(~is_av).nonzero().squeeze(1), chosen]).sort().values


def reference(checkpoint: Path) -> ReferenceRefiner:
    refiner = ReferenceRefiner.from_checkpoint(checkpoint)
    refiner.borders = channel_rows(scaled_sections(refiner.head_dim))
    return refiner
