from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest

from ep_serve.evaluation.client import Server
from ep_serve.evaluation.errors import EvaluationError
from ep_serve.evaluation.inspection import MODULES, inspect
from ep_serve.scenes.encoding import Encoding, encode
from ep_serve.scenes.scene import make_scene
from tests.clips import make_image, make_wav
from tests.evaluation import pages
from tests.evaluation.mock_server import AUDIO, MockServer, serving
from tests.gateway.browser import chromium

QUESTIONS = ("What sounds <when>?", "Which colour?")
RATIOS = (0.2, 0.1)


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("inspect")
    clip = folder / "a & b.mp4"
    clip.write_bytes(encode(make_scene(0, 4), Encoding((112, 112), 8)))
    mock = MockServer(say=lambda question, ratio: f"</script> {question} {ratio:g}")
    with serving(mock), closing(Server(mock.url)) as server:
        inspect(clip, QUESTIONS, RATIOS, [server], folder / "page.html", max_tokens=8)
    assert len(mock.bodies) == 4
    assert all(body["return_selection"] for body in mock.bodies)
    return folder / "page.html"


def test_the_page_holds_all_that_it_shows(page: Path) -> None:
    found = pages.read(page)
    assert found.loads() == []
    data = json.loads(found.scripts["data"])
    assert data["name"] == "a & b.mp4"
    assert len(data["pictures"]) == len(data["times"]) == 4
    assert all(picture.startswith("data:image/jpeg;base64,") for picture in data["pictures"])
    assert len(data["peaks"]) >= AUDIO
    assert [(run["question"], run["ratio"]) for run in data["runs"]] == [
        (question, ratio) for question in QUESTIONS for ratio in RATIOS
    ]


def test_its_modules_import_only_each_other(page: Path) -> None:
    found = pages.read(page)
    imports = json.loads(found.scripts["importmap"])["imports"]
    assert set(imports) == {f"{name}.js" for name in MODULES}
    assert 'from "./' not in found.scripts["module"]


def test_answers_can_be_read_without_scripts(page: Path) -> None:
    found = pages.read(page)
    assert "</script> Which colour? 0.1" in found.text
    assert "32 of 164" in found.text
    assert "these were kept for the second one too: 100 % at 20 %" in found.text


def test_everything_has_a_name(page: Path) -> None:
    found = pages.read(page)
    assert found.all("video")[0]["aria-label"] == "The clip a & b.mp4"
    assert all("alt" in image for image in found.all("img"))
    assert found.all("html")[0]["lang"] == "en"


@pytest.mark.parametrize(("name", "data"), [("a.wav", make_wav(1)), ("a.png", make_image())])
def test_sounds_and_pictures_have_a_page_too(
    tmp_path: Path, mock: MockServer, name: str, data: bytes
) -> None:
    clip, target = tmp_path / name, tmp_path / "page.html"
    clip.write_bytes(data)
    with closing(Server(mock.url)) as server:
        inspect(clip, ["What?"], [0.2], [server], target, max_tokens=8)
    assert pages.read(target).loads() == []


def test_a_server_that_does_not_tell_is_named(tmp_path: Path, mock: MockServer) -> None:
    mock.failures = [400]
    clip = tmp_path / "a.wav"
    clip.write_bytes(make_wav(1))
    with (
        closing(Server(mock.url)) as server,
        pytest.raises(EvaluationError, match=r"127\.0\.0\.1.*HTTP 400: not now"),
    ):
        inspect(clip, ["What?"], [0.2], [server], tmp_path / "page.html", max_tokens=8)


def test_a_browser_draws_it_and_complains_about_nothing(page: Path) -> None:
    with chromium() as chrome:
        chrome.get(page.as_uri())
        cards = chrome.find_elements("css selector", ".card")
        assert [card.find_element("css selector", "h3").text for card in cards] == [
            "1. What sounds <when>?",
            "2. Which colour?",
        ]
        assert "keep ratio 20 %" in cards[0].text
        chrome.find_elements("css selector", "input[name=ratio]")[1].click()
        cards = chrome.find_elements("css selector", ".card")
        assert len(cards) == 2
        assert "</script> Which colour? 0.1" in cards[1].text
        assert len(chrome.find_elements("css selector", ".film canvas")) == 8
        assert chrome.get_log("browser") == []  # type: ignore[no-untyped-call]  # selenium's own
