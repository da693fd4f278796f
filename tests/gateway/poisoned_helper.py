"""The helper that probes media, ended by some of them as by the kernel when memory is short."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

from ep_serve.gateway.media.probe import helper

_start = helper._start


def _poisoned(job: dict[str, Any], children: dict[int, str]) -> None:
    medium = Path(job["path"]).read_bytes()
    if medium.startswith(b"poison"):
        os.kill(os.getpid(), signal.SIGKILL)
    if medium.startswith(b"silence"):
        time.sleep(600)
    _start(job, children)


helper._start = _poisoned

if __name__ == "__main__":
    helper.main()
