"""`ep-serve eval` and `ep-serve inspect` against a real server."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ep_serve.cli import main
from ep_serve.evaluation.results import read_rows
from tests.clips import make_clip
from tests.engine.client import Client

pytestmark = [pytest.mark.engine, pytest.mark.xdist_group("server")]


def test_a_server_can_be_evaluated_and_inspected(server: Client, tmp_path: Path) -> None:
    clip = tmp_path / "clip.mp4"
    clip.write_bytes(make_clip(3, seed=71))
    evidence = {"video": [[0, 1]], "audio": [[1, 2]]}
    line = {"id": "a", "media": clip.name, "question": "What?", "answer": "this"}
    (tmp_path / "q.jsonl").write_text(json.dumps({**line, "meta": {"evidence": evidence}}))
    url = ["--server", server.root, "--max-tokens", "2", "--keep-ratios", "0.2", "0.1"]
    words = ["eval", "run", "--data", str(tmp_path / "q.jsonl"), "--selection", *url]
    assert main([*words, "--to", str(tmp_path)]) == 0
    for row in read_rows([tmp_path]):
        assert row.error is None
        assert row.tokens is not None
        assert row.placement is not None
        assert row.placement.kept == row.tokens.av_kept
        assert row.placement.full == row.tokens.av_full
    page = tmp_path / "page.html"
    words = ["inspect", str(clip), "--question", "What?", "--question", "Who?"]
    assert main([*words, *url, "--to", str(page)]) == 0
    data = page.read_text().partition('id="data">')[2].partition("</script>")[0]
    found = json.loads(data)
    steps = found["runs"][0]["usage"]["reduction"]["selection"][0]["video"]["grid"][0]
    assert len(found["pictures"]) == steps
