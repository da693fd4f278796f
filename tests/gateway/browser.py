"""The page as a person uses it: a real Chromium in front of a gateway and a mock engine."""

from __future__ import annotations

import asyncio
import base64
import os
import shutil
import signal
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pytest
from aiohttp import web
from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.wait import WebDriverWait

from ep_serve.gateway.server import running
from ep_serve.gateway.settings import load
from tests.gateway.conftest import FAST, write_keys
from tests.gateway.mock_upstream import MockUpstream

T = TypeVar("T")
PATIENCE_SECONDS = 60
"""Of a machine that does other things too."""
SWITCHES = (
    "--headless=new",
    "--no-sandbox",
    "--disable-dev-shm-usage",
    "--disable-gpu",
    "--disable-background-networking",
    "--no-first-run",
    "--window-size=1400,1000",
    # A camera and a microphone without hardware, which nobody has to allow.
    "--use-fake-device-for-media-stream",
    "--use-fake-ui-for-media-stream",
)


class Site:
    """A gateway with the page, its engine, and a proxy that puts both below a prefix."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._stack = AsyncExitStack()
        self.engine = MockUpstream()
        self.url = ""
        self.requests: list[str] = []
        """Method and path of what the proxy saw."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Do something where the servers run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_SECONDS)

    @contextmanager
    def serving(self, folder: Path, keys: list[dict[str, Any]] | None = None) -> Iterator[None]:
        self._thread.start()
        try:
            self.run(self._open(folder, keys))
            yield
        finally:
            self.run(self._stack.aclose())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(PATIENCE_SECONDS)
            self._loop.close()

    async def _open(self, folder: Path, keys: list[dict[str, Any]] | None) -> None:
        await self._stack.enter_async_context(self.engine)
        options: dict[str, Any] = {
            **FAST,
            "routing": {},  # nothing here is about time
            "upstreams": [self.engine.url],
            "port": 0,
            "store": {"path": folder / "store"},
            "playground": {"enabled": True},
        }
        if keys is not None:
            options["keys_file"] = write_keys(folder / "keys.yaml", keys)
        now = await self._stack.enter_async_context(running(load(None, options)))
        self.url = await self._proxy(f"http://127.0.0.1:{now.port}")

    async def _proxy(self, target: str) -> str:
        session = await self._stack.enter_async_context(aiohttp.ClientSession())
        dropped = ("host", "content-length", "transfer-encoding", "accept-encoding")

        async def handle(request: web.Request) -> web.StreamResponse:
            path = request.match_info["path"]
            self.requests.append(f"{request.method} {path}")
            headers = {k: v for k, v in request.headers.items() if k.lower() not in dropped}
            async with session.request(
                *(request.method, f"{target}/{path}"),
                headers=headers,
                data=request.content if request.body_exists else None,
                allow_redirects=False,
            ) as answer:
                passed = {k: v for k, v in answer.headers.items() if k.lower() not in dropped}
                response = web.StreamResponse(status=answer.status, headers=passed)
                await response.prepare(request)
                async for data in answer.content.iter_any():
                    await response.write(data)
                return response

        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/some/prefix/{path:.*}", handle)
        # Without this a page that stops an answer would not stop it here.
        runner = web.AppRunner(
            app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1
        )
        await runner.setup()
        self._stack.push_async_callback(runner.cleanup)
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return f"http://127.0.0.1:{runner.addresses[0][1]}/some/prefix"


@contextmanager
def chromium() -> Iterator[webdriver.Chrome]:
    """A browser without a window; skips where there is none."""
    browser, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if browser is None or driver is None:
        pytest.skip("needs chromium and chromedriver (Debian: chromium, chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in SWITCHES:
        options.add_argument(switch)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(driver)
    chrome = webdriver.Chrome(options, service)
    processes = [chrome.capabilities["goog:processID"], service.process.pid]
    try:
        chrome.set_script_timeout(PATIENCE_SECONDS)
        yield chrome
    finally:
        with suppress(Exception):
            chrome.quit()
        for process in processes:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)


class Page:
    """The page in a browser, with the words of its user."""

    def __init__(self, chrome: webdriver.Chrome, site: Site) -> None:
        self.chrome = chrome
        self.site = site
        self.complaints()  # those so far are about another page
        chrome.get(f"{site.url}/playground")
        self.until(lambda: self.get("#model option") or self.text("#status"))

    def get(self, selector: str) -> list[WebElement]:
        return self.chrome.find_elements(By.CSS_SELECTOR, selector)

    def one(self, selector: str) -> WebElement:
        return self.chrome.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return str(self.one(selector).get_property("textContent")).strip()

    def until(self, holds: Callable[[], T]) -> T:
        return WebDriverWait(self.chrome, PATIENCE_SECONDS, 0.05).until(lambda _: holds())

    def script(self, code: str, *arguments: Any) -> Any:
        """Run the body of a function in the page; a promise that it returns is waited for."""
        return self.chrome.execute_script(code, *arguments)

    def choose(self, file: Path) -> None:
        self.one("#file").send_keys(str(file))
        self.until(lambda: self.one("#clip").is_displayed())

    def set_ratio(self, percent: int) -> None:
        slide = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
        self.script(slide, self.one("#ratio"), percent)

    def type_question(self, text: str) -> None:
        question = self.one("#question")
        question.clear()
        question.send_keys(text)

    def ask(self, text: str | None = None, percent: int | None = None) -> None:
        """Ask, and wait until the answer is complete."""
        before = len(self.get(".card"))
        if text is not None:
            self.type_question(text)
        if percent is not None:
            self.set_ratio(percent)
        self.one("#ask").click()
        self.until(lambda: len(self.get(".card")) == before + 1)
        self.until(lambda: self.one("#ask").get_attribute("aria-disabled") == "false")

    def complaints(self) -> list[str]:
        """What the browser had to say: errors, blocked resources, refused policies."""
        log = self.chrome.get_log("browser")  # type: ignore[no-untyped-call]  # selenium's own
        return [entry["message"] for entry in log if entry["level"] != "INFO"]

    def emulate(self, **features: str) -> None:
        """Preferences such as `prefers_color_scheme="dark"`."""
        listed = [{"name": k.replace("_", "-"), "value": v} for k, v in features.items()]
        self.chrome.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": listed})

    def resize(self, width: int, height: int) -> None:
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.chrome.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)

    def screenshot(self, path: Path) -> None:
        """The whole page, also what one would have to scroll to."""
        shot = self.chrome.execute_cdp_cmd(
            "Page.captureScreenshot", {"format": "png", "captureBeyondViewport": True}
        )
        path.write_bytes(base64.b64decode(shot["data"]))
