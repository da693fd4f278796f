"""A resumable training run: optimizer steps, training curve and state on disk."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from tqdm import tqdm

from ep_serve.training.data.store import save
from ep_serve.training.loop.data_parallel import average_gradients


class Run:
    """Trains a module and logs the curve.

    `curve.jsonl` gets a line every `log_every` steps: the mean of what `update` was given.
    `state.pt` is written every `save_every` steps; a new run in the same folder resumes from it.
    """

    def __init__(
        self,
        folder: Path,
        module: nn.Module,
        steps: int,
        rate: float,
        *,
        muon: bool = False,
        log_every: int = 20,
        save_every: int = 100,
        quiet: bool = False,
    ) -> None:
        """Start a run, or resume it.

        Args:
            folder: For curve and state.
            module: Module to train.
            steps: Optimizer steps, earlier runs included.
            rate: Peak learning rate.
            muon: Train matrices inside of layers with Muon (orthogonalised momentum), which needs
                half the steps, and the rest with AdamW.
            log_every: Steps that a line of the curve averages.
            save_every: Steps between two states.
            quiet: Neither log nor save.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.module = module
        self.total = steps
        self._log_every = log_every
        self._save_every = save_every
        self._quiet = quiet
        self._optimizers = _optimizers(module, rate, muon)
        self.step = 0
        self._seconds = 0.0
        self._sums: dict[str, list[float]] = {}
        state = folder / "state.pt"
        if state.is_file():
            saved = torch.load(state, weights_only=True)
            module.load_state_dict(saved["module"])
            for name, optimizer in self._optimizers.items():
                optimizer.load_state_dict(saved["optimizer"][name])
            self.step, self._seconds = saved["step"], saved["seconds"]

    def steps(self) -> Iterator[int]:
        """Iterate over the remaining steps; each must end with `update`."""
        bar = tqdm(total=self.total, initial=self.step, desc=self.folder.name, disable=self._quiet)
        began = time.monotonic()
        with bar:
            while self.step < self.total:
                yield self.step
                bar.update()
                now = time.monotonic()
                self._seconds += now - began
                began = now
                if self.step % self._save_every == 0 or self.step == self.total:
                    self.save()

    def update(self, loss: torch.Tensor, figures: Mapping[str, float]) -> None:
        """Take one optimizer step, with gradients averaged over all processes."""
        self.module.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(self.module)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self._optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = group["highest"] * lr_factor(self.step, self.total)
            optimizer.step()
        self.step += 1
        for name, value in figures.items():
            self._sums.setdefault(name, []).append(value)
        if self.step % self._log_every == 0:
            self._log()

    def save(self) -> None:
        """Save module, optimizers and step to `state.pt`."""
        if self._quiet:
            return
        state = {
            "module": self.module.state_dict(),
            "optimizer": {n: o.state_dict() for n, o in self._optimizers.items()},
            "step": self.step,
            "seconds": self._seconds,
        }
        save(self.folder / "state.pt", state)

    def _log(self) -> None:
        means = {name: round(sum(v) / len(v), 4) for name, v in sorted(self._sums.items())}
        self._sums.clear()
        if self._quiet:
            return
        line = {"step": self.step, "seconds": round(self._seconds, 1), **means}
        with (self.folder / "curve.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def lr_factor(step: int, total: int) -> float:
    """Factor of the peak learning rate: linear warmup, then cosine decay to 0.01."""
    rise = max(1, min(100, total // 20))
    if step < rise:
        return (step + 1) / rise
    along = (step - rise) / max(1, total - rise)
    return 0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * along))


def _optimizers(module: nn.Module, rate: float, muon: bool) -> dict[str, torch.optim.Optimizer]:
    """AdamW for everything, or Muon and AdamW for what is no matrix inside of a layer."""
    own = {name: p for name, p in module.named_parameters() if p.requires_grad}
    matrices = [p for name, p in own.items() if muon and p.ndim == 2 and ".layers." in name]
    inside = set(map(id, matrices))
    # Matrices decay, vectors do not.
    wide = [p for p in own.values() if p.ndim > 1 and id(p) not in inside]
    thin = [p for p in own.values() if p.ndim <= 1]
    adam_rate = rate / 2 if muon else rate
    optimizers: dict[str, torch.optim.Optimizer] = {
        "adam": torch.optim.AdamW(
            [
                {"params": wide, "highest": adam_rate, "weight_decay": 0.01 if muon else 0.05},
                {"params": thin, "highest": adam_rate, "weight_decay": 0.0},
            ],
            lr=adam_rate,
            betas=(0.9, 0.98),
            fused=True,
        )
    }
    if matrices:
        optimizers["muon"] = torch.optim.Muon(
            [{"params": matrices, "highest": rate}],
            lr=rate,
            weight_decay=0.05,
            adjust_lr_fn="match_rms_adamw",
            ns_steps=4,
        )
    return optimizers
