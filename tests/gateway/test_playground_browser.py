"""The playground in a real browser."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("selenium", reason="needs selenium (the extra dev)")

from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys

from tests.clips import make_clip, make_image, make_wav
from tests.gateway import reductions
from tests.gateway.browser import Page, Site, chromium
from tests.gateway.conftest import bearer

pytestmark = pytest.mark.slow

AV = reductions.STEPS * reductions.ROWS * reductions.COLUMNS + reductions.AUDIO


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    with chromium() as chrome:
        yield chrome


@pytest.fixture(scope="module")
def open_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    site = Site()
    with site.serving(tmp_path_factory.mktemp("open")):
        yield site


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("clip") / "a clip.mp4"
    file.write_bytes(make_clip(seconds=4, size=(168, 112)))
    return file


@pytest.fixture
def page(browser: webdriver.Chrome, open_site: Site) -> Iterator[Page]:
    engine = open_site.engine
    engine.requests.clear()
    open_site.requests.clear()
    engine.mode, engine.gate = "ok", None
    yield Page(browser, open_site)
    browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def brightness(page: Page, selector: str) -> list[list[float]]:
    """The mean of each patch of a drawn step, row by row."""
    patches: list[list[float]] = page.script(
        """const canvas = document.querySelector(arguments[0]);
        const [rows, columns] = [arguments[1], arguments[2]];
        const pen = canvas.getContext("2d");
        const cell = canvas.width / columns;
        const inside = Math.floor(cell / 2);
        const mean = (row, column) => {
            const [x, y] = [column, row].map((place) => Math.floor((place + 0.25) * cell));
            const { data } = pen.getImageData(x, y, inside, inside);
            return data.reduce((sum, value, place) => sum + (place % 4 === 3 ? 0 : value), 0)
                / (3 * inside * inside);
        };
        const each = (length, make) => Array.from({ length }, (_, place) => make(place));
        return each(rows, (row) => each(columns, (column) => mean(row, column)));""",
        *(selector, reductions.ROWS, reductions.COLUMNS),
    )
    return patches


def until_drawn(page: Page, selector: str) -> None:
    page.until(
        lambda: page.script("return document.querySelector(arguments[0]).width", selector) > 300
    )


def test_an_answer_streams_and_shows_what_was_kept(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask("What is seen?", percent=20)
    assert page.text(".answer") == "t0 t1 t2 t3 t4"
    assert page.text("#answer-live") == "Answer: t0 t1 t2 t3 t4"
    body = page.site.engine.requests[-1]
    assert (body["keep_ratio"], body["return_selection"], body["stream"]) == (0.2, True, True)
    reported = reductions.made_up(body)
    video, audio = reported["selection"][0]["video"], reported["selection"][0]["audio"]
    figures = page.text(".details > table")
    assert f"Video96{len(video['kept'])}" in figures
    assert f"Audio100{len(audio['kept'])}" in figures
    assert f"{AV - reported['av_tokens_kept']} tokens" in page.text(".times")
    captions = [item.text for item in page.get(".film .caption")]
    size = reductions.ROWS * reductions.COLUMNS
    per_step = [sum(p // size == step for p in video["kept"]) for step in range(reductions.STEPS)]
    assert captions == [f"{step}.0 s: {kept} of {size}" for step, kept in enumerate(per_step)]
    label = page.one(".timeline").get_attribute("aria-label")
    assert label == (
        f"Video: {len(video['kept'])} of 96 tokens kept. "
        f"Audio: {len(audio['kept'])} of 100 tokens kept."
    )
    assert page.complaints() == []


def test_kept_patches_are_clear_and_dropped_ones_dark(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask("What is seen?", percent=20)
    first = ".film li:first-child canvas"
    page.script("document.querySelector(arguments[0]).scrollIntoView()", first)
    until_drawn(page, first)
    kept = set(reductions.made_up(page.site.engine.requests[-1])["selection"][0]["video"]["kept"])
    drawn = brightness(page, first)
    clear: list[float] = []
    dark: list[float] = []
    for row, patches in enumerate(drawn):
        for column, value in enumerate(patches):
            (clear if row * reductions.COLUMNS + column in kept else dark).append(value)
    assert clear
    assert dark
    assert sum(clear) / len(clear) > 1.5 * sum(dark) / len(dark)
    assert len({round(value) for value in dark}) > 3  # the clip's picture is under them


def test_scores_are_shown_as_heat_on_demand(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask("What is seen?")
    first = ".film li:first-child canvas"
    page.script("document.querySelector(arguments[0]).scrollIntoView()", first)
    until_drawn(page, first)
    before = brightness(page, first)
    assert not page.one(".legend").is_displayed()
    page.script("document.querySelector('#heat').click()")
    page.until(lambda: brightness(page, first) != before)
    assert page.one(".legend").is_displayed()
    assert "Score" in page.text(".legend")


def test_the_waveform_is_that_of_the_clip(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask("What can you hear?", percent=100)
    page.script("document.querySelector('.timeline').scrollIntoView()")
    tall = """const canvas = document.querySelector(".timeline");
        const pen = canvas.getContext("2d");
        const scale = canvas.width / canvas.clientWidth;
        const x = Math.round(canvas.width / 2);
        const { data } = pen.getImageData(x, Math.round(54 * scale), 1, Math.round(56 * scale));
        const shades = new Set();
        for (let place = 0; place < data.length; place += 4) {
            shades.add(data.slice(place, place + 3).join());
        }
        return shades.size;"""
    page.until(lambda: page.script(tall) > 1)


def test_a_second_question_needs_no_upload_and_moves_the_budget(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask("What is seen?")
    page.ask("What can you hear?")
    page.ask("What can you hear?", percent=5)
    uploads = [line for line in page.site.requests if line == "POST v1/files"]
    assert len(uploads) == 1
    budgets = [it.text for it in page.get("#comparison tbody td:nth-child(5)")]
    assert budgets == ["20 % video, 80 % audio", "20 % video, 80 % audio", "80 % video, 20 % audio"]
    assert [it.text for it in page.get(".card h3")] == [
        "3. What can you hear?",
        "2. What can you hear?",
        "1. What is seen?",
    ]
    left, right = [card.rect for card in page.get(".card")[:2]]
    assert left["y"] == right["y"]
    assert left["x"] < right["x"]


def test_an_upload_is_deleted_with_its_clip(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask()
    page.one("#remove-clip").click()
    page.until(lambda: any(line.startswith("DELETE v1/files/") for line in page.site.requests))
    assert page.one("#file").get_attribute("value") == ""


def test_stop_ends_the_answer_at_the_engine_too(page: Page, clip: Path) -> None:
    engine = page.site.engine
    engine.gate = asyncio.Event()
    cancelled = engine.cancelled
    page.choose(clip)
    page.one("#ask").click()
    page.until(lambda: page.text(".answer"))
    page.one("#stop").click()
    page.until(lambda: page.text("#status") == "Stopped.")
    page.until(lambda: engine.cancelled == cancelled + 1)
    assert page.text(".answer").startswith("t0")
    assert "Stopped" in page.text(".state")
    engine.gate = None
    page.ask()
    assert page.text("#status").startswith("Answered")


def test_errors_are_shown_in_the_words_of_the_api(page: Page, clip: Path, tmp_path: Path) -> None:
    page.choose(clip)
    page.site.engine.mode = "refuse"
    page.ask()
    assert page.text("#error") == "The prompt is too long."
    assert page.one("#error").aria_role == "alert"
    page.site.engine.mode = "die_mid"
    page.ask()
    assert page.text("#error") == "The engine closed the connection in the middle of the response."
    assert page.text(".answer").startswith("t0")
    other = tmp_path / "no clip.mp4"
    other.write_bytes(b"nothing of the kind")
    page.site.engine.mode = "ok"
    page.choose(other)
    page.ask()
    assert page.text("#error")
    assert page.text(".card .error") == page.text("#error")


def test_a_forgotten_upload_is_sent_again(page: Page, clip: Path) -> None:
    page.choose(clip)
    page.ask()
    listed = "return fetch('v1/files').then((it) => it.json())"
    (file,) = page.script(listed)["data"]
    page.script("return fetch(`v1/files/${arguments[0]}`, { method: 'DELETE' })", file["id"])
    page.ask()
    assert page.text("#error") == "The file does not exist."
    page.ask()
    assert page.text("#status").startswith("Answered")


@pytest.mark.parametrize(("name", "make"), [("s.wav", make_wav), ("p.png", make_image)])
def test_sounds_and_pictures_can_be_asked_about(
    page: Page, tmp_path: Path, name: str, make: Any
) -> None:
    file = tmp_path / name
    file.write_bytes(make())
    page.choose(file)
    page.ask()
    kind = "audio_url" if name.endswith("wav") else "image_url"
    assert page.site.engine.requests[-1]["messages"][0]["content"][0]["type"] == kind
    assert page.text("#error") == ""


def test_what_was_recorded_can_be_asked_about(page: Page) -> None:
    page.one("#record").click()
    page.until(lambda: page.text("#record") == "Stop recording")
    # A frame of the camera has come, so the recording is not empty.
    page.until(
        lambda: page.script("return document.querySelector('#preview video').currentTime") > 1
    )
    page.one("#record").click()
    page.until(lambda: page.text("#record") == "Record a clip")
    assert page.text("#clip-name").startswith("recording.")
    page.ask()
    assert page.text("#error") == ""
    assert page.site.engine.requests[-1]["messages"][0]["content"][0]["type"] == "video_url"
    first = ".film li:first-child canvas"
    page.script("document.querySelector(arguments[0]).scrollIntoView()", first)
    until_drawn(page, first)
    assert page.complaints() == []


def test_where_nothing_can_be_recorded_the_page_says_so(page: Page) -> None:
    page.script("navigator.mediaDevices.getUserMedia = async () => {"
                "  throw new DOMException('', 'NotFoundError'); }")  # fmt: skip
    page.one("#record").click()
    page.until(lambda: page.text("#error") == "No camera and no microphone was found.")
    assert page.one("#record").is_enabled()


def test_a_question_without_a_clip_is_not_sent(page: Page) -> None:
    page.one("#ask").click()
    assert page.text("#error") == "Choose or record a clip first."
    assert page.chrome.switch_to.active_element == page.one("#file")
    assert page.get(".card") == []


def test_a_dropped_file_is_chosen(page: Page) -> None:
    page.script("""const dataTransfer = new DataTransfer();
        dataTransfer.items.add(new File(["x"], "dropped.mp4", { type: "video/mp4" }));
        const event = new DragEvent("drop", { bubbles: true, cancelable: true, dataTransfer });
        document.querySelector("main").dispatchEvent(event);""")
    assert page.text("#clip-name").startswith("dropped.mp4")


def test_everything_is_reached_and_done_with_the_keyboard(page: Page, clip: Path) -> None:
    page.choose(clip)
    wanted = ["file", "record", "remove-clip", "question", "ratio", "model", "max-tokens", "ask"]
    order: list[str] = []
    while not order or order[-1] != "ask":
        assert len(order) < 50, order
        ActionChains(page.chrome).send_keys(Keys.TAB).perform()
        order.append(page.chrome.switch_to.active_element.get_attribute("id") or "")
    assert [name for name in order if name in wanted] == wanted
    ratio = page.one("#ratio")
    ratio.send_keys(Keys.ARROW_RIGHT)
    assert (page.text("#ratio-value"), ratio.get_attribute("aria-valuetext")) == ("21 %", "21 %")
    page.one("#question").send_keys(Keys.CONTROL, Keys.ENTER)
    page.until(lambda: page.text("#status").startswith("Answered"))
    assert page.chrome.switch_to.active_element == page.one("#question")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_rule_of_accessibility_is_broken(page: Page, clip: Path, scheme: str) -> None:
    page.emulate(prefers_color_scheme=scheme, prefers_reduced_motion="reduce")
    assert violations(page) == []
    page.choose(clip)
    page.ask()
    page.script("document.querySelector('#heat').click()")
    page.script("document.querySelector('details').open = true")
    page.site.engine.mode = "refuse"
    page.ask()
    assert violations(page) == []


def violations(page: Page) -> list[str]:
    axe = resources.files("axe_core_python").joinpath("axe.min.js")
    page.script(axe.read_text(encoding="utf-8"))
    found = page.script("return axe.run()")["violations"]
    return [f"{rule['id']}: {node['html']}" for rule in found for node in rule["nodes"]]


def test_a_narrow_screen_needs_no_scrolling_to_the_side(page: Page, clip: Path) -> None:
    page.resize(360, 740)
    page.choose(clip)
    page.ask("What can you hear?")
    # A scroll bar at the side takes some of the 360 pixels.
    widths = "const it = document.documentElement; return [it.scrollWidth, it.clientWidth]"
    needed, there = page.script(widths)
    assert needed == there <= 360
    for part in ("#ask-form", "#clip", "#remove-clip", ".card", ".timeline"):
        box = page.one(part).rect
        assert 8 < box["x"] < box["x"] + box["width"] < there - 8, part


def test_a_key_is_asked_for_and_kept_in_memory_only(
    browser: webdriver.Chrome, tmp_path: Path, clip: Path
) -> None:
    site = Site()
    with site.serving(tmp_path, keys=[{"name": "anna", "keep_ratio_max": 0.5}]):
        page = Page(browser, site)
        page.until(lambda: page.one("#key").is_displayed())
        assert page.text("#status") == "This server asks for an API key."
        page.one("#key").send_keys("wrong", Keys.TAB)
        page.until(lambda: page.text("#error") == "The API key is not valid.")
        page.one("#key").clear()
        page.one("#key").send_keys(bearer("anna")["authorization"].split()[1], Keys.TAB)
        page.until(lambda: page.get("#model option"))
        assert page.text("#error") == ""
        page.choose(clip)
        page.ask(percent=20)
        assert page.text("#status").startswith("Answered")
        page.ask(percent=90)
        assert page.text("#error").startswith("This key allows keep ratios from 0 to 0.5")
        stored = "return [localStorage.length, sessionStorage.length, document.cookie]"
        assert page.script(stored) == [0, 0, ""]
        assert "?" not in page.chrome.current_url
        page = Page(browser, site)
        assert page.one("#key").get_property("value") == ""
        page.chrome.get("about:blank")
