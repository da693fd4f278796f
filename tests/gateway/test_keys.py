"""Keys, what each may do, and the queue."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from pathlib import Path

import pytest

from ep_serve.gateway.errors import ApiError
from ep_serve.gateway.keys import KeyRing, new_key
from ep_serve.gateway.settings import SettingsError
from tests.gateway.conftest import MakeWorld, bearer, write_keys
from tests.gateway.test_api import check_error

pytestmark = pytest.mark.anyio


async def test_without_a_valid_key_nothing_is_served(world: MakeWorld) -> None:
    async with world(keys=[{"name": "a"}]) as w:
        check_error(await w.ask(), 401, "missing_api_key")
        for value in ("Bearer wrong", "Basic abc", "Bearer", "Bearer \xff"):
            response = await w.ask(headers={"authorization": value.encode("latin-1")})
            check_error(response, 401)
            assert response.headers["www-authenticate"] == "Bearer"
        for path in ("/v1/models", "/v1/files", "/v1/files/x", "/v1/files/x/content"):
            check_error(await w.client.get(path), 401)
        check_error(await w.client.delete("/v1/files/x"), 401)
        check_error(await w.upload(b"x"), 401)
        assert not w.engine.requests
        assert (await w.ask(headers=bearer("a"))).status_code == 200
        assert (await w.client.get("/health")).status_code == 200


async def test_requests_a_minute_are_limited_for_each_key(world: MakeWorld) -> None:
    async with world(keys=[{"name": "a", "requests_per_minute": 3}, {"name": "b"}]) as w:
        codes = [(await w.ask(headers=bearer("a"))).status_code for _ in range(5)]
        assert codes == [200, 200, 200, 429, 429]
        refused = await w.ask(headers=bearer("a"))
        check_error(refused, 429, "rate_limit_exceeded")
        assert 1 <= int(refused.headers["retry-after"]) <= 61
        assert (await w.ask(headers=bearer("b"))).status_code == 200


async def test_concurrent_requests_are_limited_for_each_key(world: MakeWorld) -> None:
    async with world(keys=[{"name": "a", "concurrent_requests": 2}]) as w:
        w.engine.interval_s = 0.1
        answers = await asyncio.gather(*(w.ask(headers=bearer("a")) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [200, 200, 429, 429]
        refused = next(answer for answer in answers if answer.status_code == 429)
        check_error(refused, 429, "concurrency_limit_exceeded")
        assert (await w.ask(headers=bearer("a"))).status_code == 200


async def test_models_are_limited_for_each_key(world: MakeWorld) -> None:
    async with world(keys=[{"name": "a", "models": ["other"]}]) as w:
        check_error(await w.ask(headers=bearer("a")), 403, "model_not_allowed")
        assert (await w.client.get("/v1/models", headers=bearer("a"))).json()["data"] == []


async def test_the_keep_ratio_is_limited_for_each_key(world: MakeWorld) -> None:
    async with world(keys=[{"name": "a", "keep_ratio_min": 0.1, "keep_ratio_max": 0.3}]) as w:
        for ratio, status in ((0.05, 403), (0.1, 200), (0.3, 200), (0.31, 403), (None, 200)):
            answer = await w.ask(headers=bearer("a"), keep_ratio=ratio)
            assert answer.status_code == status, ratio
        for field in ("rho_audio", "rho_video"):
            for rho, status in ((0.75, 200), (0, 403), (0.95, 403)):
                answer = await w.ask(headers=bearer("a"), **{field: rho})
                assert answer.status_code == status, (field, rho)


async def test_tenants_have_prefix_caches_of_their_own(world: MakeWorld) -> None:
    keys = [{"name": "a", "tenant": "t"}, {"name": "b", "tenant": "t"}, {"name": "c"}]
    async with world(keys=keys) as w:
        salts = []
        for name in "abc":
            await w.ask(headers=bearer(name))
            salts.append(w.engine.requests[-1]["cache_salt"])
        assert salts[0] == salts[1] != salts[2]


async def test_the_priority_of_a_key_reaches_the_engine_only_if_configured(
    world: MakeWorld,
) -> None:
    async with world(keys=[{"name": "a", "priority": 5}]) as w:
        await w.ask(headers=bearer("a"))
        assert "priority" not in w.engine.requests[-1]
    async with world(keys=[{"name": "a", "priority": 5}], forward_priority=True) as w:
        await w.ask(headers=bearer("a"))
        assert w.engine.requests[-1]["priority"] == -5  # lower comes first in vLLM


def test_keys_are_reloaded_when_their_file_changes(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = write_keys(tmp_path / "keys.yaml", [{"name": "a"}])
    ring = KeyRing(file)
    assert ring.authenticate(bearer("a")["authorization"]).name == "a"
    write_keys(file, [{"name": "b"}])
    ring.reload_if_changed()
    assert ring.authenticate(bearer("b")["authorization"]).name == "b"
    with pytest.raises(ApiError):
        ring.authenticate(bearer("a")["authorization"])
    file.write_text("keys: [{name: c, sha256: not-a-digest-but-a-key}]")
    os.utime(file, (1, 1))
    with caplog.at_level(logging.ERROR):
        ring.reload_if_changed()
    assert "not-a-digest" not in caplog.text
    assert "keys.0.sha256" in caplog.text
    assert ring.authenticate(bearer("b")["authorization"]).name == "b"


@pytest.mark.parametrize(
    "entries",
    [
        [{"name": "a"}, {"name": "a"}],
        [{"name": "a"}, {"name": "b", "sha256": "same"}, {"name": "c", "sha256": "same"}],
        [{"name": "a b"}],
        [{"name": "a", "keep_ratio_min": 0.5, "keep_ratio_max": 0.1}],
        [{"name": "a", "unknown": 1}],
    ],
)
def test_a_key_file_that_makes_no_sense_is_refused(
    tmp_path: Path, entries: list[dict[str, object]]
) -> None:
    same = hashlib.sha256(b"x").hexdigest()
    entries = [{**e, **({"sha256": same} if e.get("sha256") else {})} for e in entries]
    with pytest.raises(SettingsError, match="keys_file"):
        KeyRing(write_keys(tmp_path / "keys.yaml", entries))


BROKEN = {
    "is empty": b"",
    "is a list": b"- name: a",
    "is a word": b"sk-ep-secret",
    "is not YAML": b"keys: [",
    "is not text": b"\xff\xfe\x00",
    "has a date that does not exist": b"keys: [{name: 2020-99-99, sha256: sk-ep-secret}]",
    "has a number that is none": b"keys: [{name: a, priority: !!int sk-ep-secret}]",
    "has a truth value that is none": b"keys: [{name: a, priority: !!bool sk-ep-secret}]",
    "is nested without end": b"[" * 100_000,
    "has a list where a word belongs": b"keys: [{name: [sk-ep-secret], sha256: {a: b}}]",
    "has keys that are no list": b"keys: sk-ep-secret",
    "has a ratio that is no number": b"keys: [{name: a, keep_ratio_min: .nan}]",
    "says something twice": b"keys: [{name: a, name: sk-ep-secret}]",
    "has keys twice": b"keys: []\nkeys: []",
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_key_file_is_a_readable_error_at_startup_and_changes_nothing_later(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    file = write_keys(tmp_path / "keys.yaml", [{"name": "a"}])
    ring = KeyRing(file)
    file.write_bytes(BROKEN[what])
    with pytest.raises(SettingsError, match=r"^keys_file: ") as error:
        KeyRing(file)
    assert "secret" not in str(error.value)
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            ring.reload_if_changed()
    assert [record.message.count("was not reloaded") for record in caplog.records] == [1]
    assert "secret" not in caplog.text
    assert ring.authenticate(bearer("a")["authorization"]).name == "a"


def test_an_unreadable_key_file_is_a_readable_error(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for path in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(SettingsError, match=rf"keys_file: {path}: cannot be read \("):
            KeyRing(path)
    file = write_keys(tmp_path / "keys.yaml", [{"name": "a"}])
    ring = KeyRing(file)
    file.unlink()
    with caplog.at_level(logging.ERROR):
        for _ in range(3):
            ring.reload_if_changed()
    assert len(caplog.records) == 1
    assert ring.authenticate(bearer("a")["authorization"]).name == "a"
    write_keys(file, [{"name": "b"}])
    ring.reload_if_changed()
    assert ring.authenticate(bearer("b")["authorization"]).name == "b"


def test_new_keys_differ_and_only_their_digest_is_kept() -> None:
    (first, entry), (second, _) = new_key("a"), new_key("a")
    assert first != second
    assert first not in entry
    assert hashlib.sha256(first.encode()).hexdigest() in entry
