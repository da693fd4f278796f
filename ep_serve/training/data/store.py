"""Cache a data set on disk in parts, which worker processes generate."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

PART = 50
"""Clips in a part."""


def make_parts(
    folder: Path, make: Callable[[Sequence[int]], Any], seeds: Sequence[int], workers: int
) -> list[Path]:
    """Generate the parts of a data set that are not cached.

    Args:
        folder: Cache folder.
        make: Turns the seeds of a part into what `torch.save` writes; a picklable callable.
        seeds: One for each clip.
        workers: Number of processes, of one thread each.

    Returns:
        The files, in the order of the seeds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    pieces = [seeds[first : first + PART] for first in range(0, len(seeds), PART)]
    jobs = [(folder / f"{piece[0]:08}-{len(piece)}.pt", make, piece) for piece in pieces]
    absent = [job for job in jobs if not job[0].is_file()]
    if absent:
        with ProcessPoolExecutor(workers, get_context("spawn"), _one_thread) as pool:
            list(tqdm(pool.map(_write, absent), folder.name, len(absent), unit="part"))
    return [path for path, _, _ in jobs]


def read_parts(paths: Sequence[Path]) -> Iterator[Any]:
    """Load the clips of these parts one by one."""
    for path in paths:
        yield from torch.load(path, weights_only=False, mmap=True)


def save(path: Path, value: Any) -> None:
    """Save a file atomically."""
    temporary = path.with_suffix(f".{os.getpid()}")
    torch.save(value, temporary)
    temporary.replace(path)


def _one_thread() -> None:
    torch.set_num_threads(1)


def _write(job: tuple[Path, Callable[[Sequence[int]], Any], Sequence[int]]) -> None:
    path, make, seeds = job
    save(path, make(seeds))
