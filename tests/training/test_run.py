from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from ep_serve.training.loop.data_parallel import run_data_parallel
from ep_serve.training.loop.run import Run, lr_factor

STEPS = 6


class Toy(nn.Module):
    """Has a matrix in a layer, one outside, and vectors."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(4, 4)])
        self.out = nn.Linear(4, 1)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        predicted: torch.Tensor = self.out(torch.tanh(self.layers[0](rows)))
        return (predicted.squeeze(-1) - rows.sum(1)).square().mean()


def rows(step: int, rank: int = 0, size: int = 8) -> torch.Tensor:
    return torch.randn(size, 4, generator=torch.Generator().manual_seed(100 * step + rank))


def go(folder: Path, *, until: int = STEPS) -> Toy:
    toy = Toy()
    run = Run(folder, toy, STEPS, 1e-2, muon=True, log_every=1, save_every=1)
    for step in run.steps():
        loss = toy(rows(step))
        run.update(loss, {"loss": loss.item()})
        if run.step == until:
            run.save()
            break
    return toy


def test_an_interrupted_run_ends_where_an_uninterrupted_one_does(tmp_path: Path) -> None:
    go(tmp_path / "parts", until=2)
    parts, whole = go(tmp_path / "parts"), go(tmp_path / "whole")
    for one, other in zip(parts.parameters(), whole.parameters(), strict=True):
        assert torch.equal(one, other)


def test_the_curve_has_every_step_once(tmp_path: Path) -> None:
    go(tmp_path, until=2)
    go(tmp_path)
    curve = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()]
    assert [line["step"] for line in curve] == list(range(1, STEPS + 1))
    assert curve[-1]["loss"] < curve[0]["loss"]


def test_the_rate_rises_and_falls() -> None:
    rates = [lr_factor(step, 1000) for step in range(1000)]
    assert rates[0] < 0.1
    assert max(rates) == pytest.approx(1)
    assert rates.index(max(rates)) < 100
    assert rates[-1] == pytest.approx(0.01, abs=1e-3)


def train(rank: int, folder: Path) -> None:
    toy = Toy()
    run = Run(folder, toy, STEPS, 1e-2, muon=True, save_every=1, quiet=rank > 0)
    for step in run.steps():
        run.update(toy(rows(step, rank)), {})


def test_two_processes_step_along_the_mean_gradient(tmp_path: Path) -> None:
    run_data_parallel(train, 2, tmp_path / "two")
    state = torch.load(tmp_path / "two" / "state.pt", weights_only=True)["module"]
    toy = Toy()
    run = Run(tmp_path / "one", toy, STEPS, 1e-2, muon=True)
    for step in run.steps():
        run.update(toy(torch.cat([rows(step, 0), rows(step, 1)])), {})
    for name, value in toy.state_dict().items():
        torch.testing.assert_close(state[name], value, atol=1e-4, rtol=1e-3)
