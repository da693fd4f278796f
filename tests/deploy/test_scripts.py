"""The scripts that the chart carries into its pods."""

from __future__ import annotations

import hashlib
import http.server
import io
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import av
import pytest

from tests.deploy.chart import CHART
from tests.deploy.test_schemas import load_program

FETCH = CHART / "files" / "fetch_checkpoint.py"
FILES = {"config.json": b"{}", "weights/a.bin": bytes(range(256)) * 4_000, "a b.txt": b"\n"}
DIGEST_COMMAND = (
    "find . -type f -printf '%P\\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum"
)


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    return out.getvalue()


def digest(files: dict[str, bytes]) -> str:
    lines = (f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in sorted(files))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


@dataclass
class FileServer:
    """Serves `content`; breaks off the first answers after so many bytes."""

    content: bytes
    break_after: list[int] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    tokens: list[str] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def server() -> Iterator[FileServer]:
    state = FileServer(archive(FILES))

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            start = self.headers.get("Range", "")
            state.ranges.append(start)
            state.tokens.append(self.headers.get("Authorization", ""))
            if self.path != "/m.tar":
                self.send_error(404)
                return
            body = state.content[int(start[6:-1]) if start else 0 :]
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body[: state.break_after.pop(0)] if state.break_after else body)

        def log_message(self, *arguments: object) -> None:
            pass

    listening = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    state.url = f"http://127.0.0.1:{listening.server_port}/m.tar"
    threading.Thread(target=listening.serve_forever, args=(0.01,), daemon=True).start()
    yield state
    listening.shutdown()
    listening.server_close()


def fetch(
    source: str, folder: Path, sha256: str, token: str = ""
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(FETCH), source, str(folder), f"--sha256={sha256}"],
        env={"HF_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
    )


def content(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


def test_a_checkpoint_is_fetched_once(server: FileServer, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert fetch(server.url, folder, digest(FILES), token="secret").returncode == 0
    assert content(folder) == FILES
    assert server.tokens == ["Bearer secret"]
    assert fetch(server.url, folder, digest(FILES)).returncode == 0
    assert len(server.ranges) == 1
    assert {path.name for path in tmp_path.iterdir()} == {"model", ".lock"}


def test_the_digest_is_that_of_the_command_in_the_documentation(
    server: FileServer, tmp_path: Path
) -> None:
    fetch(server.url, tmp_path / "model", digest(FILES))
    printed = subprocess.run(
        DIGEST_COMMAND,
        shell=True,
        cwd=tmp_path / "model",
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed.split()[0] == digest(FILES)
    assert DIGEST_COMMAND in (CHART.parents[1] / "README.md").read_text()


def test_a_checkpoint_with_a_wrong_digest_is_deleted(server: FileServer, tmp_path: Path) -> None:
    done = fetch(server.url, tmp_path / "model", "0" * 64)
    assert done.returncode == 1
    assert f"the digest is {digest(FILES)}, expected {'0' * 64}" in done.stderr
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}


def test_a_broken_download_goes_on(server: FileServer, tmp_path: Path) -> None:
    server.break_after = [100_000]
    assert fetch(server.url, tmp_path / "model", digest(FILES)).returncode == 0
    assert server.ranges == ["", "bytes=100000-"]
    assert content(tmp_path / "model") == FILES


def test_what_does_not_exist_is_not_asked_for_again(server: FileServer, tmp_path: Path) -> None:
    done = fetch(server.url + "x", tmp_path / "model", digest(FILES))
    assert done.returncode == 1
    assert "404" in done.stderr
    assert len(server.ranges) == 1


@pytest.mark.parametrize("name", ["../evil", "/evil"])
def test_an_archive_cannot_write_outside_of_its_folder(
    name: str, server: FileServer, tmp_path: Path
) -> None:
    server.content = archive({name: b"x"})
    assert fetch(server.url, tmp_path / "model", digest({"evil": b"x"})).returncode in {0, 1}
    assert not (tmp_path / "evil").exists()
    assert not Path("/evil").exists()


def test_the_clip_of_the_tests_can_be_decoded() -> None:
    program = load_program("ep-serve/files/try_gateway")
    with av.open(io.BytesIO(program.make_clip()), "r") as container:
        frames = list(container.decode(video=0))
    assert len(frames) == program.FRAMES
    assert (frames[0].width, frames[0].height) == (program.SIZE, program.SIZE)
