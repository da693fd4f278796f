"""Stock and OmniSIFT checkpoints, served with sieves that do not read the text."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from safetensors.torch import load_file

from ep_serve.engine.server.process import ServerProcess
from tests.clips import make_clip, make_wav
from tests.engine.checkpoints import make_stock
from tests.engine.client import Client, audio, golden_messages, text, user, video
from tests.engine.conftest import EXACT, PIXELS
from tests.goldens import CHECKPOINT, OMNISIFT, load_case

pytestmark = pytest.mark.engine

SYSTEM = {"role": "system", "content": "You are a helpful assistant. " * 3}


@contextmanager
def serving_stock(
    factory: pytest.TempPathFactory,
    *options: str,
    selector: bool = False,
    environment: dict[str, str] | None = None,
) -> Iterator[Client]:
    if not CHECKPOINT.is_dir():
        pytest.skip(f"the reference numbers are not at {CHECKPOINT.parent}")
    extra = {}
    if selector:
        for name, tensor in load_file(OMNISIFT / "selector.safetensors").items():
            extra[f"thinker.compressor.{name.removeprefix('thinker.compressor.')}"] = tensor
    folder = factory.mktemp("stock")
    checkpoint = make_stock(CHECKPOINT, folder / "model", extra)
    with ServerProcess(
        checkpoint,
        [
            *PIXELS,
            *EXACT,
            *("--served-model-name", "golden"),
            *("--max-model-len", "1024"),
            *("--max-full-tokens", "4096"),
            *("--block-size", "32"),
            *("--kv-cache-memory-bytes", str(64 << 20)),
            "--enable-prompt-tokens-details",
            *options,
        ],
        log=folder / "log",
        environment={"HF_HUB_OFFLINE": "1", **(environment or {})},
    ) as process:
        yield Client(process)


def installed(factory: pytest.TempPathFactory, name: str, sieve: str, source: str) -> str:
    """Install a package that offers a sieve.

    Args:
        factory: Gives it a folder.
        name: That of the sieve.
        sieve: Module and class.
        source: That of the module.

    Returns:
        A PYTHONPATH with which it is found.
    """
    module = sieve.partition(":")[0]
    site = factory.mktemp("site")
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[ep_serve.sieves]\n{name} = {sieve}\n")
    return f"{site}:{os.environ.get('PYTHONPATH', '')}"


def omnisift_cases() -> list[dict[str, Any]]:
    """The manifest's cases that can be asked for over HTTP.

    Two clips in one prompt are left out: the authors pair frames across them, the server does not.
    """
    if not OMNISIFT.is_dir():
        return []
    manifest: list[dict[str, Any]] = json.loads((OMNISIFT / "manifest.json").read_text())
    foreign = ("fps3", "aiv_a_then_aiv_b", "aiv_a_then_audio_d")
    return [case for case in manifest if not any(word in case["source"] for word in foreign)]


class EverySieve:
    """What holds for all. Each server ends with its class: together they would fill the memory."""

    options: tuple[str, ...] = ()
    selector = False

    @pytest.fixture(scope="class")
    @classmethod
    def served(cls, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
        with serving_stock(tmp_path_factory, *cls.options, selector=cls.selector) as client:
            yield client

    def test_another_question_about_a_clip_reuses_its_reduction(self, served: Client) -> None:
        clip = video(make_clip(6, seed=80))
        served.ask([SYSTEM, *user(clip, text("What is seen?"))])
        counters = (
            "ep_serve_tower_cache_misses_total",
            "ep_serve_tower_cache_hits_total",
            "ep_serve_av_tokens_full_total",
            "ep_serve_media_decodes_total",
        )
        before = [served.metric(name) for name in counters]
        second = served.ask([SYSTEM, *user(clip, text("And what is heard in it, and when?"))])
        # No tower, no sieve, no decoding.
        assert [served.metric(name) for name in counters] == before
        system_and_clip = len(SYSTEM["content"]) // 2 + second.reduction["av_tokens_kept"]
        assert second.cached_tokens >= second.reduction["av_tokens_kept"] // 32 * 32 > 0
        assert second.cached_tokens <= system_and_clip + second.prompt_tokens
        assert second.reduction["av_tokens_kept"] > 0

    def test_clips_of_every_kind_go_through(self, served: Client) -> None:
        answer = served.ask(
            [
                *user(video(make_clip(2, seed=83)), text("First?")),
                {"role": "assistant", "content": "Yes."},
                *user(video(make_clip(2, sound_rate=None, seed=82)), text("Second?")),
            ],
            max_tokens=2,
        )
        assert len(answer.token_ids) == 2


class TestOmniSift(EverySieve):
    selector = True

    @pytest.mark.parametrize("case", omnisift_cases(), ids=lambda case: case["case"])
    def test_it_keeps_as_many_as_the_authors_code(
        self, served: Client, case: dict[str, Any]
    ) -> None:
        rates = {name: case[name] for name in ("rho_audio", "rho_video")}
        answer = served.ask(golden_messages(case["source"]), **rates)
        assert answer.prompt_tokens == case["L_reduced"]
        assert answer.reduction["video"]["kept"] == case["kept_video"]
        assert answer.reduction["audio"]["kept"] == case["kept_audio"]
        assert {name: answer.reduction[name] for name in rates} == rates

    def test_it_takes_a_plain_keep_ratio(self, served: Client) -> None:
        reduction = served.ask(golden_messages("aiv_b_r020"), keep_ratio=0.35).reduction
        pairs = 3  # 12 frames make 6 grids, and 3 pairs of them
        assert abs(reduction["av_tokens_kept"] - 0.35 * reduction["av_tokens_full"]) <= pairs


class TestOmniZip(EverySieve):
    options = ("--sieve", "omnizip")

    def test_answers_do_not_depend_on_who_asked_before(self, served: Client) -> None:
        clip = video(make_clip(4, seed=81))
        question = user(clip, text("What is seen?"))
        first = served.ask(question)
        served.ask(user(clip, text("What is heard?")))
        assert served.ask(question).token_ids == first.token_ids

    def test_one_token_stays_where_all_is_to_be_dropped(self, served: Client) -> None:
        silent = user(video(make_clip(2, sound_rate=None, seed=84)), text("What is seen?"))
        sound = user(audio(make_wav(0.3)), text("What is heard?"))
        for messages in (silent, sound):
            answer = served.ask(messages, max_tokens=2, rho_video=1.0, rho_audio=1.0)
            assert answer.reduction["av_tokens_kept"] == 1


class TestNone(EverySieve):
    options = ("--sieve", "none")

    def test_it_keeps_everything(self, served: Client) -> None:
        case, _ = load_case("aiv_a_r100")
        answer = served.ask(golden_messages("aiv_a_r100"))
        assert answer.prompt_tokens == case["stats"]["L"]
        assert answer.reduction["av_tokens_kept"] == case["stats"]["n_av"]
