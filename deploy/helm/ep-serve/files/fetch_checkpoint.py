r"""Bring a checkpoint to a folder, once, and make sure that it is the one that was asked for.

The digest covers every file's path and content and can be computed anywhere:

    find . -type f -printf '%P\0' | LC_ALL=C sort -z | xargs -0 sha256sum | sha256sum

Only a complete folder with the right digest gets the final name; a second run finds it and returns.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import http
import http.client
import os
import shutil
import sys
import tarfile
import time
import urllib.request
from pathlib import Path

DESCRIPTION = "Bring a checkpoint to a folder."
CHUNK = 1 << 20
IDLE_SECONDS = 60.0
RETRIES = 5
NOTHING_LEFT = http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE


def main() -> int:
    parser = argparse.ArgumentParser(description=DESCRIPTION)
    parser.add_argument("source", help="https://... of a tar archive, or hf://owner/name@commit")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sha256", required=True, help="digest of the unpacked folder")
    arguments = parser.parse_args()
    folder: Path = arguments.folder
    with (folder.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # pods that share the folder wait for the first one
        if folder.is_dir():
            print(f"{folder} is there already")
            return 0
        partial = folder.with_name(folder.name + ".partial")
        try:
            fetch(arguments.source, partial, os.environ.get("HF_TOKEN", ""))
            found = digest(partial)
        except (OSError, tarfile.TarError, ValueError) as error:
            print(f"{arguments.source}: {error}", file=sys.stderr)
            return 1
        if found != arguments.sha256:
            print(
                f"{arguments.source}: the digest is {found}, expected {arguments.sha256}",
                file=sys.stderr,
            )
            shutil.rmtree(partial)
            return 1
        partial.rename(folder)
        print(f"{folder} is complete")
    return 0


def fetch(source: str, folder: Path, token: str) -> None:
    """Fill a folder from a source, going on where an earlier attempt ended."""
    if source.startswith("hf://"):
        from huggingface_hub import snapshot_download

        name, _, commit = source.removeprefix("hf://").rpartition("@")
        snapshot_download(name, revision=commit, local_dir=folder, token=token or None)
        shutil.rmtree(folder / ".cache", ignore_errors=True)  # notes of the library
        return
    archive = folder.with_suffix(".tar")
    download(source, archive, token)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")  # nothing outside the folder, no devices
    finally:
        archive.unlink()


def download(url: str, file: Path, token: str) -> None:
    """Download, going on where a broken connection left off."""
    for attempt in range(RETRIES + 1):
        have = file.stat().st_size if file.exists() else 0
        headers = {"Range": f"bytes={have}-"} if have else {}
        request = urllib.request.Request(url, headers=headers)
        if token:  # not sent on when the server redirects
            request.add_unredirected_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=IDLE_SECONDS) as answer:
                save(answer, file)
            return
        except OSError as error:
            code = getattr(error, "code", None)
            if have and code == NOTHING_LEFT:
                return
            if attempt == RETRIES or (code is not None and 400 <= code < 500):
                raise
            print(f"{url}: {error}; trying again", file=sys.stderr)
            time.sleep(2**attempt)


def save(answer: http.client.HTTPResponse, file: Path) -> None:
    """Write what comes, behind what is there if the server continues.

    Raises:
        OSError: the connection ended too early.
    """
    expected = answer.headers.get("Content-Length")
    written = 0
    with file.open("ab" if answer.status == http.HTTPStatus.PARTIAL_CONTENT else "wb") as out:
        while piece := answer.read(CHUNK):
            written += out.write(piece)
    if expected is not None and written < int(expected):
        raise OSError(f"the connection ended after {written} of {expected} bytes")


def digest(folder: Path) -> str:
    """SHA-256 over the lines that sha256sum prints for all files in the order of their paths."""
    total = hashlib.sha256()
    files = (path for path in folder.rglob("*") if path.is_file())
    for name, path in sorted((path.relative_to(folder).as_posix(), path) for path in files):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        total.update(f"{content}  {name}\n".encode())
    return total.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
