"""The helper process that probes media: `python -m ep_serve.gateway.media.probe.helper`.

It reads jobs as JSON lines from stdin and forks a child for each. The child limits its CPU time,
memory, wall time and file descriptors, and writes one JSON line to stdout; if it dies, the helper
reports that. Forking a single-threaded process with FFmpeg loaded takes milliseconds, and it holds
no secrets that an exploited demuxer could leak.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import selectors
import signal
from pathlib import Path
from typing import Any

from ep_serve.gateway.media.probe.inspection import Bounds, RefusedError, probe

_NO_NEW_PRIVILEGES = 38
_LINE = 4_096
"""Maximum length of an atomic write to a pipe (PIPE_BUF on Linux)."""


def main() -> None:
    """Serve until stdin ends."""
    wake_read, wake_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    selector = selectors.DefaultSelector()
    selector.register(0, selectors.EVENT_READ)
    selector.register(wake_read, selectors.EVENT_READ)
    children: dict[int, str] = {}
    buffer = b""
    while True:
        ready = {key.fd for key, _ in selector.select()}
        if wake_read in ready:
            os.read(wake_read, 512)
            _reap(children)
        if 0 in ready:
            data = os.read(0, 65_536)
            if not data:
                return
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                _start(json.loads(line), children)


def _start(job: dict[str, Any], children: dict[int, str]) -> None:
    child = os.fork()
    if child:
        children[child] = job["id"]
        return
    status = 1
    try:
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        with Path(job["path"]).open("rb") as file:
            _limit(job)
            _write_reply({"id": job["id"], **_answer(file, job)})
        status = 0
    finally:
        os._exit(status)


def _answer(file: Any, job: dict[str, Any]) -> dict[str, Any]:
    try:
        return {"facts": probe(file, Bounds(**job["bounds"])).as_dict()}
    except RefusedError as error:
        return {"status": error.status, "reason": error.reason[:500]}
    except MemoryError:
        return {"status": 422, "reason": "exceeds the memory limit of probing"}


def _limit(job: dict[str, Any]) -> None:
    def limit(what: int, value: int) -> None:
        resource.setrlimit(what, (value, value))

    ctypes.CDLL(None).prctl(_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    limit(resource.RLIMIT_CORE, 0)
    limit(resource.RLIMIT_FSIZE, 0)
    limit(resource.RLIMIT_NOFILE, 16)
    limit(resource.RLIMIT_AS, job["memory_bytes"])
    limit(resource.RLIMIT_CPU, job["cpu_s"])
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # kills the process without Python code
    signal.setitimer(signal.ITIMER_REAL, job["timeout_s"])


def _reap(children: dict[int, str]) -> None:
    while children:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == 0:
            return
        name = children.pop(child, None)
        if name is not None and status != 0:
            number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
            slow = number in (signal.SIGALRM, signal.SIGXCPU, signal.SIGKILL)
            what = "takes longer to read than the limit" if slow else "cannot be read safely"
            _write_reply({"id": name, "status": 422, "reason": what})


def _write_reply(answer: dict[str, Any]) -> None:
    line = json.dumps(answer).encode() + b"\n"
    assert len(line) <= _LINE
    os.write(1, line)


if __name__ == "__main__":
    main()
