from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from loadtest.compare import compare, gains, ratio
from loadtest.records import Bounds, Report, Run
from tests.loadtest.requests import report, run, whole


def rounds(target: str, times: list[float], **fields: object) -> list[Run]:
    return [run(target, [whole(time)], repeat=n, **fields) for n, time in enumerate(times)]


def test_a_ratio_is_that_of_the_means() -> None:
    found = ratio([3.0, 5.0], [1.0, 3.0])
    assert found is not None
    assert found.value == 2.0


def test_one_repeat_has_no_interval() -> None:
    found = ratio([3.0], [1.5])
    assert found is not None
    assert (found.value, found.low, found.high) == (2.0, None, None)


def test_equal_repeats_have_an_interval_of_no_width() -> None:
    found = ratio([4.0] * 5, [2.0] * 5)
    assert found is not None
    assert (found.low, found.high) == (2.0, 2.0)


def test_the_interval_holds_the_truth_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        found = ratio(rng.normal(2, 0.2, 20).tolist(), rng.normal(1, 0.1, 20).tolist())
        assert found is not None
        assert found.low is not None
        assert found.high is not None
        inside += found.low <= 2.0 <= found.high
    assert 86 <= inside <= 100


@pytest.mark.parametrize(("above", "below"), [([], [1.0]), ([1.0], []), ([1.0], [0.0])])
def test_a_ratio_needs_values_on_both_sides(above: list[float], below: list[float]) -> None:
    assert ratio(above, below) is None


def test_two_reports_are_compared_where_both_measured() -> None:
    a = report([*rounds("0.2", [1.0, 1.0]), *rounds("none", [3.0])])
    b = report(rounds("0.2", [2.0, 2.0]))
    text = compare(a, b)
    assert "| 0.2, unique, 10 s, c=1 | 0.50 [0.50, 0.50] |" in text
    assert "none" not in text


def test_another_machine_is_named() -> None:
    a, b = report(rounds("x", [1.0])), report(rounds("x", [1.0]), machine={"cores": 64})
    assert "different machines" in compare(a, b)


def test_interrupted_runs_are_not_compared() -> None:
    cut = run("x", [whole(1.0)], interrupted=True)
    assert "no measurement in common" in compare(report([cut]), report([cut]))


def test_gains_are_against_the_baseline_beside_their_bound() -> None:
    limit = Bounds(target="0.2", seconds=10, first_token=2.5, request=2.4, kv=4.0)
    runs = [*rounds("stock", [4.0, 4.0]), *rounds("0.2", [2.0, 2.0])]
    (gain,) = gains(report(runs, baseline="stock", bounds=[limit]))
    assert gain.first_token is not None
    assert gain.first_token.value == 2.0
    assert gain.share_of_bound() == pytest.approx(0.8)


def test_repeated_media_have_no_bound_and_their_own_baseline() -> None:
    limit = Bounds(target="0.2", seconds=10, first_token=2.5, request=2.4, kv=4.0)
    runs = rounds("stock", [4.0]) + rounds("0.2", [1.0], media="repeated")
    assert gains(report(runs, baseline="stock", bounds=[limit])) == []
    runs += rounds("stock", [2.0], media="repeated")
    (gain,) = gains(report(runs, baseline="stock", bounds=[limit]))
    assert gain.first_token is not None
    assert (gain.first_token.value, gain.first_token_bound) == (2.0, None)


def test_a_report_comes_back_as_it_was_saved(tmp_path: Path) -> None:
    saved = report(rounds("x", [1.0]))
    saved.save(tmp_path / "report.json")
    assert Report.load(tmp_path / "report.json") == saved


def test_another_file_is_no_report(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ValueError, match="Report"):
        Report.load(tmp_path / "x.json")


def test_a_bound_is_shown_only_beside_all_tokens() -> None:
    runs = [run("0.2", [whole(2.0)]), run("0.1", [whole(1.0)])]
    limit = Bounds(target="0.1", seconds=10, first_token=4, request=4, kv=4)
    (gain,) = gains(report(runs, baseline="0.2", bounds=[limit]))
    assert gain.first_token is not None
    assert gain.first_token_bound is None
    assert gain.requests_bound is None
